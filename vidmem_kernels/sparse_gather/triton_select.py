"""Triton kernels of select_tokens. Not yet run on a GPU: interpreter and ahead-of-time compilation only.

Radix select: passes over the scores count the digits of their keys, highest digit first, and so find the key of the
last token kept; two more passes count and write what is kept, in order. All counts are integers: deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .triton_gather import launch_gather_tokens_fwd
from .triton_topk import _best_first_key

_TILE = 4096  # scores of a program
_BINS = 256  # values of a digit


@triton.jit
def _row_norms_kernel(
    x,
    norms,
    ROWS,
    N,
    C,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """L2 norms of ROWS = B * N rows."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = x + ((row // N) * x_stride_b + (row % N) * x_stride_n)[:, None]
    sum_dtype: tl.constexpr = norms.dtype.element_ty
    squares = tl.zeros([BLOCK_N, BLOCK_C], sum_dtype)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
        value = tl.load(source + c * x_stride_c, (row < ROWS)[:, None] & (c < C), other=0).to(sum_dtype)
        squares += value * value
    total = tl.sum(squares, axis=1)
    norm = tl.sqrt(total) if sum_dtype == tl.float64 else tl.sqrt_rn(total)
    tl.store(norms + row, norm, row < ROWS)


def _row_norms(x: Tensor) -> Tensor:
    batch, rows, channels = x.shape
    norms = torch.empty(batch, rows, dtype=accumulate_dtype(x.dtype), device=x.device)
    block_c = min(2048, triton.next_power_of_2(max(1, channels)))
    block_n = 2048 // block_c
    _row_norms_kernel[(triton.cdiv(batch * rows, block_n),)](
        x, norms, batch * rows, rows, channels, *x.stride(), BLOCK_N=block_n, BLOCK_C=block_c, num_warps=4
    )
    return norms


@triton.jit
def _ranks(score, batch, n, N, stride_b, stride_n):
    """Unsigned integers that fall as scores rise."""
    value = tl.load(score + batch * stride_b + n * stride_n, n < N, other=0)
    if value.dtype == tl.float64:
        key = _best_first_key(value)
        return (key ^ -0x8000000000000000).to(tl.uint64, bitcast=True)
    else:
        key = _best_first_key(value.to(tl.float32))
        return (key.to(tl.int64) + 0x80000000).to(tl.uint64)


@triton.jit
def _narrow(counts, state, batch, step, keep, STEPS: tl.constexpr, BINS: tl.constexpr):
    """(digits of the last rank kept, how many are kept of the ranks that have them), before digit `step`.

    `state` holds the pair of the step before, `counts` its digits.
    """
    prefix = tl.zeros((), tl.int64)
    left = tl.zeros((), tl.int64) + keep
    if step > 0:
        before = state + (batch * STEPS + step - 1) * 2
        prefix = tl.load(before)
        left = tl.load(before + 1)
        bins = tl.arange(0, BINS)
        count = tl.load(counts + (batch * STEPS + step - 1) * BINS + bins)
        below = tl.cumsum(count, axis=0) < left
        prefix = (prefix << 8) | tl.sum(below.to(tl.int64), axis=0)
        left -= tl.sum(tl.where(below, count, 0).to(tl.int64), axis=0)
    return prefix, left


