"""Calls measured again and again, as often as their time allows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..machine import available_bytes
from .peak import timed

# A call slower than this is measured once; faster ones are repeated for about as long.
_SLOW_SECONDS = 1.5
_MOST_REPEATS = 50


def free_bytes(device: torch.device) -> int:
    """Memory that can be had on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()


def repeated(call: Callable[[], object], device: torch.device, first: float) -> list[float]:
    """Seconds of several runs of a call, for about a second and a half; of one that took longer, just `first`."""
    if first >= _SLOW_SECONDS:
        return [first]
    times: list[float] = []
    while len(times) < 3 or (sum(times) < _SLOW_SECONDS and len(times) < _MOST_REPEATS):
        times.append(timed(call, device))
    return times
