"""Triton kernel that scales the rows of a metric for matching, and the layout of sources and destinations.

A row is multiplied by a power of two, exactly, so that no square overflows or underflows, and keeps its dtype: products
run on tensor cores and are divided by both lengths when they are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_tiles import distinct, tile_of
from .._tuned import Tile, Tunable, dtype_name
from .triton_plan import destinations_before

_SPARE_ROWS = 128  # the most rows of a tile


def _tile(arch: int, dtype: str, block_c: int, elements: int = 16) -> Tile:
    return {"BLOCK_N": max(1, 128 * elements // block_c), "num_warps": 4}


def _tiles(arch: int, dtype: str, block_c: int) -> list[Tile]:
    return distinct(_tile(arch, dtype, block_c, elements) for elements in (8, 16, 32))


PREPARE = Tunable("_prepare_kernel", ("dtype", "block_c"), _tile, _tiles)


class Layout(NamedTuple):
    """The layout of tokens (t, h, w): destinations are where every axis is at a multiple of its stride, within `cells`.

    Without a grid, the odd positions of one axis are destinations: a stride of 2 that starts at 1. If the first tokens
    are the destinations, they form the first line of a grid, whose last line may be incomplete.
    """

    grid: tuple[int, int, int]
    stride: tuple[int, int, int]
    phase: int
    cells: tuple[int, int, int]

    @property
    def destinations(self) -> int:
        return self.cells[0] * self.cells[1] * self.cells[2]


def layout_of(
    tokens: int,
    grid: Sequence[int] | None,
    stride: Sequence[int],
    whole_cells: bool = False,
    num_destinations: int = -1,
) -> Layout:
    """The layout for the arguments of `match_tokens`."""
    if num_destinations >= 0:
        line = max(1, num_destinations)
        return Layout((1, triton.cdiv(tokens, line), line), (1, 1, 1), 0, (1, 1, num_destinations))
    if grid is None:
        return Layout((1, 1, tokens), (1, 1, 2), 1, (1, 1, tokens // 2))
    cells = tuple(n // s if whole_cells else triton.cdiv(n, s) for n, s in zip(grid, stride, strict=True))
    return Layout(tuple(grid), tuple(stride), 0, cells)


@triton.jit
def _prepare_kernel(
    x,
    rows,
    factor,
    scale,
    protect,
    N,
    C,
    WIDTH,
    DESTINATIONS,
    H,
    W,
    stride_t,
    stride_h,
    stride_w,
    phase,
    cells_t,
    cells_h,
    cells_w,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    UNIT: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Scaled rows and the factors of their products; without `rows`, the scales and lengths of tokens.

    UNIT: rows are float32 unit vectors. LARGEST: the exponent (biased) + 127 that a row's largest value gets. Tokens
    marked by `protect` get rows of NaN and the factor -1.
    """
    batch, n = tile_of(N, BLOCK_N)
    n = n.to(tl.int32)  # used in divisions below
    in_n = n < N
    source = x + batch * x_stride_b + n[:, None].to(tl.int64) * x_stride_n
    peak = tl.zeros([BLOCK_N], dtype=tl.float32)
    bad = tl.zeros([BLOCK_N], dtype=tl.int32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        value = tl.load(source + c[None, :] * x_stride_c, in_n[:, None] & (c < C)[None, :], other=0).to(tl.float32)
        size = tl.abs(value)
        finite = size < float("inf")
        peak = tl.maximum(peak, tl.max(tl.where(finite, size, 0.0), axis=1))
        bad = tl.maximum(bad, tl.max(tl.where(finite, 0, 1), axis=1))
    exponent = tl.maximum((peak.to(tl.int32, bitcast=True) >> 23) & 0xFF, 1)
    power = ((LARGEST - exponent) << 23).to(tl.float32, bitcast=True)
    divisor = tl.where(peak == 0, 1.0, peak)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)
        value = tl.load(source + c[None, :] * x_stride_c, in_n[:, None] & (c < C)[None, :], other=0).to(tl.float32)
        if UNIT:
            value = tl.div_rn(value, tl.broadcast_to(divisor[:, None], [BLOCK_N, BLOCK_C]))
        else:
            value = value * power[:, None]
        total += tl.sum(value * value, axis=1)
    norm = tl.sqrt_rn(total)
    norm = tl.where(norm == 0, 1.0, norm)
    if rows is None:
        tl.store(scale + batch * N + n, power, in_n)
        tl.store(factor + batch * N + n, tl.where(bad > 0, float("nan"), norm), in_n)
    else:
        is_destination, before = destinations_before(
            n // (H * W), n // W % H, n % W, stride_t, stride_h, stride_w, phase, cells_t, cells_h, cells_w
        )
        slot = batch * N + tl.where(is_destination, before, DESTINATIONS + n - before)
        inverse = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        if not UNIT:
            inverse = tl.div_rn(inverse, norm)
        if protect is not None:
            alone = tl.load(protect + batch * N + n, in_n, other=0) != 0
            inverse = tl.where(alone, -1.0, tl.where(bad > 0, 1.0, inverse))
            bad = tl.where(alone, 1, bad)
        tl.store(factor + slot, inverse, in_n)
        for first in range(0, WIDTH, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C).to(tl.int64)
            mask = in_n[:, None] & (c < C)[None, :]
            value = tl.load(source + c[None, :] * x_stride_c, mask, other=0).to(tl.float32)
            if UNIT:
                value = tl.div_rn(value, tl.broadcast_to(divisor[:, None], [BLOCK_N, BLOCK_C]))
                value = tl.div_rn(value, tl.broadcast_to(norm[:, None], [BLOCK_N, BLOCK_C]))
            else:
                value = value * power[:, None]
            value = tl.where((bad > 0)[:, None], float("nan"), value)
            target = rows + slot[:, None] * WIDTH + c[None, :]
            tl.store(target, value.to(rows.dtype.element_ty), in_n[:, None] & (c < WIDTH)[None, :])


