"""Triton kernels of scatter_add_tokens.

A stable sort groups the sources by output row, so that one program sums each row, in order and without atomics. A row
with more than _PIECE sources is split into pieces of _PIECE sources, which separate programs sum; their sums are then
added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_tiles import tile_of, vector_of
from .._tuned import Chosen, Tile, Tunable, dtype_name

_PIECE = 256  # sources that one program adds up
_BLOCK = 256  # elements per program in the kernels that make an index


def _sum_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    vector = vector_of(dtype)
    sizes = {(min(32 * warps * vector, width), sources, warps) for warps in (1, 2, 4) for sources in (2, 4, 8)}
    return [{"BLOCK_C": c, "SOURCES": sources, "num_warps": warps} for c, sources, warps in sorted(sizes)]


def _sum_tile(arch: int, dtype: str, width: int) -> Tile:
    # Each thread reads 16 bytes of 4 sources; fewer threads if a row is narrower than 4 warps.
    vector = vector_of(dtype)
    warps = max(1, min(4, width // (32 * vector)))
    return {"BLOCK_C": min(32 * warps * vector, width), "SOURCES": 4, "num_warps": warps}


SUM_PIECES = Tunable("_sum_pieces_fwd_kernel", ("dtype", "width"), _sum_tile, _sum_tiles)
SUM_ROWS = Tunable("_sum_rows_fwd_kernel", ("dtype", "width"), _sum_tile, _sum_tiles)


@triton.jit
def _group_keys_kernel(index, key, N, K, NUM_ROWS, index_stride_b, index_stride_k, BLOCK: tl.constexpr):
    """Sort keys of N = B * K sources: the output row, or NUM_ROWS for a dropped source."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index + (i // K) * index_stride_b + (i % K) * index_stride_k, i < N, other=0).to(tl.int64)
    tl.store(key + i, tl.where((row < 0) | (row >= NUM_ROWS), NUM_ROWS, row).to(key.dtype.element_ty), i < N)


@triton.jit
def _group_offsets_kernel(key, offsets, K, NUM_ROWS, STEPS, BLOCK: tl.constexpr):
    """Offsets (B, NUM_ROWS + 1): how many of the K sorted keys of a batch element are below each row. 2**STEPS > K."""
    batch, row = tile_of(NUM_ROWS + 1, BLOCK)
    low, high = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64) + K
    for _ in range(STEPS):
        middle = (low + high) // 2
        below = tl.load(key + batch * K + middle, middle < high, other=0).to(tl.int64) < row
        low = tl.where(below & (middle < high), middle + 1, low)
        high = tl.where(below, high, middle)
    tl.store(offsets + batch * (NUM_ROWS + 1) + row, low, row <= NUM_ROWS)


