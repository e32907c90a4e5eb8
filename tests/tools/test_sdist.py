"""The source archives hold what they should; wheels made from them alone do too, and work once installed."""

from __future__ import annotations

import random
import re
import shutil
import sys
import tarfile
import zipfile

import pytest
from install_helpers import (
    DISTRIBUTIONS,
    PACKAGES,
    PIP,
    copy_source,
    files,
    fresh_environment,
    run,
    stated_version,
)

pytest.importorskip("setuptools", minversion="64")

# Folders that an archive holds as they are, as seen from the archive.
HELD = {
    "vidmem_kernels": ("benchmarks", "csrc", "docs", "examples", "tests", "vidmem_kernels"),
    "vidmem_model": ("vidmem_model",),
}
NAMED = {"LICENSE", "README.md", "MANIFEST.in", "pyproject.toml", "setup.py"}
# Kinds of file that a folder is known to get, in folders that need not be there yet.
KINDS = {
    "csrc": ("h", "cpp", "cuh", "cu"),
    "vidmem_kernels": ("py", "json"),
    "vidmem_model": ("py", "yaml", "safetensors", "csv", "md"),
}
BUILT = {
    "vidmem_kernels": ("_C.cpython-310-x86_64-linux-gnu.so", "_C_not_built.txt", "a.pyc"),
    "vidmem_model": ("a.pyc",),
}


def plant(tree, folders):
    """New files at drawn places: the archive must not depend on names that are listed somewhere."""
    draw = random.Random(0)
    planted = set()
    for top in KINDS.keys() & set(folders):
        inside = [top, *(f"{top}/{p.name}" for p in (tree / top).iterdir() if p.is_dir()), f"{top}/new/deep"]
        for kind in KINDS[top]:
            name = f"{draw.choice(inside)}/planted_{draw.randrange(10**6)}.{kind}"
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text("{}\n")
            planted.add(name)
    return planted


def archive(tree):
    made = run(sys.executable, "setup.py", "--quiet", "sdist", "--formats=gztar", cwd=tree)
    assert made.returncode == 0, made.stderr
    (path,) = (tree / "dist").iterdir()
    return path


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_source_archive_holds_every_file(package, tmp_path):
    tree = copy_source(tmp_path / "tree") / DISTRIBUTIONS[package]
    planted = plant(tree, HELD[package])
    expected = {f"{folder}/{name}" for folder in HELD[package] for name in files(tree / folder)}
    assert planted < expected
    for name in BUILT[package]:
        (tree / package / name).write_text("")
    path = archive(tree)
    assert path.name == f"{package}-{stated_version(package)}.tar.gz"
    with tarfile.open(path) as tar:
        held = {member.name.split("/", 1)[1] for member in tar.getmembers() if member.isfile()}
    assert not expected - held
    assert held >= NAMED  # as files, links included
    others = {name.split("/")[0] for name in held - expected if "/" in name}
    assert others == {f"{package}.egg-info"}
    assert not held & {f"{package}/{name}" for name in BUILT[package]}


# --- wheels, each from nothing but its archive ---


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Package -> (its wheel, the files that it was made from)."""
    folder = tmp_path_factory.mktemp("wheels")
    tree = copy_source(folder / "tree")
    (tree / "vidmem_kernels/tuned").mkdir(exist_ok=True)
    (tree / "vidmem_kernels/tuned/planted.json").write_text("{}\n")
    made = {}
    for package, place in DISTRIBUTIONS.items():
        source = tree / place / package
        shutil.unpack_archive(archive(tree / place), folder / "unpacked" / package)
        (unpacked,) = (folder / "unpacked" / package).iterdir()
        into = folder / package
        made[package] = build(unpacked, into), {f"{package}/{name}" for name in files(source)}
    return made


def build(source, into):
    command = (*PIP, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", into)
    done = run(*command, source, cwd=source.parent, VIDMEM_BUILD_CUDA="0")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = into.iterdir()
    return wheel


def content(wheel):
    with zipfile.ZipFile(wheel) as packed:
        return set(packed.namelist())


def install(python, *wheels):
    done = run(python, *PIP[1:], "install", "--no-deps", "--no-index", *wheels, cwd=python.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_wheel_holds_its_package_alone(wheels, package):
    wheel, expected = wheels[package]
    held = content(wheel)
    assert not expected - held
    extra = {name for name in held - expected if ".dist-info/" not in name}
    if package == "vidmem_kernels":
        assert len(extra) == 1 and extra.pop().startswith("vidmem_kernels/_C.")
        assert wheel.stat().st_size < 3e6
    else:
        assert not extra and wheel.name.endswith("-py3-none-any.whl")
    assert any(name.endswith("/LICENSE") for name in held)


@pytest.mark.long
def test_kernels_alone_run_compiled(wheels, tmp_path):
    """In an environment that has torch, numpy and what these need."""
    python, site = fresh_environment(tmp_path / "venv", only=("torch", "numpy", "pip"))
    install(python, wheels["vidmem_kernels"][0])
    code = """
