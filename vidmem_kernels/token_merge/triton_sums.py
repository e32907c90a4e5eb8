"""Triton kernels that sum the groups of a plan.

Sums follow a plan's `order` and `offsets`, in order, without atomics. A plan's index that is out of range is never
followed; what depends on it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_tiles import tile_of
from .triton_means import add_deviations, add_tokens, load_origins, mean_of, negative_zero

# Elements of a tile, at 4 warps: one row of many channels. Tokens that are loaded at once: most groups are pairs.
_TILE = 1024
_PAIR, _RUN = 2, 4
# Groups of more tokens are summed by several programs: of a still clip, all tokens may be one group.
_WINDOW = 128
_LARGEST = torch.finfo(torch.float32).max


@triton.jit
def _group_bounds(offsets, row, valid, stride, N):
    """Begin and end of the groups of rows, in bounds, and whether they were."""
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

    Without `value` it is 1, without `size` that is 1. Into `origin`, if given, goes the first token of each group's
    largest value. Summed in float64: the order of a sum over an axis is the
    compiler's choice, which differs between strides and types of index, and must not show in the result.
    """
    batch, row = tile_of(M, BLOCK_M)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
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
            term = tl.where(share == 0, 0.0, term * share)  # a NaN of size 0 counts for no other token
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
    batch, tokens = order.shape
    rows = offsets.shape[1] - 1
    total = torch.empty(batch, rows, dtype=torch.float32, device=order.device)
    # Wide enough that a group of a whole clip takes few steps, with rows enough for groups of two.
    block_m, block_k = 4, 128
    if total.numel():
        _group_totals_kernel[(triton.cdiv(rows, block_m) * batch,)](
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
            BLOCK_M=block_m,
            BLOCK_K=block_k,
            num_warps=4,
        )
    return total


@triton.jit
def _group_at(place, assignment, order, offsets, assignment_stride_n, order_stride_n, offsets_stride_n, N, M):
    """Row, begin and end of the group that holds a place of `order`, and whether the plan is consistent there."""
    n = tl.load(order + place * order_stride_n).to(tl.int64)
    known = (n >= 0) & (n < N)
    row = tl.load(assignment + n * assignment_stride_n, known, other=0).to(tl.int64)
    known &= (row >= 0) & (row < M)
    begin, end, in_range = _group_bounds(offsets, row, known, offsets_stride_n, N)
    return row, begin, end, known & in_range & (begin <= place) & (place < end)


