"""Compares times of queries and keys, for the reference and for the plan of the Triton kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP = 2**62  # int64 holds it; five steps leave the range of int64 from anywhere


def _moved(time: Tensor, side: float, sign: int) -> Tensor:
    """time + sign * floor(side) of int64 times, saturated at the limit of the type."""
    limit = torch.iinfo(torch.int64).max if sign > 0 else torch.iinfo(torch.int64).min
    rest = math.floor(min(side, 5.0 * _STEP))
    while True:
        step = min(rest, _STEP)
        moved = time + sign * step
        beyond = moved < time if sign > 0 else moved > time
        time = torch.where(beyond, limit, moved)
        rest -= step
        if rest <= 0:
            return time


def window_bounds(q_time: Tensor, k_time: Tensor, window: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """(first (B or 1, Lq), last (B or 1, Lq), keys (B or 1, Lk)): query i sees key j if first <= key <= last.

    All three have one dtype: int64 if both times are integers, float32 if both are float32, else float64.
    """
    left, right = window
    at, keys = torch.atleast_2d(q_time), torch.atleast_2d(k_time)
    if not (at.is_floating_point() or keys.is_floating_point()):
        at, keys = at.to(torch.int64), keys.to(torch.int64)
        return _moved(at, left, -1), _moved(at, right, 1), keys
    if not at.dtype == keys.dtype == torch.float32:
        at, keys = at.to(torch.float64), keys.to(torch.float64)
    return at - left, at + right, keys