import torch, vidmem_kernels as vk
from vidmem_kernels import info
print(vk.__file__)
print(*vk.explain(vk.gather_tokens, torch.ones(1, 4, 3), torch.tensor([[1]])))
assert vk.gather_tokens(torch.arange(12.0).view(1, 4, 3), torch.tensor([[2]])).tolist() == [[[6, 7, 8]]]
assert info.collect()["build"]["loaded"]
bank = vk.MemoryBank(8, dtype=torch.int8)
bank.append(torch.arange(24.0).view(3, 8), torch.zeros(3, 3))
bank.save("bank.safetensors")
assert vk.MemoryBank.load("bank.safetensors").gather(torch.tensor([1])).round().tolist() == [list(range(8, 16))]
"""
    ran = run(python, "-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[:2] == [str(site / "vidmem_kernels/__init__.py"), "gather_tokens on cpu: cpu"]
    assert not (python.parent / "vidmem").exists()
    assert run(python, "-m", "vidmem_model", cwd=tmp_path).stderr.endswith("No module named vidmem_model\n")


@pytest.mark.long
def test_both_give_the_command_and_the_trained_model(wheels, tmp_path):
    python, site = fresh_environment(tmp_path / "venv")
    install(python, *(wheel for wheel, _ in wheels.values()))
    command = python.parent / "vidmem"
    version = stated_version("vidmem_model")
    for shows in ([command, "info"], [python, "-m", "vidmem_kernels.info"]):
        told = run(*shows, cwd=tmp_path)
        assert told.returncode == 0, told.stderr
        assert re.search(rf"vidmem_kernels +{version}\n +vidmem_model +{version}\n", told.stdout)
    assert run(command, "--version", cwd=tmp_path).stdout == f"vidmem {version}\n"
    code = """
import sys, av, numpy as np
with av.open(sys.argv[1], "w") as film:
    stream = film.add_stream("ffv1", rate=12)
    stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
    for t in range(96):
        picture = np.full((128, 192, 3), 60 + t, np.uint8)
        film.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    film.mux(stream.encode(None))
"""
    assert run(python, "-c", code, "film.mkv", cwd=tmp_path).returncode == 0
    for arguments in (
        ["compress", "film.mkv", "-o", "memory.safetensors", "--method", "learned"],
        ["retrieve", "memory.safetensors", "--frame", "40", "-o", "frame.png"],
        ["compress", "film.mkv", "-o", "dct.safetensors", "--size", "128x192", "--seconds", "2", "--method", "dct"],
    ):
        ran = run(command, *arguments, cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "frame.png").stat().st_size > 100


@pytest.mark.long
def test_wheels_of_different_versions_do_not_work_together(wheels, tmp_path):
    """pip refuses it, with the requirement in its words; where it was forced, the command does."""
    tree = copy_source(tmp_path / "tree", PACKAGES)
    init = tree / "python/vidmem_model/__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9"', init.read_text()))
    pyproject = tree / "python/pyproject.toml"
    pyproject.write_text(re.sub(r"vidmem-kernels==[^\"]*", "vidmem-kernels==9.9", pyproject.read_text()))
    newer = build(tree / "python", tmp_path / "newer")
    python, site = fresh_environment(tmp_path / "venv")
    kernels = wheels["vidmem_kernels"][0]
    refused = run(python, *PIP[1:], "install", "--no-index", kernels, newer, cwd=tmp_path)
    assert refused.returncode != 0 and "vidmem-kernels==9.9" in refused.stdout + refused.stderr
    install(python, kernels, newer)
    told = run(python.parent / "vidmem", "info", cwd=tmp_path)
    has = stated_version("vidmem_kernels")
    needs = (
        f"vidmem_model 9.9 needs vidmem-kernels==9.9 ({has} is installed); run: pip install vidmem-kernels==9.9; or "
    )
    assert told.returncode == 2 and told.stderr.startswith(f"vidmem: error: {needs}")
    assert told.stdout == "" and told.stderr.count("\n") == 1


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_wheel_holds_nothing_of_an_earlier_build(package, tmp_path):
    """Such as modules that have another name now, or vidmem_model, which was built with the kernels once."""
    tree = copy_source(tmp_path / "tree", PACKAGES, without=("*.safetensors", "*.png")) / DISTRIBUTIONS[package]
    made = run(sys.executable, "setup.py", "--quiet", "build", cwd=tree, VIDMEM_BUILD="0")
    assert made.returncode == 0, made.stderr
    (library,) = (tree / "build").glob("lib*")
    for name in ("vidmem_kernels", "vidmem_model"):
        (library / name).mkdir(exist_ok=True)
        (library / name / "left_over.py").write_text("")
    made = run(sys.executable, "setup.py", "--quiet", "bdist_wheel", cwd=tree, VIDMEM_BUILD="0")
    assert made.returncode == 0, made.stderr
    held = content(next((tree / "dist").iterdir()))
    assert f"{package}/__init__.py" in held and not any(name.endswith("left_over.py") for name in held)
