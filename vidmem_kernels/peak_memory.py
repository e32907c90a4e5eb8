"""Measures the peak memory of a piece of work, on the CPU or on CUDA."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001

_active: list[PeakMemory] = []
_highest = 0


def status_bytes(field: str) -> int:
    """Reads a field of /proc/self/status, such as "VmRSS", in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _fold_and_reset() -> bool:
    """Reports the high-water mark to all active measurements, then lowers it to the current level.

    Returns:
        Whether the system allows lowering the mark.
    """
    global _highest
    mark = status_bytes("VmHWM")
    _highest = max(_highest, mark)
    for tracker in _active:
        tracker._mark(mark)
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def process_peak() -> int:
    """Highest resident memory of this process so far, in bytes, across all resets of the mark."""
    return max(_highest, status_bytes("VmHWM"))


def release_free_memory() -> None:
    """Returns free heap memory from malloc to the system, so that its next use is measured.

    Otherwise a buffer that fits into freed heap memory would already be resident and would not be counted.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class PeakMemory:
    """Context manager that measures the highest memory use inside it; may be nested.

    On the CPU this is the resident set of the whole process: free heap memory is released, the kernel's high-water mark
    (VmHWM) is reset through /proc/self/clear_refs, and read at the end. If the mark cannot be reset, VmRSS is sampled
    every millisecond instead, which may miss short peaks. On CUDA it is torch.cuda.max_memory_allocated (contexts on
    one device must not be nested).

    Args:
        device: device to measure.

    Attributes:
        method: "VmHWM", "sampled VmRSS" or "torch.cuda.max_memory_allocated".
        start_bytes: level on entry.
        peak_bytes: highest level inside, since the last `restart`.
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
        """Highest level inside, relative to the level on entry."""
        return max(0, self.peak_bytes - self.start_bytes)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            self.method = "torch.cuda.max_memory_allocated"
            torch.cuda.synchronize(self.device)
            self.start_bytes = torch.cuda.memory_allocated(self.device)
            self.restart()
            return self
        release_free_memory()
        self.start_bytes = status_bytes("VmRSS")
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
        """Resets the peak; the level on entry stays."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        release_free_memory()
        if self.method == "VmHWM":
            _fold_and_reset()
        self.peak_bytes = status_bytes("VmRSS")

    def held_bytes(self) -> int:
        """Current level, relative to the level on entry."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.start_bytes
        release_free_memory()  # even a large block may be in the heap, if there was a large enough gap
        return max(0, status_bytes("VmRSS") - self.start_bytes)

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
        elif self._sampler is not None:
            self._done.set()
            self._sampler.join()
            self._mark(status_bytes("VmRSS"))
        else:
            _fold_and_reset()
            _active.remove(self)

    def _mark(self, level: int) -> None:
        self.peak_bytes = max(self.peak_bytes, level)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            self._mark(status_bytes("VmRSS"))
