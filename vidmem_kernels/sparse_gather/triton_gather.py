"""Triton kernels of gather and scatter-add."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_tiles import tile_of

# Elements of a tile: 16 a thread at 4 warps keeps a gather free of spills with several loads in flight.
_TILE = 2048

# Sources that one program adds up.
_PIECE = 256


@triton.jit
def _decode_float8_e4m3fn(code):
    """float32 of e4m3fn bytes held as uint8; sm_80 has no instruction for it, and this is as exact.

    The bits are those of a float16 whose exponent is 8 too small; subnormals come out right by themselves.
    """
    bits = code.to(tl.int16)
    half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)


@triton.jit
def _gather_tokens_fwd_kernel(
    bank,
    index,
    scale,
    out,
    K,
    M,
    C,
    bank_stride_b,
    bank_stride_m,
    bank_stride_c,
    index_stride_b,
    index_stride_k,
    scale_stride_b,
    scale_stride_m,
    HAS_SCALE: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Offsets in int64: a bank may hold more than 2**31 elements.
    batch, k = tile_of(K, BLOCK_K)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_k = k < K
    row = tl.load(index + batch * index_stride_b + k * index_stride_k, in_k, other=-1).to(tl.int64)
    valid = (row >= 0) & (row < M)
    mask = valid[:, None] & (c < C)[None, :]
    where = bank + batch * bank_stride_b + row[:, None] * bank_stride_m + c[None, :] * bank_stride_c
    value = tl.load(where, mask, other=0)
    if IS_FLOAT8:
        value = _decode_float8_e4m3fn(value)
    if HAS_SCALE:
        factor = tl.load(scale + batch * scale_stride_b + row * scale_stride_m, valid, other=0.0)
        value = value.to(tl.float32) * factor[:, None]
    if value.dtype != tl.float64 or out.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    # -1 asks for zeros; any other row outside the bank is an error that a kernel can only mark.
    value = tl.where((valid | (row == -1))[:, None], value, float("nan"))
    target = out + (batch * K + k[:, None]) * C + c[None, :]
    tl.store(target, value.to(out.dtype.element_ty), in_k[:, None] & (c < C)[None, :])


def launch_gather_tokens_fwd(
    bank: Tensor, index: Tensor, scale: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """(B, K, C) rows of `bank`; see `vidmem_kernels.gather_tokens`."""
    batch, count = index.shape
    shared, rows, channels = bank.shape[0] == 1, bank.shape[1], bank.shape[2]
    if out_dtype is None:
        out_dtype = bank.dtype if scale is None else torch.float32
    out = torch.empty(batch, count, channels, dtype=out_dtype, device=index.device)
    if out.numel() == 0:
        return out
    is_float8 = bank.dtype == torch.float8_e4m3fn
    block_c = min(_TILE, triton.next_power_of_2(channels))
    block_k = _TILE // block_c
    grid = (triton.cdiv(count, block_k) * batch, triton.cdiv(channels, block_c))
    _gather_tokens_fwd_kernel[grid](
        bank.view(torch.uint8) if is_float8 else bank,
        index,
        scale,
        out,
        count,
        rows,
        channels,
        0 if shared else bank.stride(0),
        bank.stride(1),
        bank.stride(2),
        index.stride(0),
        index.stride(1),
        0 if scale is None or shared else scale.stride(0),
        0 if scale is None else scale.stride(1),
        HAS_SCALE=scale is not None,
        IS_FLOAT8=is_float8,
        BLOCK_K=block_k,
        BLOCK_C=block_c,
        num_warps=4,
    )
    return out


@triton.jit
def _sum_sources(
    src, order, begin, end, c, C, src_stride_k, src_stride_c, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Sum of the rows of `src` that `order` names from `begin` to `end`."""
    sum_dtype: tl.constexpr = tl.float64 if src.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK_C], dtype=sum_dtype)
    for first in range(begin, end, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        source = tl.load(order + k, k < end, other=0)
        where = src + source[:, None] * src_stride_k + c[None, :] * src_stride_c
        value = tl.load(where, (k < end)[:, None] & (c < C)[None, :], other=0)
        total += tl.sum(value.to(sum_dtype), axis=0)
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
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One slot and channel block a program: the piece of a group of more than PIECE sources that belongs there.

    Slot 2 i holds the piece that begins in the i-th PIECE of sorted positions and is not the first of its group, slot
    2 i + 1 the one that is. There is one of each at most, for only groups longer than PIECE have pieces.
    """
    slots = 2 * tl.cdiv(K, PIECE)
    batch = (tl.program_id(0) // slots).to(tl.int64)
    slot = (tl.program_id(0) % slots).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_first = slot % 2
    low = slot // 2 * PIECE
    high = tl.minimum(low + PIECE, K)
    # A long group that begins here holds the last position, any other one the first.
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
    total = _sum_sources(lane, order + batch * K, begin, end, c, C, src_stride_k, src_stride_c, BLOCK_K, BLOCK_C)
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
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One output row and channel block a program: its group of source rows, or of their pieces, summed in order."""
    batch = (tl.program_id(0) // M).to(tl.int64)
    row = (tl.program_id(0) % M).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.load(offsets + batch * (M + 1) + row)
    end = tl.load(offsets + batch * (M + 1) + row + 1)
    last = end
    if HAS_PIECES:
        last = tl.where(end - start > PIECE, start, end)
    lane = src + batch * src_stride_b
    total = _sum_sources(lane, order + batch * K, start, last, c, C, src_stride_k, src_stride_c, BLOCK_K, BLOCK_C)
    if HAS_PIECES:
        slots = 2 * tl.cdiv(K, PIECE)
        for begin in range(last, end, PIECE):
            slot = batch * slots + 2 * (begin // PIECE) + (begin == start).to(tl.int64)
            total += tl.load(pieces + slot * C + c, c < C, other=0)
    tl.store(out + (batch * M + row) * C + c, total.to(out.dtype.element_ty), c < C)


def _group_keys(index: Tensor, num_rows: int) -> Tensor:
    """What sorts sources by their output row, contiguous: the row, or `num_rows` for those that are dropped."""
    if num_rows > torch.iinfo(index.dtype).max:
        index = index.to(torch.int64)
    index = index.contiguous()  # sort keeps strides, the kernel reads rows
    return torch.where((index < 0) | (index >= num_rows), num_rows, index)


def launch_scatter_add_tokens_fwd(src: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """(B, num_rows, C) sums; see `vidmem_kernels.scatter_add_tokens`.

    A stable sort groups the sources by row, so that each row is summed by one program, in order, without atomics. A row
    of more than _PIECE sources is summed in pieces of as many, by programs of their own, and then over these.
    """
    batch, count, channels = src.shape
    out = torch.empty(batch, num_rows, channels, dtype=src.dtype, device=src.device)
    if out.numel() == 0:
        return out
    key, order = torch.sort(_group_keys(index, num_rows), dim=1, stable=True)
    bounds = torch.arange(num_rows + 1, device=src.device, dtype=key.dtype)
    offsets = torch.searchsorted(key, bounds.expand(batch, -1).contiguous())
    block_c = min(512, triton.next_power_of_2(channels))
    blocks_c = triton.cdiv(channels, block_c)
    sizes = (count, num_rows, channels, *src.stride())
    options = {"PIECE": _PIECE, "BLOCK_K": 4, "BLOCK_C": block_c, "num_warps": 4}
    pieces = None
    if count > _PIECE:
        slots = 2 * triton.cdiv(count, _PIECE)
        pieces = torch.empty(batch, slots, channels, dtype=accumulate_dtype(src.dtype), device=src.device)
        _sum_pieces_fwd_kernel[(batch * slots, blocks_c)](src, order, key, offsets, pieces, *sizes, **options)
    _sum_rows_fwd_kernel[(num_rows * batch, blocks_c)](
        src, order, offsets, pieces, out, *sizes, HAS_PIECES=pieces is not None, **options
    )
    return out


# What benchmarks/compile_kernels.py compiles ahead of time, per kernel: pointer types, constants (an argument that is
# None or 1 is one, as at run time) and warps of the calls that real shapes make; where a call is compiled otherwise on
# other architectures, also those it is for, as in (80, 90).
_UNIT = {"bank_stride_c": 1, "index_stride_k": 1}
_ROW = {"BLOCK_K": 1, "BLOCK_C": _TILE}
_SUM = {"PIECE": _PIECE, "BLOCK_K": 4, "BLOCK_C": 512}
AOT = {
    "_gather_tokens_fwd_kernel": [
        (
            {"bank": f"*{bank}", "index": f"*{index}", "out": f"*{out}"},
            {"scale": None, "HAS_SCALE": False, "IS_FLOAT8": False, **unit, **_ROW},
            4,
        )
        for bank, index, out, unit in (
            ("bf16", "i32", "bf16", _UNIT),
            ("bf16", "i64", "bf16", _UNIT),
            ("bf16", "i32", "bf16", {}),
            ("fp32", "i32", "fp32", _UNIT),
            ("fp64", "i64", "fp64", _UNIT),
        )
    ]
    + [
        (
            {"bank": f"*{bank}", "index": f"*{index}", "scale": "*fp32", "out": f"*{out}"},
            {"HAS_SCALE": True, "IS_FLOAT8": bank == "u8", **unit, **_ROW},
            4,
        )
        for bank, index, out, unit in (
            ("i8", "i32", "bf16", {"scale_stride_m": 1, **_UNIT}),
            ("u8", "i32", "bf16", {"scale_stride_m": 1, **_UNIT}),
            ("u8", "i64", "fp32", {}),
        )
    ],
    "_sum_pieces_fwd_kernel": [
        (
            {"src": f"*{src}", "order": "*i64", "keys": f"*{key}", "offsets": "*i64", "pieces": f"*{pieces}"},
            {**unit, **_SUM},
            4,
        )
        for src, key, pieces, unit in (
            ("bf16", "i32", "fp32", {"src_stride_c": 1}),
            ("fp64", "i64", "fp64", {"src_stride_c": 1}),
            ("bf16", "i64", "fp32", {}),
        )
    ],
    "_sum_rows_fwd_kernel": [
        (
            {"src": f"*{src}", "order": "*i64", "offsets": "*i64", "pieces": f"*{pieces}", "out": f"*{src}"},
            {**unit, **_SUM, "HAS_PIECES": True},
            4,
        )
        for src, pieces, unit in (
            ("bf16", "fp32", {"src_stride_c": 1}),
            ("fp32", "fp32", {"src_stride_c": 1}),
            ("fp64", "fp64", {"src_stride_c": 1}),
            ("bf16", "fp32", {}),
        )
    ]
    + [
        (
            {"src": "*bf16", "order": "*i64", "offsets": "*i64", "out": "*bf16"},
            {"src_stride_c": 1, **_SUM, "pieces": None, "HAS_PIECES": False},
            4,
        )
    ],
}
