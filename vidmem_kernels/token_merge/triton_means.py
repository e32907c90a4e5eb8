"""Triton functions that sum the tokens of a group and compute its mean.

A mean is measured from one of the tokens, as in the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl

_SIGN_BIT = tl.constexpr(-(2**31))


@triton.jit
def negative_zero():
    """-0.0, which changes nothing when added, not even the sign of 0. Triton 3.6 turns the literal -0.0 into 0."""
    return tl.full([], _SIGN_BIT, tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _load_member(x, order, k, end, c, N, C, x_stride_n, x_stride_c, order_stride_n):
    """The token at place `k` of `order`: its number, its row of x, whether it is in the group and whether it exists."""
    member = k < end
    n = tl.load(order + k.to(tl.int64) * order_stride_n, member, other=0).to(tl.int64)
    valid = member & (n >= 0) & (n < N)
    where = x + n[:, None] * x_stride_n + c[None, :] * x_stride_c
    return n, tl.load(where, valid[:, None] & (c < C)[None, :], other=0), member, valid


@triton.jit
def add_tokens(result, x, order, begin, end, c, N, C, x_stride_n, x_stride_c, order_stride_n, UNROLL: tl.constexpr):
    """Adds the tokens of groups to the rows of `result`, in order."""
    for first in range(0, tl.max(end - begin, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            k = begin + first + step
            _, value, member, valid = _load_member(x, order, k, end, c, N, C, x_stride_n, x_stride_c, order_stride_n)
            # So that the sum of one token equals that token, bit by bit.
            nothing = tl.where(member, float("nan"), negative_zero())
            result += tl.where(valid[:, None], value.to(result.dtype), nothing[:, None])
    return result


@triton.jit
def _scale_up(whole):
    """A power of two that scales sizes with a total below 1 to a total of about 1, so that no product underflows."""
    exponent = whole.to(tl.int32, bitcast=True) >> 23
    power = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(whole < 1, power, 1.0)


@triton.jit
def add_deviations(
    result,
    halves,
    from_row,
    x,
    size,
    whole,
    order,
    begin,
    end,
    c,
    N,
    C,
    x_stride_n,
    x_stride_c,
    size_stride_n,
    order_stride_n,
    UNROLL: tl.constexpr,
):
    """Sums, in order, the deviations of the tokens of groups from `from_row`, times their sizes, and half their shares.

    The shares are used if the deviations overflow. A token of size 0 adds nothing to either, whatever its values.
    """
    up = _scale_up(whole)
    half = tl.div_rn(tl.full(whole.shape, 0.5, tl.float32), tl.where(whole == 0, 1.0, whole * up))
    for first in range(0, tl.max(end - begin, axis=0), UNROLL):
        for step in tl.static_range(UNROLL):
            k = begin + first + step
            n, value, member, valid = _load_member(x, order, k, end, c, N, C, x_stride_n, x_stride_c, order_stride_n)
            weight = tl.full(whole.shape, 1.0, dtype=tl.float32)
            if size is not None:
                weight = tl.load(size + n * size_stride_n, valid, other=0)
            value = value.to(tl.float32)
            counts = (valid & (weight != 0))[:, None]
            weight = weight * up
            share = weight * half  # no division here: its subroutine would save all registers
            nothing = tl.where(member & ~valid, float("nan"), 0.0)[:, None]
            result += tl.where(counts, (from_row - value) * weight[:, None], nothing)
            # Infinity counts even if the share rounds to 0.
            is_lost = (share == 0)[:, None] & ~(tl.abs(value) < float("inf"))
            halves += tl.where(counts, tl.where(is_lost, value, value * share[:, None]), nothing)
    return result, halves


@triton.jit
def load_origins(x, origin, row, wanted, c, N, C, x_stride_n, x_stride_c):
    """Rows of x that the groups are measured from."""
    n = tl.load(origin + row, wanted, other=0).to(tl.int64)
    known = wanted & (n >= 0) & (n < N)
    return tl.load(x + n[:, None] * x_stride_n + c[None, :] * x_stride_c, known[:, None] & (c < C)[None, :], other=0)


@triton.jit
def mean_of(result, halves, origin_row, whole, is_alone, LARGEST: tl.constexpr):
    """The mean, in the dtype of the tokens; see the reference."""
    whole = whole[:, None]
    divisor = tl.broadcast_to(tl.where(whole == 0, 1.0, whole * _scale_up(whole)), result.shape)
    mean = origin_row.to(tl.float32) - tl.div_rn(result, divisor)
    doubled = halves * 2
    bounded = tl.minimum(tl.maximum(doubled, -LARGEST), LARGEST)
    shares = tl.where(tl.abs(halves) < float("inf"), bounded, doubled)
    mean = tl.where(tl.abs(mean) < float("inf"), mean, shares)
    mean = tl.where(whole == 0, 0.0, mean).to(origin_row.dtype)
    # Also keeps the bits of a NaN.
    return tl.where(is_alone[:, None] & (whole > 0), origin_row, mean)
