"""Triton kernels that sum the groups of a plan.

Sums follow a plan's `order` and `offsets`, in order and without atomics. An index of a plan that is out of range is
never followed; results that depend on it are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_tiles import distinct, tile_of, vector_of
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_means import add_deviations, add_tokens, load_origins, mean_of, negative_zero
from .triton_totals import group_bounds

# Groups of more tokens are summed by several programs: in a still clip, all tokens may be one group.
_WINDOW = 128
_LARGEST = torch.finfo(torch.float32).max


def _groups_tile(arch: int, dtype: str, width: int, mean: bool, warps: int = 4, rows: int = 1, tokens: int = 2) -> Tile:
    """`rows` loads of 16 bytes per thread for each of the tokens that are read at once; most groups are pairs."""
    vector = vector_of(dtype)
    block_c = min(32 * warps * vector, width)
    return {
        "BLOCK_M": min(64, rows * 32 * warps * vector // block_c),
        "BLOCK_C": block_c,
        "UNROLL": tokens,
        "num_warps": warps,
    }


def _groups_tiles(arch: int, dtype: str, width: int, mean: bool) -> list[Tile]:
    choices = ((4, 1, 2), (2, 1, 2), (1, 1, 2), (4, 1, 1), (4, 2, 2), (2, 2, 2), (4, 1, 4), (8, 1, 2))
    return distinct(_groups_tile(arch, dtype, width, mean, *choice) for choice in choices)


def _windows_tile(arch: int, dtype: str, width: int, mean: bool, warps: int = 4, tokens: int = 4) -> Tile:
    return {"BLOCK_C": min(32 * warps * vector_of(dtype), width), "UNROLL": tokens, "num_warps": warps}


def _windows_tiles(arch: int, dtype: str, width: int, mean: bool) -> list[Tile]:
    return distinct(_windows_tile(arch, dtype, width, mean, warps, tokens) for warps in (2, 4) for tokens in (2, 4))


_FIELDS = ("dtype", "width", "mean")
SUM_GROUPS = Tunable("_sum_groups_kernel", _FIELDS, _groups_tile, _groups_tiles)
SUM_WINDOWS = Tunable("_sum_windows_kernel", _FIELDS, _windows_tile, _windows_tiles)
JOIN_WINDOWS = Tunable("_join_windows_kernel", _FIELDS, _windows_tile, _windows_tiles)


@triton.jit
def _group_at(place, assignment, order, offsets, assignment_stride_n, order_stride_n, offsets_stride_n, N, M):
    """Row, begin and end of the group that holds a place of `order`, and whether the plan is consistent there."""
    n = tl.load(order + place * order_stride_n).to(tl.int64)
    known = (n >= 0) & (n < N)
    row = tl.load(assignment + n * assignment_stride_n, known, other=0).to(tl.int64)
    known &= (row >= 0) & (row < M)
    begin, end, in_range = group_bounds(offsets, row, known, offsets_stride_n, N)
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
    """Sums, for each window of WINDOW places of `order`, the parts of groups longer than WINDOW.

    Such a group covers the first place of the window (slot 0) or the last one (slot 1). Shorter groups are skipped.
    With `total`, it computes the two sums of a mean.
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
        nothing = tl.where(
            known, negative_zero(), float("nan")
        )  # NaN, so that the sums of an inconsistent plan are not used
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
    """Adds the parts of a group longer than WINDOW that begins in a window; it covers the window's last place."""
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
    # Its part of the first window is in slot 1, unless it begins at the start of the window.
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
    """Sums of groups; with `total`, the group sizes, means, measured from the tokens `origin`."""
    batch, row = tile_of(M, BLOCK_M)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end, in_range = group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    # Longer groups are left to `_join_windows_kernel`, or stay NaN if the plan is inconsistent.
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


def _fields(x: Tensor, mean: bool) -> dict[str, str | int | bool]:
    return {"dtype": dtype_name(x.dtype), "width": triton.next_power_of_2(max(1, x.shape[2])), "mean": mean}


def tiles_sum_groups(x: Tensor, mean: bool) -> list[Chosen]:
    """The tiles that `sum_groups` uses."""
    kernels = [SUM_GROUPS] if x.shape[1] <= _WINDOW else [SUM_GROUPS, SUM_WINDOWS, JOIN_WINDOWS]
    return [kernel.chosen(x.device, **_fields(x, mean)) for kernel in kernels]


