"""Triton kernel of gather_tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_tiles import FIRST_WITH_FLOAT8, RowMove, distinct, tile_of, vector_of
from .._tuned import Chosen, Tile, Tunable, arch_of, dtype_name

# Two warps read 512 bfloat16 channels, which divides the rows of real models; each thread has 4 loads of 16 bytes in
# flight before the first is used, and registers allow 40 warps per multiprocessor.
_MOVE = RowMove(warps=4, across=2, loads=4)
_MOVES = [_MOVE, *(RowMove(*m) for m in ((4, 1, 4), (4, 4, 2), (4, 4, 4), (4, 2, 8), (1, 1, 4), (1, 1, 8), (8, 2, 4)))]


def _gather_tile(arch: int, bank: str, out: str, width: int) -> Tile:
    return _MOVE.tile("BLOCK_K", width, vector_of(bank, out))


def _gather_tiles(arch: int, bank: str, out: str, width: int) -> list[Tile]:
    return distinct(move.tile("BLOCK_K", width, vector_of(bank, out)) for move in _MOVES)


GATHER = Tunable("_gather_tokens_fwd_kernel", ("bank", "out", "width"), _gather_tile, _gather_tiles)


@triton.jit
def _decode_float8_e4m3fn(code):
    """float32 values of e4m3fn bytes held as uint8, exactly; sm_80 has no instruction for it.

    The bits are those of a float16 whose exponent is too small by 8; subnormals come out right without a special case.
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
    HAS_FLOAT8: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """HAS_FLOAT8: the GPU has an instruction that converts e4m3fn."""
    # Offsets in int64: a bank may hold more than 2**31 elements.
    batch, k = tile_of(K, BLOCK_K)
    bits: tl.constexpr = max(bank.dtype.element_ty.primitive_bitwidth, out.dtype.element_ty.primitive_bitwidth)
    # Loads and stores keep one layout: see `vector_of`.
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.max_contiguous(tl.arange(0, BLOCK_C), 128 // bits)
    in_k = k < K
    row = tl.load(index + batch * index_stride_b + k * index_stride_k, in_k, other=-1).to(tl.int64)
    valid = (row >= 0) & (row < M)
    mask = valid[:, None] & (c < C)[None, :]
    where = bank + batch * bank_stride_b + row[:, None] * bank_stride_m + c[None, :] * bank_stride_c
    value = tl.load(where, mask, other=0)
    if HAS_FLOAT8:
        value = value.to(tl.float8e4nv, bitcast=True)
    elif IS_FLOAT8:
        value = _decode_float8_e4m3fn(value)
    if HAS_SCALE:
        factor = tl.load(scale + batch * scale_stride_b + row * scale_stride_m, valid, other=0.0)
        value = value.to(tl.float32) * factor[:, None]
    if value.dtype != tl.float64 or out.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    # -1 asks for zeros; any other row outside the bank is an error, which a kernel can only mark by NaN.
    value = tl.where((valid | (row == -1))[:, None], value, float("nan"))
    target = out + (batch * K + k[:, None]) * C + c[None, :]
    tl.store(target, value.to(out.dtype.element_ty), in_k[:, None] & (c < C)[None, :])


def _gather_fields(bank: Tensor, out_dtype: torch.dtype) -> dict[str, str | int]:
    width = triton.next_power_of_2(bank.shape[2])
    return {"bank": dtype_name(bank.dtype), "out": dtype_name(out_dtype), "width": width}


def _out_dtype(bank: Tensor, scale: Tensor | None, out_dtype: torch.dtype | None) -> torch.dtype:
    return out_dtype or (bank.dtype if scale is None else torch.float32)


def launch_gather_tokens_fwd(
    bank: Tensor, index: Tensor, scale: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:
    """(B, K, C) rows of `bank`; see `vidmem_kernels.gather_tokens`."""
    batch, count = index.shape
    shared, rows, channels = bank.shape[0] == 1, bank.shape[1], bank.shape[2]
    out_dtype = _out_dtype(bank, scale, out_dtype)
    out = torch.empty(batch, count, channels, dtype=out_dtype, device=index.device)
    if out.numel() == 0:
        return out
    is_float8 = bank.dtype == torch.float8_e4m3fn
    tile = GATHER.tile(index.device, **_gather_fields(bank, out_dtype))
    grid = (triton.cdiv(count, tile["BLOCK_K"]) * batch, triton.cdiv(channels, tile["BLOCK_C"]))
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
        HAS_FLOAT8=is_float8 and arch_of(index.device) >= FIRST_WITH_FLOAT8,
        **tile,
    )
    return out


def tiles_gather_tokens_fwd(
    bank: Tensor, index: Tensor, scale: Tensor | None, out_dtype: torch.dtype | None
) -> list[Chosen]:
    """The tiles that `launch_gather_tokens_fwd` uses."""
    return [GATHER.chosen(index.device, **_gather_fields(bank, _out_dtype(bank, scale, out_dtype)))]


# The calls that benchmarks/compile_kernels.py compiles ahead of time, those of real shapes, per kernel: pointer types,
# constants (including arguments that are None or 1, as at run time), (Tunable, fields) or warps, and the architectures,
# such as (80, 90), if the call is compiled differently on others.
_UNIT = {"bank_stride_c": 1, "index_stride_k": 1}
_PLAIN = {"scale": None, "HAS_SCALE": False, "IS_FLOAT8": False, "HAS_FLOAT8": False}


def _aot_scaled(bank: str, index: str, out: str, constants: dict, *archs: tuple[int, ...]) -> tuple:
    float8 = {"IS_FLOAT8": bank == "fp8", "HAS_FLOAT8": archs == (_CONVERTING,)}
    constants = {"HAS_SCALE": True, **float8, **constants}
    pointers = {"bank": "*u8" if bank == "fp8" else "*i8", "index": f"*{index}", "scale": "*fp32", "out": f"*{out}"}
    return pointers, constants, (GATHER, {"bank": bank, "out": out, "width": 4096}), *archs


_CONVERTING = (89, 90, 100, 120)
_SCALED = {"scale_stride_m": 1, **_UNIT}
AOT = {
    "_gather_tokens_fwd_kernel": [
        (
            {"bank": f"*{bank}", "index": f"*{index}", "out": f"*{out}"},
            {**_PLAIN, **unit},
            (GATHER, {"bank": bank, "out": out, "width": width}),
        )
        for bank, index, out, width, unit in (
            ("bf16", "i32", "bf16", 4096, _UNIT),
            ("bf16", "i64", "bf16", 128, _UNIT),
            ("bf16", "i32", "bf16", 4096, {}),
            ("bf16", "i32", "fp32", 4096, _UNIT),
            ("fp32", "i32", "fp32", 4096, _UNIT),
            ("fp64", "i64", "fp64", 4096, _UNIT),
        )
    ]
    + [
        _aot_scaled("i8", "i32", "bf16", _SCALED),
        _aot_scaled("i8", "i32", "fp32", _SCALED),
        *(_aot_scaled("fp8", "i32", "bf16", _SCALED, archs) for archs in ((80,), _CONVERTING)),
        *(_aot_scaled("fp8", "i64", "fp32", {}, archs) for archs in ((80,), _CONVERTING)),
    ],
}
