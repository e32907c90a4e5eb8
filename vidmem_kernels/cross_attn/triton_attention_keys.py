"""Triton kernel for the gradients of keys, values and bias of cross_attention.

It sums over queries, and so uses lists of the tiles of queries that see a tile of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_attention_parts import (
    as_operand,
    dot_rows,
    dot_split,
    entry_of,
    lane_of,
    load_rows,
    range_of,
    seen_by_any,
    span_of,
    tiles_in,
    visible,
    weights_of,
)
from .triton_tiles import GRAD_KV, variants

TENSORS = ("q", "k", "v", "grad")
ROWS = {"base": "*fp32", "delta": "*fp32"}


@triton.jit
def _tile_of_queries(
    grad_k,
    grad_v,
    grad_bias,
    keys,
    values,
    key,
    key_stop,
    key_bias,
    times,
    q,
    grad,
    base,
    delta,
    low,
    high,
    grad_q,
    entries,
    i,
    LQ,
    D,
    DV,
    SIZE_Q,
    SINKS,
    SCALE,
    q_stride_l,
    q_stride_d,
    grad_stride_l,
    grad_stride_d,
    grad_q_stride_l,
    MASKED: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    ONE_PASS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds the contribution of one tile of queries to the gradients of a tile of keys; scores are (keys, queries)."""
    tile, listed = entry_of(entries, i)
    start, stop = span_of(tile, LQ, SIZE_Q, HAS_BLOCKS, BLOCK_M)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    first = tl.cast(start, tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    inside = start + m < stop
    at_q = q + first * q_stride_l + (m.to(tl.int64)[:, None] * q_stride_l + d.to(tl.int64)[None, :] * q_stride_d)
    queries = as_operand(load_rows(at_q, inside, d, D, EVEN, True), dtype, INTERPRET)
    row_base = tl.load(base + first + m, inside, other=float("inf"))
    row_delta = tl.load(delta + first + m, inside, other=0.0)
    product = dot_rows(keys, queries, PRECISION)
    there = inside
    if MASKED:
        row_low = None
        row_high = None
        if times is not None:
            row_low = tl.load(low + first + m, inside, other=1)[None, :]
            row_high = tl.load(high + first + m, inside, other=0)[None, :]
        seen = visible(key, key_stop, listed, times, row_low, row_high, SINKS, HAS_BLOCKS, HAS_SINKS) & inside[None, :]
        if times is not None:
            there = seen_by_any(seen, product) & (row_base != float("inf"))
            queries = as_operand(load_rows(at_q, there, d, D, EVEN, True), dtype, INTERPRET)
    at = grad + first * grad_stride_l
    at = at + (m.to(tl.int64)[:, None] * grad_stride_l + dv.to(tl.int64)[None, :] * grad_stride_d)
    gradient = as_operand(load_rows(at, there, dv, DV, EVEN_V, True), dtype, INTERPRET)
    weight = weights_of(product, key_bias, row_base[None, :], SCALE, PRECISION, INTERPRET)
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    grad_v = dot_split(weight, gradient, grad_v, dtype, SPLIT, PRECISION, INTERPRET)
    grad_score = weight * (dot_rows(values, gradient, PRECISION) - row_delta[None, :])
    if MASKED:  # 0 where a key is hidden, even if it is NaN
        grad_score = tl.where(weight != 0.0, grad_score, 0.0)
    if key_bias is not None:
        grad_bias += tl.sum(grad_score, axis=1)
    grad_k = dot_split(grad_score, queries, grad_k, dtype, SPLIT, PRECISION, INTERPRET)
    if ONE_PASS:
        rounded = as_operand(grad_score, dtype, INTERPRET)
        factor = keys
        if MASKED and (times is not None or HAS_SINKS):  # keys that no query of the tile sees are excluded
            factor = tl.where(tl.max(seen.to(tl.int32), axis=1)[:, None] > 0, keys, tl.zeros_like(keys))
        # Triton 3.4 to 3.7.0 miscompile trans(dot) on Hopper: see `one_pass_allowed`.
        share = tl.dot(tl.trans(rounded), factor, input_precision=PRECISION) * SCALE
        at = grad_q + first * grad_q_stride_l + m.to(tl.int64)[:, None] * grad_q_stride_l + d[None, :]
        tl.atomic_add(at, share, inside[:, None] & (d < D)[None, :], sem="relaxed")
    return grad_k, grad_v, grad_bias


@triton.jit
def _cross_attention_grad_kv_kernel(
    q,
    k,
    v,
    grad,
    base,
    delta,
    bias,
    when,
    low,
    high,
    ranges,
    entries,
    grad_k,
    grad_v,
    grad_bias,
    grad_q,
    LQ,
    LK,
    H,
    D,
    DV,
    SIZE_Q,
    SIZE_K,
    SINKS,
    SCALE,
    q_stride_b,
    q_stride_l,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    grad_stride_d,
    bias_stride_b,
    bias_stride_h,
    bias_stride_k,
    when_stride_b,
    low_stride_b,
    tiles_stride_b,
    tiles_stride_h,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    HOIST: tl.constexpr,
    ONE_PASS: tl.constexpr,
):
    """grad_k (B, Lk, H, D), grad_v (B, Lk, H, Dv) and grad_bias (B, H, Lk) of one tile of keys.

    In ONE_PASS, it atomically adds its share of grad_q (B, Lq, H, D), in float32, to those of other tiles of keys.
    """
    count = tiles_in(LK, SIZE_K, HAS_BLOCKS, BLOCK_N)
    batch, head, tile = lane_of(count, H)
    start, stop = span_of(tile, LK, SIZE_K, HAS_BLOCKS, BLOCK_N)
    key = start + tl.arange(0, BLOCK_N)
    key64 = key.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    at = k + batch * k_stride_b + head * k_stride_h
    at = at + key64[:, None] * k_stride_l + d.to(tl.int64)[None, :] * k_stride_d
    keys = as_operand(load_rows(at, key < stop, d, D, EVEN, True), k.dtype.element_ty, INTERPRET)
    at = v + batch * v_stride_b + head * v_stride_h
    at = at + key64[:, None] * v_stride_l + dv.to(tl.int64)[None, :] * v_stride_d
    values = as_operand(load_rows(at, key < stop, dv, DV, EVEN_V, True), v.dtype.element_ty, INTERPRET)
    q += batch * q_stride_b + head * q_stride_h
    grad += batch * grad_stride_b + head * grad_stride_h
    base += (batch * H + head) * LQ
    delta += (batch * H + head) * LQ
    key_bias = None
    if bias is not None:
        at_bias = bias + batch * bias_stride_b + head * bias_stride_h
        key_bias = tl.load(at_bias + key64 * bias_stride_k, key < stop, other=0.0)[:, None]
    times = None
    if when is not None:
        times = tl.load(when + batch * when_stride_b + key64, key < stop, other=0)[:, None]
        low += batch * low_stride_b
        high += batch * low_stride_b
    grad_q += (batch * LQ * H + head) * D
    lane = batch * tiles_stride_b + head * tiles_stride_h
    whole = tl.cdiv(LQ, BLOCK_M)  # keys past the end are 0, and their gradients are not stored
    begin, middle, end = range_of(ranges, lane * count + tile, whole, whole)
    total_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    total_bias = tl.zeros([BLOCK_N], tl.float32)
    for i in tl.range(begin, middle, num_stages=STAGES, disable_licm=not HOIST):
        total_k, total_v, total_bias = _tile_of_queries(
            total_k, total_v, total_bias, keys, values, key[:, None], stop, key_bias, times, q, grad, base, delta, low,
            high, grad_q, entries, i, LQ, D, DV, SIZE_Q, SINKS, SCALE, q_stride_l, q_stride_d, grad_stride_l,
            grad_stride_d, H * D, False, HAS_BLOCKS, HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, ONE_PASS,
            BLOCK_M, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    if ranges is not None:
        for i in tl.range(middle, end, num_stages=1, disable_licm=not HOIST):
            total_k, total_v, total_bias = _tile_of_queries(
                total_k, total_v, total_bias, keys, values, key[:, None], stop, key_bias, times, q, grad, base, delta,
                low, high, grad_q, entries, i, LQ, D, DV, SIZE_Q, SINKS, SCALE, q_stride_l, q_stride_d, grad_stride_l,
                grad_stride_d, H * D, True, HAS_BLOCKS, HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, ONE_PASS,
                BLOCK_M, BLOCK_D, BLOCK_V,
            )  # fmt: skip
    inside = (key < stop)[:, None]
    row = (batch * LK + key64[:, None]) * H + head
    grad_k += row * D + d[None, :]
    tl.store(grad_k, (total_k * SCALE).to(grad_k.dtype.element_ty), inside & (d < D)[None, :])
    grad_v += row * DV + dv[None, :]
    tl.store(grad_v, total_v.to(grad_v.dtype.element_ty), inside & (dv < DV)[None, :])
    if bias is not None:
        tl.store(grad_bias + (batch * H + head) * LK + key64, total_bias, key < stop)


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_cross_attention_grad_kv_kernel": variants(
        GRAD_KV, (*TENSORS, "grad_k", "grad_v"), {**ROWS, "grad_bias": "*fp32", "grad_q": "*fp32"}
    ),
}