@triton.jit
def _sum_windows_kernel(
    x,
    size,
    total,
    origin,
    assignment,
    order,
    offsets,
    partial,
    N,
    M,
    C,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    size_stride_b,
    size_stride_n,
    assignment_stride_b,
    assignment_stride_n,
    order_stride_b,
    order_stride_n,
    offsets_stride_b,
    offsets_stride_n,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Per WINDOW places of `order`, sums of the groups of more places than that: such a group holds the first
    place of the window (slot 0) or the last one (slot 1). Smaller groups are left alone. With `total`, the two sums
    that a mean is made of.
    """
    windows = tl.cdiv(N, WINDOW)
    window = (tl.program_id(0) % windows).to(tl.int64)
    batch = (tl.program_id(0) // windows).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    order += batch * order_stride_b
    low = window * WINDOW + tl.zeros([1], dtype=tl.int64)
    high = tl.minimum(low + WINDOW, N)
    for slot in tl.static_range(2):
        place = high - 1 if slot == 1 else low
        row, begin, end, known = _group_at(
            place,
            assignment + batch * assignment_stride_b,
            order,
            offsets + batch * offsets_stride_b,
            assignment_stride_n,
            order_stride_n,
            offsets_stride_n,
            N,
            M,
        )
        wanted = known & (end - begin > WINDOW)
        if slot == 1:
            wanted &= begin > low
        nothing = tl.where(known, negative_zero(), float("nan"))  # the reader must not trust what contradicts itself
        result = tl.broadcast_to(nothing[:, None], [1, BLOCK_C]).to(partial.dtype.element_ty)
        first_place = tl.maximum(begin, low)
        end_place = tl.where(wanted, tl.minimum(end, high), 0)
        source = x + batch * x_stride_b
        mask = (wanted | ~known)[:, None] & (c < C)[None, :]
        target = partial + ((batch * windows + window) * 2 + slot) * C + c[None, :]
        target += tl.zeros([1, BLOCK_C], dtype=tl.int64)
        if total is not None:
            from_row = load_origins(source, origin + batch * M, row, wanted, c, N, C, x_stride_n, x_stride_c)
            result, halves = add_deviations(
                result + 0.0,
                result + 0.0,
                from_row.to(tl.float32),
                source,
                None if size is None else size + batch * size_stride_b,
                tl.load(total + batch * M + row, wanted, other=0),
                order,
                first_place,
                end_place,
                c,
                N,
                C,
                x_stride_n,
                x_stride_c,
                size_stride_n,
                order_stride_n,
                UNROLL,
            )
            tl.store(target + tl.num_programs(0).to(tl.int64) * 2 * C, halves, mask)
        else:
            result = add_tokens(
                result, source, order, first_place, end_place, c, N, C, x_stride_n, x_stride_c, order_stride_n, UNROLL
            )
        tl.store(target, result, mask)


@triton.jit
def _join_windows_kernel(
    partial,
    x,
    total,
    origin,
    assignment,
    order,
    offsets,
    out,
    N,
    M,
    C,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    assignment_stride_b,
    assignment_stride_n,
    order_stride_b,
    order_stride_n,
    offsets_stride_b,
    offsets_stride_n,
    LARGEST: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The row of the group of more than WINDOW places that begins in a window, if one does: it holds the last place."""
    windows = tl.cdiv(N, WINDOW)
    window = (tl.program_id(0) % windows).to(tl.int64)
    batch = (tl.program_id(0) // windows).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, begin, end, known = _group_at(
        tl.minimum(window * WINDOW + WINDOW, N) - 1 + tl.zeros([1], dtype=tl.int64),
        assignment + batch * assignment_stride_b,
        order + batch * order_stride_b,
        offsets + batch * offsets_stride_b,
        assignment_stride_n,
        order_stride_n,
        offsets_stride_n,
        N,
        M,
    )
    wanted = known & (end - begin > WINDOW) & (begin >= window * WINDOW)
    count = tl.where(wanted, (end - 1) // WINDOW - window + 1, 0)
    in_c = (c < C)[None, :]
    where = partial + (batch * windows + window) * 2 * C + c[None, :]
    # Its part of the first window is in slot 1 unless it begins where the window does.
    start = where + tl.where(begin % WINDOW == 0, 0, C)[:, None]
    result = tl.load(start, wanted[:, None] & in_c, other=0)
    part = tl.num_programs(0).to(tl.int64) * 2 * C  # from the first sums to the second
    if total is not None:
        halves = tl.load(start + part, wanted[:, None] & in_c, other=0)
    for first in range(1, tl.max(count, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            i = first + step
            mask = (i < count)[:, None] & in_c
            result += tl.load(where + i * 2 * C, mask, other=0)
            if total is not None:
                halves += tl.load(where + part + i * 2 * C, mask, other=0)
    if total is not None:
        source = x + batch * x_stride_b
        from_row = load_origins(source, origin + batch * M, row, wanted, c, N, C, x_stride_n, x_stride_c)
        result = mean_of(result, halves, from_row, tl.load(total + batch * M + row, wanted, other=0), ~known, LARGEST)
    target = out + (batch * M + row[:, None]) * C + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), wanted[:, None] & in_c)


@triton.jit
def _sum_groups_kernel(
    x,
    size,
    total,
    origin,
    order,
    offsets,
    out,
    N,
    M,
    C,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    size_stride_b,
    size_stride_n,
    order_stride_b,
    order_stride_n,
    offsets_stride_b,
    offsets_stride_n,
    LARGEST: tl.constexpr,
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of groups; with `total`, the size of each, means, `origin` being the tokens that they are measured from."""
    batch, row = tile_of(M, BLOCK_M)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    # Longer groups are left to `_join_windows_kernel`, or stay NaN where the plan contradicts itself.
    in_range = in_range & (end - begin <= WINDOW)
    nothing = tl.where(in_range, tl.where(begin < end, negative_zero(), 0.0), float("nan"))
    result = tl.broadcast_to(nothing[:, None], [BLOCK_M, BLOCK_C]).to(sum_dtype)
    end = tl.where(in_range, end, begin)
    source = x + batch * x_stride_b
    order += batch * order_stride_b
    if total is not None:
        whole = tl.load(total + batch * M + row, row < M, other=0)
        from_row = load_origins(source, origin + batch * M, row, row < M, c, N, C, x_stride_n, x_stride_c)
        result, halves = add_deviations(
            result + 0.0,
            result + 0.0,
            from_row.to(tl.float32),
            source,
            None if size is None else size + batch * size_stride_b,
            whole,
            order,
            begin,
            end,
            c,
            N,
            C,
            x_stride_n,
            x_stride_c,
            size_stride_n,
            order_stride_n,
            UNROLL,
        )
        result = mean_of(result, halves, from_row, whole, in_range & (end - begin == 1), LARGEST)
    else:
        result = add_tokens(result, source, order, begin, end, c, N, C, x_stride_n, x_stride_c, order_stride_n, UNROLL)
    target = out + (batch * M + row[:, None]) * C + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), (row < M)[:, None] & (c < C)[None, :])


def sum_groups(
    x: Tensor,
    size: Tensor | None,
    total: Tensor | None,
    origin: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Sums of the groups; means by `size` where their `total` and `origin` are given."""
    batch, tokens, channels = x.shape
    rows = offsets.shape[1] - 1
    out = torch.empty(batch, rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_c = min(_TILE, triton.next_power_of_2(channels))
    block_m = min(64, _TILE // block_c)
    blocks = triton.cdiv(channels, block_c)
    sizes = *x.stride(), *(size.stride() if size is not None else (0, 0))
    places = *order.stride(), *offsets.stride()
    _sum_groups_kernel[(triton.cdiv(rows, block_m) * batch, blocks)](
        x,
        size,
        total,
        origin,
        order,
        offsets,
        out,
        tokens,
        rows,
        channels,
        *sizes,
        *places,
        LARGEST=_LARGEST,
        WINDOW=_WINDOW,
        UNROLL=_PAIR,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
    )
    if tokens <= _WINDOW:  # no group is longer
        return out
    windows = triton.cdiv(tokens, _WINDOW)
    parts = 1 if total is None else 2
    partial = torch.empty(parts, batch, windows, 2, channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    plan = assignment, order, offsets
    options = {"WINDOW": _WINDOW, "UNROLL": _RUN, "BLOCK_C": block_c, "num_warps": 4}
    _sum_windows_kernel[(windows * batch, blocks)](
        x,
        size,
        total,
        origin,
        *plan,
        partial,
        tokens,
        rows,
        channels,
        *sizes,
        *assignment.stride(),
        *places,
        **options,
    )
    _join_windows_kernel[(windows * batch, blocks)](
        partial,
        x,
        total,
        origin,
        *plan,
        out,
        tokens,
        rows,
        channels,
        *x.stride(),
        *assignment.stride(),
        *places,
        LARGEST=_LARGEST,
        **options,
    )
    return out


# See sparse_gather.triton_gather.AOT. Contiguous inputs of many channels.
_UNIT = {"size_stride_n": 1, "order_stride_n": 1, "offsets_stride_n": 1}
_TOTALS = {**_UNIT, "value_stride_n": 1, "BLOCK_M": 4, "BLOCK_K": 128}
_WINDOWS = {
    **_UNIT,
    "assignment_stride_n": 1,
    "x_stride_c": 1,
    "WINDOW": _WINDOW,
    "UNROLL": _RUN,
    "BLOCK_C": _TILE,
}
_JOIN = {**{k: v for k, v in _WINDOWS.items() if k != "size_stride_n"}, "LARGEST": _LARGEST}
_STRIDED = {"LARGEST": _LARGEST, "WINDOW": _WINDOW, "UNROLL": _PAIR, "BLOCK_M": 1, "BLOCK_C": _TILE}
_SUMS = {**_UNIT, "x_stride_c": 1, **_STRIDED}
_MEAN = {"size": "*fp32", "total": "*fp32", "origin": "*i32"}
_NO_MEAN = {"size": None, "total": None, "origin": None}


def _pointers(dtype: str, index: str, **more: str) -> dict[str, str]:
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    plan = {name: f"*{index}" for name in ("assignment", "order", "offsets")}
    return {"x": f"*{dtype}", **more, **plan, "partial": wide, "out": f"*{dtype}"}


_VARIANTS = [
    *((_pointers(dtype, index, **_MEAN), {}) for dtype, index in (("bf16", "i32"), ("fp32", "i32"), ("bf16", "i64"))),
    *((_pointers(dtype, "i32"), _NO_MEAN) for dtype in ("bf16", "fp32", "fp64")),
]
_PLAN = {"order": "*i32", "offsets": "*i32"}
_NO_SIZE = {"size": None, "size_total": None}
AOT = {
    "_group_totals_kernel": [
        ({**_PLAN, "total": "*fp32", "origin": "*i32"}, {"value": None, **_NO_SIZE, **_TOTALS}, 4),
        ({"value": "*fp32", **_PLAN, "total": "*fp32", "origin": "*i32"}, {**_NO_SIZE, **_TOTALS}, 4),
        (
            {"value": "*fp32", "size": "*fp32", "size_total": "*fp32", **_PLAN, "total": "*fp32"},
            {"origin": None, **_TOTALS},
            4,
        ),
    ],
    "_sum_windows_kernel": [(pointers, {**_WINDOWS, **constants}, 4) for pointers, constants in _VARIANTS],
    "_join_windows_kernel": [
        *((_pointers(dtype, "i32"), {**_JOIN, "total": None, "origin": None}, 4) for dtype in ("bf16", "fp32", "fp64")),
        *((_pointers(dtype, "i32", total="*fp32", origin="*i32"), _JOIN, 4) for dtype in ("bf16", "fp32")),
    ],
    "_sum_groups_kernel": [
        *((pointers, {**_SUMS, **constants}, 4) for pointers, constants in _VARIANTS),
        (_pointers("bf16", "i32"), {**_SUMS, **_NO_MEAN, "BLOCK_M": 8, "BLOCK_C": 128}, 4),
        (_pointers("bf16", "i32", total="*fp32", origin="*i32"), {**_STRIDED, "size": None}, 4),
    ],
}
