"""Triton kernels that sum the groups of a plan. Not yet run on a GPU.

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

# Elements of a tile, at 4 warps: one row of many channels. Tokens that are loaded at once: most groups are pairs.
_TILE = 1024
_PAIR, _RUN = 2, 4
# Groups of more tokens are summed by several programs: of a still clip, all tokens may be one group.
_WINDOW = 128
_SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit
def _negative_zero():
    """What adding changes nothing about, not even the sign of 0. Triton 3.6 makes the literal -0.0 a 0."""
    return tl.full([], _SIGN_BIT, tl.int32).to(tl.float32, bitcast=True)


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

    Without `value` it is 1, without `size` that is 1. Summed in float64: the order of a sum over an axis is the
    compiler's choice, which differs between strides and types of index, and must not show in the result.
    """
    batch, row = tile_of(M, BLOCK_M)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    if size_total is not None:
        whole = tl.load(size_total + batch * M + row, row < M, other=0)[:, None]
        divisor = tl.broadcast_to(tl.where(whole == 0, 1.0, whole), [BLOCK_M, BLOCK_K])
    result = tl.zeros([BLOCK_M], dtype=tl.float64)
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
            term = term * tl.where(whole == 0, 0.0, tl.div_rn(share, divisor))
        result += tl.sum(tl.where(member, tl.where(valid, term, float("nan")), 0.0).to(tl.float64), axis=1)
    tl.store(total + batch * M + row, tl.where(in_range, result.to(tl.float32), float("nan")), row < M)


