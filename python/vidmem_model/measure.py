"""Time and peak memory of a piece of work, on the CPU as the operating system counts it."""

from __future__ import annotations

import ctypes
import math
import platform
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001

_active: list[PeakMemory] = []
_highest = 0


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def available_bytes() -> int:
    """Memory that can be had without swapping, as the system estimates it, and within this process's own limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    own = math.inf if limit == resource.RLIM_INFINITY else max(0, limit - _status_bytes("VmSize"))
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return min(int(line.split()[1]) * 1024, own)
    raise OSError("/proc/meminfo has no MemAvailable")


def _fold_and_reset() -> bool:
    """Hand the high-water mark to everybody who measures, then lower it to the present level.

    Returns:
        Whether the system lets the mark be lowered.
    """
    global _highest
    mark = _status_bytes("VmHWM")
    _highest = max(_highest, mark)
    for tracker in _active:
        tracker._mark(mark)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def process_peak() -> int:
    """Highest resident memory of this process so far, in bytes, over every reset of the mark."""
    return max(_highest, _status_bytes("VmHWM"))


def release_free_memory() -> None:
    """Give memory that malloc keeps for later back to the system, so that the next use is seen.

    Without it a buffer that fits in freed heap is resident already and would be counted as nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """Context manager that measures the highest memory held inside it; may be nested.

    On the CPU this is the resident set of the whole process: free heap is released, the kernel's
    high-water mark (VmHWM) is reset through /proc/self/clear_refs, and read at the end. Where the
    mark cannot be reset, VmRSS is sampled every millisecond instead and short peaks may be missed.
    On CUDA it is torch.cuda.max_memory_allocated (contexts on one device must not be nested).

    Args:
        device: whose memory.

    Attributes:
        method: "VmHWM", "sampled VmRSS" or "torch.cuda.max_memory_allocated".
        start_bytes: level on entry.
        peak_bytes: highest level inside, from the last `restart` on.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.method = ""
        self.start_bytes = 0
        self.peak_bytes = 0
        self._sampler: threading.Thread | None = None
        self._done = threading.Event()

    @property
    def grown_bytes(self) -> int:
        """Highest level inside above the level on entry."""
        return max(0, self.peak_bytes - self.start_bytes)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
            self.restart()
            return self
        release_free_memory()
        self.start_bytes = _status_bytes("VmRSS")
        if _fold_and_reset():
            self.method = "VmHWM"
            _active.append(self)
        else:
            self.method = "sampled VmRSS"
            self._sampler = threading.Thread(target=self._sample, daemon=True)
            self._sampler.start()
        self.peak_bytes = self.start_bytes
        return self

    def restart(self) -> None:
        """Forget the peak so far; the level on entry stays."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        release_free_memory()
        if self.method == "VmHWM":
            _fold_and_reset()
        self.peak_bytes = _status_bytes("VmRSS")

    def held_bytes(self) -> int:
        """Present level above the level on entry."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.start_bytes
        release_free_memory()  # even a large block may have come from the heap, if a hole there was large enough
        return max(0, _status_bytes("VmRSS") - self.start_bytes)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            self._done.set()
            self._sampler.join()
            self._mark(_status_bytes("VmRSS"))
        else:
            _fold_and_reset()
            _active.remove(self)

    def _mark(self, level: int) -> None:
        self.peak_bytes = max(self.peak_bytes, level)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._mark(_status_bytes("VmRSS"))


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
