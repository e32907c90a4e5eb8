"""Describes where a result file comes from, and writes it."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vidmem_kernels import _verified, info
from vidmem_kernels._op import OPS


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit(root: Path) -> dict[str, Any]:
    """The revision, and whether the running code differs from it.

    Outside git, the revision is VIDMEM_COMMIT or the content of a file COMMIT at the root, else "unknown".
    """
    revision = _git(root, "rev-parse", "--short=10", "HEAD")
    if revision is None:
        file = root / "COMMIT"
        told = os.environ.get("VIDMEM_COMMIT") or (file.read_text().strip() if file.is_file() else "")
        return {"commit": told[:10] or "unknown", "dirty": None}
    changed = _git(root, "status", "--porcelain", "--", "csrc", "vidmem_kernels", "benchmarks", "setup.py")
    return {"commit": revision, "dirty": None if changed is None else bool(changed)}


def device_name(device: torch.device) -> str:
    """Name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


@cache
def kernels(root: Path) -> dict[str, dict[str, str]]:
    """Fingerprints of the kernels' sources, by backend and op: they tell later whether a kernel has changed since."""
    triton = {name: (op.family.rpartition(".")[2], op.triton) for name, op in OPS.items() if op.triton}
    modules = {module: _verified.triton_fingerprint(*module) for module in triton.values()}
    return {
        "cpu": _verified.cpu_fingerprints(root / "csrc"),
        "cuda": _verified.cuda_fingerprints(root / "csrc"),
        "triton": {name: modules[module] for name, module in triton.items()},
    }


def describe(root: Path, device: torch.device, argv: list[str]) -> dict[str, Any]:
    """A result without rows."""
    known = info.collect()
    return {
        "format": 1,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        **_commit(root),
        "argv": argv,
        "device": {
            "type": device.type,
            "name": device_name(device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "versions": known["versions"],
        "build": known["build"],
        "kernels": kernels(root),
        "load_average_before": os.getloadavg()[0],
        "complete": False,
        "not_begun": [],
        "rows": [],
    }


def slug(name: str) -> str:
    """The name in lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def result_path(output: Path | None, root: Path, result: dict[str, Any]) -> Path:
    """The file to write: `output` if it ends in .json, else a file named by date and commit in that folder."""
    if output is not None and output.suffix == ".json":
        return output
    device = result["device"]
    prefix = "" if device["type"] == "cuda" else "cpu-"
    folder = output or root / "benchmarks" / "results" / (prefix + slug(device["name"]))
    stamp = result["date"].replace("-", "").replace(":", "").replace("T", "-").rstrip("Z")
    return folder / f"{stamp}-{result['commit']}{'-dirty' if result['dirty'] else ''}.json"


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Writes the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(result, file, indent=1, allow_nan=False)
            file.write("\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
