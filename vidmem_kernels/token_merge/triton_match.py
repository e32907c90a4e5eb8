"""Triton kernels that find the most similar destination of each source.

Scores are compared tile by tile in registers and never stored; see triton_rows for the rows that are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_plan import destinations_before, plan_from_keys, source_keys
from .triton_rows import Layout, is_unit_rows, layout_of, prepare_rows


def _tile(m: int, n: int, c: int, warps: int, stages: int) -> Tile:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "num_warps": warps, "num_stages": stages}


def _default_tile(dtype: str, width: int, narrow: bool) -> Tile:
    """Sources x destinations x channels; `narrow`: few destinations at a time, those that a box sees."""
    stages = 2 if narrow else 3  # a box has few steps, so one load ahead is enough
    if dtype == "fp32":
        return _tile(64, 32 if narrow and width <= 16 else 64, min(32, width), 4, stages)
    if width <= 128:
        return _tile(128, 32 if narrow and width <= 64 else 64, width, 8, stages)
    return _tile(128, 64, 64, 8, stages)


def _all_tile(arch: int, dtype: str, width: int) -> Tile:
    return _default_tile(dtype, width, narrow=False)


def _all_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    # Running maxima and their positions take two registers per element: 128 x 128 needs 16 warps.
    sizes = ((128, 64, 8), (64, 64, 4), (64, 128, 8), (128, 32, 4), (64, 128, 4), (128, 128, 16))
    if dtype == "fp32":
        return [_tile(m, n, c, 4, 3) for m, n in ((64, 64), (128, 32), (32, 64)) for c in {16, min(32, width)}]
    return [
        _tile(m, n, min(c, width), w, s) for m, n, w in sizes for c in {min(64, width), min(128, width)} for s in (2, 3)
    ]


def _window_tile(arch: int, dtype: str, width: int) -> Tile:
    if dtype == "fp32" and width <= 16 and arch >= 100:
        return _tile(32, 32, width, 4, 2)  # with 64 sources, registers spill
    return _default_tile(dtype, width, narrow=True)


def _window_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    if dtype == "fp32":
        return [_tile(m, n, min(32, width), 4, 2) for m, n in ((64, 64), (64, 32), (32, 64))]
    return [_tile(m, n, min(128, width), w, s) for m, n, w in ((128, 64, 8), (128, 32, 4), (64, 64, 4)) for s in (2, 3)]


MATCH_ALL = Tunable("_match_all_kernel", ("dtype", "width"), _all_tile, _all_tiles)
MATCH_WINDOW = Tunable("_match_window_kernel", ("dtype", "width"), _window_tile, _window_tiles)

NO_SIMILARITY = tl.constexpr(-2.0)
# Below any product, above -inf, which marks destinations that a source does not see.
_NAN_PRODUCT = tl.constexpr(-3.0e38)
_LAST = tl.constexpr(2**31 - 1)


@triton.jit
def _load_rows(where, first, INTERPRET: tl.constexpr, BLOCK_C: tl.constexpr):
    # The interpreter uses BLAS: it has no bfloat16 products, and in float32, products of equal rows may differ.
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
    PROTECT: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Matches a tile of sources against one span of all destinations.

    PROTECT: tokens with a negative factor stay alone. A source without a destination gets the score -inf.
    """
    count = N - DESTINATIONS
    tiles = tl.cdiv(count, BLOCK_M)
    tile = tl.program_id(0) % tiles
    split = tl.program_id(0) // tiles % splits
    batch = (tl.program_id(0) // tiles // splits).to(tl.int64)
    row_size = BLOCK_C if HOLD else WIDTH
    lane = rows + batch * N * row_size
    # Tiles may extend beyond their rows, into other rows or the spare ones at the end; these values are not used.
    sources = lane + (DESTINATIONS + tile * BLOCK_M).to(tl.int64) * row_size + tl.arange(0, BLOCK_M) * row_size
    held = _load_rows(sources, 0, INTERPRET, BLOCK_C)
    # Positions fit int32, whatever the type of the sizes.
    begin = (split * span).to(tl.int32)
    end = tl.minimum(begin + span, DESTINATIONS).to(tl.int32)
    wide = tl.zeros([], dtype=tl.int64)
    best = tl.full([BLOCK_M, BLOCK_N], float("-inf"), dtype=tl.float32)
    at = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32) + begin
    unprotected = tl.full([], _LAST, dtype=tl.int32)  # the first destination that is not protected
    for first in range(begin, end, BLOCK_N):
        d = first + tl.arange(0, BLOCK_N)
        inverse = tl.load(factor + batch * N + d, d < DESTINATIONS, other=float("nan"))
        if PROTECT:
            unprotected = tl.minimum(unprotected, tl.min(tl.where(inverse >= 0, d, _LAST), axis=0))
        destinations = lane + (wide + first) * row_size + tl.arange(0, BLOCK_N) * row_size
        value = _products(sources, held, destinations, WIDTH, HOLD, INTERPRET, BLOCK_C) * inverse[None, :]
        # False for NaN, which ranks last: it matters only if there is nothing else.
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
    similarity = tl.where(top == float("-inf"), NO_SIMILARITY, top * own)
    if PROTECT:
        similarity = tl.where((own < 0) | (unprotected == _LAST), float("-inf"), similarity)
        found = tl.where(top == float("-inf"), tl.where(unprotected == _LAST, 0, unprotected), found)
    tl.store(score + target, similarity, in_s)
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
    PROTECT: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Matches the sources of a box of edge_t x edge_h x edge_w cells against the cells that they see.

    Boxes also cover cells that the border of the grid cuts, which may have no destination: cells_t, cells_h and cells_w
    count the cells that have one. Scores and PROTECT are as in `_match_all_kernel`.
    """
    inner_h, inner_w = edge_h * stride_h, edge_w * stride_w
    size = edge_t * stride_t * inner_h * inner_w
    blocks = tl.cdiv(size, BLOCK_M)
    boxes_h, boxes_w = tl.cdiv(tl.cdiv(H, stride_h), edge_h), tl.cdiv(tl.cdiv(W, stride_w), edge_w)
    boxes = tl.cdiv(tl.cdiv(T, stride_t), edge_t) * boxes_h * boxes_w
    box = tl.program_id(0) // blocks % boxes
    batch = (tl.program_id(0) // blocks // boxes).to(tl.int64)
    origin_t = box // (boxes_h * boxes_w) * edge_t
    origin_h = box // boxes_w % boxes_h * edge_h
    origin_w = box % boxes_w * edge_w

    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    t = origin_t * stride_t + r // (inner_h * inner_w)
    h = origin_h * stride_h + r // inner_w % inner_h
    w = origin_w * stride_w + r % inner_w
    is_destination, before = destinations_before(t, h, w, stride_t, stride_h, stride_w, 0, cells_t, cells_h, cells_w)
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
    seen_t = tl.maximum(tl.minimum(origin_t + edge_t + window_t, cells_t) - low_t, 0)
    seen_h = tl.maximum(tl.minimum(origin_h + edge_h + window_h, cells_h) - low_h, 0)
    seen_w = tl.maximum(tl.minimum(origin_w + edge_w + window_w, cells_w) - low_w, 0)
    best = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    found = tl.full([BLOCK_M], 0, dtype=tl.int32)
    for first in range(0, seen_t * seen_h * seen_w, BLOCK_N):
        k = first + tl.arange(0, BLOCK_N)
        cell_t = low_t + k // (seen_h * seen_w)
        cell_h = low_h + k // seen_w % seen_h
        cell_w = low_w + k % seen_w
        in_d = k < seen_t * seen_h * seen_w
        d = tl.where(in_d, (cell_t * cells_h + cell_h) * cells_w + cell_w, 0).to(tl.int32)
        inverse = tl.load(factor + batch * N + d)
        destinations = lane + d.to(tl.int64) * WIDTH
        value = _products(sources, held, destinations, WIDTH, HOLD, INTERPRET, BLOCK_C) * inverse[None, :]
        value = tl.where(value > _NAN_PRODUCT, value, _NAN_PRODUCT)  # replaces NaN
        # Unsigned, so that one comparison tests both sides of the window.
        sees = (cell_t[None, :] - first_t[:, None]).to(tl.uint32) <= 2 * window_t
        sees &= (cell_h[None, :] - first_h[:, None]).to(tl.uint32) <= 2 * window_h
        sees &= (cell_w[None, :] - first_w[:, None]).to(tl.uint32) <= 2 * window_w
        if PROTECT:
            sees &= (inverse >= 0)[None, :]
        value = tl.where(sees & in_d[None, :], value, float("-inf"))
        top = tl.max(value, axis=1)
        at = tl.min(tl.where(value == top[:, None], d[None, :], _LAST), axis=1)
        found = tl.where(top > best, at, found)
        best = tl.maximum(top, best)
    own = tl.load(factor + batch * N + DESTINATIONS + s)
    target = batch * (N - DESTINATIONS) + s
    similarity = tl.where(best <= _NAN_PRODUCT, NO_SIMILARITY, best * own)
    alone = best == float("-inf")
    if PROTECT:
        alone |= own < 0
    tl.store(score + target, tl.where(alone, float("-inf"), similarity), in_s)
    tl.store(column + target, found, in_s)


def _programs(device: torch.device) -> int:
    """The number of programs that keep a device busy."""
    if device.type != "cuda":
        return 2
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count


def _match_all(rows: Tensor, factor: Tensor, layout: Layout, protects: bool, tile: Tile) -> tuple[Tensor, Tensor]:
    """Scores and columns of the sources, (splits, B, S)."""
    batch, tokens, width = *factor.shape, rows.shape[1]
    destinations = layout.destinations
    count = tokens - destinations
    tiles = triton.cdiv(count, tile["BLOCK_M"]) * batch
    columns = triton.cdiv(destinations, tile["BLOCK_N"])
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
        per_split * tile["BLOCK_N"],
        HOLD=width == tile["BLOCK_C"],
        PROTECT=protects,
        INTERPRET=_env.triton_interpret(),
        **tile,
    )
    return score, column


def box_edges(layout: Layout, window: Sequence[int], rows: int) -> list[int]:
    """Cells of a box, per axis: at most `rows` tokens, and chosen so that few cells are seen from it."""
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
    rows: Tensor, factor: Tensor, layout: Layout, window: Sequence[int], protects: bool, tile: Tile
) -> tuple[Tensor, Tensor]:
    """Scores and columns of the sources, (1, B, S)."""
    batch, tokens, width = *factor.shape, rows.shape[1]
    window = [min(w, n) for w, n in zip(window, layout.cells, strict=True)]
    edge = box_edges(layout, window, tile["BLOCK_M"])
    size, boxes = 1, 1
    for e, s, n in zip(edge, layout.stride, layout.grid, strict=True):
        size, boxes = size * e * s, boxes * triton.cdiv(triton.cdiv(n, s), e)
    score = torch.empty(1, batch, tokens - layout.destinations, dtype=torch.float32, device=rows.device)
    column = torch.empty_like(score, dtype=torch.int32)
    _match_window_kernel[(triton.cdiv(size, tile["BLOCK_M"]) * boxes * batch,)](
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
        HOLD=width == tile["BLOCK_C"],
        PROTECT=protects,
        INTERPRET=_env.triton_interpret(),
        **tile,
    )
    return score, column


def _fields(metric: Tensor) -> dict[str, str | int]:
    channels = metric.shape[2]
    dtype = "fp32" if is_unit_rows(metric.dtype, channels) else dtype_name(metric.dtype)
    return {"dtype": dtype, "width": max(16, triton.next_power_of_2(channels))}


def launch_match_tokens_fwd(
    metric: Tensor,
    num_merge: int,
    grid: Sequence[int] | None,
    stride: Sequence[int],
    window: Sequence[int] | None,
    whole_cells: bool,
    num_destinations: int,
    protect: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See the reference."""
    batch, tokens, _ = metric.shape
    if num_merge == 0 or batch == 0:
        return plan_from_keys(None, None, metric, num_merge)
    layout = layout_of(tokens, grid, stride, whole_cells, num_destinations)
    protects = protect is not None
    tile = (MATCH_ALL if window is None else MATCH_WINDOW).tile(metric.device, **_fields(metric))
    rows, factor = prepare_rows(metric, layout, tile["BLOCK_C"], protect)
    if window is None:
        score, column = _match_all(rows, factor, layout, protects, tile)
    else:
        score, column = _match_window(rows, factor, layout, window, protects, tile)
    key, target = source_keys(score, column, tokens, layout.grid, layout.stride, layout.phase, layout.cells)
    return plan_from_keys(key, target, metric, num_merge)


