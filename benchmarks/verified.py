"""Records which kernels passed their tests on this machine's GPU, for `python -m vidmem_kernels.info`.

    python -m pytest -m gpu --junitxml tests.xml
    python benchmarks/verified.py tests.xml -o vidmem_kernels/verified/DEVICE-DATE.json

A kernel passed if its op's comparison with the reference passed at every dtype. See vidmem_kernels/_verified.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from record import describe

from vidmem_kernels import _dispatch, _extension, _verified
from vidmem_kernels._op import OPS, Op

ROOT = Path(__file__).resolve().parents[1]
_COMPARISON = re.compile(r"test_backends_agree_with_reference\[cuda-(\w+)-\w+\]")


def passed_ops(report: ElementTree.Element) -> list[str]:
    """Ops whose comparison ran on a GPU and passed at every dtype."""
    outcomes: dict[str, list[bool]] = {}
    for case in report.iter("testcase"):
        if match := _COMPARISON.fullmatch(case.get("name", "")):
            outcomes.setdefault(match[1], []).append(not any(bad.tag != "properties" for bad in case))
    return sorted(op for op, passed in outcomes.items() if all(passed))


def summary(report: ElementTree.Element) -> str:
    """The outcome of the tests, e.g. "pytest -m gpu: 469 passed, 37 skipped, 20 failed"."""
    count = dict.fromkeys(("tests", "skipped", "failures", "errors"), 0)
    for suite in report.iter("testsuite"):
        count = {key: total + int(suite.get(key, 0)) for key, total in count.items()}
    bad = count["failures"] + count["errors"]
    return f"pytest -m gpu: {count['tests'] - count['skipped'] - bad} passed, {count['skipped']} skipped, {bad} failed"


def fingerprints(op: Op) -> dict[str, str]:
    """Fingerprints of the kernels of an op that run on this machine's GPU."""
    here = [b for b in ("triton", "cuda") if _dispatch.unavailable(op, b, "cuda") is None]
    known = {
        "triton": lambda: _verified.triton_fingerprint(op.family.rpartition(".")[2], op.triton),
        "cuda": lambda: _extension.cuda_fingerprint(op.name),
    }
    return {backend: known[backend]() for backend in here}


def record(
    report: ElementTree.Element, where: dict[str, Any], kernels_of: Callable[[Op], dict[str, str]]
) -> dict[str, Any]:
    """The content of a file in vidmem_kernels/verified, for the machine that `record.describe` describes."""
    return {
        "device": where["device"]["name"],
        "commit": where["commit"][:7],
        "date": where["date"][:10],
        "suite": summary(report),
        "versions": {name: where["versions"][name] for name in ("torch", "triton", "cuda")},
        "kernels": {name: kernels_of(OPS[name]) for name in passed_ops(report)},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=Path, help="file written by pytest --junitxml")
    parser.add_argument("--commit", help="commit, if git is not available")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU: nothing to record", file=sys.stderr)
        return 2
    where = describe(ROOT, torch.device("cuda"), sys.argv[1:])
    where["commit"] = options.commit or where["commit"]
    made = record(ElementTree.parse(options.report).getroot(), where, fingerprints)
    options.output.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    print(f"{options.output}: {len(made['kernels'])} ops passed on {made['device']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
