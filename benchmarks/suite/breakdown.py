"""Measures where the time of a call goes, and whether it works on a side stream and in a CUDA graph."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree

Prepare = Callable[[], Callable[[], Any]]  # makes the call, after everything that is not part of it

# Names of torch's own kernels, copies and compiled kernels; all others that are not ours belong to a library.
_TORCH = re.compile(r"at::|at_cuda_detail|\bcub::|thrust::|^Memcpy|^Memset|^triton_(poi|red|per|for)_")
_CALLS, _TOP, _ALIKE = 5, 8, 4e-2  # _ALIKE: part of the largest magnitude, as for alternatives in half precision


def split(prepare: Prepare, device: torch.device, kernels: Sequence[str]) -> dict[str, Any]:
    """Milliseconds of our kernels, of libraries' kernels, of PyTorch's (our planning), and of the host.

    Args:
        prepare: makes a call.
        device: device of the call.
        kernels: names of our Triton kernels; CUDA C++ kernels are recognised by their namespace.

    Returns:
        {"by": "device" or "host", "kernels_ms", "library_ms", "planning_ms", "host_ms", "idle_ms", "top"}. On a GPU,
        `host_ms` is the time in which the host launches everything and `idle_ms` the time that the device waits in
        between. On the CPU (`by` the host), times are those of operators, and `host_ms` is the time outside of all of
        them. `top` are the longest by name, with milliseconds and number of launches.
    """
    prepare()()
    on_device = device.type == "cuda"
    span, host = _span_and_host(prepare, device) if on_device else (0.0, 0.0)
    call = prepare()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]) as profiler:
        start = perf_counter()
        call()
        wall = 1e3 * (perf_counter() - start)
        if on_device:
            torch.cuda.synchronize(device)
    found = _by_name(profiler, on_device)
    if not found:
        return {"by": None, "reason": "not measured: the profiler saw nothing"}
    parts = {"kernels_ms": 0.0, "library_ms": 0.0, "planning_ms": 0.0}
    for name, (ms, _) in found.items():
        parts[_part(name, kernels)] += ms
    busy = sum(parts.values())
    longest = sorted(found.items(), key=lambda item: -item[1][0])[:_TOP]
    return {
        "by": "device" if on_device else "host",
        **parts,
        "host_ms": host if on_device else max(0.0, wall - busy),
        "idle_ms": max(0.0, span - busy),
        "top": [[name[:100], ms, count] for name, (ms, count) in longest],
    }


def _part(name: str, kernels: Sequence[str]) -> str:
    if name in kernels or "vidmem" in name:
        return "kernels_ms"
    return "planning_ms" if _TORCH.search(name) or name.startswith(("aten::", "autograd::")) else "library_ms"


def _by_name(profiler: profile, on_device: bool) -> dict[str, tuple[float, int]]:
    """(milliseconds, number) of every kernel by name, or of every operator itself."""
    found: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if on_device and event.device_type == DeviceType.CUDA:
            microseconds = event.self_device_time_total
        elif not on_device and "::" in event.key:
            microseconds = event.self_cpu_time_total
        else:
            continue
        if microseconds > 0:
            found[event.key] = (microseconds / 1e3, event.count)
    return found


def _span_and_host(prepare: Prepare, device: torch.device) -> tuple[float, float]:
    """Milliseconds from the first launch to the end on the device, and until the host has launched everything."""
    spans, hosts = [], []
    for _ in range(_CALLS):
        call = prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        began = perf_counter()
        call()
        hosts.append(1e3 * (perf_counter() - began))
        end.record()
        torch.cuda.synchronize(device)
        spans.append(start.elapsed_time(end))
    return median(spans), median(hosts)


def on_side_stream(prepare: Prepare, device: torch.device) -> dict[str, Any]:
    """Whether a call on another stream gives the same results as on the current one.

    Args:
        prepare: makes a call.
        device: device of the call.

    Returns:
        {"works": bool or None (no GPU), "reason"?, "equal"?: bit by bit, "difference"?: relative to the largest
        magnitude}.
    """
    if device.type != "cuda":
        return _no_gpu()
    expected = prepare()()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            results = prepare()()
        stream.synchronize()
    except Exception as error:
        return _fails(error)
    return _compared(results, expected)


def in_graph(prepare: Prepare, device: torch.device) -> dict[str, Any]:
    """Whether a call can be captured in a CUDA graph whose replay gives the same results; "replay_ms" if it can."""
    if device.type != "cuda":
        return _no_gpu()
    expected = prepare()()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            for _ in range(2):
                prepare()()
            call = prepare()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            results = call()
        times = []
        for _ in range(_CALLS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
    except Exception as error:
        return _fails(error)
    return {**_compared(results, expected), "replay_ms": median(times)}


def _no_gpu() -> dict[str, Any]:
    return {"works": None, "reason": "not measured: no GPU"}


def _fails(error: Exception) -> dict[str, Any]:
    return {"works": False, "reason": f"{type(error).__name__}: {error}"[:300]}


def _compared(results: Any, expected: Any) -> dict[str, Any]:
    pairs = [
        (a, b)
        for a, b in zip(pytree.tree_leaves(results), pytree.tree_leaves(expected), strict=True)
        if isinstance(a, torch.Tensor) and a.numel()
    ]
    if all(torch.equal(a, b) for a, b in pairs):
        return {"works": True, "equal": True}
    off = max(
        (a.double() - b.double()).abs().max().item() / max(b.double().abs().max().item(), 1e-300) for a, b in pairs
    )
    if off <= _ALIKE:
        return {"works": True, "equal": False, "difference": off}
    return {"works": False, "reason": f"results differ by {off:.2g} of the largest magnitude"}  # or are NaN