@triton.jit(do_not_specialize=["step"])
def _select_digits_kernel(
    score,
    counts,
    state,
    N,
    step,
    keep,
    score_stride_b,
    score_stride_n,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Counts digit `step` of the ranks that share the digits before it with the last rank kept."""
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    prefix, left = _narrow(counts, state, batch, step, keep, STEPS, BINS)
    if tile == 0:
        here = state + (batch * STEPS + step) * 2
        tl.store(here, prefix)
        tl.store(here + 1, left)
    rank = _ranks(score, batch, n, N, score_stride_b, score_stride_n)
    shift = 8 * (STEPS - 1 - step)
    rest = (rank >> shift.to(tl.uint64)).to(tl.int64, bitcast=True)
    same = (n < N) & (((rest >> 8) & ((1 << (8 * step).to(tl.int64)) - 1)) == prefix)
    found = tl.histogram((rest & (BINS - 1)).to(tl.int32), BINS, mask=same)
    target = counts + (batch * STEPS + step) * BINS + tl.arange(0, BINS)
    tl.atomic_add(target, found, found > 0, sem="relaxed")


@triton.jit
def _select_count_kernel(
    score,
    counts,
    state,
    tile_counts,
    N,
    keep,
    score_stride_b,
    score_stride_n,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """How many scores of each tile are better than the last one kept, and how many equal it."""
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    last, _ = _narrow(counts, state, batch, STEPS, keep, STEPS, BINS)
    rank = _ranks(score, batch, n, N, score_stride_b, score_stride_n)
    last = last.to(tl.uint64, bitcast=True)
    target = tile_counts + batch * 2 * tiles + tile
    tl.store(target, tl.sum(((n < N) & (rank < last)).to(tl.int32), axis=0))
    tl.store(target + tiles, tl.sum(((n < N) & (rank == last)).to(tl.int32), axis=0))


@triton.jit
def _select_write_kernel(
    score,
    counts,
    state,
    tile_counts,
    index,
    N,
    keep,
    score_stride_b,
    score_stride_n,
    STEPS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The positions of what is kept: all better ones and the first of the equal ones."""
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    last, left = _narrow(counts, state, batch, STEPS, keep, STEPS, BINS)
    rank = _ranks(score, batch, n, N, score_stride_b, score_stride_n)
    last = last.to(tl.uint64, bitcast=True)
    better_before = tl.zeros([BLOCK_T], tl.int64)
    equal_before = tl.zeros([BLOCK_T], tl.int64)
    for start in range(0, tile, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        better_before += tl.load(tile_counts + batch * 2 * tiles + t, t < tile, other=0)
        equal_before += tl.load(tile_counts + (batch * 2 + 1) * tiles + t, t < tile, other=0)
    better = ((n < N) & (rank < last)).to(tl.int32)
    equal = ((n < N) & (rank == last)).to(tl.int32)
    taken = tl.minimum(left, tl.sum(equal_before, axis=0))  # equal ones that the tiles before keep
    kept = better | (equal & (tl.cumsum(equal, axis=0) <= left - taken).to(tl.int32))
    slot = tl.sum(better_before, axis=0) + taken + tl.cumsum(kept, axis=0) - 1
    tl.store(index + batch * keep + slot, n.to(tl.int32), kept > 0)


def _select(score: Tensor, keep: int) -> Tensor:
    """(B, keep) int32 positions, ascending, of the largest of (B, N) scores."""
    batch, count = score.shape
    steps = 8 if score.dtype == torch.float64 else 4
    tiles = triton.cdiv(count, _TILE)
    new = {"dtype": torch.int32, "device": score.device}
    counts = torch.zeros(batch, steps, _BINS, **new)
    state = torch.empty(batch, steps, 2, dtype=torch.int64, device=score.device)
    tile_counts = torch.empty(batch, 2, tiles, **new)
    index = torch.empty(batch, keep, **new)
    grid = (batch * tiles,)
    options = {"STEPS": steps, "BINS": _BINS, "BLOCK_N": _TILE, "num_warps": 4}
    for step in range(steps):
        _select_digits_kernel[grid](score, counts, state, count, step, keep, *score.stride(), **options)
    _select_count_kernel[grid](score, counts, state, tile_counts, count, keep, *score.stride(), **options)
    _select_write_kernel[grid](
        score, counts, state, tile_counts, index, count, keep, *score.stride(), **options, BLOCK_T=256
    )
    return index


def launch_select_tokens_fwd(x: Tensor, keep: int, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens (B, keep, C), index (B, keep)); see `vidmem_kernels.select_tokens`."""
    if x.shape[0] * keep == 0:
        return x.new_empty(x.shape[0], keep, x.shape[2]), x.new_empty(x.shape[0], keep, dtype=torch.int32)
    index = _select(_row_norms(x) if score is None else score, keep)
    return launch_gather_tokens_fwd(x, index, None, None), index


_STATE = {"counts": "*i32", "state": "*i64"}
_OPTIONS = {"STEPS": 4, "BINS": _BINS, "BLOCK_N": _TILE}
_CASES = [  # score, constants
    ("fp32", {"score_stride_n": 1, **_OPTIONS}),
    ("bf16", {"score_stride_n": 1, **_OPTIONS}),
    ("fp64", {"score_stride_n": 1, **_OPTIONS, "STEPS": 8}),
    ("fp32", _OPTIONS),
]
# See triton_gather.AOT.
AOT = {
    "_row_norms_kernel": [
        ({"x": f"*{x}", "norms": f"*{norms}"}, {**unit, "BLOCK_N": 1, "BLOCK_C": 2048}, 4)
        for x, norms, unit in (
            ("bf16", "fp32", {"x_stride_c": 1}),
            ("fp64", "fp64", {"x_stride_c": 1}),
            ("bf16", "fp32", {}),
        )
    ],
    "_select_digits_kernel": [({"score": f"*{score}", **_STATE}, constants, 4) for score, constants in _CASES],
    "_select_count_kernel": [
        ({"score": f"*{score}", **_STATE, "tile_counts": "*i32"}, constants, 4) for score, constants in _CASES
    ],
    "_select_write_kernel": [
        ({"score": f"*{score}", **_STATE, "tile_counts": "*i32", "index": "*i32"}, {**constants, "BLOCK_T": 256}, 4)
        for score, constants in _CASES
    ],
}
