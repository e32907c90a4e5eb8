"""Time and peak memory of a call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from vidmem_kernels.peak_memory import PeakMemory, process_peak

__all__ = ["PeakMemory", "process_peak", "timed"]


def timed(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Run `work` once and return its time in seconds; synchronises with the GPU before and after."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
