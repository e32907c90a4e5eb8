"""Triton kernels that make a merge plan of scores: select, rank, group. Not yet run on a GPU.

Everything is in the order of the tokens: a score becomes an int32 key of the same order, and a destination gets the
lowest key, so that it never merges. A radix select finds the key of the last token that merges; no step waits for
the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_NEVER = tl.constexpr(-(2**31))
_BINS = tl.constexpr(2048)  # a key is three digits, of 11, 11 and 10 bits
_TILE = 1024


@triton.jit
def order_key(score):
    """int32 that orders as float32 does; -0 as 0, and -inf as the key of what never merges."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(score == float("-inf"), _NEVER, key)


@triton.jit
def destinations_before(t, h, w, stride_t, stride_h, stride_w, phase, cells_h, cells_w):
    """Whether a token is a destination, and how many destinations come before it."""
    on_t = t % stride_t == 0
    on_h = on_t & (h % stride_h == 0)
    before = (t + stride_t - 1) // stride_t * (cells_h * cells_w)
    before += tl.where(on_t, (h + stride_h - 1) // stride_h * cells_w, 0)
    before += tl.where(on_h, (w - phase + stride_w - 1) // stride_w, 0)
    return on_h & (w % stride_w == phase), before


@triton.jit
def _source_keys_kernel(
    score,
    column,
    key,
    target,
    N,
    DESTINATIONS,
    B,
    splits,
    H,
    W,
    stride_t,
    stride_h,
    stride_w,
    phase,
    cells_h,
    cells_w,
    BLOCK: tl.constexpr,
):
    """Keys and destinations of all tokens, from the best of each split of the destinations."""
    tiles = tl.cdiv(N, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    is_destination, before = destinations_before(
        n // (H * W), n // W % H, n % W, stride_t, stride_h, stride_w, phase, cells_h, cells_w
    )
    is_source = (n < N) & (is_destination == 0)
    best = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK], 0, dtype=tl.int32)
    for split in range(splits):
        where = (split * B + batch) * (N - DESTINATIONS) + n - before
        value = tl.load(score + where, is_source, other=float("-inf"))
        better = value > best
        best = tl.where(better, value, best)
        at = tl.where(better, tl.load(column + where, is_source, other=0), at)
    at_t, at_h, at_w = at // (cells_h * cells_w), at // cells_w % cells_h, at % cells_w
    position = (at_t * stride_t * H + at_h * stride_h) * W + at_w * stride_w + phase
    tl.store(key + batch * N + n, order_key(best), n < N)
    tl.store(target + batch * N + n, tl.where(is_source, position, n), n < N)


def source_keys(
    score: Tensor, column: Tensor, grid: Sequence[int], stride: Sequence[int], phase: int, cells: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Keys and destinations' positions, (B, N), of scores (splits, B, S) and numbers of destinations."""
    splits, batch, _ = score.shape
    tokens = grid[0] * grid[1] * grid[2]
    key = torch.empty(batch, tokens, dtype=torch.int32, device=score.device)
    target = torch.empty_like(key)
    _source_keys_kernel[(triton.cdiv(tokens, _TILE) * batch,)](
        score,
        column,
        key,
        target,
        tokens,
        cells[0] * cells[1] * cells[2],
        batch,
        splits,
        grid[1],
        grid[2],
        *stride,
        phase,
        *cells[1:],
        BLOCK=_TILE,
        num_warps=4,
    )
    return key, target


@triton.jit
def _pick_digit(bins, want, BINS: tl.constexpr):
    """The digit of the `want`-th largest key, and how many of the keys of that digit are wanted."""
    i = tl.arange(0, BINS)
    counts = tl.load(bins + i)
    at_least = tl.cumsum(counts, axis=0, reverse=True)
    digit = tl.sum((at_least >= want).to(tl.int32), axis=0) - 1
    return digit, want - tl.sum(tl.where(i > digit, counts, 0), axis=0)


@triton.jit
def _pick_prefix(bins, want, DIGITS: tl.constexpr):
    """The leading digits of the key of the last token that merges, and how many keys that share them are wanted."""
    prefix = tl.zeros([], dtype=tl.int32)
    if DIGITS >= 1:
        digit, want = _pick_digit(bins, want, _BINS)
        prefix = digit - _BINS // 2
    if DIGITS >= 2:
        digit, want = _pick_digit(bins + _BINS, want, _BINS)
        prefix = (prefix << 11) | digit
    if DIGITS >= 3:
        digit, want = _pick_digit(bins + 2 * _BINS, want, _BINS // 2)
        prefix = (prefix << 10) | digit
    return prefix, want


@triton.jit
def _histogram_kernel(key, bins, N, num_merge, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the keys that share the leading digits already known, by their next digit."""
    tiles = tl.cdiv(N, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(key + batch * N + n, n < N, other=0)
    bins += batch * 3 * _BINS
    prefix, _ = _pick_prefix(bins, num_merge, DIGIT)
    if DIGIT == 0:
        digit, shares = (value >> 21) + _BINS // 2, n < N
    elif DIGIT == 1:
        digit, shares = (value >> 10) & 0x7FF, (n < N) & (value >> 21 == prefix)
    else:
        digit, shares = value & 0x3FF, (n < N) & (value >> 10 == prefix)
    counts = tl.histogram(digit, _BINS, mask=shares)
    # Integers: their sum does not depend on the order.
    tl.atomic_add(bins + DIGIT * _BINS + tl.arange(0, _BINS), counts, counts > 0, sem="relaxed")


@triton.jit
def _count_kernel(key, bins, counts, N, num_merge, BLOCK: tl.constexpr):
    """Per tile, the keys above and at that of the last token that merges."""
    tiles = tl.cdiv(N, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(key + batch * N + n, n < N, other=_NEVER)
    last, _ = _pick_prefix(bins + batch * 3 * _BINS, num_merge, 3)
    out = counts + tl.program_id(0).to(tl.int64) * 2
    tl.store(out, tl.sum((value > last).to(tl.int32), axis=0))
    tl.store(out + 1, tl.sum(((value == last) & (n < N)).to(tl.int32), axis=0))


@triton.jit
def _rank_kernel(key, target, bins, counts, row, kept, N, num_merge, BLOCK: tl.constexpr):
    """Row of every token that stays, ~destination of every other one, and the positions of the rows."""
    tiles = tl.cdiv(N, BLOCK)
    tile = tl.program_id(0) % tiles
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    last, wanted = _pick_prefix(bins + batch * 3 * _BINS, num_merge, 3)
    above, equal = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, tile, BLOCK):
        i = first + tl.arange(0, BLOCK)
        above += tl.load(counts + (batch * tiles + i) * 2, i < tile, other=0)
        equal += tl.load(counts + (batch * tiles + i) * 2 + 1, i < tile, other=0)
    equal_before = tl.sum(equal, axis=0)
    merged_before = tl.sum(above, axis=0) + tl.minimum(equal_before, wanted)
    n = tile * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(key + batch * N + n, n < N, other=_NEVER)
    is_equal = ((value == last) & (n < N)).to(tl.int32)
    # Of equal keys the first ones merge.
    merges = (value > last) | ((is_equal > 0) & (equal_before + tl.cumsum(is_equal, axis=0) <= wanted))
    rank = n - merged_before - tl.cumsum(merges.to(tl.int32), axis=0)
    destination = tl.load(target + batch * N + n, n < N, other=0)
    tl.store(row + batch * N + n, tl.where(merges, ~destination, rank), n < N)
    tl.store(kept + batch * (N - num_merge) + rank, n, (n < N) & (merges == 0))


@triton.jit
def _assign_kernel(row, assignment, N, BLOCK: tl.constexpr):
    tiles = tl.cdiv(N, BLOCK)
    lane = (tl.program_id(0) // tiles).to(tl.int64) * N
    n = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(row + lane + n, n < N, other=0)
    joined = tl.load(row + lane + ~own, (n < N) & (own < 0), other=0)
    tl.store(assignment + lane + n, tl.where(own < 0, joined, own), n < N)


@triton.jit
def _groups_kernel(grouped, token, order, offsets, N, num_rows, BLOCK: tl.constexpr):
    """CSR of the tokens sorted by row; no row is empty, so each begins where the row changes."""
    tiles = tl.cdiv(N, BLOCK)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    i = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    tl.store(order + batch * N + i, tl.load(token + batch * N + i, i < N, other=0).to(tl.int32), i < N)
    row = tl.load(grouped + batch * N + i, i < N, other=0)
    previous = tl.load(grouped + batch * N + i - 1, (i > 0) & (i < N), other=-1)
    offsets += batch * (num_rows + 1)
    tl.store(offsets + row, i, (i < N) & (row != previous))
    tl.store(offsets + num_rows + i, tl.zeros([BLOCK], dtype=tl.int32) + N, i == 0)


def plan_from_keys(
    key: Tensor | None, target: Tensor | None, metric: Tensor, num_merge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """assignment, kept, order and offsets when the `num_merge` tokens of the highest keys join their targets."""
    batch, tokens, _ = metric.shape
    rows = tokens - num_merge

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=metric.device)

    if num_merge == 0:
        each = torch.arange(tokens + 1, dtype=torch.int32, device=metric.device).repeat(batch, 1)
        return *(each[:, :tokens].contiguous() for _ in range(3)), each
    assignment, kept, offsets = empty(batch, tokens), empty(batch, rows), empty(batch, rows + 1)
    order = empty(batch, tokens)
    if batch == 0:
        return assignment, kept, order, offsets
    row, counts = torch.empty_like(assignment), empty(batch, triton.cdiv(tokens, _TILE), 2)
    bins = torch.zeros(batch, 3, _BINS.value, dtype=torch.int32, device=metric.device)
    programs = (triton.cdiv(tokens, _TILE) * batch,)
    for digit in range(3):
        _histogram_kernel[programs](key, bins, tokens, num_merge, DIGIT=digit, BLOCK=_TILE, num_warps=4)
    _count_kernel[programs](key, bins, counts, tokens, num_merge, BLOCK=_TILE, num_warps=4)
    _rank_kernel[programs](key, target, bins, counts, row, kept, tokens, num_merge, BLOCK=_TILE, num_warps=4)
    _assign_kernel[programs](row, assignment, tokens, BLOCK=_TILE, num_warps=4)
    # The library's radix sort: a group may be as large as the clip, where own counting would have to be quadratic.
    grouped, token = torch.sort(assignment, dim=1, stable=True)
    _groups_kernel[programs](grouped, token, order, offsets, tokens, rows, BLOCK=_TILE, num_warps=4)
    return assignment, kept, order, offsets


def count_at_least(key: Tensor, threshold: float) -> Tensor:
    """(B,) int32: keys of scores that are at least `threshold`, compared in float32."""
    bits = torch.tensor(threshold + 0.0, dtype=torch.float32, device="cpu").view(torch.int32).item()
    lowest = max(bits ^ ((bits >> 31) & 0x7FFFFFFF), _NEVER.value + 1)
    return (key >= lowest).sum(dim=1, dtype=torch.int32)


# See vidmem_kernels/sparse_gather/triton_kernels.py.
_I32 = "*i32"
_SELECT = {"key": _I32, "bins": _I32}
AOT = {
    "_source_keys_kernel": [
        ({"score": "*fp32", "column": _I32, "key": _I32, "target": _I32}, {"BLOCK": _TILE}, 4),
    ],
    "_histogram_kernel": [(_SELECT, {"DIGIT": digit, "BLOCK": _TILE}, 4) for digit in range(3)],
    "_count_kernel": [({**_SELECT, "counts": _I32}, {"BLOCK": _TILE}, 4)],
    "_rank_kernel": [
        ({**_SELECT, "target": _I32, "counts": _I32, "row": _I32, "kept": _I32}, {"BLOCK": _TILE}, 4),
    ],
    "_assign_kernel": [({"row": _I32, "assignment": _I32}, {"BLOCK": _TILE}, 4)],
    "_groups_kernel": [({"grouped": _I32, "token": "*i64", "order": _I32, "offsets": _I32}, {"BLOCK": _TILE}, 4)],
}
