"""Every test file collects where packages are missing, and what runs for every device is given tensors on it."""

import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import PACKAGES
from paths import HELPERS, TESTS

# Python imports it before anything else, pytest and its plugins among that.
WITHOUT = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def without(cls, name, path=None, target=None):
    return None if name.split(".")[0] in {packages!r} else find_spec(name, path, target)

PathFinder.find_spec = classmethod(without)
"""


def collect(tmp_path, packages, *arguments):
    """pytest's exit code, what it prints, and the number of tests of every file, where `packages` are missing."""
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(packages=set(packages)))
    path = os.pathsep.join([str(tmp_path), str(TESTS), str(HELPERS), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-rsE", "-p", "no:cacheprovider"]
    command += ["-p", "no:hypothesispytest", *arguments]
    result = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    counts = dict(re.findall(r"^tests/\S*?(test_\w+\.py): (\d+)$", result.stdout, re.MULTILINE))
    return result.returncode, result.stdout + result.stderr, counts


FILES = {path.name for path in TESTS.rglob("test_*.py")}


def check(tmp_path, packages):
    code, output, counts = collect(tmp_path, packages)
    assert code == 0 and "ERROR" not in output, output
    skipped = set(re.findall(r"tests/\S*?(test_\w+\.py):\d+: .*(?:not installed|could not import)", output))
    assert counts.keys() | skipped == FILES, output
    # Kernels need none of them, but files that draw by hypothesis or test Triton do.
    assert {"test_contract.py", "test_linear_attn_kernels.py", "test_yardstick.py"} <= counts.keys()
    return skipped


def test_all_packages_missing(tmp_path):
    skipped = check(tmp_path, PACKAGES)
    assert {"test_cli.py", "test_data.py", "test_generate.py", "test_shipped.py", "test_video_out.py"} <= skipped
    assert {"test_cross_attn_triton.py", "test_merge_properties.py", "test_model.py", "test_lora.py"} <= skipped


@pytest.mark.long
@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_one_package_missing(package, tmp_path):
    check(tmp_path, {package})


def test_nothing_is_skipped_that_is_broken(tmp_path):
    """Only for want of PACKAGES: another module that is missing, ours above all, is an error."""
    broken = ["import vidmem_kernels.not_there", "import not_there_at_all", "raise ImportError('av is old')", "1 / 0"]
    for lacks in ("av>=15 (14.0 is installed)", "av>=15 (not installed), vidmem-kernels==0.1.0 (not installed)"):
        broken.append(f"raise ImportError('vidmem_model 0.1.0 needs {lacks}; run: pip install av')")
    missing = ["import av.logging", "import vidmem_model.errors"]
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    for i, text in enumerate([*broken, *missing]):
        (tmp_path / f"test_{i}.py").write_text(f"{text}\n\n\ndef test():\n    pass\n")
    code, output, _ = collect(tmp_path, {"av"}, "--continue-on-collection-errors", str(tmp_path))
    assert code != 0
    assert re.findall(r"^ERROR \S*test_(\d)\.py", output, re.MULTILINE) == list("012345"), output
    skipped = re.findall(r"^SKIPPED \S+ \S*test_(\d)\.py.*: av is not installed", output, re.MULTILINE)
    assert skipped == ["6", "7"], output


# --- tests for every device ---


def takes(function, name):
    return any(argument.arg == name for argument in function.args.args)


def is_fixture(function, *, autouse):
    marks = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any("fixture" in mark and (not autouse or "autouse=True" in mark) for mark in marks)


def runs_on_the_cpu_only(text):
    """Tests of a file run once for every device that nevertheless make tensors without asking which one it is."""
    functions = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    if not any(is_fixture(f, autouse=True) and takes(f, "device") for f in functions):
        return []
    knows = {f.name for f in functions if is_fixture(f, autouse=False) and takes(f, "device")}
    made = re.compile(r"torch\.(randn|rand|randint|randperm|zeros|ones|empty|full|arange|tensor|eye)\(|backend=.triton")
    return [
        f.name
        for f in functions
        if f.name.startswith("test_") and not takes(f, "device") and not any(takes(f, k) for k in knows)
        if made.search(ast.unparse(f))
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: path.name)
def test_what_runs_for_every_device_asks_for_it(path):
    """Else its run for a GPU hands in tensors of the CPU, which only Triton's interpreter takes."""
    assert runs_on_the_cpu_only(path.read_text()) == []


def test_a_test_that_forgets_the_device_is_found():
    text = "@pytest.fixture(autouse=True)\ndef available(device):\n    pass\n\n"
    text += "def test_one(device):\n    torch.randn(3, device=device)\n\ndef test_two():\n    torch.randn(3)\n"
    assert runs_on_the_cpu_only(text) == ["test_two"]
    assert runs_on_the_cpu_only(text.replace("autouse=True", "")) == []
