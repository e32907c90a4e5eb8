"""Repeated timing of calls."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..machine import available_bytes
from .peak import timed

# A slower call is measured once; a faster one is repeated for about this time.
_SLOW_SECONDS = 1.5
_MOST_REPEATS = 50


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def repeated(call: Callable[[], object], device: torch.device, first: float) -> list[float]:
    """Seconds of several runs of a call, for about 1.5 s; only `first` if the first run took longer."""
    if first >= _SLOW_SECONDS:
        return [first]
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SLOW_SECONDS and len(times) < _MOST_REPEATS):
        times.append(timed(call, device))
    return times
