"""Time and peak memory of a piece of work, on the CPU as the operating system counts it."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..machine import status_bytes

_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001

_active: list[PeakMemory] = []
_highest = 0


def _fold_and_reset() -> bool:
    """Hand the high-water mark to everybody who measures, then lower it to the present level.

    Returns:
        Whether the system lets the mark be lowered.
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
    """Highest resident memory of this process so far, in bytes, over every reset of the mark."""
    return max(_highest, status_bytes("VmHWM"))


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
        """Forget the peak so far; the level on entry stays."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        release_free_memory()
        if self.method == "VmHWM":
            _fold_and_reset()
        self.peak_bytes = status_bytes("VmRSS")

    def held_bytes(self) -> int:
        """Present level above the level on entry."""
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) - self.start_bytes
        release_free_memory()  # even a large block may have come from the heap, if a hole there was large enough
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
