"""Times of cross_attention: integers compare exactly wherever they lie, floats as their type rounds; any backend."""

import math
import random
from fractions import Fraction

import pytest
import torch

from vidmem_kernels import _dispatch, cross_attention
from vidmem_kernels._op import OPS

INF = math.inf
LEAST, MOST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


@pytest.fixture(params=["cpu", "reference", "triton"])
def backend(request, device):
    reason = _dispatch.unavailable(OPS["cross_attention"], request.param, device)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


def seen_by(backend, device, q_time, k_time, window):
    """(Lq, Lk) bool, read off the result: equal scores, values that are the keys' own unit vectors."""
    queries, keys = q_time.shape[-1], k_time.shape[-1]
    q, k = torch.zeros(1, queries, 1, 4, device=device), torch.zeros(1, keys, 1, 4, device=device)
    v = torch.eye(keys, device=device)[None, :, None]
    times = {"q_time": q_time.to(device), "k_time": k_time.to(device)}
    return cross_attention(q, k, v, **times, window=window, backend=backend)[0, :, 0].cpu() > 0


def exactly(q_time, k_time, window):
    """In the integers of Python."""
    left, right = (INF if side == INF else Fraction(side) for side in window)
    rows = [[t - left <= s <= t + right for s in k_time.tolist()] for t in q_time.tolist()]
    return torch.tensor(rows).reshape(len(q_time), len(k_time))


def draw_integers(rng):
    """Times near each other, somewhere in their type, and a window of about their distances."""
    dtype = rng.choice([torch.int32, torch.int64, torch.int64])
    info = torch.iinfo(dtype)
    origin = rng.choice([0, info.min, info.max, rng.randint(info.min, info.max), 1_700_000_000_000_000_000])
    step = rng.choice([1, 1, 1000, 1_000_000, 2**53 + 1, 2**61, 2**62])
    side = step * rng.randint(0, 4)
    times = [
        torch.tensor([min(max(origin + step * rng.randint(-6, 6) + rng.randint(-1, 1), info.min), info.max)
                      for _ in range(rng.randint(1, 12))], dtype=dtype)
        for _ in range(2)
    ]  # fmt: skip
    if dtype == torch.int64 and rng.random() < 0.3:
        times[rng.randint(0, 1)] = torch.randint(-(2**31), 2**31 - 1, (5,), dtype=torch.int32)
    sides = [rng.choice([0, side, float(side), side + 0.5, INF, 0.25, 2.0**63, 2.0**64, 1e300]) for _ in range(2)]
    return *times, sides


def test_integers_compare_exactly(backend, device):
    rng = random.Random(0)
    for _ in range(25 if backend == "triton" else 150):
        q_time, k_time, window = draw_integers(rng)
        sides = [float(side) for side in window]  # a window is float64
        assert torch.equal(seen_by(backend, device, q_time, k_time, window), exactly(q_time, k_time, sides)), (
            q_time.tolist(), k_time.tolist(), window,
        )  # fmt: skip


def test_nanoseconds_since_1970(backend, device):
    times = 1_700_000_000_000_000_000 + 1_000_000 * torch.arange(8)
    near = seen_by(backend, device, times - times[0], times - times[0], (2_000_000, 0))
    assert torch.equal(seen_by(backend, device, times, times, (2_000_000, 0)), near)
    assert near.sum(1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def test_the_whole_range_of_int64(backend, device):
    ends = torch.tensor([LEAST, LEAST + 1, -1, 0, 1, MOST - 1, MOST])
    for left in (0, 1, 2.0**62, 2.0**63, 2.0**64, INF):
        assert torch.equal(seen_by(backend, device, ends, ends, (left, 1)), exactly(ends, ends, (left, 1))), left


def test_floats_compare_as_before(backend, device):
    """In float32 if both are that, else in float64; NaN sees nothing, and neither does infinity with a side of it."""
    rng = random.Random(1)
    for _ in range(12 if backend == "triton" else 60):
        dtypes = [rng.choice([torch.int32, torch.int64, torch.float32, torch.float64]) for _ in range(2)]
        if not any(d.is_floating_point for d in dtypes):
            dtypes[0] = torch.float64
        offset = rng.choice([0, 0.1, 2**24, 2**40])
        times = []
        for dtype in dtypes:
            values = (offset + torch.randint(-8, 8, (9,)) * rng.choice([1, 0.1, 0.5])).to(dtype)
            if dtype.is_floating_point:
                values[rng.randint(0, 8)] = rng.choice([math.nan, INF, -INF, 0.0, -0.0])
            times.append(values)
        window = [rng.choice([0, 0.1, 1, 2.5, INF]) for _ in range(2)]
        wide = torch.float32 if dtypes == [torch.float32] * 2 else torch.float64
        at, keys = times[0].to(wide)[:, None], times[1].to(wide)
        expected = (at - window[0] <= keys) & (keys <= at + window[1])
        assert torch.equal(seen_by(backend, device, *times, window), expected), (times, window)
