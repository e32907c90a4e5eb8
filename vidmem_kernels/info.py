"""`python -m vidmem_kernels.info [--json]`: versions, build, devices, and which backends run each op here.

The table shows, per op and device, which backends can run it and why the others cannot. Use `vidmem_kernels.explain`
for a particular call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import textwrap
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch

from . import __version__, _dispatch, _env, _extension, _tuned
from ._op import OPS, Op


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _build() -> dict[str, Any]:
    module = _extension.module
    if module is None:
        return {"loaded": False, "reason": _extension.reason}
    return {
        "loaded": True,
        "built_with_torch": module.torch_version,
        "running_torch": torch.__version__,
        "compiler": module.compiler,
        "cpu_capabilities": module.cpu_capabilities.split(),
        "cpu_capability": module.cpu_capability(),
        "cuda_archs": module.cuda_archs.split(),
    }


def _devices() -> list[dict[str, Any]]:
    devices = [{"type": "cpu", "name": platform.machine(), "threads": torch.get_num_threads()}]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            devices.append(
                {
                    "type": "cuda",
                    "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}",
                    "memory_bytes": properties.total_memory,
                }
            )
    return devices


def collect() -> dict[str, Any]:
    """Collects everything that `render` shows, as plain values.

    Returns:
        "versions", "build", "devices", "environment"; "ops": op -> device -> {"auto": the first backend that can run
        it, "backends": backend -> None if it can, else why not}; "verified_on": op -> GPU backend with a kernel -> the
        last test run that the kernel passed, or None; "tuned": name of a table of tiles -> the GPUs here that use it,
        its number of tiles, and what they were measured on.
    """
    devices = _devices()
    device_types = list(dict.fromkeys(d["type"] for d in devices))
    ops: dict[str, Any] = {}
    for name, op in sorted(OPS.items()):
        ops[name] = {}
        for device in device_types:
            reasons = {b: _dispatch.unavailable(op, b, device) for b in _dispatch.BACKENDS}
            auto = next(b for b in _dispatch.LADDERS[device] if reasons[b] is None)
            ops[name][device] = {"auto": auto, "backends": reasons}
    return {
        "versions": {
            "vidmem_kernels": __version__,
            "vidmem_model": _version("vidmem-model"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
        },
        "build": _build(),
        "devices": devices,
        "environment": {
            "VIDMEM_BACKEND": _env.backend(),
            "VIDMEM_CPU_CAPABILITY": _env.cpu_capability(),
            "TRITON_INTERPRET": _env.triton_interpret(),
        },
        "ops": ops,
        "verified_on": {name: _verified_on(op) for name, op in sorted(OPS.items())},
        "tuned": _tables(),
    }


def _tables() -> dict[str, Any]:
    """All tables in the package."""
    found = {}
    for path in sorted(_tuned.FOLDER.glob("*.json")):
        entries = [entry for keys in _tuned.table(path.stem).values() for entry in keys.values()]
        devices = range(torch.cuda.device_count())
        here = [i for i in devices if _tuned.class_of(_tuned.arch_of(torch.device("cuda", i))) == path.stem]
        measured = sorted({entry["on"] for entry in entries})
        found[path.stem] = {"devices": here, "tiles": len(entries), "measured_on": measured}
    return found


def _verified_on(op: Op) -> dict[str, Any]:
    has = {"triton": op.triton, "cuda": _extension.cuda_fingerprint(op.name)}
    runs = {backend: op.verified_on(backend) for backend, kernel in has.items() if kernel}
    return {backend: run and {**dataclasses.asdict(run), "what": str(run)} for backend, run in runs.items()}


def render(info: dict[str, Any]) -> str:
    """The text of `python -m vidmem_kernels.info`, as wide as the terminal, or 80 columns without one."""
    columns = max(40, shutil.get_terminal_size().columns)
    lines = ["Versions"]
    lines += [f"  {name:16} {version or 'not installed'}" for name, version in info["versions"].items()]
    build = info["build"]
    lines += ["", "Compiled kernels (vidmem_kernels._C)"]
    if build["loaded"]:
        lines += [
            f"  built with       torch {build['built_with_torch']}, {build['compiler']}; "
            f"running torch {build['running_torch']}",
            f"  CPU              {', '.join(build['cpu_capabilities'])}; in use: {build['cpu_capability']}",
            f"  CUDA             {', '.join('sm_' + a for a in build['cuda_archs']) or 'not built'}",
        ]
    else:
        lines.append(f"  not available: {build['reason']}")
    lines += ["", "Devices"]
    for device in info["devices"]:
        details = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("type", "name"))
        lines.append(f"  {device['type']:5} {device['name']} ({details})")
    lines += ["", "Environment"]
    lines += [f"  {name}={'unset' if value is None else value}" for name, value in info["environment"].items()]
    for device in info["ops"][next(iter(info["ops"]))]:
        lines += ["", f"Ops on {device}: yes = runs here, * = what auto tries first, a letter = why not"]
        lines += _table(info["ops"], device, columns)
    lines += ["", "Kernels for GPUs: the run of their tests that they passed last"]
    lines += _runs(info["verified_on"])
    lines += ["", "Tuned tiles of Triton kernels (others have their defaults)"]
    lines += [] if info["tuned"] else ["  none"]
    for name, table in info["tuned"].items():
        read = f"read by cuda {', '.join(map(str, table['devices']))}" if table["devices"] else "read by no GPU here"
        lines.append(f"  {name}: {table['tiles']} tiles ({'; '.join(table['measured_on'])}); {read}")
    return "\n".join(part for line in lines for part in _wrapped(line, columns))


def _wrapped(line: str, columns: int) -> list[str]:
    """Splits a line into pieces that fit, the later ones indented."""
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return textwrap.wrap(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    ) or [line]


def _runs(verified_on: dict[str, Any]) -> list[str]:
    kernels: dict[str, list[str]] = {}
    for name, backends in verified_on.items():
        for backend, run in backends.items():
            kernels.setdefault(run["what"] if run else "compiled, not run", []).append(f"{name} ({backend})")
    return [f"  {run}: {', '.join(names)}" for run, names in sorted(kernels.items())]


def _table(ops: dict[str, Any], device: str, columns: int) -> list[str]:
    widths = [max(len(backend), len("yes *")) + 1 for backend in _dispatch.BACKENDS]
    width = min(max(map(len, ops)) + 2, columns - 2 - sum(widths))
    letters: dict[str, str] = {}

    def row(name: str, cells: Iterable[str]) -> list[str]:
        found = "".join(cell.ljust(size) for cell, size in zip(cells, widths, strict=True)).rstrip()
        if len(name) < width:
            return [f"  {name:{width}}{found}"]
        return [f"  {name}", f"  {'':{width}}{found}"]

    rows = row("op", _dispatch.BACKENDS)
    for name, by_device in ops.items():
        cells = []
        for backend, reason in by_device[device]["backends"].items():
            if reason is None:
                cells.append("yes *" if backend == by_device[device]["auto"] else "yes")
            else:
                cells.append(letters.setdefault(reason, chr(ord("a") + len(letters))))
        rows += row(name, cells)
    return rows + [f"  {letter}: {reason}" for reason, letter in letters.items()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vidmem_kernels.info", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="machine-readable")
    info = collect()
    print(json.dumps(info, indent=2) if parser.parse_args().json else render(info))


if __name__ == "__main__":
    main()
