"""Times calls against each other: interleaved, with cold caches, without compilation and set-up.

CPU: perf_counter; inputs rotate through copies larger than the last-level cache; the results of the last calls are kept
alive, so that no call writes into a buffer that was just written. CUDA: events; before every call the L2 cache is
flushed by reading a larger buffer, which takes long enough to hide the launch of the first kernels.

A round calls every contender once, in an order that shifts from round to round. A temporary disturbance of the machine
then affects all of them, and the ratio within a round stays valid even if the times alone do not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from math import inf
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

from vidmem_kernels.peak_memory import PeakMemory

from .registry import Work

MIN_ROUNDS, MAX_ROUNDS, MAX_COPIES = 3, 60, 8
COPY_BYTES = 2**28  # all copies of the inputs together, on the CPU
FLUSH_BYTES = 2**29  # an H200 reads this in about 0.1 ms

Prepare = Callable[[int], Callable[[], Any]]  # the number of a copy of the inputs -> the call to time


class Times(NamedTuple):
    """Milliseconds of one contender's calls."""

    median: float
    p20: float
    p80: float
    best: float


def summarise(seconds: Sequence[float]) -> Times:
    """Median, 20th and 80th percentile and minimum, in milliseconds."""
    ms = [1e3 * t for t in seconds]
    fifths = quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else ms * 4
    return Times(median(ms), fifths[0], fifths[3], min(ms))


class CpuClock:
    """Times calls on the CPU."""

    def __init__(self) -> None:
        self._kept: deque[Any] = deque(maxlen=2)

    def copies(self, x: Any) -> int:
        """The number of copies of the inputs to rotate through."""
        size = sum(t.nbytes for t in pytree.tree_leaves(x) if isinstance(t, torch.Tensor))
        wanted = -(-2 * _last_level_cache() // max(1, size))
        return max(1, min(wanted, MAX_COPIES, COPY_BYTES // max(1, size)))

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds."""
        start = perf_counter()
        result = call()
        seconds = perf_counter() - start
        self._kept.append(result)
        return seconds

    def peak_bytes(self, make: Callable[[], Callable[[], Any]]) -> int:
        """Bytes by which the process grew at most during a call, including its results; free heap is released first."""
        call = make()
        with PeakMemory() as peak:
            call()
        return peak.grown_bytes


class CudaClock:
    """Times calls on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.zeros(max(2 * cache, FLUSH_BYTES) // 4, dtype=torch.int32, device=device)

    def copies(self, x: Any) -> int:
        return 1

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds between two events around the call, alone on the device."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        self._flush.sum()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return 1e-3 * start.elapsed_time(end)

    def peak_bytes(self, make: Callable[[], Callable[[], Any]]) -> int:
        """Bytes that a call held at most, including its results, beyond those held before it."""
        call = make()
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def _last_level_cache() -> int:
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    return size if size > 0 else 2**25


def interleave(
    clock: CpuClock | CudaClock, contenders: dict[str, Prepare], copies: int, budget: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Times every contender once per round, until the budget is spent.

    Args:
        clock: clock of the device.
        contenders: by name, a function that prepares a call on one of the copies of the inputs.
        copies: number of copies of the inputs.
        budget: seconds for all rounds; at least MIN_ROUNDS, at most MAX_ROUNDS run.

    Returns:
        (seconds of every round by name, errors by name). A contender that fails is excluded, with its times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    errors: dict[str, str] = {}

    def one_round(number: int) -> None:
        names = [name for name in seconds if name not in errors]
        for i in range(len(names)):
            name = names[(i + number) % len(names)]
            try:
                seconds[name].append(clock.time(contenders[name](number % copies)))
            except Exception as error:  # one contender's failure must not lose the others'
                errors[name] = f"{type(error).__name__}: {error}"

    one_round(0)  # warms up: code paths, autotuning
    for times in seconds.values():
        times.clear()
    start = perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and perf_counter() - start > budget:
            break
        one_round(number)
    return {name: times for name, times in seconds.items() if name not in errors}, errors


def speedup(ours: Sequence[float], other: Sequence[float]) -> float:
    """How many times longer the other takes than ours: the median over rounds of the ratio within a round."""
    return median(b / a for a, b in zip(ours, other, strict=True))


class Rates(NamedTuple):
    """The rates that this device reaches, measured in this run: the denominators of the floor."""

    bytes_per_second: float
    flops_per_second: dict[str, float]
    host_bytes_per_second: float = inf  # from pinned memory of the host to a GPU

    def floor(self, work: Work, dtype: str) -> float:
        """Minimum seconds for this number of bytes and operations."""
        rates = (self.bytes_per_second, self.flops_per_second[dtype], self.host_bytes_per_second)
        return max(amount / rate for amount, rate in zip(work, rates, strict=True))


def measure_rates(clock: CpuClock | CudaClock, device: torch.device, dtypes: dict[str, torch.dtype]) -> Rates:
    """Measures copy bandwidth (reads and writes counted), matrix product rates per dtype, and host reads of a GPU."""
    on_cuda = device.type == "cuda"
    source = torch.ones(2**28 if on_cuda else 2**26, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copy = min(_repeat(clock, lambda: target.copy_(source)))
    size = 8192 if on_cuda else 1024
    rates = {}
    for name, dtype in {"float32": torch.float32, **dtypes}.items():
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[name] = 2 * size**3 / min(_repeat(clock, lambda a=a, b=b: a @ b))
    if not on_cuda:
        # Where a processor has no units of a dtype, torch's product is slower than that of float32 tiles.
        rates = {name: max(rate, rates["float32"]) for name, rate in rates.items()}
    from_host = inf
    if on_cuda:
        host = torch.ones(2**26, dtype=torch.float32, pin_memory=True)
        part = target[: host.numel()]
        from_host = host.nbytes / min(_repeat(clock, lambda: part.copy_(host, non_blocking=True), times=5))
    return Rates(2 * source.nbytes / copy, rates, from_host)


def _repeat(clock: CpuClock | CudaClock, call: Callable[[], Any], times: int = 15) -> list[float]:
    clock.time(call)
    return [clock.time(call) for _ in range(times)]
