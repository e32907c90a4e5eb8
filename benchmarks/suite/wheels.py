"""Installs wheels from a folder: libraries to measure against, on a machine that cannot reach a package index."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

LIST = Path(__file__).resolve().parents[1] / "gpu_wheels.txt"


def wanted(path: Path = LIST) -> dict[str, str]:
    """Name -> version of the entries of the list."""
    lines = (line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return dict(line.split("==") for line in lines if line)


def install(folder: Path, seconds: float) -> dict[str, Any]:
    """Installs every wheel of a folder separately, so that one that does not fit does not affect the others.

    Args:
        folder: folder of the wheels.
        seconds: time limit.

    Returns:
        {"installed": file names, "failed": {file: reason}, "missing": entries of the list that the folder lacks}.
    """
    found: dict[str, Any] = {"installed": [], "failed": {}, "missing": []}
    files = sorted(folder.glob("*.whl"))
    for file in files:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--no-deps",
            "--disable-pip-version-check",
            "-q",
        ]
        try:
            done = subprocess.run([*command, str(file)], capture_output=True, text=True, timeout=seconds)
            lines = done.stderr.strip().splitlines()
            reason = "" if done.returncode == 0 else lines[-1] if lines else f"pip: exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"took over {seconds:.0f} s"
        if reason:
            found["failed"][file.name] = reason
        else:
            found["installed"].append(file.name)
    there = {tuple(file.name.lower().replace("_", "-").split("-")) for file in files}
    for name, version in wanted().items():
        parts = (*name.split("-"), version)
        if not any(known[: len(parts)] == parts for known in there):
            found["missing"].append(f"{name}=={version}")
    return found