def tiles_match_tokens_fwd(
    metric: Tensor, num_merge: int, grid: Sequence[int] | None, stride: Sequence[int], window: Sequence[int] | None, *_
) -> list[Chosen]:
    """The tiles that `launch_match_tokens_fwd` uses."""
    return [(MATCH_ALL if window is None else MATCH_WINDOW).chosen(metric.device, **_fields(metric))]


def launch_match_into_fwd(
    metric: Tensor, memory_metric: Tensor, num_merge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_into`."""
    # Concatenates the two tensors, which costs a copy, because the kernels expect the prepared rows in one tensor.
    both = torch.cat([memory_metric.expand(metric.shape[0], -1, -1), metric], dim=1)
    return launch_match_tokens_fwd(both, num_merge, None, (1, 1, 1), None, False, memory_metric.shape[1], None)


def tiles_match_into_fwd(metric: Tensor, memory_metric: Tensor, num_merge: int) -> list[Chosen]:
    """The tiles that `launch_match_into_fwd` uses."""
    return [MATCH_ALL.chosen(metric.device, **_fields(metric))]


# See sparse_gather.triton_gather.AOT.
def _aot_match(tunable: Tunable) -> list[tuple]:
    variants = []
    for dtype, width in (
        ("bf16", 128),
        ("bf16", 64),
        ("bf16", 1024),
        ("bf16", 32),
        ("fp16", 128),
        ("fp32", 128),
        ("fp32", 16),
    ):
        pointers = {"rows": f"*{dtype}", "factor": "*fp32", "score": "*fp32", "column": "*i32"}
        held = width == tunable.default(80, dtype=dtype, width=width)["BLOCK_C"]
        for protects in (False, True) if width == 128 else (False,):
            constants = {"HOLD": held, "PROTECT": protects, "INTERPRET": False}
            variants.append((pointers, constants, (tunable, {"dtype": dtype, "width": width})))
    return variants


AOT = {
    "_match_all_kernel": _aot_match(MATCH_ALL),
    "_match_window_kernel": _aot_match(MATCH_WINDOW),
}
