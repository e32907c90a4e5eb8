"""Facts about the machine: devices, free memory, and versions of packages."""

from __future__ import annotations

import math
import platform
import resource
from pathlib import Path

import torch

import vidmem_kernels
from vidmem_kernels.peak_memory import status_bytes


def available_bytes() -> int:
    """Bytes of memory available without swapping, within the memory limit of this process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = math.inf if limit == resource.RLIM_INFINITY else max(0, limit - status_bytes("VmSize"))
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return min(int(line.split()[1]) * 1024, own)
    raise OSError("/proc/meminfo has no MemAvailable")


def describe_device(device: torch.device | str) -> dict[str, object]:
    """Describe a device: {"type", "name", "threads" or "memory_bytes"}."""
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


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vidmem_kernels": vidmem_kernels.__version__,
    }
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found
