"""Time and memory of a piece of work, and what it ran on."""

from __future__ import annotations

import math
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vidmem_kernels.peak_memory import PeakMemory, process_peak, status_bytes

__all__ = ["PeakMemory", "available_bytes", "describe_device", "process_peak", "timed"]


def available_bytes() -> int:
    """Memory that can be had without swapping, as the system estimates it, and within this process's own limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = math.inf if limit == resource.RLIM_INFINITY else max(0, limit - status_bytes("VmSize"))
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return min(int(line.split()[1]) * 1024, own)
    raise OSError("/proc/meminfo has no MemAvailable")


def timed(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Run `work` once and return its seconds, waiting for the GPU before and after."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def describe_device(device: torch.device | str) -> dict[str, object]:
    """Name and size of what was measured on: {"type", "name", "threads" or "memory_bytes"}."""
    device = torch.device(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
        }
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return {"type": "cpu", "name": name, "threads": torch.get_num_threads()}