def sum_groups(
    x: Tensor,
    size: Tensor | None,
    total: Tensor | None,
    origin: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> Tensor:
    """Sums of the groups; with their `total` and `origin`, means weighted by `size`."""
    batch, tokens, channels = x.shape
    rows = offsets.shape[1] - 1
    out = torch.empty(batch, rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    fields = _fields(x, total is not None)
    tile = SUM_GROUPS.tile(x.device, **fields)
    sizes = *x.stride(), *(size.stride() if size is not None else (0, 0))
    places = *order.stride(), *offsets.stride()
    grid = (triton.cdiv(rows, tile["BLOCK_M"]) * batch, triton.cdiv(channels, tile["BLOCK_C"]))
    _sum_groups_kernel[grid](
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
        **tile,
    )
    if tokens <= _WINDOW:  # no group can be longer
        return out
    windows = triton.cdiv(tokens, _WINDOW)
    parts = 1 if total is None else 2
    partial = torch.empty(parts, batch, windows, 2, channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    plan = assignment, order, offsets
    tile = SUM_WINDOWS.tile(x.device, **fields)
    _sum_windows_kernel[(windows * batch, triton.cdiv(channels, tile["BLOCK_C"]))](
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
        WINDOW=_WINDOW,
        **tile,
    )
    tile = JOIN_WINDOWS.tile(x.device, **fields)
    _join_windows_kernel[(windows * batch, triton.cdiv(channels, tile["BLOCK_C"]))](
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
        WINDOW=_WINDOW,
        **tile,
    )
    return out


# See sparse_gather.triton_gather.AOT. Contiguous inputs of many channels.
_UNIT = {"size_stride_n": 1, "order_stride_n": 1, "offsets_stride_n": 1, "x_stride_c": 1, "WINDOW": _WINDOW}
_JOIN = {"order_stride_n": 1, "offsets_stride_n": 1, "assignment_stride_n": 1, "x_stride_c": 1, "WINDOW": _WINDOW}
_JOIN |= {"LARGEST": _LARGEST}
_SUMS = {**_UNIT, "LARGEST": _LARGEST}
_MEAN = {"size": "*fp32", "total": "*fp32", "origin": "*i32"}
_NO_MEAN = {"size": None, "total": None, "origin": None}


def _pointers(dtype: str, index: str, **more: str) -> dict[str, str]:
    wide = "*fp64" if dtype == "fp64" else "*fp32"
    plan = {name: f"*{index}" for name in ("assignment", "order", "offsets")}
    return {"x": f"*{dtype}", **more, **plan, "partial": wide, "out": f"*{dtype}"}


def _how(tunable: Tunable, pointers: dict[str, str], width: int = 4096) -> tuple[Tunable, dict]:
    return tunable, {"dtype": pointers["x"][1:], "width": width, "mean": "total" in pointers}


_VARIANTS = [
    *((_pointers(dtype, index, **_MEAN), {}) for dtype, index in (("bf16", "i32"), ("fp32", "i32"), ("bf16", "i64"))),
    *((_pointers(dtype, "i32"), _NO_MEAN) for dtype in ("bf16", "fp32", "fp64")),
]
_JOINS = [
    *((_pointers(dtype, "i32"), {"total": None, "origin": None}) for dtype in ("bf16", "fp32", "fp64")),
    *((_pointers(dtype, "i32", total="*fp32", origin="*i32"), {}) for dtype in ("bf16", "fp32")),
]
AOT = {
    "_sum_windows_kernel": [
        (pointers, {**_UNIT, "assignment_stride_n": 1, **fixed}, _how(SUM_WINDOWS, pointers))
        for pointers, fixed in _VARIANTS
    ],
    "_join_windows_kernel": [
        (pointers, {**_JOIN, **fixed}, _how(JOIN_WINDOWS, pointers)) for pointers, fixed in _JOINS
    ],
    "_sum_groups_kernel": [
        *((pointers, {**_SUMS, **fixed}, _how(SUM_GROUPS, pointers)) for pointers, fixed in _VARIANTS),
        (_VARIANTS[3][0], {**_SUMS, **_NO_MEAN}, _how(SUM_GROUPS, _VARIANTS[3][0], width=128)),
        (_JOINS[3][0], {"LARGEST": _LARGEST, "WINDOW": _WINDOW, "size": None}, _how(SUM_GROUPS, _JOINS[3][0])),
    ],
}
