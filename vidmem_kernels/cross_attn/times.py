"""How times of queries and keys compare, for the reference and the plan of Triton's tiles alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_STEP = 2**62  # int64 holds it; five steps leave the range of int64 from anywhere


def _moved(time: Tensor, side: float, sign: int) -> Tensor:
    """time + sign * floor(side) of int64 times, or the limit of the type where that is beyond."""
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
    """(first (B|1, Lq), last (B|1, Lq), keys (B|1, Lk)) of one dtype: query i sees key j if first <= key <= last.

    In int64 if both times are integers, in float32 if both are that, else in float64.
    """
    left, right = window
    at, keys = torch.atleast_2d(q_time), torch.atleast_2d(k_time)
    if not (at.is_floating_point() or keys.is_floating_point()):
        at, keys = at.to(torch.int64), keys.to(torch.int64)
        return _moved(at, left, -1), _moved(at, right, 1), keys
    if not at.dtype == keys.dtype == torch.float32:
        at, keys = at.to(torch.float64), keys.to(torch.float64)
    return at - left, at + right, keys
