"""Triton kernels of select_tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_radix_select import TILE, chosen_of_tile, find_cut, order_key, programs
from .._triton_tiles import RowMove, distinct, tile_of, vector_of
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_gather import launch_gather_tokens_fwd, tiles_gather_tokens_fwd

# Each thread sums the squares of 2 loads of 16 bytes at a time.
_MOVE = RowMove(warps=4, across=4, loads=2)
_MOVES = [_MOVE, *(RowMove(*m) for m in ((4, 4, 1), (4, 2, 4), (4, 1, 4), (2, 2, 2), (1, 1, 4), (8, 8, 1)))]


def _norm_tile(arch: int, dtype: str, width: int) -> Tile:
    return _MOVE.tile("BLOCK_N", width, vector_of(dtype))


def _norm_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    return distinct(move.tile("BLOCK_N", width, vector_of(dtype)) for move in _MOVES)


NORM_KEYS = Tunable("_norm_keys_kernel", ("dtype", "width"), _norm_tile, _norm_tiles)


@triton.jit
def _load_row_tile(source, start, C, stride, valid, BLOCK_C: tl.constexpr, dtype: tl.constexpr):
    c = start + tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    return tl.load(source + c * stride, valid[:, None] & (c < C), other=0).to(dtype)


@triton.jit
def _score_of(norm, power, MANTISSA: tl.constexpr):
    """A value that orders like norm * 2**power, which itself may exceed the range of the dtype.

    It is norm * 2**power * 2**-64, or a negative number if even that underflows; NaN and infinity are unchanged.
    """
    code: tl.constexpr = tl.int64 if MANTISSA == 52 else tl.int32
    key = norm.to(code, bitcast=True) + ((power - 64).to(code) << MANTISSA)
    score = tl.abs(key).to(norm.dtype, bitcast=True)
    score = tl.where(key >= 0, score, -score)
    score = tl.where(norm == 0, -1.0, score)
    return tl.where(norm < float("inf"), score, norm)


@triton.jit
def _norm_keys_kernel(
    x,
    key,
    ROWS,
    N,
    C,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Keys of the L2 norms of ROWS = B * N rows; rows whose squares overflow or underflow are read again."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = x + ((row // N) * x_stride_b + (row % N) * x_stride_n)[:, None]
    sum_dtype: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    code: tl.constexpr = tl.int64 if sum_dtype == tl.float64 else tl.int32
    MANTISSA: tl.constexpr = 52 if sum_dtype == tl.float64 else 23
    BIAS: tl.constexpr = 1023 if sum_dtype == tl.float64 else 127
    # A smaller sum may have lost terms by underflow.
    LEAST: tl.constexpr = 2.0**-900 if sum_dtype == tl.float64 else 2.0**-100
    squares = tl.zeros([BLOCK_N, BLOCK_C], sum_dtype)
    for start in range(0, C, BLOCK_C):
        value = _load_row_tile(source, start, C, x_stride_c, row < ROWS, BLOCK_C, sum_dtype)
        squares += value * value
    total = tl.sum(squares, axis=1)
    power = tl.zeros([BLOCK_N], tl.int32)
    again = (row < ROWS) & ((total >= LEAST) & (total < float("inf")) == 0)
    if tl.max(again.to(tl.int32), axis=0) > 0:
        largest = tl.zeros(
            [BLOCK_N, BLOCK_C], code
        )  # bits of magnitudes, which have their order, with NaN above infinity
        for start in range(0, C, BLOCK_C):
            value = _load_row_tile(source, start, C, x_stride_c, again, BLOCK_C, sum_dtype)
            largest = tl.maximum(largest, tl.abs(value).to(code, bitcast=True))
        peak = tl.max(largest, axis=1)
        exponent = tl.maximum(peak >> MANTISSA, 1)
        is_number = again & (exponent <= 2 * BIAS)
        exponent = tl.where(is_number, exponent, BIAS + 1)
        factor = ((2 * BIAS + 1 - exponent) << MANTISSA).to(sum_dtype, bitcast=True)
        squares = tl.zeros([BLOCK_N, BLOCK_C], sum_dtype)
        for start in range(0, C, BLOCK_C):
            value = _load_row_tile(source, start, C, x_stride_c, is_number, BLOCK_C, sum_dtype) * factor[:, None]
            squares += value * value
        power = (exponent - (BIAS + 1)).to(tl.int32)
        total = tl.where(again, tl.where(is_number, tl.sum(squares, axis=1), peak.to(sum_dtype, bitcast=True)), total)
    norm = tl.sqrt(total) if sum_dtype == tl.float64 else tl.sqrt_rn(total)
    tl.store(key + row, order_key(_score_of(norm, power, MANTISSA)), row < ROWS)


@triton.jit
def _score_keys_kernel(score, key, N, score_stride_b, score_stride_n, BLOCK: tl.constexpr):
    batch, n = tile_of(N, BLOCK)
    value = tl.load(score + batch * score_stride_b + n * score_stride_n, n < N, other=0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    tl.store(key + batch * N + n, order_key(value), n < N)


def _norm_fields(x: Tensor) -> dict[str, str | int]:
    return {"dtype": dtype_name(x.dtype), "width": triton.next_power_of_2(max(1, x.shape[2]))}


def _keys(x: Tensor, score: Tensor | None) -> Tensor:
    """(B, N) keys of the scores, or of the norms of the rows of x."""
    batch, rows, channels = x.shape
    wide = accumulate_dtype(x.dtype if score is None else score.dtype)
    key = torch.empty(batch, rows, dtype=torch.int64 if wide == torch.float64 else torch.int32, device=x.device)
    if score is None:
        tile = NORM_KEYS.tile(x.device, **_norm_fields(x))
        _norm_keys_kernel[(triton.cdiv(batch * rows, tile["BLOCK_N"]),)](
            x, key, batch * rows, rows, channels, *x.stride(), **tile
        )
    else:
        _score_keys_kernel[programs(key)](score, key, rows, *score.stride(), BLOCK=TILE)
    return key


@triton.jit
def _positions_kernel(key, cut, counts, index, N, keep, BLOCK: tl.constexpr):
    batch, n = tile_of(N, BLOCK)
    kept, slot = chosen_of_tile(key, cut, counts, N, BLOCK)
    tl.store(index + batch * keep + slot, n.to(tl.int32), kept)


def launch_select_tokens_fwd(x: Tensor, keep: int, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """(tokens (B, keep, C), index (B, keep)); see `vidmem_kernels.select_tokens`."""
    if x.shape[0] * keep == 0:
        return x.new_empty(x.shape[0], keep, x.shape[2]), x.new_empty(x.shape[0], keep, dtype=torch.int32)
    key = _keys(x, score)
    cut, counts = find_cut(key, keep)
    index = torch.empty(x.shape[0], keep, dtype=torch.int32, device=x.device)
    _positions_kernel[programs(key)](key, cut, counts, index, x.shape[1], keep, BLOCK=TILE)
    return launch_gather_tokens_fwd(x, index, None, None), index


def tiles_select_tokens_fwd(x: Tensor, keep: int, score: Tensor | None) -> list[Chosen]:
    """The tiles that `launch_select_tokens_fwd` uses."""
    keys = [NORM_KEYS.chosen(x.device, **_norm_fields(x))] if score is None else []
    return keys + tiles_gather_tokens_fwd(x, x, None, None)


# See triton_gather.AOT.
AOT = {
    "_norm_keys_kernel": [
        ({"x": f"*{x}", "key": f"*{key}"}, unit, (NORM_KEYS, {"dtype": x, "width": width}))
        for x, key, width, unit in (
            ("bf16", "i32", 4096, {"x_stride_c": 1}),
            ("bf16", "i32", 128, {"x_stride_c": 1}),
            ("fp64", "i64", 4096, {"x_stride_c": 1}),
            ("bf16", "i32", 4096, {}),
        )
    ],
    "_score_keys_kernel": [
        ({"score": f"*{score}", "key": f"*{key}"}, {**unit, "BLOCK": TILE}, 4)
        for score, key, unit in (
            ("fp32", "i32", {"score_stride_n": 1}),
            ("bf16", "i32", {"score_stride_n": 1}),
            ("fp64", "i64", {"score_stride_n": 1}),
            ("fp32", "i32", {}),
        )
    ],
    "_positions_kernel": [
        ({"key": f"*{key}", "cut": f"*{key}", "counts": "*i32", "index": "*i32"}, {"BLOCK": TILE}, 4)
        for key in ("i32", "i64")
    ],
}
