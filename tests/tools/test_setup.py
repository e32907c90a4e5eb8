"""What setup.py says where something that a build needs is missing, old or broken: one line, no traceback."""

from __future__ import annotations

import re
import shlex

import pytest
from install_helpers import PACKAGES, copy_source, environment, fresh_environment, run

pytest.importorskip("setuptools", minversion="64")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return packages_only(tmp_path_factory.mktemp("setup") / "tree")


def packages_only(to):
    return copy_source(to, PACKAGES, without=("*.safetensors", "*.png"))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Of an environment without vidmem_kernels; the tests' one may lend a library from an editable install."""
    return fresh_environment(tmp_path_factory.mktemp("python") / "venv")[0]


def install(python, tree, folder, *options, **env):
    command = (python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--no-compile")
    return run(*command, *options, "--target", folder, tree, cwd=folder.parent, **env)


def said(text):
    return [line.strip() for line in text.splitlines() if re.search("vidmem_(kernels|model): ", line)]


FAULTS = {
    "no pybind11": ({"missing": ["pybind11"]}, "pybind11>=2.12 (not installed)"),
    "old pybind11": ({"old": {"pybind11": "2.11.1"}}, "pybind11>=2.12 (2.11.1 is installed)"),
    "no torch": ({"missing": ["torch"]}, "torch>=2.11 (not installed)"),
    "old torch": ({"old": {"torch": "2.9.1+cpu"}}, "torch>=2.11 (2.9.1+cpu is installed)"),
    "broken torch": (
        {"broken": ["torch"]},
        "torch>=2.11 (does not load: libtorch.so.1: cannot open shared object file)",
    ),
    "torch lacks a package": (
        {"missing": ["typing_extensions"]},
        "torch>=2.11 (does not load: No module named 'typing_extensions')",
    ),
    "old setuptools": ({"old": {"setuptools": "58.0.4"}}, "setuptools>=64 (58.0.4 is installed)"),
    "no setuptools": ({"missing": ["setuptools"]}, "setuptools>=64 (not installed)"),
}


def line_for(needs):
    return f"vidmem_kernels: building needs {needs}; run: pip install '{needs.split()[0]}'"


@pytest.mark.sample(4)
@pytest.mark.parametrize("fault", FAULTS)
def test_build_says_what_to_install(python, tree, tmp_path, fault):
    how, needs = FAULTS[fault]
    built = run(python, "setup.py", "build_ext", cwd=tree, **environment(tmp_path / "site", **how))
    assert built.returncode != 0
    assert said(built.stderr) == [line_for(needs)]
    assert "Traceback" not in built.stderr


@pytest.mark.sample(2)
@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "no setuptools"])  # pip's own message
def test_pip_shows_what_to_install(python, tree, tmp_path, fault):
    how, needs = FAULTS[fault]
    ran = install(python, tree, tmp_path / "into", **environment(tmp_path / "site", **how))
    assert ran.returncode != 0
    assert said(ran.stdout + ran.stderr) == [line_for(needs)]
    assert "Traceback" not in ran.stdout + ran.stderr
    assert not (tmp_path / "into" / "vidmem_kernels").exists()


def test_all_that_is_missing_is_said_at_once(python, tree, tmp_path):
    env = environment(tmp_path / "site", missing=["pybind11", "torch"])
    ran = run(python, "setup.py", "build_ext", cwd=tree, **env)
    needs = "pybind11>=2.12 (not installed), torch>=2.11 (not installed)"
    install = "'pybind11>=2.12' 'torch>=2.11'"
    assert said(ran.stderr) == [f"vidmem_kernels: building needs {needs}; run: pip install {install}"]


def test_older_setuptools_needs_wheel(python, tree, tmp_path):
    env = environment(tmp_path / "site", missing=["wheel"], old={"setuptools": "68.1.2"})
    ran = install(python, tree, tmp_path / "into", **env)
    assert ran.returncode != 0
    needs = "with setuptools 68.1.2 building needs wheel (not installed); run: pip install wheel"
    assert said(ran.stdout + ran.stderr) == [f"vidmem_kernels: {needs}"]


MODEL_FAULTS = {
    "old setuptools": ({"old": {"setuptools": "58.0.4"}}, "building needs setuptools>=64 (58.0.4 is installed)"),
    "no setuptools": ({"missing": ["setuptools"]}, "building needs setuptools>=64 (not installed)"),
    "no wheel": (
        {"missing": ["wheel"], "old": {"setuptools": "68.1.2"}},
        "with setuptools 68.1.2 building needs wheel (not installed)",
    ),
}