def is_unit_rows(dtype: torch.dtype, channels: int) -> bool:
    """Whether rows become float32 unit vectors: they are too narrow for tensor cores, and their cost is negligible."""
    return dtype == torch.float32 or channels <= 16


def prepare_rows(metric: Tensor, layout: Layout, block_c: int, protect: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows (B N + spare, width), the destinations of each batch element first, and the factors of products, (B, N).

    The factor of a token marked by `protect` (B, N) is -1.
    """
    batch, tokens, channels = metric.shape
    unit = is_unit_rows(metric.dtype, channels)
    width = triton.cdiv(channels, block_c) * block_c
    dtype = torch.float32 if unit else metric.dtype
    rows = torch.empty(batch * tokens + _SPARE_ROWS, width, dtype=dtype, device=metric.device)
    factor = torch.empty(batch, tokens, dtype=torch.float32, device=metric.device)
    launch_prepare(metric, rows, factor, None, layout, width, unit, block_c, protect)
    return rows, factor


def launch_prepare(metric, rows, factor, scale, layout, width, unit, block_c, protect=None):
    batch, tokens, channels = metric.shape
    tile = PREPARE.tile(metric.device, dtype=dtype_name(metric.dtype), block_c=block_c)
    # The largest exponent for float16, so that subnormals keep every bit; 1 for dtypes of a wider range.
    largest = 269 if metric.dtype == torch.float16 else 255
    _prepare_kernel[(triton.cdiv(tokens, tile["BLOCK_N"]) * batch,)](
        metric,
        rows,
        factor,
        scale,
        None if protect is None else protect.contiguous().view(torch.uint8),
        tokens,
        channels,
        width,
        layout.destinations,
        layout.grid[1],
        layout.grid[2],
        *layout.stride,
        layout.phase,
        *layout.cells,
        *metric.stride(),
        UNIT=unit,
        LARGEST=largest,
        BLOCK_C=block_c,
        **tile,
    )


def _aot() -> list[tuple]:
    constants = {"protect": None, "x_stride_c": 1, "LARGEST": 255, "BLOCK_C": 128}
    strided = {"scale": None, "protect": None, "UNIT": False, "LARGEST": 255, "BLOCK_C": 128}
    protected = {"scale": None, "x_stride_c": 1, "LARGEST": 255, "BLOCK_C": 128}
    calls = [
        *(
            ({"x": f"*{x}", "rows": f"*{x}"}, {"scale": None, "UNIT": x == "fp32", **constants})
            for x in ("bf16", "fp32")
        ),
        *(({"x": f"*{x}", "scale": "*fp32"}, {"rows": None, "UNIT": False, **constants}) for x in ("bf16", "fp32")),
        ({"x": "*bf16", "rows": "*bf16"}, strided),
        *(
            ({"x": f"*{x}", "rows": f"*{x}", "protect": "*u8"}, {"UNIT": x == "fp32", **protected})
            for x in ("bf16", "fp32")
        ),
    ]
    return [
        ({**pointers, "factor": "*fp32"}, fixed, (PREPARE, {"dtype": pointers["x"][1:], "block_c": 128}))
        for pointers, fixed in calls
    ]


AOT = {"_prepare_kernel": _aot()}
