"""Triton kernels of quantize_rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import _env
from .._numerics import accumulate_dtype
from .._triton_tiles import FIRST_WITH_FLOAT8, distinct
from .._tuned import Chosen, Tile, Tunable, arch_of, dtype_name
from .reference import QUANTIZED_MAX, scale_limits

# The widest row that a program keeps in registers; wider rows are read twice.
_WIDEST_TILE = 8192


def _tile(width: int, widest: int, warps: int, elements: int = 16) -> Tile:
    """Up to `widest` channels at a time, and rows (at least one) such that each thread has `elements` of them."""
    block_c = min(widest, width)
    return {"BLOCK_M": max(1, 32 * warps * elements // block_c), "BLOCK_C": block_c, "num_warps": warps}


def _forward_tile(arch: int, dtype: str, rows: str, width: int) -> Tile:
    return _tile(width, _WIDEST_TILE, 8 if width > 4096 else 4)


def _forward_tiles(arch: int, dtype: str, rows: str, width: int) -> list[Tile]:
    # Narrower blocks read a row again, from the L1 cache.
    return distinct(_tile(width, widest, warps) for widest in (_WIDEST_TILE, 1024) for warps in (1, 2, 4, 8))


def _backward_tile(arch: int, dtype: str, width: int) -> Tile:
    return _tile(width, 2048, 4)


def _backward_tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    return distinct(_tile(width, widest, warps) for widest in (1024, 2048, 4096) for warps in (2, 4))


QUANTIZE = Tunable("_quantize_rows_fwd_kernel", ("dtype", "rows", "width"), _forward_tile, _forward_tiles)
QUANTIZE_GRAD = Tunable("_quantize_rows_bwd_kernel", ("dtype", "width"), _backward_tile, _backward_tiles)


@triton.jit
def _magnitude_bits(value):
    """Bits of |value|, which order as integers like the magnitudes, infinity and then NaN last."""
    if value.dtype == tl.float64:
        return value.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return value.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _infinity_bits(bits):
    if bits.dtype == tl.int64:
        return tl.full((), 0x7FF0000000000000, tl.int64)
    else:
        return tl.full((), 0x7F800000, tl.int32)


@triton.jit
def _divide(a, b):
    """IEEE division; in Triton, `/` is IEEE only in float64."""
    a, b = tl.broadcast(a, b)
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _divide_rows(value, divisor, INTERPRET: tl.constexpr):
    """IEEE quotients of rows by their positive divisors, exact unless too small for any code.

    Uses the correctly rounded reciprocal of a row and two corrections by exact remainders (Markstein): 6 instructions
    per element instead of about 20 for a division. Divisors are scaled to [1, 2), so that no remainder underflows. The
    interpreter rounds a product before it is added.
    """
    if INTERPRET or divisor.dtype == tl.float64:
        return _divide(value.to(divisor.dtype), divisor[:, None])
    else:
        exponent = (divisor.to(tl.int32, bitcast=True) >> 23) & 0xFF
        power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        scaled = divisor * power
        inverse = tl.div_rn(tl.full(scaled.shape, 1.0, tl.float32), scaled)[:, None]
        scaled = tl.broadcast_to(scaled[:, None], value.shape)
        inverse = tl.broadcast_to(inverse, value.shape)
        value = value.to(tl.float32) * power[:, None]
        quotient = value * inverse
        quotient = tl.fma(tl.fma(-quotient, scaled, value), inverse, quotient)
        return tl.fma(tl.fma(-quotient, scaled, value), inverse, quotient)


@triton.jit
def _encode_float8_e4m3fn(value):
    """e4m3fn bytes of float32 values up to magnitude 464, to nearest, ties to even; sm_80 has no instruction for it."""
    bits = value.to(tl.int32, bitcast=True)
    rest = bits & 0x7FFFFFFF
    normal = ((rest + 0x7FFFF + ((rest >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6, codes are multiples of 2**-9, to which the addition rounds.
    shifted = rest.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    return (((bits >> 24) & 0x80) | tl.where(rest < 0x3C800000, subnormal, normal)).to(tl.uint8)


@triton.jit
def _quantize(value, scale, IS_FLOAT8: tl.constexpr, HAS_FLOAT8: tl.constexpr, INTERPRET: tl.constexpr):
    """Codes of `value`; rows whose scale is 0 or NaN become zeros."""
    usable = scale > 0
    quotient = _divide_rows(value, tl.where(usable, scale, 1.0), INTERPRET)
    quotient = tl.where(usable[:, None], quotient, 0.0)
    if HAS_FLOAT8:  # the largest value is 464, which rounds to 448
        return quotient.to(tl.float32).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    elif IS_FLOAT8:
        return _encode_float8_e4m3fn(quotient.to(tl.float32))
    else:
        # Adding 1.5 * 2**mantissa removes the fraction: rounds to nearest, ties to even; the lowest byte is the code.
        if scale.dtype == tl.float64:
            return (quotient + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int8)
        else:
            return (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize_rows_fwd_kernel(
    x,
    out,
    scale,
    N,
    M,
    C,
    x_stride_b,
    x_stride_m,
    x_stride_c,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    IS_FLOAT8: tl.constexpr,
    HAS_FLOAT8: tl.constexpr,
    INTERPRET: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Quantises N = B * M rows, BLOCK_M per program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = (row < N)[:, None]
    source = (x + (row // M) * x_stride_b + (row % M) * x_stride_m)[:, None]
    target = (out + row * C)[:, None]
    c = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    value = tl.load(source + c * x_stride_c, in_rows & (c < C), other=0)
    largest = _magnitude_bits(value)
    if not ONE_TILE:
        for start in range(BLOCK_C, C, BLOCK_C):
            at = start + c
            more = tl.load(source + at * x_stride_c, in_rows & (at < C), other=0)
            largest = tl.maximum(largest, _magnitude_bits(more))
    bits = tl.max(largest, axis=1)
    maximum = bits.to(scale.dtype.element_ty, bitcast=True)
    factor = _divide(maximum, tl.full((), QMAX, maximum.dtype))
    factor = tl.minimum(tl.maximum(factor, SMALLEST), LARGEST)
    factor = tl.where(bits == 0, 0.0, factor)
    factor = tl.where(bits >= _infinity_bits(bits), float("nan"), factor)
    tl.store(scale + row, factor, row < N)
    if ONE_TILE:
        tl.store(target + c, _quantize(value, factor, IS_FLOAT8, HAS_FLOAT8, INTERPRET), in_rows & (c < C))
    else:
        for start in range(0, C, BLOCK_C):
            at = start + c
            again = tl.load(source + at * x_stride_c, in_rows & (at < C), other=0)
            tl.store(target + at, _quantize(again, factor, IS_FLOAT8, HAS_FLOAT8, INTERPRET), in_rows & (at < C))


def _limits(dtype: torch.dtype, scale_dtype: torch.dtype) -> dict[str, float]:
    smallest, largest = scale_limits(dtype, scale_dtype)
    return {"QMAX": QUANTIZED_MAX[dtype], "SMALLEST": smallest, "LARGEST": largest}


def _width(x: Tensor) -> int:
    return triton.next_power_of_2(max(1, x.shape[2]))


def _forward_fields(x: Tensor, dtype: torch.dtype) -> dict[str, str | int]:
    return {"dtype": dtype_name(x.dtype), "rows": dtype_name(dtype), "width": _width(x)}


def launch_quantize_rows_fwd(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, scale) of (B, M, C); see `vidmem_kernels.quantize_rows`."""
    batch, rows, channels = x.shape
    is_float8 = dtype == torch.float8_e4m3fn
    out = torch.empty(x.shape, dtype=torch.uint8 if is_float8 else dtype, device=x.device)
    scale = torch.empty(batch, rows, dtype=accumulate_dtype(x.dtype), device=x.device)
    if scale.numel() > 0:
        tile = QUANTIZE.tile(x.device, **_forward_fields(x, dtype))
        _quantize_rows_fwd_kernel[(triton.cdiv(scale.numel(), tile["BLOCK_M"]),)](
            x,
            out,
            scale,
            scale.numel(),
            rows,
            channels,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            **_limits(dtype, scale.dtype),
            IS_FLOAT8=is_float8,
            HAS_FLOAT8=is_float8 and arch_of(x.device) >= FIRST_WITH_FLOAT8,
            INTERPRET=_env.triton_interpret(),
            ONE_TILE=channels <= tile["BLOCK_C"],
            **tile,
        )
    return (out.view(dtype) if is_float8 else out), scale