@pytest.mark.parametrize("fault", MODEL_FAULTS)
def test_build_of_the_model_says_what_to_install(python, tree, tmp_path, fault):
    """Which has no more to say than of setuptools: an old one would install a package without a name."""
    how, needs = MODEL_FAULTS[fault]
    env = environment(tmp_path / "site", **how)
    wanted = re.search(r"needs (\S+)", needs).group(1)
    line = f"vidmem_model: {needs}; run: pip install {shlex.quote(wanted)}"
    if fault != "no wheel":  # which only packing needs
        built = run(python, "setup.py", "build", cwd=tree / "python", **env)
        assert built.returncode != 0 and said(built.stderr) == [line] and "Traceback" not in built.stderr
    if fault != "no setuptools":  # pip's own message
        ran = install(python, tree / "python", tmp_path / "into", **env)
        assert ran.returncode != 0 and "Traceback" not in ran.stdout + ran.stderr
        assert said(ran.stdout + ran.stderr) == [line]
        assert not (tmp_path / "into").exists()


def broken_compiler(folder):
    script = folder / "broken-g++"
    script.write_text("#!/bin/sh\nexit 1\n")
    script.chmod(0o755)
    return str(script), f"{script} failed on csrc/"


def no_compiler(folder):
    return "/nonexistent/g++", "/nonexistent/g++ was not found; install g++, or set CXX to a C++ compiler"


def launcher_without_compiler(folder):
    return "/nonexistent/ccache g++", "/nonexistent/ccache was not found"


def compiler_that_may_not_run(folder):
    (folder / "text").write_text("")
    return str(folder / "text"), f"{folder / 'text'} does not start: Permission denied"


COMPILERS = [no_compiler, broken_compiler, launcher_without_compiler, compiler_that_may_not_run]


@pytest.mark.sample(1)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_without_a_compiler_the_references_are_installed(python, tree, tmp_path, compiler):
    cxx, why = compiler(tmp_path)
    ran = install(python, tree, tmp_path / "into", "-v", CXX=cxx, VIDMEM_BUILD_CUDA="0")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (line,) = said(ran.stdout + ran.stderr)
    assert line.startswith(f"vidmem_kernels: WARNING: every op will run its reference: {why}")
    # pip shows a build's output only with -v or when it fails, so that the import has to tell, too.
    code = "import torch, vidmem_kernels as vk; print(*vk.explain(vk.gather_tokens, torch.ones(1, 4, 3), INDEX))"
    code = code.replace("INDEX", "torch.tensor([[1]])")
    used = run(python, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "into"))
    assert used.returncode == 0, used.stderr
    assert "gather_tokens on cpu: reference" in used.stdout
    (line,) = used.stderr.splitlines()
    assert f"vidmem_kernels._C is not built ({why}" in line and "every op runs its PyTorch reference" in line


def test_build_in_place_replaces_what_an_earlier_one_left(python, tmp_path):
    """A library or a reason of an earlier build must not outlive a build that ends otherwise."""
    tree = packages_only(tmp_path / "tree")
    package = tree / "vidmem_kernels"
    (package / "_C.cpython-310-x86_64-linux-gnu.so").write_text("stale")
    (package / "_C_not_built.txt").write_text("stale")
    built = run(python, "setup.py", "build_ext", "--inplace", cwd=tree, CXX="/nonexistent")
    assert built.returncode == 0, built.stderr
    assert not list(package.glob("_C*.so"))
    assert (package / "_C_not_built.txt").read_text().startswith("/nonexistent was not found")


@pytest.mark.sample(1)
@pytest.mark.parametrize("name", ["VIDMEM_BUILD", "VIDMEM_BUILD_CUDA", "VIDMEM_CUDA_ARCHS", "MAX_JOBS"])
def test_bad_setting_is_one_line(python, tree, name):
    env = {"VIDMEM_BUILD_CUDA": "1"} if name == "VIDMEM_CUDA_ARCHS" else {"VIDMEM_BUILD_CUDA": "0"}
    built = run(python, "setup.py", "build_ext", cwd=tree, **{**env, name: "many"}, PATH=fake_nvcc(tree))
    assert built.returncode != 0
    assert built.stderr.splitlines()[-1].startswith(f"{name}: must be ") and "got 'many'" in built.stderr
    assert "Traceback" not in built.stderr


def fake_nvcc(tree):
    folder = tree.parent / "bin"
    folder.mkdir(exist_ok=True)
    (folder / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "nvcc").chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_incomplete_source_is_refused(python, tmp_path):
    tree = packages_only(tmp_path / "tree")
    (tree / "csrc/module.cpp").unlink()
    built = run(python, "setup.py", "build_ext", cwd=tree, VIDMEM_BUILD_CUDA="0")
    assert built.returncode != 0
    (line,) = said(built.stderr)
    assert line.endswith("csrc has no module.cpp; this copy of the source is not complete")
