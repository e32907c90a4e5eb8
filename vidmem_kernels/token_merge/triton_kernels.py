"""Triton kernels of merging and unmerging. Not yet run on a GPU: interpreter and ahead-of-time compilation only.

Sums follow a plan's `order` and `offsets`: each row is summed by one program, in order, without atomics. A plan's
index that is out of range is never followed; what depends on it is NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_match import launch_count_neighbors_fwd, launch_match_neighbors_fwd, launch_match_tokens_fwd

__all__ = [
    "launch_count_neighbors_fwd",
    "launch_match_neighbors_fwd",
    "launch_match_tokens_fwd",
    "launch_merge_tokens_bwd",
    "launch_merge_tokens_fwd",
    "launch_sum_groups_fwd",
    "launch_unmerge_tokens_fwd",
]

# Elements of a tile, at 4 warps. Sums of groups take one row of many channels, whose tokens are the loads in flight;
# spread rows take several, as each is one load.
_SUM_TILE, _SPREAD_TILE = 1024, 4096
_UNROLL = 4  # tokens of a group


@triton.jit
def _group_bounds(offsets, row, valid, stride, N):
    """Begin and end of the groups of rows, in bounds, and whether they were."""
    begin = tl.load(offsets + row * stride, valid, other=0).to(tl.int64)
    end = tl.load(offsets + (row + 1) * stride, valid, other=0).to(tl.int64)
    in_range = (begin >= 0) & (begin <= end) & (end <= N)
    return tl.where(in_range, begin, 0), tl.where(in_range, end, 0), in_range


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

    Without `value` it is 1, without `size` that is 1.
    """
    tiles = tl.cdiv(M, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    if size_total is not None:
        whole = tl.load(size_total + batch * M + row, row < M, other=0)[:, None]
        divisor = tl.broadcast_to(tl.where(whole == 0, 1.0, whole), [BLOCK_M, BLOCK_K])
    result = tl.zeros([BLOCK_M], dtype=tl.float32)
    for first in range(0, tl.max(end - begin, axis=0), BLOCK_K):
        k = begin[:, None] + first + tl.arange(0, BLOCK_K)[None, :]
        member = k < end[:, None]
        n = tl.load(order + batch * order_stride_b + k * order_stride_n, member, other=0).to(tl.int64)
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
        result += tl.sum(tl.where(member, tl.where(valid, term, float("nan")), 0.0), axis=1)
    tl.store(total + batch * M + row, tl.where(in_range, result, float("nan")), row < M)


def _group_totals(
    value: Tensor | None, size: Tensor | None, size_total: Tensor | None, order: Tensor, offsets: Tensor
) -> Tensor:
    batch, tokens = order.shape
    rows = offsets.shape[1] - 1
    total = torch.empty(batch, rows, dtype=torch.float32, device=order.device)
    # Wide enough that a group of a whole clip takes few steps, with rows enough for groups of two.
    block_m, block_k = 16, 32
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
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of groups; with `total`, of the tokens times their shares of it."""
    tiles = tl.cdiv(M, BLOCK_M)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin, end, in_range = _group_bounds(offsets + batch * offsets_stride_b, row, row < M, offsets_stride_n, N)
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    if total is not None:
        whole = tl.load(total + batch * M + row, row < M, other=0)
        divisor = tl.where(whole == 0, 1.0, whole)
    # -0 is what adding changes nothing about, so that the sum of one token is that token to the bit.
    nothing = tl.where(in_range, tl.where(begin < end, -0.0, 0.0), float("nan"))
    result = tl.broadcast_to(nothing[:, None], [BLOCK_M, BLOCK_C]).to(sum_dtype)
    for first in range(0, tl.max(end - begin, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            k = begin + first + step
            member = k < end
            n = tl.load(order + batch * order_stride_b + k * order_stride_n, member, other=0).to(tl.int64)
            valid = member & (n >= 0) & (n < N)
            where = x + batch * x_stride_b + n[:, None] * x_stride_n + c[None, :] * x_stride_c
            value = tl.load(where, valid[:, None] & (c < C)[None, :], other=0).to(sum_dtype)
            if total is not None:
                share = tl.full([BLOCK_M], 1.0, dtype=tl.float32)
                if size is not None:
                    share = tl.load(size + batch * size_stride_b + n * size_stride_n, valid, other=0)
                # Rounded correctly: size / size is 1.
                share = tl.where(whole == 0, 0.0, tl.div_rn(share, divisor))
                value = value * share[:, None]
            result += tl.where(valid[:, None], value, tl.where(member, float("nan"), -0.0)[:, None])
    target = out + (batch * M + row[:, None]) * C + c[None, :]
    tl.store(target, result.to(out.dtype.element_ty), (row < M)[:, None] & (c < C)[None, :])


def _sum_groups(x: Tensor, size: Tensor | None, total: Tensor | None, order: Tensor, offsets: Tensor) -> Tensor:
    batch, tokens, channels = x.shape
    rows = offsets.shape[1] - 1
    out = torch.empty(batch, rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_c = min(_SUM_TILE, triton.next_power_of_2(channels))
    block_m = min(64, _SUM_TILE // block_c)
    grid = (triton.cdiv(rows, block_m) * batch, triton.cdiv(channels, block_c))
    _sum_groups_kernel[grid](
        x,
        size,
        total,
        order,
        offsets,
        out,
        tokens,
        rows,
        channels,
        *x.stride(),
        *(size.stride() if size is not None else (0, 0)),
        *order.stride(),
        *offsets.stride(),
        UNROLL=_UNROLL,
        BLOCK_M=block_m,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


@triton.jit
def _spread_rows_kernel(
    y,
    x,
    size,
    total,
    assignment,
    out,
    along,
    N,
    M,
    C,
    y_stride_b,
    y_stride_m,
    y_stride_c,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    size_stride_b,
    size_stride_n,
    assignment_stride_b,
    assignment_stride_n,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Every token's row of y; with `total`, times the token's share; with `x`, also its product with x.

    Axis 1 of the grid has one program when there is x, which then needs all channels, else one a channel block.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    row = tl.load(assignment + batch * assignment_stride_b + n * assignment_stride_n, in_n, other=0).to(tl.int64)
    valid = (row >= 0) & (row < M)
    wide: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    if total is not None:
        whole = tl.load(total + batch * M + row, valid, other=0)
        share = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        if size is not None:
            share = tl.load(size + batch * size_stride_b + n * size_stride_n, in_n, other=0)
        share = tl.where(whole == 0, 0.0, tl.div_rn(share, tl.where(whole == 0, 1.0, whole)))
    product = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(tl.program_id(1) * BLOCK_C, C, tl.num_programs(1) * BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        mask = in_n[:, None] & (c < C)[None, :]
        where = y + batch * y_stride_b + row[:, None] * y_stride_m + c[None, :] * y_stride_c
        value = tl.load(where, mask & valid[:, None], other=0).to(wide)
        value = tl.where(valid[:, None], value, float("nan"))
        if x is not None:
            own = tl.load(x + batch * x_stride_b + n[:, None] * x_stride_n + c[None, :] * x_stride_c, mask, other=0)
            product += tl.sum(tl.where(mask, value * own.to(tl.float32), 0.0), axis=1)
        if total is not None:
            value = value * share[:, None]
        tl.store(out + (batch * N + n[:, None]) * C + c[None, :], value.to(out.dtype.element_ty), mask)
    if x is not None:
        tl.store(along + batch * N + n, product, in_n)


def _spread_rows(
    y: Tensor, x: Tensor | None, size: Tensor | None, total: Tensor | None, assignment: Tensor, along: Tensor | None
) -> Tensor:
    batch, tokens = assignment.shape
    rows, channels = y.shape[1:]
    out = torch.empty(batch, tokens, channels, dtype=y.dtype, device=y.device)
    if batch * tokens == 0 or (channels == 0 and x is None):
        return out
    block_c = min(1024, triton.next_power_of_2(max(1, channels)))
    block_n = min(64, (_SPREAD_TILE if x is None else _SPREAD_TILE // 2) // block_c)
    blocks = 1 if x is not None else triton.cdiv(channels, block_c)
    _spread_rows_kernel[(triton.cdiv(tokens, block_n) * batch, blocks)](
        y,
        x,
        size,
        total,
        assignment,
        out,
        along,
        tokens,
        rows,
        channels,
        *y.stride(),
        *(x.stride() if x is not None else (0, 0, 0)),
        *(size.stride() if size is not None else (0, 0)),
        *assignment.stride(),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


@triton.jit
def _grad_size_kernel(
    along,
    mean,
    total,
    grad_size,
    assignment,
    out,
    N,
    M,
    grad_size_stride_b,
    grad_size_stride_m,
    assignment_stride_b,
    assignment_stride_n,
    BLOCK_N: tl.constexpr,
):
    """The mean moves by (x - mean) / total for a unit of size: <grad, x> less its own mean over the group."""
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.load(assignment + batch * assignment_stride_b + n * assignment_stride_n, n < N, other=0).to(tl.int64)
    valid = (n < N) & (row >= 0) & (row < M)
    whole = tl.load(total + batch * M + row, valid, other=0)
    slope = tl.load(along + batch * N + n, valid, other=0) - tl.load(mean + batch * M + row, valid, other=0)
    slope = tl.where(whole == 0, 0.0, tl.div_rn(slope, tl.where(whole == 0, 1.0, whole)))
    direct = tl.load(grad_size + batch * grad_size_stride_b + row * grad_size_stride_m, valid, other=0)
    tl.store(out + batch * N + n, tl.where(valid, slope + direct, float("nan")), n < N)


# --- launches ---


def launch_merge_tokens_fwd(
    x: Tensor, size: Tensor | None, assignment: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.merge_tokens`."""
    total = _group_totals(size, None, None, order, offsets)
    return _sum_groups(x, size, total, order, offsets), total


def launch_merge_tokens_bwd(
    grad_tokens: Tensor,
    grad_size: Tensor,
    x: Tensor | None,
    size: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients in x and size; without x the latter is not wanted and is (B, 0)."""
    batch, tokens = assignment.shape
    rows = offsets.shape[1] - 1
    total = _group_totals(size, None, None, order, offsets)
    along = torch.empty(batch, tokens if x is not None else 0, dtype=torch.float32, device=grad_tokens.device)
    grad_x = _spread_rows(grad_tokens, x, size, total, assignment, along)
    if x is None or along.numel() == 0:
        return grad_x, along
    mean = _group_totals(along, size, total, order, offsets)
    slope = torch.empty_like(along)
    _grad_size_kernel[(triton.cdiv(tokens, 1024) * batch,)](
        along,
        mean,
        total,
        grad_size,
        assignment,
        slope,
        tokens,
        rows,
        *grad_size.stride(),
        *assignment.stride(),
        BLOCK_N=1024,
        num_warps=4,
    )
    return grad_x, slope


def launch_unmerge_tokens_fwd(y: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """See `vidmem_kernels.unmerge_tokens`."""
    return _spread_rows(y, None, None, None, assignment, None)


def launch_sum_groups_fwd(x: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row."""
    return _sum_groups(x, None, None, order, offsets)


# See vidmem_kernels/sparse_gather/triton_kernels.py. Contiguous inputs of many channels, int32 plans.
_UNIT = {"order_stride_n": 1, "offsets_stride_n": 1}
_TOTALS = {"value_stride_n": 1, "size_stride_n": 1, "BLOCK_M": 16, "BLOCK_K": 32, **_UNIT}
_SUMS = {"x_stride_c": 1, "size_stride_n": 1, "UNROLL": _UNROLL, "BLOCK_M": 1, "BLOCK_C": _SUM_TILE, **_UNIT}
_SPREAD = {"y_stride_c": 1, "x_stride_c": 1, "size_stride_n": 1, "assignment_stride_n": 1}
_SPREAD |= {"BLOCK_N": 4, "BLOCK_C": 1024}


def _plan(index: str) -> dict[str, str]:
    return {"order": f"*{index}", "offsets": f"*{index}"}


AOT = {
    "_group_totals_kernel": [
        (
            {"value": "*fp32", **_plan("i32"), "total": "*fp32"},
            {"size": None, "size_total": None, **_TOTALS},
            4,
        ),
        ({**_plan("i32"), "total": "*fp32"}, {"value": None, "size": None, "size_total": None, **_TOTALS}, 4),
        (
            {"value": "*fp32", "size": "*fp32", "size_total": "*fp32", **_plan("i32"), "total": "*fp32"},
            _TOTALS,
            4,
        ),
    ],
    "_sum_groups_kernel": [
        *(
            ({"x": f"*{t}", "size": "*fp32", "total": "*fp32", **_plan(index), "out": f"*{t}"}, _SUMS, 4)
            for t, index in (("bf16", "i32"), ("fp32", "i32"), ("bf16", "i64"))
        ),
        *(
            ({"x": f"*{t}", **_plan("i32"), "out": f"*{t}"}, {"size": None, "total": None, **_SUMS}, 4)
            for t in ("bf16", "fp32", "fp64")
        ),
        (
            {"x": "*bf16", **_plan("i32"), "out": "*bf16"},
            {"size": None, "total": None, **_SUMS, "BLOCK_M": 8, "BLOCK_C": 128},
            4,
        ),
        (
            {"x": "*bf16", "total": "*fp32", **_plan("i32"), "out": "*bf16"},
            {"size": None, "UNROLL": _UNROLL, "BLOCK_M": 1, "BLOCK_C": _SUM_TILE},
            4,
        ),
    ],
    "_spread_rows_kernel": [
        *(
            (
                {"y": f"*{t}", "assignment": f"*{index}", "out": f"*{t}"},
                {"x": None, "size": None, "total": None, "along": None, **_SPREAD},
                4,
            )
            for t, index in (("bf16", "i32"), ("fp32", "i32"), ("fp64", "i32"), ("bf16", "i64"))
        ),
        *(
            (
                {"y": f"*{t}", "size": "*fp32", "total": "*fp32", "assignment": "*i32", "out": f"*{t}"},
                {"x": None, "along": None, **_SPREAD},
                4,
            )
            for t in ("bf16", "fp32")
        ),
        *(
            (
                {
                    "y": f"*{t}",
                    "x": f"*{t}",
                    "size": "*fp32",
                    "total": "*fp32",
                    "assignment": "*i32",
                    "out": f"*{t}",
                    "along": "*fp32",
                },
                {**_SPREAD, "BLOCK_N": 2},
                4,
            )
            for t in ("bf16", "fp32")
        ),
    ],
    "_grad_size_kernel": [
        (
            {
                "along": "*fp32",
                "mean": "*fp32",
                "total": "*fp32",
                "grad_size": "*fp32",
                "assignment": "*i32",
                "out": "*fp32",
            },
            {"grad_size_stride_m": 1, "assignment_stride_n": 1, "BLOCK_N": 1024},
            4,
        )
    ],
}
