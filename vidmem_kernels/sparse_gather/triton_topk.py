"""Triton kernels of topk_blocks.

First the means of the blocks are computed; half-precision rows that are blocks on their own are left as they are, for
tensor cores. For topk = 1, the scores are compared in registers. For larger topk, the scores of some query blocks with
all key blocks are written, few enough for the cache; the best of each row of scores are found by bisection of their
keys rather than by a sort, in chunks of columns whose winners are compared again. Only the winners are sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from .._numerics import accumulate_dtype
from .._triton_radix_select import order_key
from .._triton_tiles import distinct, vector_of
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_quantize import _divide

# Scores held at a time: 32 MiB in float32, which fits the L2 cache of sm_80 and later.
_SCORES = 1 << 23
_STEP = 64  # query blocks are scored in multiples of this number
_NARROW, _CHUNK = 256, 4096  # columns of a row per program; short rows are combined
_SORTED_AT_ONCE = 256  # columns that a program sorts
_LAST = tl.constexpr(2**31 - 1)


def _means_tile(arch: int, dtype: str, width: int, warps: int = 4, loads: int = 1) -> Tile:
    vector = vector_of(dtype)
    block_d = min(32 * warps * vector, width)
    return {"BLOCK_N": loads * 32 * warps * vector // block_d, "BLOCK_D": block_d, "num_warps": warps}


def _means_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    return distinct(_means_tile(arch, dtype, width, warps, loads) for warps in (1, 2, 4) for loads in (1, 2))


def _dot_tile(arch: int, dtype: str, width: int) -> Tile:
    if dtype in ("bf16", "fp16"):
        return _dot(64 if arch in (100, 103) else 128, 64, min(64, width), 8, 3)  # with 128, registers spill
    # 32 channels of float32 spill registers on sm_120 under Triton 3.6, with 64-bit sizes.
    return _dot(64, 64, min(16 if dtype == "fp32" and arch in (120, 121) else 32, width), 8, 3)


def _dot_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    if dtype in ("bf16", "fp16"):
        sizes = ((128, 64, 8), (64, 64, 4), (64, 128, 8), (128, 128, 8), (128, 32, 4))
        return [_dot(q, k, d, warps, 3) for q, k, warps in sizes for d in {min(64, width), min(128, width)}]
    sizes = ((64, 64, 8), (64, 64, 4), (128, 64, 8), (64, 32, 4))
    return [_dot(q, k, d, warps, 3) for q, k, warps in sizes for d in {16, min(32, width)}]


def _nearest_tile(arch: int, dtype: str, width: int) -> Tile:
    # Running maxima and their positions take two registers per element: with 4 warps, 3 programs share a
    # multiprocessor, and one multiplies while another compares.
    half = dtype in ("bf16", "fp16")
    return _dot(64, 64, min(64, width), 4, 3) if half else _dot(64, 32, min(16, width), 8, 3)


def _dot(q: int, k: int, d: int, warps: int, stages: int) -> Tile:
    return {"BLOCK_Q": q, "BLOCK_K": k, "BLOCK_D": d, "num_warps": warps, "num_stages": stages}


def _best_tile(arch: int, columns: int) -> Tile:
    if columns == _NARROW:
        return {"BLOCK_R": 2, "num_warps": 1}  # a single warp counts without a barrier
    # On sm_80, 8,192 columns in 16 warps spill registers under Triton 3.6.
    return {"BLOCK_R": 1, "num_warps": 8 if columns == _CHUNK or (arch == 80 and columns == 2 * _CHUNK) else 16}


def _best_tiles(arch: int, columns: int) -> list[Tile]:
    choices = ((1, 1), (2, 1), (4, 1), (4, 4), (8, 4)) if columns == _NARROW else ((1, 4), (1, 8), (1, 16))
    return [{"BLOCK_R": rows, "num_warps": warps} for rows, warps in choices]


def _sort_tile(arch: int, columns: int, warps: int = 1) -> Tile:
    return {"BLOCK_R": warps * _SORTED_AT_ONCE // columns, "num_warps": warps}


def _sort_tiles(arch: int, columns: int) -> list[Tile]:
    return [_sort_tile(arch, columns, warps) for warps in (1, 2, 4)]


BLOCK_MEANS = Tunable("_block_means_kernel", ("dtype", "width"), _means_tile, _means_tiles)
BLOCK_SCORES = Tunable("_block_scores_kernel", ("dtype", "width"), _dot_tile, _dot_tiles)
NEAREST = Tunable("_nearest_blocks_kernel", ("dtype", "width"), _nearest_tile, _dot_tiles)
BEST_COLUMNS = Tunable("_best_columns_kernel", ("columns",), _best_tile, _best_tiles)
SORT_COLUMNS = Tunable("_sort_columns_kernel", ("columns",), _sort_tile, _sort_tiles)


@triton.jit
def _block_means_kernel(
    x,
    means,
    L,
    H,
    D,
    COUNT,
    SIZE,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(B, H, COUNT, D) means of SIZE rows each, added in order. Neighbouring programs share rows of all heads."""
    head = tl.program_id(0) % H
    blocks = tl.cdiv(COUNT, BLOCK_N)
    batch = (tl.program_id(0) // H // blocks).to(tl.int64)
    n = (tl.program_id(0) // H % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    in_d = (d < D)[None, :]
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_N, BLOCK_D], sum_dtype)
    row = n * SIZE
    source = x + batch * x_stride_b + head.to(tl.int64) * x_stride_h + d[None, :] * x_stride_d
    for i in tl.range(0, tl.minimum(SIZE, L), loop_unroll_factor=8):
        at = row + i
        total += tl.load(source + at[:, None] * x_stride_l, (at < L)[:, None] & in_d, other=0).to(sum_dtype)
    size = tl.maximum(tl.minimum(L - row, SIZE), 1)  # avoids a division by zero past the end
    mean = _divide(total, size.to(sum_dtype)[:, None])
    target = means + ((batch * H + head) * COUNT + n[:, None]) * D + d[None, :]
    tl.store(target, mean.to(means.dtype.element_ty), (n < COUNT)[:, None] & in_d)