def group_totals(
    value: Tensor | None, size: Tensor | None, size_total: Tensor | None, order: Tensor, offsets: Tensor
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
def _add_tokens(
    result,
    x,
    size,
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
    UNROLL: tl.constexpr,
):
    """Adds the tokens of groups to the rows of `result`, in order; with `whole`, times their shares of it."""
    if whole is not None:
        divisor = tl.where(whole == 0, 1.0, whole)
    for first in range(0, tl.max(end - begin, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            k = begin + first + step
            member = k < end
            n = tl.load(order + k.to(tl.int64) * order_stride_n, member, other=0).to(tl.int64)
            valid = member & (n >= 0) & (n < N)
            if whole is not None:
                share = tl.full(whole.shape, 1.0, dtype=tl.float32)
                if size is not None:
                    share = tl.load(size + n * size_stride_n, valid, other=0)
                # Rounded correctly: size / size is 1.
                share = tl.where(whole == 0, 0.0, tl.div_rn(share, divisor))
            where = x + n[:, None] * x_stride_n + c[None, :] * x_stride_c
            value = tl.load(where, valid[:, None] & (c < C)[None, :], other=0).to(result.dtype)
            if whole is not None:
                value = value * share[:, None]
            # So that the sum of one token is that token to the bit.
            result += tl.where(valid[:, None], value, tl.where(member, float("nan"), _negative_zero())[:, None])
    return result


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
    place of the window (slot 0) or the last one (slot 1). Smaller groups are left alone.
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
        whole = None
        if total is not None:
            whole = tl.load(total + batch * M + row, wanted, other=0)
        nothing = tl.where(known, _negative_zero(), float("nan"))  # the reader must not trust what contradicts itself
        result = tl.broadcast_to(nothing[:, None], [1, BLOCK_C]).to(partial.dtype.element_ty)
        result = _add_tokens(
            result,
            x + batch * x_stride_b,
            None if size is None else size + batch * size_stride_b,
            whole,
            order,
            tl.maximum(begin, low),
            tl.where(wanted, tl.minimum(end, high), 0),
            c,
            N,
            C,
            x_stride_n,
            x_stride_c,
            size_stride_n,
            order_stride_n,
            UNROLL,
        )
        target = partial + ((batch * windows + window) * 2 + slot) * C + c[None, :]
        tl.store(target + tl.zeros([1, BLOCK_C], dtype=tl.int64), result, (wanted | ~known)[:, None] & (c < C)[None, :])


@triton.jit
def _join_windows_kernel(
    partial,
    assignment,
    order,
    offsets,
    out,
    N,
    M,
    C,
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
    result = tl.load(where + tl.where(begin % WINDOW == 0, 0, C)[:, None], wanted[:, None] & in_c, other=0)
    for first in range(1, tl.max(count, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            i = first + step
            result += tl.load(where + i * 2 * C, (i < count)[:, None] & in_c, other=0)
    target = out + (batch * M + row[:, None]) * C + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), wanted[:, None] & in_c)


@triton.jit
def _sum_groups_kernel(
    x,
    size,
    total,
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
    WINDOW: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of groups; with `total`, of the tokens times their shares of it."""
    batch, row = tile_of(M, BLOCK_M)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    whole = None
    if total is not None:
        whole = tl.load(total + batch * M + row, row < M, other=0)
    # Longer groups are left to `_join_windows_kernel`, or stay NaN where the plan contradicts itself.
    in_range = in_range & (end - begin <= WINDOW)
    nothing = tl.where(in_range, tl.where(begin < end, _negative_zero(), 0.0), float("nan"))
    result = tl.broadcast_to(nothing[:, None], [BLOCK_M, BLOCK_C]).to(sum_dtype)
    result = _add_tokens(
        result,
        x + batch * x_stride_b,
        None if size is None else size + batch * size_stride_b,
        whole,
        order + batch * order_stride_b,
        begin,
        tl.where(in_range, end, begin),
        c,
        N,
        C,
        x_stride_n,
        x_stride_c,
        size_stride_n,
        order_stride_n,
        UNROLL,
    )
    target = out + (batch * M + row[:, None]) * C + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), (row < M)[:, None] & (c < C)[None, :])


def sum_groups(
    x: Tensor, size: Tensor | None, total: Tensor | None, assignment: Tensor, order: Tensor, offsets: Tensor
) -> Tensor:
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
        order,
        offsets,
        out,
        tokens,
        rows,
        channels,
        *sizes,
        *places,
        WINDOW=_WINDOW,
        UNROLL=_PAIR,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
    )
    if tokens <= _WINDOW:  # no group is longer
        return out
    windows = triton.cdiv(tokens, _WINDOW)
    partial = torch.empty(batch, windows, 2, channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    plan = assignment, order, offsets
    options = {"WINDOW": _WINDOW, "UNROLL": _RUN, "BLOCK_C": block_c, "num_warps": 4}
    _sum_windows_kernel[(windows * batch, blocks)](
        x,
        size,
        total,
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
        partial, *plan, out, tokens, rows, channels, *assignment.stride(), *places, **options
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
_JOIN = {k: v for k, v in _WINDOWS.items() if k not in ("x_stride_c", "size_stride_n")}
_SUMS = {**_UNIT, "x_stride_c": 1, "WINDOW": _WINDOW, "UNROLL": _PAIR, "BLOCK_M": 1, "BLOCK_C": _TILE}
_STRIDED = {"WINDOW": _WINDOW, "UNROLL": _PAIR, "BLOCK_M": 1, "BLOCK_C": _TILE}
_MEAN = {"size": "*fp32", "total": "*fp32"}
_NO_MEAN = {"size": None, "total": None}


def _pointers(dtype: str, index: str, **more: str) -> dict[str, str]:
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    plan = {name: f"*{index}" for name in ("assignment", "order", "offsets")}
    return {"x": f"*{dtype}", **more, **plan, "partial": wide, "out": f"*{dtype}"}


_VARIANTS = [
    *((_pointers(dtype, index, **_MEAN), {}) for dtype, index in (("bf16", "i32"), ("fp32", "i32"), ("bf16", "i64"))),
    *((_pointers(dtype, "i32"), _NO_MEAN) for dtype in ("bf16", "fp32", "fp64")),
]
_PLAN = {"order": "*i32", "offsets": "*i32"}
AOT = {
    "_group_totals_kernel": [
        ({**_PLAN, "total": "*fp32"}, {"value": None, "size": None, "size_total": None, **_TOTALS}, 4),
        ({"value": "*fp32", **_PLAN, "total": "*fp32"}, {"size": None, "size_total": None, **_TOTALS}, 4),
        ({"value": "*fp32", "size": "*fp32", "size_total": "*fp32", **_PLAN, "total": "*fp32"}, _TOTALS, 4),
    ],
    "_sum_windows_kernel": [(pointers, {**_WINDOWS, **constants}, 4) for pointers, constants in _VARIANTS],
    "_join_windows_kernel": [(_pointers(dtype, "i32"), _JOIN, 4) for dtype in ("bf16", "fp32", "fp64")],
    "_sum_groups_kernel": [
        *((pointers, {**_SUMS, **constants}, 4) for pointers, constants in _VARIANTS),
        (_pointers("bf16", "i32"), {**_SUMS, **_NO_MEAN, "BLOCK_M": 8, "BLOCK_C": 128}, 4),
        (_pointers("bf16", "i32", total="*fp32"), {**_STRIDED, "size": None}, 4),
    ],
}