def tiles_quantize_rows_fwd(x: Tensor, dtype: torch.dtype) -> list[Chosen]:
    """The tiles that `launch_quantize_rows_fwd` uses."""
    return [QUANTIZE.chosen(x.device, **_forward_fields(x, dtype))]


@triton.jit
def _quantize_rows_bwd_kernel(
    grad_scale,
    x,
    grad,
    N,
    M,
    C,
    grad_scale_stride_b,
    grad_scale_stride_m,
    x_stride_b,
    x_stride_m,
    x_stride_c,
    QMAX: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_rows = row < N
    source = x + (row // M) * x_stride_b + (row % M) * x_stride_m
    c = tl.arange(0, BLOCK_C).to(tl.int64)[None, :]
    sum_dtype: tl.constexpr = grad_scale.dtype.element_ty
    bits_dtype: tl.constexpr = tl.int64 if sum_dtype == tl.float64 else tl.int32
    best = tl.full([BLOCK_M], -1, bits_dtype)
    first = tl.zeros([BLOCK_M], tl.int64)
    for start in range(0, C, BLOCK_C):
        at = start + c
        value = tl.load(source[:, None] + at * x_stride_c, in_rows[:, None] & (at < C), other=0)
        bits = _magnitude_bits(value)
        # The first NaN counts, regardless of its payload.
        bits = tl.where(at < C, tl.minimum(bits, _infinity_bits(bits) + 1), -1)
        here = tl.max(bits, axis=1)
        where = tl.min(tl.where(bits == here[:, None], at, C), axis=1)
        first = tl.where(here > best, where, first)
        best = tl.maximum(here, best)
    largest = tl.load(source + first * x_stride_c, in_rows, other=0).to(sum_dtype)
    factor = _divide(tl.abs(largest), tl.full((), QMAX, sum_dtype))
    slope = tl.load(grad_scale + (row // M) * grad_scale_stride_b + (row % M) * grad_scale_stride_m, in_rows, other=0)
    sign = tl.where(largest > 0, 1.0, tl.where(largest < 0, -1.0, 0.0)).to(sum_dtype)
    step = _divide(slope * sign, tl.full((), QMAX, sum_dtype))
    step = tl.where((factor < SMALLEST) | (factor > LARGEST), 0.0, step)  # where the scale is clamped
    step = tl.where(best >= _infinity_bits(best), float("nan"), step)
    for start in range(0, C, BLOCK_C):
        at = start + c
        result = tl.where(at == first[:, None], step[:, None], 0.0)
        target = grad + row[:, None] * C + at
        tl.store(target, result.to(grad.dtype.element_ty), in_rows[:, None] & (at < C))


def launch_quantize_rows_bwd(grad_scale: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the scales (B, M) with respect to x (B, M, C); see `reference.quantize_rows_backward`."""
    channels = x.shape[2]
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if grad.numel() == 0:
        return grad
    tile = QUANTIZE_GRAD.tile(x.device, dtype=dtype_name(x.dtype), width=_width(x))
    _quantize_rows_bwd_kernel[(triton.cdiv(grad_scale.numel(), tile["BLOCK_M"]),)](
        grad_scale,
        x,
        grad,
        grad_scale.numel(),
        x.shape[1],
        channels,
        grad_scale.stride(0),
        grad_scale.stride(1),
        x.stride(0),
        x.stride(1),
        x.stride(2),
        **_limits(dtype, grad_scale.dtype),
        **tile,
    )
    return grad


def _aot(dtype: torch.dtype, rows: torch.dtype, width: int, *archs: tuple[int, ...], **constants):
    """A call on rows of `width`, for the architectures."""
    wide = accumulate_dtype(dtype)
    pointers = {"x": _pointer(dtype), "out": "*u8" if rows == torch.float8_e4m3fn else "*i8", "scale": _pointer(wide)}
    constants = {"IS_FLOAT8": rows == torch.float8_e4m3fn, "INTERPRET": False, **constants}
    constants["HAS_FLOAT8"] = bool(archs) and min(archs[0]) >= FIRST_WITH_FLOAT8
    constants["ONE_TILE"] = width <= _WIDEST_TILE
    how = QUANTIZE, {"dtype": dtype_name(dtype), "rows": dtype_name(rows), "width": width}
    return pointers, {**constants, **_limits(rows, wide)}, how, *archs


def _pointer(dtype: torch.dtype) -> str:
    return f"*{dtype_name(dtype)}"


_UNIT = {"x_stride_c": 1}
_ROW = {**_UNIT, "grad_scale_stride_m": 1}
# See triton_gather.AOT.
AOT = {
    "_quantize_rows_fwd_kernel": [
        _aot(torch.bfloat16, torch.int8, 4096, **_UNIT),
        _aot(torch.bfloat16, torch.float8_e4m3fn, 4096, (80,), **_UNIT),
        _aot(torch.bfloat16, torch.float8_e4m3fn, 4096, (89, 90, 100, 120), **_UNIT),
        _aot(torch.bfloat16, torch.int8, 128, **_UNIT),
        _aot(torch.float32, torch.float8_e4m3fn, _WIDEST_TILE, (80,), **_UNIT),
        _aot(torch.float32, torch.float8_e4m3fn, _WIDEST_TILE, (89, 90, 100, 120), **_UNIT),
        _aot(torch.float32, torch.int8, 2 * _WIDEST_TILE, **_UNIT),
        _aot(torch.float64, torch.int8, 4096, **_UNIT),
        _aot(torch.float32, torch.int8, 4096),
    ],
    "_quantize_rows_bwd_kernel": [
        (
            {"grad_scale": _pointer(accumulate_dtype(dtype)), "x": _pointer(dtype), "grad": _pointer(dtype)},
            {**_limits(torch.int8, accumulate_dtype(dtype)), **unit},
            (QUANTIZE_GRAD, {"dtype": dtype_name(dtype), "width": 4096}),
        )
        for dtype, unit in ((torch.bfloat16, _ROW), (torch.float64, _ROW), (torch.float32, {}))
    ],
}