@triton.jit
def _sum_sources(
    src, order, begin, end, c, C, src_stride_k, src_stride_c, SOURCES: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum, in order, of the rows of `src` that `order` lists from `begin` to `end`; reads SOURCES of them at once."""
    sum_dtype: tl.constexpr = tl.float64 if src.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_C], dtype=sum_dtype)
    for first in range(begin, end, SOURCES):
        for step in tl.static_range(SOURCES):
            k = first + step
            source = tl.load(order + k, k < end, other=0)
            value = tl.load(src + source * src_stride_k + c * src_stride_c, c < tl.where(k < end, C, 0), other=0)
            total += value.to(sum_dtype)
    return total


@triton.jit
def _sum_pieces_fwd_kernel(
    src,
    order,
    keys,
    offsets,
    pieces,
    K,
    M,
    C,
    src_stride_b,
    src_stride_k,
    src_stride_c,
    PIECE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums one piece of a group with more than PIECE sources, for one slot and channel block per program.

    The sorted positions are divided into ranges of PIECE. Slot 2 i holds the piece that begins in range i and is not
    the first of its group, slot 2 i + 1 the piece that is the first. There is at most one of each, because only groups
    longer than PIECE have pieces.
    """
    slots = 2 * tl.cdiv(K, PIECE)
    batch = (tl.program_id(0) // slots).to(tl.int64)
    slot = (tl.program_id(0) % slots).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_first = slot % 2
    low = slot // 2 * PIECE
    high = tl.minimum(low + PIECE, K)
    # A long group that begins here covers the last position, any other covers the first.
    row = tl.load(keys + batch * K + tl.where(is_first > 0, high - 1, low)).to(tl.int64)
    group = offsets + batch * (M + 1) + tl.minimum(row, M - 1)
    start = tl.load(group)
    end = tl.load(group + 1)
    begin = start + tl.cdiv(tl.maximum(low - start, 0), PIECE) * PIECE
    here = (
        (row < M)
        & (end - start > PIECE)
        & (begin < tl.minimum(high, end))
        & ((begin == start).to(tl.int64) == is_first)
    )
    end = tl.where(here, tl.minimum(begin + PIECE, end), begin)
    lane = src + batch * src_stride_b
    total = _sum_sources(lane, order + batch * K, begin, end, c, C, src_stride_k, src_stride_c, SOURCES, BLOCK_C)
    tl.store(pieces + (batch * slots + slot) * C + c, total, c < tl.where(here, C, 0))


@triton.jit
def _sum_rows_fwd_kernel(
    src,
    order,
    offsets,
    pieces,
    out,
    K,
    M,
    C,
    src_stride_b,
    src_stride_k,
    src_stride_c,
    HAS_PIECES: tl.constexpr,
    PIECE: tl.constexpr,
    SOURCES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums the source rows of one output row, or their pieces, in order, for one channel block per program."""
    batch = (tl.program_id(0) // M).to(tl.int64)
    row = (tl.program_id(0) % M).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(offsets + batch * (M + 1) + row)
    end = tl.load(offsets + batch * (M + 1) + row + 1)
    last = end
    if HAS_PIECES:
        last = tl.where(end - start > PIECE, start, end)
    lane = src + batch * src_stride_b
    total = _sum_sources(lane, order + batch * K, start, last, c, C, src_stride_k, src_stride_c, SOURCES, BLOCK_C)
    if HAS_PIECES:
        slots = 2 * tl.cdiv(K, PIECE)
        for begin in range(last, end, PIECE):
            slot = batch * slots + 2 * (begin // PIECE) + (begin == start).to(tl.int64)
            total += tl.load(pieces + slot * C + c, c < C, other=0)
    tl.store(out + (batch * M + row) * C + c, total.to(out.dtype.element_ty), c < C)


def _group_keys(index: Tensor, num_rows: int) -> Tensor:
    """(B, K) keys of the sources, in the narrowest dtype that holds them: torch sorts 8 bits of a key per pass."""
    dtype = next(d for d in (torch.int16, torch.int32, torch.int64) if num_rows <= torch.iinfo(d).max)
    key = torch.empty(index.shape, dtype=dtype, device=index.device)
    if key.numel() > 0:
        _group_keys_kernel[(triton.cdiv(key.numel(), _BLOCK),)](
            index, key, key.numel(), key.shape[1], num_rows, *index.stride(), BLOCK=_BLOCK
        )
    return key


def _group_offsets(key: Tensor, num_rows: int) -> Tensor:
    """(B, num_rows + 1) int64: where the sources of each row begin in the sorted keys (B, K)."""
    batch, count = key.shape
    offsets = torch.empty(batch, num_rows + 1, dtype=torch.int64, device=key.device)
    _group_offsets_kernel[(triton.cdiv(num_rows + 1, _BLOCK) * batch,)](
        key, offsets, count, num_rows, count.bit_length(), BLOCK=_BLOCK
    )
    return offsets


def _fields(src: Tensor) -> dict[str, str | int]:
    return {"dtype": dtype_name(src.dtype), "width": triton.next_power_of_2(src.shape[2])}


def launch_scatter_add_tokens_fwd(src: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(B, num_rows, C) sums; see `vidmem_kernels.scatter_add_tokens`."""
    batch, count, channels = src.shape
    out = torch.empty(batch, num_rows, channels, dtype=src.dtype, device=src.device)
    if out.numel() == 0:
        return out
    key, order = torch.sort(_group_keys(index, num_rows), dim=1, stable=True)
    offsets = _group_offsets(key, num_rows)
    sizes = (count, num_rows, channels, *src.stride())
    pieces = None
    if count > _PIECE:
        tile = SUM_PIECES.tile(src.device, **_fields(src))
        slots = 2 * triton.cdiv(count, _PIECE)
        pieces = torch.empty(batch, slots, channels, dtype=accumulate_dtype(src.dtype), device=src.device)
        _sum_pieces_fwd_kernel[(batch * slots, triton.cdiv(channels, tile["BLOCK_C"]))](
            src, order, key, offsets, pieces, *sizes, PIECE=_PIECE, **tile
        )
    tile = SUM_ROWS.tile(src.device, **_fields(src))
    _sum_rows_fwd_kernel[(num_rows * batch, triton.cdiv(channels, tile["BLOCK_C"]))](
        src, order, offsets, pieces, out, *sizes, HAS_PIECES=pieces is not None, PIECE=_PIECE, **tile
    )
    return out


def tiles_scatter_add_tokens_fwd(src: Tensor, index: Tensor, num_rows: int) -> list[Chosen]:
    """The tiles that `launch_scatter_add_tokens_fwd` uses."""
    kernels = [SUM_PIECES, SUM_ROWS] if src.shape[1] > _PIECE else [SUM_ROWS]
    return [kernel.chosen(src.device, **_fields(src)) for kernel in kernels]


# See triton_gather.AOT.
_UNIT = {"src_stride_c": 1}
_KINDS = (("bf16", 4096, _UNIT), ("bf16", 128, _UNIT), ("fp32", 4096, _UNIT), ("fp64", 4096, _UNIT), ("bf16", 4096, {}))
_WIDE = {"bf16": "*fp32", "fp32": "*fp32", "fp64": "*fp64"}
AOT = {
    "_group_keys_kernel": [
        ({"index": f"*{index}", "key": f"*{key}"}, {**unit, "BLOCK": _BLOCK}, 4)
        for index, key, unit in (
            ("i32", "i16", {"index_stride_k": 1}),
            ("i64", "i32", {"index_stride_k": 1}),
            ("i32", "i64", {}),
        )
    ],
    "_group_offsets_kernel": [
        ({"key": f"*{key}", "offsets": "*i64"}, {"BLOCK": _BLOCK}, 4) for key in ("i16", "i32", "i64")
    ],
    "_sum_pieces_fwd_kernel": [
        (
            {"src": f"*{src}", "order": "*i64", "keys": "*i32", "offsets": "*i64", "pieces": _WIDE[src]},
            {**unit, "PIECE": _PIECE},
            (SUM_PIECES, {"dtype": src, "width": width}),
        )
        for src, width, unit in _KINDS
    ],
    "_sum_rows_fwd_kernel": [
        (
            {"src": f"*{src}", "order": "*i64", "offsets": "*i64", "pieces": _WIDE[src], "out": f"*{src}"},
            {**unit, "HAS_PIECES": True, "PIECE": _PIECE},
            (SUM_ROWS, {"dtype": src, "width": width}),
        )
        for src, width, unit in _KINDS
    ]
    + [
        (
            {"src": "*bf16", "order": "*i64", "offsets": "*i64", "out": "*bf16"},
            {**_UNIT, "pieces": None, "HAS_PIECES": False, "PIECE": _PIECE},
            (SUM_ROWS, {"dtype": "bf16", "width": 4096}),
        )
    ],
}
