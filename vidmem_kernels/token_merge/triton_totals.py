"""Triton kernel that sums one number per token over the groups of a plan, such as sizes; and the bounds of groups."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_tiles import tile_of
from .._tuned import Tile, Tunable


def _tile(arch: int, has_value: bool, rows: int = 4) -> Tile:
    # Wide enough for a group of a whole clip to take few steps, with enough rows for groups of two.
    return {"BLOCK_M": rows, "BLOCK_K": 512 // rows, "num_warps": 4}


def _tiles(arch: int, has_value: bool) -> list[Tile]:
    return [_tile(arch, has_value, rows) for rows in (4, 8, 16, 32)]


GROUP_TOTALS = Tunable("_group_totals_kernel", ("has_value",), _tile, _tiles)


@triton.jit
def group_bounds(offsets, row, valid, stride, N):
    """Begin and end of the groups of rows, clamped to the bounds, and whether they were within them."""
    begin = tl.load(offsets + row * stride, valid, other=0).to(tl.int64)
    end = tl.load(offsets + (row + 1) * stride, valid, other=0).to(tl.int64)
    in_range = (begin >= 0) & (begin <= end) & (end <= N)
    return tl.where(in_range, begin, 0).to(tl.int32), tl.where(in_range, end, 0).to(tl.int32), in_range


@triton.jit
def _group_totals_kernel(
    value,
    size,
    size_total,
    order,
    offsets,
    total,
    origin,
    N,
    M,
    value_stride_b,
    value_stride_n,
    size_stride_b,
    size_stride_n,
    order_stride_b,
    order_stride_n,
    offsets_stride_b,
    offsets_stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 sum of a value per token over each group; with `size_total`, weighted by the tokens' shares of it.

    Without `value` it is 1, without `size` that is 1. `origin`, if given, gets the first token with the largest value
    of each group. Summed in float64, because the compiler chooses the order of a sum over an axis, which depends on
    strides and index types and must not affect the result.
    """
    batch, row = tile_of(M, BLOCK_M)
    begin, end, in_range = group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    if size_total is not None:
        whole = tl.load(size_total + batch * M + row, row < M, other=0)[:, None]
        divisor = tl.broadcast_to(tl.where(whole == 0, 1.0, whole), [BLOCK_M, BLOCK_K])
    result = tl.zeros([BLOCK_M], dtype=tl.float64)
    best = tl.full([BLOCK_M], -0.5, dtype=tl.float32)
    best_place = begin
    for first in range(0, tl.max(end - begin, axis=0), BLOCK_K):
        k = begin[:, None] + first + tl.arange(0, BLOCK_K)[None, :]
        member = k < end[:, None]
        n = tl.load(order + batch * order_stride_b + k.to(tl.int64) * order_stride_n, member, other=0).to(tl.int64)
        valid = (n >= 0) & (n < N)
        one = tl.full([BLOCK_M, BLOCK_K], 1.0, dtype=tl.float32)
        term = one
        if value is not None:
            term = tl.load(value + batch * value_stride_b + n * value_stride_n, member & valid, other=0)
        if size_total is not None:
            share = one
            if size is not None:
                share = tl.load(size + batch * size_stride_b + n * size_stride_n, member & valid, other=0)
            share = tl.where(whole == 0, 0.0, tl.div_rn(share, divisor))
            term = tl.where(share == 0, 0.0, term * share)  # a NaN of size 0 does not affect other tokens
        if origin is not None:
            known = tl.where(member & valid & (term == term), term, -1.0)
            largest = tl.max(known, axis=1)
            place = tl.min(tl.where(known == largest[:, None], k, 2147483647), axis=1)
            best_place = tl.where(largest > best, place, best_place)
            best = tl.maximum(largest, best)
        result += tl.sum(tl.where(member, tl.where(valid, term, float("nan")), 0.0).to(tl.float64), axis=1)
    tl.store(total + batch * M + row, tl.where(in_range, result.to(tl.float32), float("nan")), row < M)
    if origin is not None:
        where = order + batch * order_stride_b + best_place.to(tl.int64) * order_stride_n
        tl.store(origin + batch * M + row, tl.load(where, begin < end, other=0).to(tl.int32), row < M)


def group_totals(
    value: Tensor | None,
    size: Tensor | None,
    size_total: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    origin: Tensor | None = None,
) -> Tensor:
    """(B, M) float32; see `_group_totals_kernel`."""
    batch, tokens = order.shape
    rows = offsets.shape[1] - 1
    total = torch.empty(batch, rows, dtype=torch.float32, device=order.device)
    if total.numel():
        tile = GROUP_TOTALS.tile(order.device, has_value=value is not None)
        _group_totals_kernel[(triton.cdiv(rows, tile["BLOCK_M"]) * batch,)](
            value,
            size,
            size_total,
            order,
            offsets,
            total,
            origin,
            tokens,
            rows,
            *(value.stride() if value is not None else (0, 0)),
            *(size.stride() if size is not None else (0, 0)),
            *order.stride(),
            *offsets.stride(),
            **tile,
        )
    return total


# See sparse_gather.triton_gather.AOT.
_UNIT = {"size_stride_n": 1, "order_stride_n": 1, "offsets_stride_n": 1, "value_stride_n": 1}
_PLAN = {"order": "*i32", "offsets": "*i32"}
_NO_SIZE = {"size": None, "size_total": None}
_SIZES = {"size": "*fp32", "size_total": "*fp32"}
AOT = {
    "_group_totals_kernel": [
        (
            {**_PLAN, "total": "*fp32", "origin": "*i32"},
            {"value": None, **_NO_SIZE, **_UNIT},
            (GROUP_TOTALS, {"has_value": False}),
        ),
        (
            {"value": "*fp32", **_PLAN, "total": "*fp32", "origin": "*i32"},
            {**_NO_SIZE, **_UNIT},
            (GROUP_TOTALS, {"has_value": True}),
        ),
        (
            {"value": "*fp32", **_SIZES, **_PLAN, "total": "*fp32"},
            {"origin": None, **_UNIT},
            (GROUP_TOTALS, {"has_value": True}),
        ),
    ],
}
