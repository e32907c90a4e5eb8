"""Every Triton kernel and every CUDA file compiles for every architecture, on a machine without a GPU.

All of them take minutes: `make test` compiles a sample, `make test-long` all, and all by the oldest Triton too.
"""

import json
import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

ARCHS = (80, 89, 90, 100, 120)
OLDEST = ROOT / "build" / "triton-3.6.0"  # of the oldest torch that is supported; `make test-long` puts it there


def compile_kernels(tmp_path, which, *options, triton=None):
    rows, table = tmp_path / "usage.json", tmp_path / "table.md"
    command = [sys.executable, "benchmarks/compile_kernels.py", "--only", which, *options]
    command += ["--json", str(rows), "--table", str(table)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if triton is not None:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(triton), env.get("PYTHONPATH")]))
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    assert result.returncode == 0, result.stderr
    usages = json.loads(rows.read_text())
    lines = table.read_text().splitlines()
    assert lines[0] == "# Compiled kernels"
    assert [line.split(" | ")[0] for line in lines if line.startswith("| ")][1:] == [f"| {u['kernel']}" for u in usages]
    return usages


def check(rows, kernels):
    """Faults are left to the script; here: nothing was skipped."""
    assert kernels
    assert {(r["kernel"], r["arch"]) for r in rows} == {(k, a) for k in kernels for a in ARCHS}
    assert all(r["registers"] > 0 for r in rows)


def check_sample(rows, kernels):
    assert {r["kernel"] for r in rows} <= kernels and {r["arch"] for r in rows} <= set(ARCHS)
    assert all(r["registers"] > 0 for r in rows)


def triton_kernels():
    sources = [p.read_text() for p in ROOT.glob("vidmem_kernels/**/*triton_*.py")]
    return {
        line.removeprefix("def ").split("(")[0]
        for source in sources
        for line in source.splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }


def test_sample_of_triton_kernels(tmp_path):
    pytest.importorskip("triton")
    rows = compile_kernels(tmp_path, "triton", "--sample", "16")
    assert len(rows) == 16
    check_sample(rows, triton_kernels())


@pytest.mark.long
@pytest.mark.parametrize("triton", [None, OLDEST], ids=["installed", "oldest"])
def test_triton_kernels(tmp_path, triton):
    pytest.importorskip("triton")
    if triton is not None and not triton.is_dir():
        pytest.skip(f"{triton.relative_to(ROOT)} is not there; make {triton.relative_to(ROOT)} installs it")
    check(compile_kernels(tmp_path, "triton", triton=triton), triton_kernels())


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")


@needs_nvcc
def test_one_cuda_file(tmp_path):
    rows = compile_kernels(tmp_path, "cuda", "--sample", "1")
    assert len({(r["variant"], r["arch"]) for r in rows}) == 1
    check_sample(rows, {r["kernel"] for r in rows})


@needs_nvcc
@pytest.mark.long
def test_cuda_files(tmp_path):
    rows = compile_kernels(tmp_path, "cuda")
    assert {r["variant"] for r in rows} == {p.name for p in ROOT.glob("csrc/cuda/*.cu")}
    check(rows, {r["kernel"] for r in rows})