def _block_means(x: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(B * H, ceil(L / size), D) means of blocks of (B, L, H, D)."""
    batch, length, heads, channels = x.shape
    count = triton.cdiv(length, size)
    means = torch.empty(batch * heads, count, channels, dtype=dtype, device=x.device)
    if means.numel() == 0:
        return means
    tile = BLOCK_MEANS.tile(x.device, dtype=dtype_name(x.dtype), width=triton.next_power_of_2(channels))
    grid = (batch * heads * triton.cdiv(count, tile["BLOCK_N"]), triton.cdiv(channels, tile["BLOCK_D"]))
    _block_means_kernel[grid](x, means, length, heads, channels, count, size, *x.stride(), **tile)
    return means


@triton.jit
def _products(q, k, row, column, ROWS, K, D, PRECISION: tl.constexpr, INTERPRET: tl.constexpr, BLOCK_D: tl.constexpr):
    """Products of rows `row` of q with rows `column` of k, in float32 (float64 for float64)."""
    dtype: tl.constexpr = q.dtype.element_ty
    sum_dtype: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    total = tl.zeros([row.shape[0], column.shape[0]], sum_dtype)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        query = tl.load(q + row[:, None] * D + d[None, :], (row < ROWS)[:, None] & (d < D)[None, :], other=0.0)
        key = tl.load(k + column[None, :] * D + d[:, None], (column < K)[None, :] & (d < D)[:, None], other=0.0)
        if INTERPRET:  # its bfloat16 products are wrong
            query, key = query.to(sum_dtype), key.to(sum_dtype)
        total = tl.dot(query, key, total, input_precision=PRECISION, out_dtype=sum_dtype)
    return total


@triton.jit
def _block_scores_kernel(
    q,
    k,
    scores,
    FIRST,
    ROWS,
    Q,
    K,
    D,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(B * H, ROWS, K) products of the query means from FIRST on with all key means."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks_q = tl.cdiv(ROWS, BLOCK_Q)
    lane = (tl.program_id(0) // blocks_k // blocks_q).to(tl.int64)
    row = (tl.program_id(0) // blocks_k % blocks_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = (tl.program_id(0) % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    queries, keys = q + (lane * Q + FIRST) * D, k + lane * K * D
    total = _products(queries, keys, row, column, ROWS, K, D, PRECISION, INTERPRET, BLOCK_D)
    target = scores + (lane * ROWS + row[:, None]) * K + column[None, :]
    tl.store(target, total, (row < ROWS)[:, None] & (column < K)[None, :])


@triton.jit
def _nearest_blocks_kernel(
    q,
    k,
    out,
    Q,
    K,
    D,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(B * H, Q) the first column of the largest product of each query mean; NaN counts as -inf."""
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    lane = (tl.program_id(0) // blocks_q).to(tl.int64)
    row = (tl.program_id(0) % blocks_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    queries, keys = q + lane * Q * D, k + lane * K * D
    sum_dtype: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    best = tl.full([BLOCK_Q, BLOCK_K], float("-inf"), sum_dtype)
    at = tl.zeros([BLOCK_Q, BLOCK_K], tl.int32)
    for first in range(0, K, BLOCK_K):
        column = first + tl.arange(0, BLOCK_K)
        value = _products(queries, keys, row, column.to(tl.int64), Q, K, D, PRECISION, INTERPRET, BLOCK_D)
        better = (value > best) & (column < K)[None, :]  # false for NaN
        best = tl.where(better, value, best)
        at = tl.where(better, first, at).to(tl.int32)
    top = tl.max(best, axis=1)
    found = tl.min(tl.where(best == top[:, None], at + tl.arange(0, BLOCK_K)[None, :], _LAST), axis=1)
    tl.store(out + lane * Q + row, found, row < Q)


@triton.jit
def _best_columns_kernel(
    values,
    columns,
    best_keys,
    best_columns,
    ROWS,
    N,
    SLOTS,
    k,
    ARE_SCORES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The `k` smallest keys of each chunk of BLOCK_N columns (or all of fewer columns), in the order of their columns.

    `values` are (ROWS, N) scores, or the keys that earlier chunks found in `columns`.
    """
    chunks = tl.cdiv(N, BLOCK_N)
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    at = chunk * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < ROWS) & (at < N)
    if ARE_SCORES:
        key = ~order_key(tl.load(values + row * N + at, valid, other=0.0))  # inverted, so that the best come first
        column = at + tl.zeros_like(row).to(tl.int32)
    else:
        key = tl.load(values + row * N + at, valid, other=0)
        column = tl.load(columns + row * N + at, valid, other=0)
    last: tl.constexpr = 0x7FFFFFFFFFFFFFFF if key.dtype == tl.int64 else 0x7FFFFFFF  # above the key of any score
    want = tl.where(tl.max(row, axis=1) < ROWS, tl.minimum(k, N - chunk * BLOCK_N), 0)
    # The smallest key that is at least as large as those of `want` columns lies in [low, high].
    low = tl.min(tl.where(valid, key, last), axis=1)
    high = tl.max(tl.where(valid, key, -last), axis=1)
    key = tl.where(valid, key, last)
    open_rows = tl.max((low < high).to(tl.int32), axis=0)
    while open_rows > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        count = tl.sum((key <= middle[:, None]).to(tl.int32), axis=1)
        # If exactly `want` are below, the search is done.
        low = tl.where(count < want, middle + 1, tl.where(count == want, middle, low))
        high = tl.where(count < want, high, middle)
        open_rows = tl.max((low < high).to(tl.int32), axis=0)
    better = (key < low[:, None]).to(tl.int32)
    equal = (key == low[:, None]).to(tl.int32)
    missing = want - tl.sum(better, axis=1)
    kept = better | (equal & (tl.cumsum(equal, axis=1) <= missing[:, None]).to(tl.int32))
    slot = tl.cumsum(kept, axis=1) - 1
    begin = row * SLOTS + chunk * k
    tl.store(best_keys + begin + slot, key, kept > 0)
    tl.store(best_columns + begin + slot, column, kept > 0)


@triton.jit
def _sort_columns_kernel(keys, columns, out, ROWS, k, out_stride_b, STEP, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sorts columns (ROWS, k) by key, equal keys by column; `out` has STEP rows for each batch element and head."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    at = tl.arange(0, BLOCK_N)[None, :]
    valid = (row < ROWS) & (at < k)
    key = tl.load(keys + row * k + at, valid, other=0x7FFFFFFF).to(tl.int64)
    column = tl.load(columns + row * k + at, valid, other=0x7FFFFFFF).to(tl.int64)
    best = tl.sort((key << 32) | column, dim=1)
    tl.store(out + (row // STEP) * out_stride_b + (row % STEP) * k + at, best.to(tl.int32), valid)


def _best_columns(scores: Tensor, k: int, out: Tensor) -> None:
    """Writes the columns of the `k` largest of (batch and head, rows, N) scores to `out`, best first."""
    lanes, step, count = scores.shape
    rows = lanes * step
    values, columns = scores, None
    key_dtype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    chunks = None
    while chunks != 1:
        width = _NARROW if count <= _NARROW else max(_CHUNK, 2 * triton.next_power_of_2(k))
        chunks = triton.cdiv(count, width)
        slots = (chunks - 1) * k + min(k, count - (chunks - 1) * width)
        keys = torch.empty(rows, slots, dtype=key_dtype, device=scores.device)
        found = torch.empty(rows, slots, dtype=torch.int32, device=scores.device)
        tile = BEST_COLUMNS.tile(scores.device, columns=width)
        _best_columns_kernel[(triton.cdiv(rows, tile["BLOCK_R"]) * chunks,)](
            values, columns, keys, found, rows, count, slots, k, ARE_SCORES=columns is None, BLOCK_N=width, **tile
        )
        values, columns, count = keys, found, slots
    if key_dtype == torch.int32 and k <= _SORTED_AT_ONCE:
        width = triton.next_power_of_2(k)
        tile = SORT_COLUMNS.tile(scores.device, columns=width)
        _sort_columns_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
            values, columns, out, rows, k, out.stride(0), step, BLOCK_N=width, **tile
        )
    else:
        order = values.sort(dim=1, stable=True).indices
        out.copy_(columns.gather(1, order).view(lanes, step, k))


def _is_exact(q: Tensor, block_q: int, block_k: int) -> bool:
    """Whether blocks are single rows whose products tensor cores compute exactly."""
    return block_q == block_k == 1 and q.dtype in (torch.bfloat16, torch.float16)


def _precision(dtype: torch.dtype) -> str:
    """Float32 means of half rows are multiplied in three parts on tensor cores: 21 bits of each factor, not 8 or 11."""
    return "ieee" if dtype in (torch.float32, torch.float64) else "tf32x3"


def _dot_fields(q: Tensor, block_q: int, block_k: int) -> dict[str, str | int]:
    dtype = q.dtype if _is_exact(q, block_q, block_k) else accumulate_dtype(q.dtype)
    return {"dtype": dtype_name(dtype), "width": max(16, triton.next_power_of_2(max(1, q.shape[3])))}


def launch_topk_blocks_fwd(q: Tensor, k: Tensor, block_q: int, block_k: int, topk: int) -> Tensor:
    """(B, H, query blocks, topk) int32; see `vidmem_kernels.topk_blocks`."""
    batch, _, heads, channels = q.shape
    lanes = batch * heads
    queries = triton.cdiv(q.shape[1], block_q)
    out = torch.empty(lanes, queries, topk, dtype=torch.int32, device=q.device)
    if out.numel() > 0:
        dtype = q.dtype if _is_exact(q, block_q, block_k) else accumulate_dtype(q.dtype)
        q_means, k_means = _block_means(q, block_q, dtype), _block_means(k, block_k, dtype)
        fields = _dot_fields(q, block_q, block_k)
        options = {"PRECISION": _precision(q.dtype), "INTERPRET": _env.triton_interpret()}
        if topk == 1:
            tile = NEAREST.tile(q.device, **fields)
            _nearest_blocks_kernel[(lanes * triton.cdiv(queries, tile["BLOCK_Q"]),)](
                q_means, k_means, out, queries, k_means.shape[1], channels, **options, **tile
            )
            return out.view(batch, heads, queries, topk)
        keys = k_means.shape[1]
        fits = _SCORES // (lanes * keys)
        step = max(1, fits // _STEP * _STEP or fits)
        tile = BLOCK_SCORES.tile(q.device, **fields)
        for first in range(0, queries, step):
            rows = min(step, queries - first)
            scores = torch.empty(lanes, rows, keys, dtype=accumulate_dtype(q.dtype), device=q.device)
            grid = (lanes * triton.cdiv(rows, tile["BLOCK_Q"]) * triton.cdiv(keys, tile["BLOCK_K"]),)
            _block_scores_kernel[grid](
                q_means, k_means, scores, first, rows, queries, keys, channels, **options, **tile
            )
            _best_columns(scores, topk, out[:, first : first + rows])
    return out.view(batch, heads, queries, topk)


def tiles_topk_blocks_fwd(q: Tensor, k: Tensor, block_q: int, block_k: int, topk: int) -> list[Chosen]:
    """The tiles that `launch_topk_blocks_fwd` uses."""
    width = triton.next_power_of_2(max(1, q.shape[3]))
    means = BLOCK_MEANS.chosen(q.device, dtype=dtype_name(q.dtype), width=width)
    fields = _dot_fields(q, block_q, block_k)
    if topk == 1:
        return [means, NEAREST.chosen(q.device, **fields)]
    columns = _NARROW if triton.cdiv(k.shape[1], block_k) <= _NARROW else max(_CHUNK, 2 * triton.next_power_of_2(topk))
    return [means, BLOCK_SCORES.chosen(q.device, **fields), BEST_COLUMNS.chosen(q.device, columns=columns)]


# See triton_gather.AOT.
_FOUND = {"best_columns": "*i32"}
_DOTS = (
    ("bf16", 64, "tf32x3"),
    ("fp16", 128, "tf32x3"),
    ("fp32", 128, "tf32x3"),
    ("fp32", 128, "ieee"),
    ("fp64", 128, "ieee"),
)
AOT = {
    "_block_means_kernel": [
        ({"x": f"*{x}", "means": f"*{means}"}, unit, (BLOCK_MEANS, {"dtype": x, "width": 128}))
        for x, means, unit in (
            ("bf16", "fp32", {"x_stride_d": 1}),
            ("bf16", "bf16", {"x_stride_d": 1, "SIZE": 1}),
            ("fp32", "fp32", {"x_stride_d": 1}),
            ("fp64", "fp64", {"x_stride_d": 1}),
            ("bf16", "fp32", {}),
        )
    ],
    "_block_scores_kernel": [
        (
            {"q": f"*{dtype}", "k": f"*{dtype}", "scores": "*fp64" if dtype == "fp64" else "*fp32"},
            {"PRECISION": precision, "INTERPRET": False},
            (BLOCK_SCORES, {"dtype": dtype, "width": width}),
        )
        for dtype, width, precision in _DOTS
    ],
    "_nearest_blocks_kernel": [
        (
            {"q": f"*{dtype}", "k": f"*{dtype}", "out": "*i32"},
            {"PRECISION": precision, "INTERPRET": False},
            (NEAREST, {"dtype": dtype, "width": width}),
        )
        for dtype, width, precision in _DOTS
    ],
    "_best_columns_kernel": [
        (
            {"values": f"*{dtype}", "best_keys": "*i64" if dtype == "fp64" else "*i32", **_FOUND},
            {"columns": None, "ARE_SCORES": True, "BLOCK_N": width},
            (BEST_COLUMNS, {"columns": width}),
        )
        for dtype, width in (("fp32", 256), ("fp32", 4096), ("fp32", 8192), ("fp64", 256), ("fp64", 4096))
    ]
    + [
        (
            {"values": "*i32", "columns": "*i32", "best_keys": "*i32", **_FOUND},
            {"ARE_SCORES": False, "BLOCK_N": width},
            (BEST_COLUMNS, {"columns": width}),
        )
        for width in (256, 4096)
    ],
    "_sort_columns_kernel": [
        ({"keys": "*i32", "columns": "*i32", "out": "*i32"}, {"BLOCK_N": width}, (SORT_COLUMNS, {"columns": width}))
        for width in (8, 64, 256)
    ],
}
