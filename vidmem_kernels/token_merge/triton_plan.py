"""Triton kernels that make a merge plan from scores: select, rank, group.

All arrays are in the order of the tokens: a score becomes an int32 key of the same order, and a destination gets the
lowest key, that of -inf, so that it never merges. No step waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_radix_select import TILE, chosen_of_tile, find_cut, order_key, programs
from .._triton_tiles import tile_of


@triton.jit
def destinations_before(t, h, w, stride_t, stride_h, stride_w, phase, cells_t, cells_h, cells_w):
    """Whether a token is a destination, and the number of destinations before it."""
    on_t = (t % stride_t == 0) & (t // stride_t < cells_t)
    on_h = on_t & (h % stride_h == 0) & (h // stride_h < cells_h)
    before = tl.minimum((t + stride_t - 1) // stride_t, cells_t) * (cells_h * cells_w)
    before += tl.where(on_t, tl.minimum((h + stride_h - 1) // stride_h, cells_h) * cells_w, 0)
    before += tl.where(on_h, tl.minimum((w - phase + stride_w - 1) // stride_w, cells_w), 0)
    return on_h & (w % stride_w == phase) & (w // stride_w < cells_w), before


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
    cells_t,
    cells_h,
    cells_w,
    BLOCK: tl.constexpr,
):
    """Keys and destinations of all tokens, from the best score of each split of the destinations."""
    batch, n = tile_of(N, BLOCK)
    n = n.to(tl.int32)  # used in divisions below
    is_destination, before = destinations_before(
        n // (H * W), n // W % H, n % W, stride_t, stride_h, stride_w, phase, cells_t, cells_h, cells_w
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
    score: Tensor,
    column: Tensor,
    tokens: int,
    grid: Sequence[int],
    stride: Sequence[int],
    phase: int,
    cells: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Keys and destination positions, (B, N), from scores (splits, B, S) and numbers of destinations."""
    splits, batch, _ = score.shape
    key = torch.empty(batch, tokens, dtype=torch.int32, device=score.device)
    target = torch.empty_like(key)
    _source_keys_kernel[programs(key)](
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
        *cells,
        BLOCK=TILE,
    )
    return key, target


@triton.jit
def _rank_kernel(key, target, cut, counts, row, kept, N, num_merge, BLOCK: tl.constexpr):
    """The row of each token that stays, ~destination of each other token, and the positions of the rows."""
    batch, n = tile_of(N, BLOCK)
    merges, merged_before = chosen_of_tile(key, cut, counts, N, BLOCK)
    rank = n.to(tl.int32) - merged_before
    destination = tl.load(target + batch * N + n, n < N, other=0)
    tl.store(row + batch * N + n, tl.where(merges, ~destination, rank), n < N)
    tl.store(kept + batch * (N - num_merge) + rank, n.to(tl.int32), (n < N) & (merges == 0))


@triton.jit
def _assign_kernel(row, assignment, narrow, N, BLOCK: tl.constexpr):
    """`narrow` gets a copy that sorts faster, if rows fit int16."""
    batch, n = tile_of(N, BLOCK)
    own = tl.load(row + batch * N + n, n < N, other=0)
    joined = tl.load(row + batch * N + ~own, (n < N) & (own < 0), other=0)
    joined = tl.where(own < 0, joined, own)
    tl.store(assignment + batch * N + n, joined, n < N)
    if narrow is not None:
        tl.store(narrow + batch * N + n, joined.to(tl.int16), n < N)


@triton.jit
def _groups_kernel(grouped, token, order, offsets, N, num_rows, BLOCK: tl.constexpr):
    """CSR form of the tokens sorted by row; no row is empty, so each begins where the row number changes."""
    batch, i = tile_of(N, BLOCK)
    tl.store(order + batch * N + i, tl.load(token + batch * N + i, i < N, other=0).to(tl.int32), i < N)
    row = tl.load(grouped + batch * N + i, i < N, other=0).to(tl.int32)
    previous = tl.load(grouped + batch * N + i - 1, (i > 0) & (i < N), other=-1).to(tl.int32)
    offsets += batch * (num_rows + 1)
    tl.store(offsets + row, i.to(tl.int32), (i < N) & (row != previous))
    tl.store(offsets + num_rows + i, tl.zeros([BLOCK], dtype=tl.int32) + N, i == 0)


def plan_from_keys(
    key: Tensor | None, target: Tensor | None, metric: Tensor, num_merge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """assignment, kept, order and offsets of the plan that merges the `num_merge` tokens with the highest keys."""
    batch, tokens, _ = metric.shape
    rows = tokens - num_merge

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=metric.device)

    if num_merge == 0:
        each = torch.arange(tokens + 1, dtype=torch.int32, device=metric.device).repeat(batch, 1)
        return *(each[:, :tokens].clone(memory_format=torch.contiguous_format) for _ in range(3)), each
    assignment, kept, offsets = empty(batch, tokens), empty(batch, rows), empty(batch, rows + 1)
    order = empty(batch, tokens)
    if batch == 0:
        return assignment, kept, order, offsets
    row = torch.empty_like(assignment)
    cut, counts = find_cut(key, num_merge)
    tiles = programs(key)
    _rank_kernel[tiles](key, target, cut, counts, row, kept, tokens, num_merge, BLOCK=TILE)
    narrow = torch.empty_like(assignment, dtype=torch.int16) if rows <= 2**15 else None
    _assign_kernel[tiles](row, assignment, narrow, tokens, BLOCK=TILE)
    # The library's radix sort, 8 bits of a key per pass: a group may be as large as the clip, for which a counting
    # kernel would need quadratic time.
    grouped, token = torch.sort(assignment if narrow is None else narrow, dim=1, stable=True)
    _groups_kernel[tiles](grouped, token, order, offsets, tokens, rows, BLOCK=TILE)
    return assignment, kept, order, offsets


def count_at_least(key: Tensor, threshold: float) -> Tensor:
    """(B,) int32: the number of keys of scores of at least `threshold`, compared in float32."""
    bits = torch.tensor(threshold + 0.0, dtype=torch.float32, device="cpu").view(torch.int32).item()
    lowest = max(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7F800000)  # above the key of -inf
    return (key >= lowest).sum(dim=1, dtype=torch.int32)


# See sparse_gather.triton_gather.AOT.
_I32 = "*i32"
AOT = {
    "_source_keys_kernel": [
        ({"score": "*fp32", "column": _I32, "key": _I32, "target": _I32}, {"BLOCK": TILE}, 4),
    ],
    "_rank_kernel": [
        ({name: _I32 for name in ("key", "target", "cut", "counts", "row", "kept")}, {"BLOCK": TILE}, 4),
    ],
    "_assign_kernel": [
        ({"row": _I32, "assignment": _I32, "narrow": "*i16"}, {"BLOCK": TILE}, 4),
        ({"row": _I32, "assignment": _I32}, {"narrow": None, "BLOCK": TILE}, 4),
    ],
    "_groups_kernel": [
        ({"grouped": grouped, "token": "*i64", "order": _I32, "offsets": _I32}, {"BLOCK": TILE}, 4)
        for grouped in ("*i16", _I32)
    ],
}
