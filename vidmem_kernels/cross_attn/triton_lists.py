"""Triton kernels that list the tiles of keys that each tile of queries sees, and the reverse.

Each list has two parts: tiles of which every query sees every key, and tiles that need a mask. Entries are in the order
of the candidates, so that sums over them are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROWS = tl.constexpr(16)  # rows of a block index that are searched for a block at a time
_BAD = tl.constexpr(-1)  # replaces the end of the list of queries whose block index is out of range
LIST = {"CHUNK": 64, "num_warps": 4}
OF_BLOCKS = {"CHUNK": 32, "num_warps": 4}  # for _block_tiles_kernel: with 64, registers spill on sm_100


@triton.jit
def _verdict(
    q_spans, k_spans, q_tile, k_tile, listed, there, LQ, LK, SIZE_Q, SIZE_K, SINKS, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Which pairs of tiles are fully visible, and which partly, among those that are `there`."""
    parts_q = tl.cdiv(SIZE_Q, BLOCK_M)
    parts_k = tl.cdiv(SIZE_K, BLOCK_N)
    q_start = q_tile // parts_q * SIZE_Q + q_tile % parts_q * BLOCK_M
    q_stop = tl.minimum((q_tile // parts_q + 1) * SIZE_Q, LQ)
    start = k_tile // parts_k * SIZE_K + k_tile % parts_k * BLOCK_N
    stop = tl.minimum((k_tile // parts_k + 1) * SIZE_K, LK)
    there = there & (q_start < q_stop) & (start < stop)
    some = listed
    every = listed
    if q_spans is not None:
        of_q = q_spans + q_tile.to(tl.int64) * 4
        of_k = k_spans + k_tile.to(tl.int64) * 3
        least = tl.load(of_k, there, other=0)
        most = tl.load(of_k + 1, there, other=0)
        numbers = tl.load(of_k + 2, there, other=0)
        some = some & (tl.load(of_q, there, other=0) <= most) & (least <= tl.load(of_q + 3, there, other=0))
        every = every & (tl.load(of_q + 1, there, other=0) <= least) & (most <= tl.load(of_q + 2, there, other=0))
        every = every & (numbers > 0)
    full = there & (start + BLOCK_N <= stop) & (every | (start + BLOCK_N <= SINKS))
    return full, there & ~full & (some | (start < SINKS))


@triton.jit
def _put(entries, tile, listed, full, part, full_at, part_at, WRITE: tl.constexpr):
    """The places after the entries of `full` and `part`, which are written or only counted."""
    full = full.to(tl.int32)
    part = part.to(tl.int32)
    if WRITE:
        code = tile * 2 + listed.to(tl.int32)
        tl.store(entries + full_at + tl.cumsum(full, 0) - full, code, full > 0)
        tl.store(entries + part_at + tl.cumsum(part, 0) - part, code, part > 0)
    return full_at + tl.sum(full, 0), part_at + tl.sum(part, 0)


@triton.jit
def _scan_window(
    entries, full_at, part_at, q_spans, k_spans, row, others, LQ, LK, SIZE_Q, SIZE_K, SINKS, BY_KEY: tl.constexpr,
    WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    for first in range(0, others, CHUNK):
        tile = first + tl.arange(0, CHUNK)
        own = tl.zeros_like(tile) + row
        q_tile = tile if BY_KEY else own
        k_tile = own if BY_KEY else tile
        there = tile < others
        full, part = _verdict(
            q_spans, k_spans, q_tile, k_tile, there, there, LQ, LK, SIZE_Q, SIZE_K, SINKS, BLOCK_M, BLOCK_N
        )
        full_at, part_at = _put(entries, tile, there, full, part, full_at, part_at, WRITE)
    return full_at, part_at


@triton.jit
def _window_tiles_kernel(
    q_spans,
    k_spans,
    entries,
    ranges,
    q_spans_stride_b,
    k_spans_stride_b,
    LQ,
    LK,
    SIZE_Q,
    SIZE_K,
    SINKS,
    BY_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one tile, of queries or BY_KEY of keys, if only windows hide keys."""
    tiles_q = tl.cdiv(LQ, BLOCK_M)
    tiles_k = tl.cdiv(LK, BLOCK_N)
    rows = tiles_k if BY_KEY else tiles_q
    others = tiles_q if BY_KEY else tiles_k
    row = tl.program_id(0) % rows
    batch = (tl.program_id(0) // rows).to(tl.int64)
    q_spans += batch * q_spans_stride_b
    k_spans += batch * k_spans_stride_b
    begin = tl.program_id(0).to(tl.int64) * others
    full, _ = _scan_window(
        entries, begin * 0, begin * 0, q_spans, k_spans, row, others, LQ, LK, SIZE_Q, SIZE_K, SINKS, BY_KEY, False,
        BLOCK_M, BLOCK_N, CHUNK,
    )  # fmt: skip
    middle, end = _scan_window(
        entries, begin, begin + full, q_spans, k_spans, row, others, LQ, LK, SIZE_Q, SIZE_K, SINKS, BY_KEY, True,
        BLOCK_M, BLOCK_N, CHUNK,
    )  # fmt: skip
    _put_range(ranges, tl.program_id(0), begin, middle, end)


@triton.jit
def _put_range(ranges, row, begin, middle, end):
    at = ranges + row.to(tl.int64) * 3
    tl.store(at, begin)
    tl.store(at + 1, middle)
    tl.store(at + 2, end)


@triton.jit
def _among(index, stride, block, before, CHUNK: tl.constexpr):
    """Whether `block` is in an index, at a place before `before`."""
    found = tl.zeros_like(block)
    for first in range(0, tl.max(before), CHUNK):
        j = first + tl.arange(0, CHUNK)
        other = tl.load(index + j.to(tl.int64) * stride, j < tl.max(before), other=-1).to(tl.int32)
        same = (block[:, None] == other[None, :]) & (j[None, :] < before[:, None])
        found = tl.maximum(found, tl.max(same.to(tl.int32), 1))
    return found > 0


@triton.jit
def _scan_blocks(
    entries, full_at, part_at, q_spans, k_spans, index, stride, q_tile, TOPK, LQ, LK, SIZE_Q, SIZE_K, SINKS,
    WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The places after the tiles of the listed blocks and of the sinks, and whether a block is out of range."""
    parts = tl.cdiv(SIZE_K, BLOCK_N)
    count = TOPK + tl.cdiv(SINKS, SIZE_K)
    bad = q_tile * 0
    for first in range(0, count, CHUNK):
        i = first + tl.arange(0, CHUNK)
        is_listed = i < TOPK
        found = tl.load(index + i.to(tl.int64) * stride, is_listed, other=-1)
        wrong = (found < -1) | (found >= tl.cdiv(LK, SIZE_K))
        bad = tl.maximum(bad, tl.max(wrong.to(tl.int32), 0))
        block = tl.where(is_listed, tl.where(wrong, -1, found).to(tl.int32), i - TOPK)
        kept = (block >= 0) & (i < count)
        kept = kept & ~_among(index, stride, block, tl.minimum(i, TOPK), CHUNK)
        for part in range(0, parts):
            tile = block * parts + part
            full, some = _verdict(
                q_spans, k_spans, tl.zeros_like(tile) + q_tile, tile, kept & is_listed, kept, LQ, LK, SIZE_Q, SIZE_K,
                SINKS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            full_at, part_at = _put(entries, tile, kept & is_listed, full, some, full_at, part_at, WRITE)
    return full_at, part_at, bad


@triton.jit
def _block_tiles_kernel(
    q_spans,
    k_spans,
    block_index,
    entries,
    ranges,
    q_spans_stride_b,
    k_spans_stride_b,
    index_stride_b,
    index_stride_h,
    index_stride_q,
    index_stride_k,
    HEADS,
    TOPK,
    LQ,
    LK,
    SIZE_Q,
    SIZE_K,
    SINKS,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one tile of queries: the blocks of its index, each once, and the sinks."""
    parts_q = tl.cdiv(SIZE_Q, BLOCK_M)
    parts_k = tl.cdiv(SIZE_K, BLOCK_N)
    tiles_q = tl.cdiv(LQ, SIZE_Q) * parts_q
    tile = tl.program_id(0) % tiles_q
    lane = (tl.program_id(0) // tiles_q).to(tl.int64)
    if q_spans is not None:
        q_spans += lane // HEADS * q_spans_stride_b
        k_spans += lane // HEADS * k_spans_stride_b
    index = block_index + lane // HEADS * index_stride_b + lane % HEADS * index_stride_h
    index += (tile // parts_q).to(tl.int64) * index_stride_q
    held = tl.minimum(tl.cdiv(LK, SIZE_K), TOPK + tl.cdiv(SINKS, SIZE_K)) * parts_k
    begin = tl.program_id(0).to(tl.int64) * held
    full, _, bad = _scan_blocks(
        entries, begin * 0, begin * 0, q_spans, k_spans, index, index_stride_k, tile, TOPK, LQ, LK, SIZE_Q, SIZE_K,
        SINKS, False, BLOCK_M, BLOCK_N, CHUNK,
    )  # fmt: skip
    middle, end, _ = _scan_blocks(
        entries, begin, begin + full, q_spans, k_spans, index, index_stride_k, tile, TOPK, LQ, LK, SIZE_Q, SIZE_K,
        SINKS, True, BLOCK_M, BLOCK_N, CHUNK,
    )  # fmt: skip
    _put_range(ranges, tl.program_id(0), begin, middle, tl.where(bad > 0, _BAD, end))


@triton.jit
def _scan_queries(
    entries, full_at, part_at, q_spans, k_spans, index, stride_q, stride_k, k_tile, TOPK, LQ, LK, SIZE_Q, SIZE_K,
    SINKS, WRITE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The places after the tiles of queries that list the block of a tile of keys, or see sinks in it."""
    parts_q = tl.cdiv(SIZE_Q, BLOCK_M)
    block = k_tile // tl.cdiv(SIZE_K, BLOCK_N)
    for first in range(0, tl.cdiv(LQ, SIZE_Q), _ROWS):
        r = first + tl.arange(0, _ROWS)
        inside = r < tl.cdiv(LQ, SIZE_Q)
        found = tl.zeros([_ROWS], tl.int32)
        for place in range(0, TOPK, CHUNK):
            j = place + tl.arange(0, CHUNK)
            at = index + r.to(tl.int64)[:, None] * stride_q + j.to(tl.int64)[None, :] * stride_k
            other = tl.load(at, inside[:, None] & (j < TOPK)[None, :], other=-1)
            found = tl.maximum(found, tl.max((other == block).to(tl.int32), 1))
        listed = found > 0
        for part in range(0, parts_q):
            tile = r * parts_q + part
            full, some = _verdict(
                q_spans, k_spans, tile, tl.zeros_like(tile) + k_tile, listed, inside, LQ, LK, SIZE_Q, SIZE_K, SINKS,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip
            full_at, part_at = _put(entries, tile, listed, full, some, full_at, part_at, WRITE)
    return full_at, part_at


@triton.jit
def _block_queries_kernel(
    q_spans,
    k_spans,
    block_index,
    entries,
    ranges,
    counts,
    q_spans_stride_b,
    k_spans_stride_b,
    index_stride_b,
    index_stride_h,
    index_stride_q,
    index_stride_k,
    HEADS,
    TOPK,
    CAPACITY,
    LQ,
    LK,
    SIZE_Q,
    SIZE_K,
    SINKS,
    COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The list of one tile of keys: the tiles of queries whose block lists contain it.

    A first launch with COUNT computes the lengths of the lists, which determine their places among the CAPACITY entries
    of their batch element and head.
    """
    tiles_k = tl.cdiv(LK, SIZE_K) * tl.cdiv(SIZE_K, BLOCK_N)
    tile = tl.program_id(0) % tiles_k
    lane = (tl.program_id(0) // tiles_k).to(tl.int64)
    if q_spans is not None:
        q_spans += lane // HEADS * q_spans_stride_b
        k_spans += lane // HEADS * k_spans_stride_b
    index = block_index + lane // HEADS * index_stride_b + lane % HEADS * index_stride_h
    begin = lane * CAPACITY
    counts += lane * tiles_k * 2
    if COUNT:
        full, part = _scan_queries(
            entries, begin * 0, begin * 0, q_spans, k_spans, index, index_stride_q, index_stride_k, tile, TOPK, LQ, LK,
            SIZE_Q, SIZE_K, SINKS, False, BLOCK_M, BLOCK_N, CHUNK,
        )  # fmt: skip
        tl.store(counts + tile * 2, full.to(tl.int32))
        tl.store(counts + tile * 2 + 1, part.to(tl.int32))
    else:
        for first in range(0, tile * 2, CHUNK):
            j = first + tl.arange(0, CHUNK)
            begin += tl.sum(tl.load(counts + j, j < tile * 2, other=0), 0)
        middle, end = _scan_queries(
            entries, begin, begin + tl.load(counts + tile * 2), q_spans, k_spans, index, index_stride_q, index_stride_k,
            tile, TOPK, LQ, LK, SIZE_Q, SIZE_K, SINKS, True, BLOCK_M, BLOCK_N, CHUNK,
        )  # fmt: skip
        _put_range(ranges, tl.program_id(0), begin, middle, end)


def _entries(names: tuple[str, ...], **fixed: object) -> list:
    """AOT entries with a window of int64 times and of float32 times, and without one if a block index can be alone."""
    given = {"entries": "*i32", "ranges": "*i64", **{name: "*i32" for name in names}}
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "CHUNK": LIST["CHUNK"]}
    spans = [{"q_spans": f"*{t}", "k_spans": f"*{t}"} for t in ("i64", "i32")]
    found = [(given | of, {**sizes, **fixed}, LIST["num_warps"]) for of in spans]
    if names:
        found.append((given, {**sizes, **fixed, "q_spans": None, "k_spans": None}, LIST["num_warps"]))
    return found


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_window_tiles_kernel": [*_entries((), BY_KEY=False), *_entries((), BY_KEY=True)],
    "_block_tiles_kernel": _entries(("block_index",), CHUNK=OF_BLOCKS["CHUNK"]),
    "_block_queries_kernel": [
        *_entries(("block_index", "counts"), COUNT=True),
        *_entries(("block_index", "counts"), COUNT=False),
    ],
}
