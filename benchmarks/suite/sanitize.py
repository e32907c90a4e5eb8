"""Runs compute-sanitizer over a few tests: memcheck finds accesses out of bounds, racecheck races in shared memory."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from .process import run

TESTS = "tests/kernels/test_contract.py"
# Tool -> ops whose comparison with the reference it checks, one process each: the tool is slow and a fault ends it.
SELECTION = {
    "memcheck": (
        "gather_tokens", "scatter_add_tokens", "topk_blocks", "match_tokens", "merge_tokens", "linear_attention",
        "cross_attention", "select_tokens", "quantize_rows", "merge_attention_states",
    ),
    "racecheck": ("select_tokens", "topk_blocks", "merge_tokens"),
}  # fmt: skip
LEAST_SECONDS = 15.0  # starting torch under the tool takes nearly this long


def find() -> str | None:
    """The tool's path, or None if it is not installed."""
    roots = [os.environ.get("CUDA_HOME", ""), *sorted(glob.glob("/usr/local/cuda*"), reverse=True)]
    places = [f"{root}/{folder}" for root in roots if root for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *places]))


def check(tool: str, path: Path, log: Path, seconds: float) -> int:
    """Checks the selection within the time limit; writes each outcome immediately.

    Args:
        tool: path of compute-sanitizer.
        path: JSON file for the outcomes.
        log: log file.
        seconds: time limit.

    Returns:
        0 if no fault was found, 1 if one was, or if a test failed. What there was no time for is named.
    """
    from ..record import write_json  # imports torch

    end = monotonic() + seconds
    result: dict[str, Any] = {"tool": tool, "runs": [], "left_out": []}
    code = 0
    for name, ops in SELECTION.items():
        for op in ops:
            left = end - monotonic()
            if left < LEAST_SECONDS:
                result["left_out"].append(f"{name} {op}")
            else:
                start = monotonic()
                ended, text = _watch([tool, "--tool", name], op, log, min(left, max(LEAST_SECONDS, seconds / 4)))
                told = {"check": name, "op": op, "seconds": round(monotonic() - start, 1), **outcome(ended, text)}
                result["runs"].append(told)
                code = code or int(told["status"] not in ("clean", "out of time"))
            write_json(path, result)
    return code


def _watch(tool: Sequence[str], op: str, log: Path, seconds: float) -> tuple[int, str]:
    """(exit code, what was printed) of the tests of an op under a tool."""
    tests = ["-m", "pytest", "-q", "-p", "no:cacheprovider", TESTS]
    chosen = ["-k", f"test_backends_agree_with_reference and cuda-{op}-", "-m", "gpu"]
    command = [*tool, "--error-exitcode", "99", "--target-processes", "all", sys.executable, *tests, *chosen]
    before = log.stat().st_size if log.exists() else 0
    # Otherwise the whole block that torch holds counts as allocated.
    code = run(command, seconds, log, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ask=signal.SIGINT)
    with log.open("rb") as file:
        file.seek(before)
        return code, file.read().decode(errors="replace")


def outcome(code: int, text: str) -> dict[str, Any]:
    """How a run under the tool ended: "clean", "faults", "tests failed", "nothing ran" or "out of time"."""
    found = sum(map(int, re.findall(r"(?:ERROR SUMMARY: |RACECHECK SUMMARY: )(\d+)", text)))
    if found or code == 99:
        return {"status": "faults", "faults": found}
    passed = re.search(r"(\d+) passed", text)
    if code == 124:
        return {"status": "out of time"}
    if code == 0 and passed:
        return {"status": "clean", "passed": int(passed[1])}
    return {"status": "nothing ran" if code in (0, 5) else "tests failed", "exit_code": code}
