"""Triton kernels of merging and unmerging.

An index of a plan that is out of range is never followed; results that depend on it are NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_tiles import RowMove, distinct, tile_of, vector_of
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_sums import sum_groups, tiles_sum_groups
from .triton_totals import group_totals

# As in gather_tokens; if rows of x are read along with those of y, one load of each at a time.
_MOVE, _BESIDE = RowMove(warps=4, across=2, loads=4), RowMove(warps=4, across=4, loads=1)
_MOVES = [_MOVE, _BESIDE, *(RowMove(*m) for m in ((4, 1, 4), (4, 4, 4), (4, 4, 2), (4, 2, 2), (1, 1, 4), (1, 1, 2)))]


def _spread_tile(arch: int, dtype: str, width: int, beside: bool) -> Tile:
    return (_BESIDE if beside else _MOVE).tile("BLOCK_N", width, vector_of(dtype))


def _spread_tiles(arch: int, dtype: str, width: int, beside: bool) -> list[Tile]:
    moves = (move for move in _MOVES if move.loads <= (2 if beside else 4))
    return distinct(move.tile("BLOCK_N", width, vector_of(dtype)) for move in moves)


SPREAD = Tunable("_spread_rows_kernel", ("dtype", "width", "beside"), _spread_tile, _spread_tiles)


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
    """Copies to each token its row of y; with `total`, times the token's share; with `x`, also its product with x.

    With x, axis 1 of the grid has one program, which needs all channels; otherwise one program per channel block.
    """
    batch, n = tile_of(N, BLOCK_N)
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


def _spread_fields(y: Tensor, beside: bool) -> dict[str, str | int | bool]:
    return {"dtype": dtype_name(y.dtype), "width": triton.next_power_of_2(max(1, y.shape[2])), "beside": beside}


def _spread_rows(
    y: Tensor, x: Tensor | None, size: Tensor | None, total: Tensor | None, assignment: Tensor, along: Tensor | None
) -> Tensor:
    batch, tokens = assignment.shape
    rows, channels = y.shape[1:]
    out = torch.empty(batch, tokens, channels, dtype=y.dtype, device=y.device)
    if batch * tokens == 0 or (channels == 0 and x is None):
        return out
    tile = SPREAD.tile(y.device, **_spread_fields(y, x is not None))
    blocks = 1 if x is not None else triton.cdiv(channels, tile["BLOCK_C"])
    _spread_rows_kernel[(triton.cdiv(tokens, tile["BLOCK_N"]) * batch, blocks)](
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
        **tile,
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
    """The mean moves by (x - mean) / total per unit of size: <grad, x> minus its own mean over the group."""
    batch, n = tile_of(N, BLOCK_N)
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
    origin = torch.empty(offsets.shape[0], offsets.shape[1] - 1, dtype=torch.int32, device=x.device)
    total = group_totals(size, None, None, order, offsets, origin)
    return sum_groups(x, size, total, origin, assignment, order, offsets), total


def launch_merge_tokens_bwd(
    grad_tokens: Tensor,
    grad_size: Tensor,
    x: Tensor | None,
    size: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients with respect to x and size; without x, the latter is not needed and is (B, 0)."""
    batch, tokens = assignment.shape
    rows = offsets.shape[1] - 1
    total = group_totals(size, None, None, order, offsets)
    along = torch.empty(batch, tokens if x is not None else 0, dtype=torch.float32, device=grad_tokens.device)
    grad_x = _spread_rows(grad_tokens, x, size, total, assignment, along)
    if x is None or along.numel() == 0:
        return grad_x, along
    mean = group_totals(along, size, total, order, offsets)
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
    )
    return grad_x, slope


def launch_unmerge_tokens_fwd(y: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """See `vidmem_kernels.unmerge_tokens`."""
    return _spread_rows(y, None, None, None, assignment, None)


def launch_sum_groups_fwd(x: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row."""
    return sum_groups(x, None, None, None, assignment, order, offsets)


def tiles_merge_tokens_fwd(
    x: Tensor, size: Tensor | None, assignment: Tensor, order: Tensor, offsets: Tensor
) -> list[Chosen]:
    """The tiles that `launch_merge_tokens_fwd` uses."""
    return tiles_sum_groups(x, mean=True)


def tiles_unmerge_tokens_fwd(y: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> list[Chosen]:
    """The tiles that `launch_unmerge_tokens_fwd` uses."""
    return [SPREAD.chosen(y.device, **_spread_fields(y, beside=False))]


def tiles_sum_groups_fwd(x: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> list[Chosen]:
    """The tiles that `launch_sum_groups_fwd` uses."""
    return tiles_sum_groups(x, mean=False)


# See sparse_gather.triton_gather.AOT. Contiguous inputs of many channels, int32 plans.
_SPREAD = {"y_stride_c": 1, "x_stride_c": 1, "size_stride_n": 1, "assignment_stride_n": 1}


def _spread(dtype: str, beside: bool = False) -> tuple[Tunable, dict]:
    return SPREAD, {"dtype": dtype, "width": 4096, "beside": beside}


AOT = {
    "_spread_rows_kernel": [
        *(
            (
                {"y": f"*{t}", "assignment": f"*{index}", "out": f"*{t}"},
                {"x": None, "size": None, "total": None, "along": None, **_SPREAD},
                _spread(t),
            )
            for t, index in (("bf16", "i32"), ("fp32", "i32"), ("fp64", "i32"), ("bf16", "i64"))
        ),
        *(
            (
                {"y": f"*{t}", "size": "*fp32", "total": "*fp32", "assignment": "*i32", "out": f"*{t}"},
                {"x": None, "along": None, **_SPREAD},
                _spread(t),
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
                _SPREAD,
                _spread(t, beside=True),
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
