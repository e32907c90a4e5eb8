"""Triton specialises the warps of every tile that asks for it, without spills: compiled ahead of time, never run."""

import os
import subprocess
import sys

import pytest
from paths import ROOT

CODE = """
from benchmarks.compile_kernels import compile_triton, triton_jobs

for job in triton_jobs([90, 100], "_cross_attention_fwd_kernel", candidates=True):
    if job.tile["WARP_SPECIALIZE"] and job.integer == "i32":
        print(job.arch, compile_triton(job).faults)
"""


@pytest.mark.long
def test_specialised_warps_compile():
    pytest.importorskip("triton")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "TRITON_ALWAYS_COMPILE": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert {line.split()[0] for line in lines} == {"90", "100"}
    assert all(line.endswith(" []") for line in lines), lines
