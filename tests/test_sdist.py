"""The source archive holds all that is tracked, and a wheel made from it alone has the compiled kernels."""

from __future__ import annotations

import random
import shutil
import sys
import tarfile
import zipfile

import pytest
from install_helpers import FOLDERS, PIP, copy_source, files, fresh_environment, run

pytest.importorskip("setuptools", minversion="64")

# Kinds of file that a folder is known to get, in folders that need not be there yet.
KINDS = {
    "csrc": ("h", "cpp", "cuh", "cu"),
    "vidmem_kernels": ("py", "json"),
    "python/vidmem_model": ("py", "yaml", "safetensors", "csv", "md"),
}
BUILT = ("vidmem_kernels/_C.cpython-310-x86_64-linux-gnu.so", "vidmem_kernels/_C_not_built.txt", "csrc/a.pyc")


def plant(tree):
    """New files at drawn places: the archive must not depend on names that are listed somewhere."""
    draw = random.Random(0)
    planted = set()
    for top, kinds in KINDS.items():
        folders = [top, *(f"{top}/{p.name}" for p in (tree / top).iterdir() if p.is_dir()), f"{top}/new/deep"]
        for kind in kinds:
            name = f"{draw.choice(folders)}/planted_{draw.randrange(10**6)}.{kind}"
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text("{}\n")
            planted.add(name)
    return planted


def archive(tree):
    made = run(sys.executable, "setup.py", "--quiet", "sdist", "--formats=gztar", cwd=tree)
    assert made.returncode == 0, made.stderr
    (path,) = (tree / "dist").iterdir()
    return path


def test_source_archive_holds_every_file(tmp_path):
    tree = copy_source(tmp_path / "tree")
    planted = plant(tree)
    expected = {f"{folder}/{name}" for folder in FOLDERS for name in files(tree / folder)}
    assert planted < expected
    for name in BUILT:
        (tree / name).write_text("")
    with tarfile.open(archive(tree)) as tar:
        held = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    assert not expected - held
    assert {"LICENSE", "README.md", "MANIFEST.in", "Makefile", "pyproject.toml", "setup.py"} <= held
    assert not held & set(BUILT)


@pytest.mark.long
def test_wheel_of_the_source_archive_runs_compiled_kernels(tmp_path):
    """From nothing but the archive, into an environment of its own, with this one's torch."""
    tree = copy_source(tmp_path / "tree")
    (tree / "vidmem_kernels/tuned").mkdir(exist_ok=True)
    (tree / "vidmem_kernels/tuned/planted.json").write_text("{}\n")
    shutil.unpack_archive(archive(tree), tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    command = (*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", tmp_path / "wheels")
    made = run(*command, source, cwd=tmp_path, VIDMEM_BUILD_CUDA="0")
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as content:
        held = set(content.namelist())
    packed = {f"vidmem_kernels/{name}" for name in files(tree / "vidmem_kernels")}
    packed |= {f"vidmem_model/{name}" for name in files(tree / "python/vidmem_model")}
    assert not packed - held
    extra = {name for name in held - packed if ".dist-info/" not in name}
    assert len(extra) == 1 and extra.pop().startswith("vidmem_kernels/_C.")
    assert any(name.endswith("/LICENSE") for name in held)

    python, site = fresh_environment(tmp_path / "venv")
    installed = run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert installed.returncode == 0, installed.stdout + installed.stderr
    code = """
import torch, vidmem_kernels as vk
from vidmem_kernels import info
print(vk.__file__)
print(*vk.explain(vk.gather_tokens, torch.ones(1, 4, 3), torch.tensor([[1]])))
assert vk.gather_tokens(torch.arange(12.0).view(1, 4, 3), torch.tensor([[2]])).tolist() == [[[6, 7, 8]]]
assert info.collect()["build"]["loaded"]
"""
    ran = run(python, "-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == [str(site / "vidmem_kernels/__init__.py"), "gather_tokens on cpu: cpu"]
    recipes = run(python, "-m", "vidmem_model", "--help", cwd=tmp_path)
    assert recipes.returncode == 0, recipes.stderr
