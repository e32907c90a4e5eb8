"""Determines which tiles of keys a tile of queries needs; small kernels list them before a cross-attention kernel runs.

Times are converted to integers of the same order, so that a window compares as in the reference: in int64, float32 or
float64. `_attention_times_kernel` computes them and the span of each tile; the kernels in triton_lists.py list the
tiles. A window or a block list costs one or two launches, both together at most three; none waits for the GPU.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_lists import LIST, OF_BLOCKS, _block_queries_kernel, _block_tiles_kernel, _window_tiles_kernel

_LEAST = tl.constexpr(-(2**63))
_MOST = tl.constexpr(2**63 - 1)
_SPANS = {"num_warps": 4}


@triton.jit
def _ordered(x, WIDE: tl.constexpr):
    """Integers that order like the numbers, NaN beyond infinity, and which of the numbers are not NaN."""
    known = x == x
    if x.dtype.is_floating():
        x = tl.where(x == 0.0, 0.0, x)  # -0.0 too
        if WIDE:
            bits = x.to(tl.int64, bitcast=True)
            x = tl.where(known, bits ^ ((bits >> 63) & _MOST), _MOST)
        else:
            bits = x.to(tl.int32, bitcast=True)
            x = tl.where(known, bits ^ ((bits >> 31) & 2147483647), 2147483647)
    return x, known


@triton.jit
def _moved(time, side, UP: tl.constexpr):
    """time + side or time - side in int64, saturated at the type's limit; `side` holds the bits of a uint64."""
    limit = tl.full(time.shape, _MOST if UP else _LEAST, tl.int64)
    room = limit - time if UP else time - limit
    beyond = side.to(tl.uint64, bitcast=True) > room.to(tl.uint64, bitcast=True)
    return tl.where(beyond, limit, time + side if UP else time - side)


@triton.jit
def _as(x, INTEGER: tl.constexpr, WIDE: tl.constexpr):
    """Times in the dtype in which they are compared."""
    return x.to(tl.int64) if INTEGER else (x.to(tl.float64) if WIDE else x.to(tl.float32))


@triton.jit
def _rows_of(tile, L, SIZE, parts, BLOCK: tl.constexpr):
    """Rows of a tile, which is within one block of SIZE, and which of them exist."""
    begin = tile // parts * SIZE
    row = begin + tile % parts * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), row < tl.minimum(begin + SIZE, L)


@triton.jit
def _span_queries(
    q_time, left, right, low, high, spans, tile, LQ, SIZE, INTEGER: tl.constexpr, WIDE: tl.constexpr,
    stride_l, BLOCK: tl.constexpr,
):  # fmt: skip
    """Windows of a tile of queries: low, high and [min low, max low, min high, max high]."""
    most: tl.constexpr = _MOST if WIDE else 2147483647
    least: tl.constexpr = _LEAST if WIDE else -2147483648
    row, inside = _rows_of(tile, LQ, SIZE, tl.cdiv(SIZE, BLOCK), BLOCK)
    time = _as(tl.load(q_time + row * stride_l, inside, other=0), INTEGER, WIDE)
    before = tl.zeros_like(row) + left
    after = tl.zeros_like(row) + right
    if INTEGER:
        first = _moved(time, before, False)
        last = _moved(time, after, True)
        some = inside
    else:
        first, known = _ordered(time - _as(before.to(tl.float64, bitcast=True), False, WIDE), WIDE)
        last, also = _ordered(time + _as(after.to(tl.float64, bitcast=True), False, WIDE), WIDE)
        some = known & also & inside
    first = tl.where(some, first, most)
    last = tl.where(some, last, least)
    tl.store(low + row, first, inside)
    tl.store(high + row, last, inside)
    tl.store(spans, tl.min(first))
    tl.store(spans + 1, tl.max(tl.where(inside, first, least)))
    tl.store(spans + 2, tl.min(tl.where(inside, last, most)))
    tl.store(spans + 3, tl.max(last))


