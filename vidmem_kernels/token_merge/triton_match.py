"""Triton kernels that find each source's most similar destination. Not yet run on a GPU.

Rows are scaled once, exactly, so that no square overflows or vanishes, and stored destinations first. Products then
run on tensor cores in the metric's own dtype, and each is divided by both lengths where it is compared: no score
matrix, and half-precision metrics lose nothing to rounded unit vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from .triton_plan import count_at_least, destinations_before, order_key, plan_from_keys, source_keys

_NO_SIMILARITY = tl.constexpr(-2.0)
# Below any product, above -inf, which marks what a source does not see.
_NAN_PRODUCT = tl.constexpr(-3.0e38)
_LAST = tl.constexpr(2**31 - 1)
_SPARE_ROWS = 128  # as a tile has at most


class Layout(NamedTuple):
    """How the tokens (t, h, w) split: destinations are where every axis is at a multiple of its stride.

    Without a grid the odd positions of one axis are destinations: a stride of 2 that starts at 1.
    """

    grid: tuple[int, int, int]
    stride: tuple[int, int, int]
    phase: int
    cells: tuple[int, int, int]

    @property
    def destinations(self) -> int:
        return self.cells[0] * self.cells[1] * self.cells[2]


def layout_of(tokens: int, grid: Sequence[int] | None, stride: Sequence[int]) -> Layout:
    """The layout of `match_tokens`'s arguments."""
    if grid is None:
        return Layout((1, 1, tokens), (1, 1, 2), 1, (1, 1, tokens // 2))
    cells = tuple(triton.cdiv(n, s) for n, s in zip(grid, stride, strict=True))
    return Layout(tuple(grid), tuple(stride), 0, cells)


@triton.jit
def _prepare_kernel(
    x,
    rows,
    factor,
    scale,
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
    """Scaled rows with what to multiply their products by; or, without `rows`, the scales and lengths of tokens.

    UNIT: rows are float32 unit vectors. LARGEST: exponent (biased) + 127 that a row's largest value gets.
    """
    tiles = tl.cdiv(N, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
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
            n // (H * W), n // W % H, n % W, stride_t, stride_h, stride_w, phase, cells_h, cells_w
        )
        slot = batch * N + tl.where(is_destination, before, DESTINATIONS + n - before)
        inverse = tl.full([BLOCK_N], 1.0, dtype=tl.float32)
        if not UNIT:
            inverse = tl.div_rn(inverse, norm)
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


@triton.jit
def _load_rows(where, first, INTERPRET: tl.constexpr, BLOCK_C: tl.constexpr):
    # The interpreter's products are BLAS's: not of bfloat16, and in float32 equal rows' products need not be equal.
    value = tl.load(where[:, None] + first + tl.arange(0, BLOCK_C)[None, :])
    return value.to(tl.float64) if INTERPRET else value


@triton.jit
def _products(sources, held, destinations, WIDTH, HOLD: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_C: tl.constexpr):
    """float32 products of rows; HOLD: the sources fit one block of channels and are already in `held`."""
    sum_dtype: tl.constexpr = tl.float64 if INTERPRET else tl.float32
    if HOLD:
        columns = _load_rows(destinations, 0, INTERPRET, BLOCK_C)
        return tl.dot(held, columns.T, input_precision="ieee", out_dtype=sum_dtype).to(tl.float32)
    product = tl.zeros([sources.shape[0], destinations.shape[0]], dtype=sum_dtype)
    for first in range(0, WIDTH, BLOCK_C):
        values = _load_rows(sources, first, INTERPRET, BLOCK_C)
        columns = _load_rows(destinations, first, INTERPRET, BLOCK_C)
        product = tl.dot(values, columns.T, product, input_precision="ieee", out_dtype=sum_dtype)
    return product.to(tl.float32)


@triton.jit
def _match_all_kernel(
    rows,
    factor,
    score,
    column,
    N,
    DESTINATIONS,
    WIDTH,
    B,
    splits,
    span,
    HOLD: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of sources against one span of all destinations."""
    count = N - DESTINATIONS
    tiles = tl.cdiv(count, BLOCK_M)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    batch = (tl.program_id(0) // tiles // splits).to(tl.int64)
    row_size = BLOCK_C if HOLD else WIDTH
    lane = rows + batch * N * row_size
    # Tiles may reach beyond their rows, into other ones or the spare rows at the end: what is there is not used.
    sources = lane + (DESTINATIONS + tile * BLOCK_M).to(tl.int64) * row_size + tl.arange(0, BLOCK_M) * row_size
    held = _load_rows(sources, 0, INTERPRET, BLOCK_C)
    begin = split * span
    wide = tl.zeros([], dtype=tl.int64)
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK_M, BLOCK_N], 0, dtype=tl.int32) + begin
    for first in range(begin, tl.minimum(begin + span, DESTINATIONS), BLOCK_N):
        d = first + tl.arange(0, BLOCK_N)
        inverse = tl.load(factor + batch * N + d, d < DESTINATIONS, other=float("nan"))
        destinations = lane + (wide + first) * row_size + tl.arange(0, BLOCK_N) * row_size
        value = _products(sources, held, destinations, WIDTH, HOLD, INTERPRET, BLOCK_C) * inverse[None, :]
        # False for NaN, which comes last: it needs no care until nothing else is there.
        better = value > best
        best = tl.where(better, value, best)
        at = tl.where(better, first, at)
    top = tl.max(best, axis=1)
    d = at + tl.arange(0, BLOCK_N)[None, :]
    found = tl.min(tl.where(best == top[:, None], d, _LAST), axis=1)
    s = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_s = s < count
    own = tl.load(factor + batch * N + DESTINATIONS + s, in_s, other=0.0)
    target = (split * B + batch) * count + s
    tl.store(score + target, tl.where(top == float("-inf"), _NO_SIMILARITY, top * own), in_s)
    tl.store(column + target, found, in_s)


@triton.jit
def _match_window_kernel(
    rows,
    factor,
    score,
    column,
    N,
    DESTINATIONS,
    WIDTH,
    T,
    H,
    W,
    stride_t,
    stride_h,
    stride_w,
    cells_t,
    cells_h,
    cells_w,
    window_t,
    window_h,
    window_w,
    edge_t,
    edge_h,
    edge_w,
    HOLD: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sources of a box of edge_t x edge_h x edge_w cells against the box of the cells that any of them sees."""
    inner_h, inner_w = edge_h * stride_h, edge_w * stride_w
    size = edge_t * stride_t * inner_h * inner_w
    blocks = tl.cdiv(size, BLOCK_M)
    boxes_h, boxes_w = tl.cdiv(cells_h, edge_h), tl.cdiv(cells_w, edge_w)
    boxes = tl.cdiv(cells_t, edge_t) * boxes_h * boxes_w
    box = tl.program_id(0) // blocks % boxes
    batch = (tl.program_id(0) // blocks // boxes).to(tl.int64)
    origin_t = box // (boxes_h * boxes_w) * edge_t
    origin_h = box // boxes_w % boxes_h * edge_h
    origin_w = box % boxes_w * edge_w

    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t = origin_t * stride_t + r // (inner_h * inner_w)
    h = origin_h * stride_h + r // inner_w % inner_h
    w = origin_w * stride_w + r % inner_w
    is_destination, before = destinations_before(t, h, w, stride_t, stride_h, stride_w, 0, cells_h, cells_w)
    s = (t * H + h) * W + w - before
    in_s = (r < size) & (t < T) & (h < H) & (w < W) & (is_destination == 0)
    s = tl.where(in_s, s, 0)
    lane = rows + batch * N * WIDTH
    sources = lane + (DESTINATIONS + s).to(tl.int64) * WIDTH
    held = _load_rows(sources, 0, INTERPRET, BLOCK_C)
    first_t, first_h, first_w = t // stride_t - window_t, h // stride_h - window_h, w // stride_w - window_w

    low_t, low_h, low_w = (
        tl.maximum(origin_t - window_t, 0),
        tl.maximum(origin_h - window_h, 0),
        tl.maximum(origin_w - window_w, 0),
    )
    seen_t = tl.minimum(origin_t + edge_t + window_t, cells_t) - low_t
    seen_h = tl.minimum(origin_h + edge_h + window_h, cells_h) - low_h
    seen_w = tl.minimum(origin_w + edge_w + window_w, cells_w) - low_w
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    found = tl.full([BLOCK_M], 0, dtype=tl.int32)
    # Few steps: one load ahead is enough.
    for first in tl.range(0, seen_t * seen_h * seen_w, BLOCK_N, num_stages=2):
        k = first + tl.arange(0, BLOCK_N)
        cell_t = low_t + k // (seen_h * seen_w)
        cell_h = low_h + k // seen_w % seen_h
        cell_w = low_w + k % seen_w
        in_d = k < seen_t * seen_h * seen_w
        d = tl.where(in_d, (cell_t * cells_h + cell_h) * cells_w + cell_w, 0)
        inverse = tl.load(factor + batch * N + d)
        destinations = lane + d.to(tl.int64) * WIDTH
        value = _products(sources, held, destinations, WIDTH, HOLD, INTERPRET, BLOCK_C) * inverse[None, :]
        value = tl.maximum(value, _NAN_PRODUCT)  # which NaN becomes
        # Unsigned, so that one comparison covers both sides of the window.
        sees = (cell_t[None, :] - first_t[:, None]).to(tl.uint32) <= 2 * window_t
        sees &= (cell_h[None, :] - first_h[:, None]).to(tl.uint32) <= 2 * window_h
        sees &= (cell_w[None, :] - first_w[:, None]).to(tl.uint32) <= 2 * window_w
        value = tl.where(sees & in_d[None, :], value, float("-inf"))
        top = tl.max(value, axis=1)
        at = tl.min(tl.where(value == top[:, None], d[None, :], _LAST), axis=1)
        found = tl.where(top > best, at, found)
        best = tl.maximum(top, best)
    own = tl.load(factor + batch * N + DESTINATIONS + s)
    target = batch * (N - DESTINATIONS) + s
    tl.store(score + target, tl.where(best <= _NAN_PRODUCT, _NO_SIMILARITY, best * own), in_s)
    tl.store(column + target, found, in_s)


@triton.jit
def _compare_neighbor(
    x, scale, norm, n, m, exists, best, at, C, x_stride_n, x_stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Best similarity and neighbour of tokens n after neighbours m."""
    product = tl.zeros([BLOCK_N], dtype=tl.float32)
    scale_n, scale_m = tl.load(scale + n, exists, other=0.0), tl.load(scale + m, exists, other=0.0)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = exists[:, None] & (c < C)[None, :]
        a = tl.load(x + n[:, None].to(tl.int64) * x_stride_n + c[None, :].to(tl.int64) * x_stride_c, mask, other=0)
        b = tl.load(x + m[:, None].to(tl.int64) * x_stride_n + c[None, :].to(tl.int64) * x_stride_c, mask, other=0)
        product += tl.sum((a.to(tl.float32) * scale_n[:, None]) * (b.to(tl.float32) * scale_m[:, None]), axis=1)
    lengths = tl.load(norm + n, exists, other=1.0) * tl.load(norm + m, exists, other=1.0)
    similarity = tl.div_rn(product, lengths)
    similarity = tl.where(similarity == similarity, similarity, _NO_SIMILARITY)
    better = exists & (similarity > best)
    return tl.where(better, similarity, best), tl.where(better, m, at)


@triton.jit
def _match_neighbors_kernel(
    x,
    scale,
    norm,
    key,
    target,
    N,
    C,
    T,
    H,
    W,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Key and destination of every source; positions 2 i and 2 i + 1 hold one source and one destination."""
    pairs = tl.cdiv(N, 2)
    tiles = tl.cdiv(pairs, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    even = 2 * ((tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N))
    is_second = (even // (H * W) + even // W % H + even % W) % 2 == 0
    n = tl.where(is_second, even + 1, even)
    other = tl.where(is_second, even, even + 1)
    t, h, w = n // (H * W), n // W % H, n % W
    valid = n < N
    x += batch * x_stride_b
    scale += batch * N
    norm += batch * N
    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK_N], 0, dtype=tl.int32)
    # By ascending position, so that of equal neighbours the first stays.
    best, at = _compare_neighbor(
        x, scale, norm, n, n - H * W, valid & (t > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n - W, valid & (h > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n - 1, valid & (w > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + 1, valid & (w < W - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + W, valid & (h < H - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + H * W, valid & (t < T - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    tl.store(key + batch * N + n, order_key(best), valid)
    tl.store(target + batch * N + n, at, valid)
    tl.store(key + batch * N + other, order_key(tl.full([BLOCK_N], float("-inf"), tl.float32)), other < N)
    tl.store(target + batch * N + other, other, other < N)


# --- launches ---


class Blocks(NamedTuple):
    """Tile of sources x destinations x channels, and warps."""

    m: int
    n: int
    c: int
    warps: int


def _is_unit(dtype: torch.dtype, channels: int) -> bool:
    """Whether rows become float32 unit vectors: for tensor cores too narrow, their cost is nothing."""
    return dtype == torch.float32 or channels <= 16


def _blocks(dtype: torch.dtype, channels: int, windowed: bool) -> Blocks:
    is_unit = _is_unit(dtype, channels)
    channels = max(16, triton.next_power_of_2(channels))
    if is_unit:
        return Blocks(64, 64, min(32, channels), 4)
    if channels <= 128:
        return Blocks(128, 32 if windowed and channels <= 64 else 64, channels, 8)
    return Blocks(128, 64, 64, 8)


def _prepare(metric: Tensor, layout: Layout, block_c: int) -> tuple[Tensor, Tensor]:
    """Rows (B N + spare, width), each element's destinations first, and what to multiply products by, (B, N)."""
    batch, tokens, channels = metric.shape
    unit = _is_unit(metric.dtype, channels)
    width = triton.cdiv(channels, block_c) * block_c
    dtype = torch.float32 if unit else metric.dtype
    rows = torch.empty(batch * tokens + _SPARE_ROWS, width, dtype=dtype, device=metric.device)
    factor = torch.empty(batch, tokens, dtype=torch.float32, device=metric.device)
    _launch_prepare(metric, rows, factor, None, layout, width, unit, block_c)
    return rows, factor


def _launch_prepare(metric, rows, factor, scale, layout, width, unit, block_c):
    batch, tokens, channels = metric.shape
    block_n = max(1, 2048 // block_c)
    # The largest exponent of float16, so that its subnormals keep every bit; 1 for the wide ones.
    largest = 269 if metric.dtype == torch.float16 else 255
    _prepare_kernel[(triton.cdiv(tokens, block_n) * batch,)](
        metric,
        rows,
        factor,
        scale,
        tokens,
        channels,
        width,
        layout.destinations,
        layout.grid[1],
        layout.grid[2],
        *layout.stride,
        layout.phase,
        *layout.cells[1:],
        *metric.stride(),
        UNIT=unit,
        LARGEST=largest,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )


def _programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _match_all(rows: Tensor, factor: Tensor, layout: Layout, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Scores and columns of the sources, (splits, B, S)."""
    batch, tokens, width = *factor.shape, rows.shape[1]
    destinations = layout.destinations
    count = tokens - destinations
    tiles = triton.cdiv(count, blocks.m) * batch
    columns = triton.cdiv(destinations, blocks.n)
    per_split = triton.cdiv(columns, min(columns, max(1, _programs(rows.device) // tiles)))
    splits = triton.cdiv(columns, per_split)
    score = torch.empty(splits, batch, count, dtype=torch.float32, device=rows.device)
    column = torch.empty(splits, batch, count, dtype=torch.int32, device=rows.device)
    _match_all_kernel[(tiles * splits,)](
        rows,
        factor,
        score,
        column,
        tokens,
        destinations,
        width,
        batch,
        splits,
        per_split * blocks.n,
        HOLD=width == blocks.c,
        INTERPRET=_env.triton_interpret(),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        num_warps=blocks.warps,
    )
    return score, column


def box_edges(layout: Layout, window: Sequence[int], rows: int) -> list[int]:
    """Cells of a box, per axis: of at most `rows` tokens, and such that few cells are seen from it."""
    volume = layout.stride[0] * layout.stride[1] * layout.stride[2]
    edge = [1, 1, 1]

    def seen(axis: int) -> int:
        longer = [e * (1 + (i == axis)) for i, e in enumerate(edge)]
        total = 1
        for e, w, n in zip(longer, window, layout.cells, strict=True):
            total *= min(n, e + 2 * w)
        return total

    while 2 * volume * edge[0] * edge[1] * edge[2] <= rows:
        growing = [axis for axis in range(3) if edge[axis] < layout.cells[axis]]
        if not growing:
            break
        edge[min(growing, key=seen)] *= 2
    return edge


def _match_window(
    rows: Tensor, factor: Tensor, layout: Layout, window: Sequence[int], blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """Scores and columns of the sources, (1, B, S)."""
    batch, tokens, width = *factor.shape, rows.shape[1]
    window = [min(w, n) for w, n in zip(window, layout.cells, strict=True)]
    edge = box_edges(layout, window, blocks.m)
    size, boxes = 1, 1
    for e, s, n in zip(edge, layout.stride, layout.cells, strict=True):
        size, boxes = size * e * s, boxes * triton.cdiv(n, e)
    score = torch.empty(1, batch, tokens - layout.destinations, dtype=torch.float32, device=rows.device)
    column = torch.empty_like(score, dtype=torch.int32)
    _match_window_kernel[(triton.cdiv(size, blocks.m) * boxes * batch,)](
        rows,
        factor,
        score,
        column,
        tokens,
        layout.destinations,
        width,
        *layout.grid,
        *layout.stride,
        *layout.cells,
        *window,
        *edge,
        HOLD=width == blocks.c,
        INTERPRET=_env.triton_interpret(),
        BLOCK_M=blocks.m,
        BLOCK_N=blocks.n,
        BLOCK_C=blocks.c,
        num_warps=blocks.warps,
    )
    return score, column


def launch_match_tokens_fwd(
    metric: Tensor, num_merge: int, grid: Sequence[int] | None, stride: Sequence[int], window: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_tokens`."""
    batch, tokens, _ = metric.shape
    if num_merge == 0 or batch == 0:
        return plan_from_keys(None, None, metric, num_merge)
    layout = layout_of(tokens, grid, stride)
    blocks = _blocks(metric.dtype, metric.shape[2], window is not None)
    rows, factor = _prepare(metric, layout, blocks.c)
    if window is None:
        score, column = _match_all(rows, factor, layout, blocks)
    else:
        score, column = _match_window(rows, factor, layout, window, blocks)
    key, target = source_keys(score, column, layout.grid, layout.stride, layout.phase, layout.cells)
    return plan_from_keys(key, target, metric, num_merge)


def _neighbor_keys(metric: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = metric.shape
    block_c = min(128, triton.next_power_of_2(channels))
    norm = torch.empty(batch, tokens, dtype=torch.float32, device=metric.device)
    scale = torch.empty_like(norm)
    key = torch.empty(batch, tokens, dtype=torch.int32, device=metric.device)
    target = torch.empty_like(key)
    _launch_prepare(metric, None, norm, scale, layout_of(tokens, grid, (1, 1, 1)), channels, False, block_c)
    block_n = max(1, 1024 // block_c)
    _match_neighbors_kernel[(triton.cdiv(triton.cdiv(tokens, 2), block_n) * batch,)](
        metric,
        scale,
        norm,
        key,
        target,
        tokens,
        channels,
        *grid,
        *metric.stride(),
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return key, target


def launch_match_neighbors_fwd(
    metric: Tensor, num_merge: int, grid: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_neighbors`."""
    if num_merge == 0 or metric.shape[0] == 0:
        return plan_from_keys(None, None, metric, num_merge)
    return plan_from_keys(*_neighbor_keys(metric, grid), metric, num_merge)


def launch_count_neighbors_fwd(metric: Tensor, grid: Sequence[int], threshold: float) -> Tensor:
    """(B,) int32; see the reference."""
    if metric.shape[0] == 0 or metric.shape[1] < 2:
        return torch.zeros(metric.shape[0], dtype=torch.int32, device=metric.device)
    return count_at_least(_neighbor_keys(metric, grid)[0], threshold)


# See vidmem_kernels/sparse_gather/triton_kernels.py.
def _aot_match(windowed: bool) -> list[tuple[dict, dict, int]]:
    variants = []
    for dtype, name, channels in (
        (torch.bfloat16, "bf16", 128),
        (torch.bfloat16, "bf16", 64),
        (torch.bfloat16, "bf16", 1024),
        (torch.bfloat16, "bf16", 32),
        (torch.float16, "fp16", 128),
        (torch.float32, "fp32", 128),
        (torch.float32, "fp32", 16),
    ):
        blocks = _blocks(dtype, channels, windowed)
        pointers = {"rows": f"*{name}", "factor": "*fp32", "score": "*fp32", "column": "*i32"}
        constants = {"HOLD": channels <= blocks.c, "INTERPRET": False}
        constants |= {"BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_C": blocks.c}
        variants.append((pointers, constants, blocks.warps))
    return variants


def _aot_prepare() -> list[tuple[dict, dict, int]]:
    constants = {"x_stride_c": 1, "LARGEST": 255, "BLOCK_N": 16, "BLOCK_C": 128}
    rows = [
        ({"x": f"*{x}", "rows": f"*{x}", "factor": "*fp32"}, {"scale": None, "UNIT": x == "fp32", **constants}, 4)
        for x in ("bf16", "fp32")
    ]
    lengths = [
        ({"x": f"*{x}", "factor": "*fp32", "scale": "*fp32"}, {"rows": None, "UNIT": False, **constants}, 4)
        for x in ("bf16", "fp32")
    ]
    strided = {"scale": None, "UNIT": False, "LARGEST": 255, "BLOCK_N": 16, "BLOCK_C": 128}
    return [*rows, *lengths, ({"x": "*bf16", "rows": "*bf16", "factor": "*fp32"}, strided, 4)]


AOT = {
    "_prepare_kernel": _aot_prepare(),
    "_match_all_kernel": _aot_match(windowed=False),
    "_match_window_kernel": _aot_match(windowed=True),
    "_match_neighbors_kernel": [
        (
            {"x": f"*{x}", "scale": "*fp32", "norm": "*fp32", "key": "*i32", "target": "*i32"},
            {"x_stride_c": 1, "BLOCK_N": 8, "BLOCK_C": 128},
            4,
        )
        for x in ("bf16", "fp32")
    ],
}
