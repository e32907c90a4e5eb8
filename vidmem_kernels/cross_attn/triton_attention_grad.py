"""Triton kernels of the gradient of cross_attention.

Weights are recomputed from lse. In two passes, one kernel sums over keys and one over queries, each in a fixed order.
In one pass, with five products per pair instead of seven, the kernel that sums over queries adds its share of the
gradient of queries by atomics, in any order; this is used only if no deterministic algorithms are requested.
"""

from __future__ import annotations

import re

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._determinism import must_be_deterministic, warn_if_asked
from .._tuned import Chosen, Tile, arch_of
from .triton_attention import check_blocks, constants, strides
from .triton_attention_keys import ROWS, TENSORS, _cross_attention_grad_kv_kernel
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
    unit_of,
    visible,
    weights_of,
)
from .triton_plan import Call
from .triton_tiles import FEW, GRAD_KV, GRAD_Q, fields_of, variants


@triton.jit
def _cross_attention_delta_kernel(
    out,
    grad,
    grad_lse,
    lse,
    base,
    delta,
    LQ,
    H,
    DV,
    out_stride_b,
    out_stride_l,
    out_stride_h,
    out_stride_d,
    grad_stride_b,
    grad_stride_l,
    grad_stride_h,
    grad_stride_d,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Per query: delta, reduced by the gradient of its lse, and the base of its weights, in the units of scores.

    The base of a query that sees no key is +inf, which makes every weight 0.
    """
    batch, head, tile = lane_of(tl.cdiv(LQ, BLOCK_M), H)
    row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    dv = tl.arange(0, BLOCK_V).to(tl.int64)
    inside = (row < LQ)[:, None] & (dv < DV)[None, :]
    at = out + batch * out_stride_b + head * out_stride_h
    result = tl.load(at + row[:, None] * out_stride_l + dv[None, :] * out_stride_d, inside, other=0.0)
    at = grad + batch * grad_stride_b + head * grad_stride_h
    gradient = tl.load(at + row[:, None] * grad_stride_l + dv[None, :] * grad_stride_d, inside, other=0.0)
    total = tl.sum(result.to(tl.float32) * gradient.to(tl.float32), axis=1)
    where = (batch * H + head) * LQ + row
    if grad_lse is not None:
        total -= tl.load(grad_lse + where, row < LQ, other=0.0)
    log_sum = tl.load(lse + where, row < LQ, other=0.0)
    tl.store(delta + where, total, row < LQ)
    tl.store(base + where, tl.where(log_sum == float("-inf"), float("inf"), log_sum * unit_of(PRECISION)), row < LQ)


@triton.jit
def _tile_of_keys(
    grad_q,
    held,
    held_grad,
    base,
    delta,
    k,
    v,
    bias,
    when,
    low,
    high,
    entries,
    i,
    LK,
    D,
    DV,
    SIZE_K,
    SINKS,
    SCALE,
    k_stride_l,
    k_stride_d,
    v_stride_l,
    v_stride_d,
    bias_stride_k,
    MASKED: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRET: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds the contribution of one tile of keys to the gradient of a tile of queries."""
    tile, listed = entry_of(entries, i)
    start, stop = span_of(tile, LK, SIZE_K, HAS_BLOCKS, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    first = tl.cast(start, tl.int64)
    key = start + n
    inside = key < stop
    at_k = k + first * k_stride_l + (n.to(tl.int64)[:, None] * k_stride_l + d.to(tl.int64)[None, :] * k_stride_d)
    keys = as_operand(load_rows(at_k, inside, d, D, EVEN, MASKED), k.dtype.element_ty, INTERPRET)
    at = v + first * v_stride_l + (n.to(tl.int64)[:, None] * v_stride_l + dv.to(tl.int64)[None, :] * v_stride_d)
    values = as_operand(load_rows(at, inside, dv, DV, EVEN_V, MASKED), v.dtype.element_ty, INTERPRET)
    key_bias = None
    if bias is not None:
        at_bias = bias + (first + n) * bias_stride_k
        key_bias = (tl.load(at_bias, inside, other=0.0) if MASKED else tl.load(at_bias))[None, :]
    product = dot_rows(held, keys, PRECISION)
    if MASKED:
        times = None
        if when is not None:
            times = tl.load(when + first + n, inside, other=0)[None, :]
        seen = visible(key[None, :], stop, listed, times, low, high, SINKS, HAS_BLOCKS, HAS_SINKS)
        if when is not None or HAS_SINKS:
            there = seen_by_any(seen, product)
            keys = as_operand(load_rows(at_k, there, d, D, EVEN, True), k.dtype.element_ty, INTERPRET)
    weight = weights_of(product, key_bias, base[:, None], SCALE, PRECISION, INTERPRET)
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    grad_score = weight * (dot_rows(held_grad, values, PRECISION) - delta[:, None])
    if MASKED:  # 0 where a key is hidden, even if the gradient is NaN
        grad_score = tl.where(weight != 0.0, grad_score, 0.0)
    return dot_split(grad_score, keys, grad_q, k.dtype.element_ty, SPLIT, PRECISION, INTERPRET)


@triton.jit
def _cross_attention_grad_q_kernel(
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
):
    """grad_q (B, Lq, H, D) of one tile of queries."""
    count = tiles_in(LQ, SIZE_Q, HAS_BLOCKS, BLOCK_M)
    batch, head, tile = lane_of(count, H)
    start, stop = span_of(tile, LQ, SIZE_Q, HAS_BLOCKS, BLOCK_M)
    row = start + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    at = q + batch * q_stride_b + head * q_stride_h
    at = at + row64[:, None] * q_stride_l + d.to(tl.int64)[None, :] * q_stride_d
    held = as_operand(load_rows(at, row < stop, d, D, EVEN, True), q.dtype.element_ty, INTERPRET)
    at = grad + batch * grad_stride_b + head * grad_stride_h
    at = at + row64[:, None] * grad_stride_l + dv.to(tl.int64)[None, :] * grad_stride_d
    held_grad = as_operand(load_rows(at, row < stop, dv, DV, EVEN_V, True), q.dtype.element_ty, INTERPRET)
    where = (batch * H + head) * LQ + row64
    row_base = tl.load(base + where, row < stop, other=float("inf"))
    row_delta = tl.load(delta + where, row < stop, other=0.0)
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
    row_low = None
    row_high = None
    if when is not None:  # rows past the end have an empty window
        when += batch * when_stride_b
        row_low = tl.load(low + batch * low_stride_b + row64, row < stop, other=1)[:, None]
        row_high = tl.load(high + batch * low_stride_b + row64, row < stop, other=0)[:, None]
    lane = batch * tiles_stride_b + head * tiles_stride_h
    begin, middle, end = range_of(ranges, lane * count + tile, LK // BLOCK_N, tl.cdiv(LK, BLOCK_N))
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for i in tl.range(begin, middle, num_stages=STAGES, disable_licm=not HOIST):
        total = _tile_of_keys(
            total, held, held_grad, row_base, row_delta, k, v, bias, when, row_low, row_high, entries, i, LK, D, DV,
            SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, False, HAS_BLOCKS,
            HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for i in tl.range(middle, end, num_stages=1, disable_licm=not HOIST):
        total = _tile_of_keys(
            total, held, held_grad, row_base, row_delta, k, v, bias, when, row_low, row_high, entries, i, LK, D, DV,
            SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, True, HAS_BLOCKS,
            HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    total = tl.where(end < begin, float("nan"), total)  # a block index is out of range
    grad_q += ((batch * LQ + row64[:, None]) * H + head) * D + d[None, :]
    tl.store(grad_q, (total * SCALE).to(grad_q.dtype.element_ty), (row < stop)[:, None] & (d < D)[None, :])


_DELTA = {"BLOCK_M": 16}  # the kernel is bound by memory
_DELTA_WARPS = {"num_warps": 4}


def launch_cross_attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (empty without one)."""
    batch, queries, heads, size = q.shape
    keys, value_size = k.shape[1], v.shape[3]
    check_blocks(block_index, block_size, keys)
    like = {"device": q.device}
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, **like) for t in (q, k, v))
    grad_bias = torch.empty(0 if key_bias is None else (batch, heads, keys), dtype=torch.float32, **like)
    call = Call.of(q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size)
    base, delta = (torch.empty(batch, heads, queries, dtype=torch.float32, **like) for _ in range(2))
    fixed = constants(q, v)
    half = q.dtype != torch.float32
    by_axis = strides({"q": q, "k": k, "v": v, "grad": grad_out})
    shared = {"LQ": queries, "LK": keys, "H": heads, "D": size, "DV": value_size, "SCALE": float(scale)}
    if base.numel() > 0:
        _cross_attention_delta_kernel[(batch * heads * triton.cdiv(queries, _DELTA["BLOCK_M"]),)](
            out,
            grad_out,
            grad_lse if grad_lse is None else grad_lse.contiguous(),
            lse.contiguous(),
            base,
            delta,
            queries,
            heads,
            value_size,
            *out.stride(),
            *grad_out.stride(),
            PRECISION=fixed["PRECISION"],
            **_DELTA,
            BLOCK_V=fixed["BLOCK_V"],
            **_DELTA_WARPS,
        )
    kv_tile, _ = _kv_tile_of(call, q, v)
    sums = delta  # placeholder for a sum that is not needed
    if kv_tile["ONE_PASS"]:
        warn_if_asked("cross_attention_backward on triton")
        sums = torch.zeros(q.shape, dtype=torch.float32, **like)
    elif base.numel() > 0:
        tile = call.limited(GRAD_Q.tile(q.device, **fields_of(q, v, call.features, keys < FEW)))
        _cross_attention_grad_q_kernel[(batch * heads * call.query_tiles(tile["BLOCK_M"]),)](
            q, k, v, grad_out, base, delta, grad_q=grad_q, **shared, **by_axis, **fixed,
            **call.arguments(tile, by_key=False), SPLIT=half and keys < FEW, **tile,
        )  # fmt: skip
    if batch * heads * keys > 0:
        _cross_attention_grad_kv_kernel[(batch * heads * call.key_tiles(kv_tile["BLOCK_N"]),)](
            q, k, v, grad_out, base, delta, grad_k=grad_k, grad_v=grad_v, grad_bias=grad_bias, grad_q=sums, **shared,
            **by_axis, **fixed, **call.arguments(kv_tile, by_key=True), SPLIT=half and queries < FEW, **kv_tile,
        )  # fmt: skip
    if kv_tile["ONE_PASS"]:
        grad_q = sums.to(q.dtype)
    if key_bias is not None:
        grad_bias = (grad_bias.sum(1) if key_bias.dim() == 2 else grad_bias).to(key_bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias


def one_pass_allowed(arch: int, version: str = triton.__version__) -> bool:
    """Whether this Triton compiles the product with a transposed product correctly.

    Triton 3.4 to 3.7.0 do not on Hopper (tiles of 64; flash-linear-attention issues 640 and 983). No other kernel of
    attention transposes a product.
    """
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    return not (arch == 90 and (3, 4) <= numbers < (3, 7, 1))


def _kv_tile_of(call: Call, q: Tensor, v: Tensor) -> tuple[Tile, Chosen]:
    """The tile for the gradient of keys, fitted to the call's blocks, and the choice that it comes from."""
    fields = fields_of(q, v, call.features, call.queries < FEW)
    # In one pass, the gradient of a query is summed in the order in which programs run.
    fixed = must_be_deterministic() or not one_pass_allowed(arch_of(q.device))
    fixed = fixed or fields["dtype"] == "fp32" or min(call.queries, call.keys) < FEW
    fields["order"] = "fixed" if fixed else "any"
    tile, chosen = GRAD_KV.tile(q.device, **fields), GRAD_KV.chosen(q.device, **fields)
    if fixed and tile["ONE_PASS"]:  # only if forced: no table has it
        tile = GRAD_KV.default(arch_of(q.device), **fields)
    return call.limited(tile), chosen


def tiles_cross_attention_bwd(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> list[Chosen]:
    """The tiles that `launch_cross_attention_bwd` uses for the same arguments."""
    call = Call.of(q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size)
    tile, of_keys = _kv_tile_of(call, q, v)
    if tile["ONE_PASS"]:
        return [of_keys]
    return [GRAD_Q.chosen(q.device, **fields_of(q, v, call.features, call.keys < FEW)), of_keys]


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_cross_attention_delta_kernel": [
        (
            {"out": "*bf16", "grad": "*bf16", "grad_lse": "*fp32", "lse": "*fp32", **ROWS},
            {"out_stride_d": 1, "grad_stride_d": 1, "PRECISION": "tf32", **_DELTA, "BLOCK_V": size},
            4,
        )
        for size in (128, 256)
    ],
    "_cross_attention_grad_q_kernel": variants(GRAD_Q, (*TENSORS, "grad_q"), ROWS),
}