@triton.jit
def _span_keys(
    k_time, when, spans, tile, LK, SIZE, stride_l, INTEGER: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Times of a tile of keys, and [min, max, whether none is NaN]."""
    most: tl.constexpr = _MOST if WIDE else 2147483647
    least: tl.constexpr = _LEAST if WIDE else -2147483648
    row, inside = _rows_of(tile, LK, SIZE, tl.cdiv(SIZE, BLOCK), BLOCK)
    time, known = _ordered(_as(tl.load(k_time + row * stride_l, inside, other=0), INTEGER, WIDE), WIDE)
    tl.store(when + row, time, inside)
    tl.store(spans, tl.min(tl.where(known & inside, time, most)))
    tl.store(spans + 1, tl.max(tl.where(known & inside, time, least)))
    tl.store(spans + 2, tl.min(tl.where(inside, known, True).to(tl.int32)).to(when.dtype.element_ty))


@triton.jit(do_not_specialize=["left", "right", "tiles_q", "tiles_k", "q_programs"])
def _attention_times_kernel(
    q_time,
    k_time,
    left,
    right,
    low,
    high,
    when,
    q_spans,
    k_spans,
    LQ,
    LK,
    SIZE_Q,
    SIZE_K,
    tiles_q,
    tiles_k,
    q_programs,
    q_stride_b,
    q_stride_l,
    k_stride_b,
    k_stride_l,
    INTEGER: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Times of one tile, of queries or of keys. Key j is in query i's window iff low[i] <= when[j] <= high[i]."""
    program = tl.program_id(0)
    if program < q_programs:
        batch = (program // tiles_q).to(tl.int64)
        _span_queries(
            q_time + batch * q_stride_b, left, right, low + batch * LQ, high + batch * LQ,
            q_spans + program.to(tl.int64) * 4, program % tiles_q, LQ, SIZE_Q, INTEGER, WIDE, q_stride_l, BLOCK_M,
        )  # fmt: skip
    else:
        other = program - q_programs
        lane = (other // tiles_k).to(tl.int64)
        _span_keys(
            k_time + lane * k_stride_b, when + lane * LK, k_spans + other.to(tl.int64) * 3, other % tiles_k, LK, SIZE_K,
            k_stride_l, INTEGER, WIDE, BLOCK_N,
        )  # fmt: skip


def _bits(side: float, integer: bool) -> int:
    """A side of a window as a kernel argument: the bits of a uint64 or a float64, as an int64."""
    if integer:
        side = 0 if side < 0 else 2**64 - 1 if side >= 2**64 else math.floor(side)
        return side - 2**64 if side >= 2**63 else side
    return struct.unpack("<q", struct.pack("<d", side))[0]


@dataclass
class Windows:
    """Windows and times as ordered integers, and their spans in each tile."""

    low: Tensor  # (B|1, Lq)
    high: Tensor  # (B|1, Lq)
    when: Tensor  # (B|1, Lk)
    q_spans: Tensor  # (B|1, tiles, 4)
    k_spans: Tensor  # (B|1, tiles, 3)


@dataclass
class Visibility:
    """The rules that hide keys: windows of times, a block index, or both, and sinks."""

    queries: int
    keys: int
    sinks: int
    times: tuple[Tensor, Tensor] | None  # of queries and keys
    window: list[float] | None
    block_index: Tensor | None
    size_q: int
    size_k: int

    def _windows(self, block_m: int, block_n: int, tiles_q: int, tiles_k: int) -> Windows:
        q_time, k_time = (torch.atleast_2d(t) for t in self.times)
        dtypes = {q_time.dtype, k_time.dtype}
        integer = not any(d.is_floating_point for d in dtypes)
        wide = dtypes != {torch.float32}
        dtype = {"dtype": torch.int64 if wide else torch.int32, "device": q_time.device}
        low, high, when = (torch.empty(t.shape, **dtype) for t in (q_time, q_time, k_time))
        q_spans = torch.empty(q_time.shape[0], tiles_q, 4, **dtype)
        k_spans = torch.empty(k_time.shape[0], tiles_k, 3, **dtype)
        q_programs = q_time.shape[0] * tiles_q
        _attention_times_kernel[(q_programs + k_time.shape[0] * tiles_k,)](
            q_time, k_time, *(_bits(side, integer) for side in self.window), low, high, when, q_spans, k_spans,
            self.queries, self.keys, self.size_q, self.size_k, tiles_q, tiles_k, q_programs,
            *q_time.stride(), *k_time.stride(),
            INTEGER=integer, WIDE=wide, BLOCK_M=block_m, BLOCK_N=block_n, **_SPANS,
        )  # fmt: skip
        return Windows(low, high, when, q_spans, k_spans)

    def arguments(self, block_m: int, block_n: int, by_key: bool) -> dict[str, object]:
        """Windows, and the tiles of keys for each tile of queries, or with `by_key` the reverse.

        An entry is 2 * tile + listed. For each row of a (batch, head), the entries [begin:middle] are fully visible,
        the entries [middle:end] need a mask. `listed` is 0 if a block is there only for its sinks.
        """
        parts_q, parts_k = triton.cdiv(self.size_q, block_m), triton.cdiv(self.size_k, block_n)
        blocks_q, blocks_k = triton.cdiv(self.queries, self.size_q), triton.cdiv(self.keys, self.size_k)
        tiles_q, tiles_k = blocks_q * parts_q, blocks_k * parts_k
        found: dict[str, object] = {"SIZE_Q": self.size_q, "SIZE_K": self.size_k}
        spans: dict[str, object] = {"q_spans": None, "k_spans": None, "q_spans_stride_b": 0, "k_spans_stride_b": 0}
        batch, heads, device = 1, 1, self.device
        if self.times is not None:
            windows = self._windows(block_m, block_n, tiles_q, tiles_k)
            batch = max(windows.low.shape[0], windows.when.shape[0])
            found |= {"low": windows.low, "high": windows.high, "when": windows.when}
            found |= {"low_stride_b": _stride(windows.low), "when_stride_b": _stride(windows.when)}
            for name in ("q_spans", "k_spans"):
                spans |= {name: getattr(windows, name), f"{name}_stride_b": _stride(getattr(windows, name))}
        sizes = {"LQ": self.queries, "LK": self.keys, "SIZE_Q": self.size_q, "SIZE_K": self.size_k, "SINKS": self.sinks}
        shared = {**spans, **sizes, "BLOCK_M": block_m, "BLOCK_N": block_n, **LIST}
        rows, others = (tiles_k, tiles_q) if by_key else (tiles_q, tiles_k)
        if self.block_index is None:
            capacity = rows * others
        else:
            index = self.block_index
            batch, heads = index.shape[:2]
            sinks = triton.cdiv(self.sinks, self.size_k)
            capacity = tiles_q * min(tiles_k, (index.shape[3] + sinks) * parts_k)
            shared |= {"block_index": index, "TOPK": index.shape[3], "HEADS": heads}
            shared |= {f"index_stride_{axis}": s for axis, s in zip("bhqk", index.stride(), strict=True)}
        lanes = batch * heads
        entries = torch.empty(lanes * capacity, dtype=torch.int32, device=device)
        ranges = torch.empty(lanes * rows, 3, dtype=torch.int64, device=device)
        grid = (lanes * rows,)
        if self.block_index is None:
            _window_tiles_kernel[grid](entries=entries, ranges=ranges, BY_KEY=by_key, **shared)
        elif not by_key:
            _block_tiles_kernel[grid](entries=entries, ranges=ranges, **shared | OF_BLOCKS)
        else:
            counts = torch.empty(lanes * rows, 2, dtype=torch.int32, device=device)
            for counting in (True, False):
                _block_queries_kernel[grid](
                    entries=entries, ranges=ranges, counts=counts, CAPACITY=capacity, COUNT=counting, **shared
                )
        found |= {"ranges": ranges, "entries": entries}
        return found | {"tiles_stride_b": heads if batch > 1 else 0, "tiles_stride_h": 1 if heads > 1 else 0}

    @property
    def device(self) -> torch.device:
        return self.block_index.device if self.times is None else self.times[0].device


def _stride(x: Tensor) -> int:
    """Batch stride of a contiguous tensor, 0 if it is shared by the batch."""
    return x.stride(0) if x.shape[0] > 1 else 0


@dataclass
class Call:
    """The arguments of one call in the form that the kernels need."""

    queries: int
    keys: int
    key_bias: Tensor | None  # (B, H|1, Lk) float32
    visibility: Visibility | None
    sinks: int

    @classmethod
    def of(cls, q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size) -> Call:
        if key_bias is not None:
            key_bias = key_bias.to(torch.float32)
            key_bias = key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)
        queries, keys = q.shape[1], k.shape[1]
        if (window is None and block_index is None) or 0 in (queries, keys):
            return cls(queries, keys, key_bias, None, 0)
        size_q, size_k = queries, keys
        if block_index is not None:
            size_q, size_k = min(size_q, block_size[0]), min(size_k, block_size[1])
        times = None if window is None else (q_time, k_time)
        seen = Visibility(queries, keys, num_sinks, times, window, block_index, size_q, size_k)
        return cls(queries, keys, key_bias, seen, num_sinks)

    @property
    def features(self) -> str:
        """The features that a tile depends on: "bias", "window" and "blocks", those that are present."""
        seen = self.visibility
        has = {
            "bias": self.key_bias is not None,
            "window": seen is not None and seen.times is not None,
            "blocks": seen is not None and seen.block_index is not None,
        }
        return " ".join(name for name, there in has.items() if there)

    def limited(self, tile: dict[str, object]) -> dict[str, object]:
        """`tile` with block sizes that are at most its own and waste the least on the blocks of queries and keys."""
        if self.visibility is None:
            return tile
        sizes = {"BLOCK_M": self.visibility.size_q, "BLOCK_N": self.visibility.size_k}
        return tile | {name: min(tile[name], max(16, triton.next_power_of_2(s))) for name, s in sizes.items()}

    def query_tiles(self, block: int) -> int:
        """The number of tiles of queries, each within one block."""
        size = max(1, self.queries) if self.visibility is None else self.visibility.size_q
        return triton.cdiv(self.queries, size) * triton.cdiv(size, block)

    def key_tiles(self, block: int) -> int:
        """The number of tiles of keys, each within one block."""
        size = max(1, self.keys) if self.visibility is None else self.visibility.size_k
        return triton.cdiv(self.keys, size) * triton.cdiv(size, block)

    def arguments(self, tile: dict[str, object], by_key: bool) -> dict[str, object]:
        """The arguments that all kernels share; lists the tiles of the call."""
        found = dict.fromkeys(("bias", "when", "low", "high", "ranges", "entries"))
        names = ("bias_stride_b", "bias_stride_h", "bias_stride_k", "when_stride_b", "low_stride_b")
        found |= dict.fromkeys((*names, "tiles_stride_b", "tiles_stride_h"), 0)
        found |= {"SIZE_Q": 1, "SIZE_K": 1, "SINKS": self.sinks, "HAS_SINKS": self.sinks > 0, "HAS_BLOCKS": False}
        if self.key_bias is not None:
            batch, head, key = self.key_bias.stride()
            found |= {"bias": self.key_bias, "bias_stride_b": batch, "bias_stride_k": key}
            found["bias_stride_h"] = head if self.key_bias.shape[1] > 1 else 0
        if self.visibility is not None:
            found |= self.visibility.arguments(tile["BLOCK_M"], tile["BLOCK_N"], by_key)
            found["HAS_BLOCKS"] = self.visibility.block_index is not None
        return found


_TIMES = {"low": "*i64", "high": "*i64", "when": "*i64", "q_spans": "*i64", "k_spans": "*i64"}
_SIDES = {"left": "i64", "right": "i64"}
# See sparse_gather.triton_gather.AOT.
AOT = {
    "_attention_times_kernel": [
        (
            {"q_time": "*i64", "k_time": "*i64", **_SIDES, **_TIMES},
            {"INTEGER": True, "WIDE": True, "BLOCK_M": 128, "BLOCK_N": 64},
            4,
        ),
        (
            {"q_time": "*fp32", "k_time": "*fp32", **_SIDES, **dict.fromkeys(_TIMES, "*i32")},
            {"INTEGER": False, "WIDE": False, "BLOCK_M": 128, "BLOCK_N": 64},
            4,
        ),
        (
            {"q_time": "*i32", "k_time": "*fp64", **_SIDES, **_TIMES},
            {"INTEGER": False, "WIDE": True, "BLOCK_M": 64, "BLOCK_N": 128},
            4,
        ),
    ]
}
