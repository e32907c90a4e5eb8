"""Triton kernel of cross_attention, and what its gradient shares with it.

An online softmax over the tiles of keys that a tile of queries needs: first those without any mask, then those with.
Masks, biases and lists of tiles that a call does not have are not compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from .._env import triton_interpret
from .._numerics import check_index
from .triton_plan import Call
from .triton_tiles import WANTED, padded, pick, variants

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def as_operand(x, dtype: tl.constexpr, INTERPRET: tl.constexpr):
    """x as a factor of tl.dot; the interpreter has no products of bfloat16."""
    return x.to(dtype).to(tl.float32) if INTERPRET else x.to(dtype)


@triton.jit
def exp_minus(x, base, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """exp(x - base). In half precision base * log2(e) is rounded by itself, which is the same for all of a row."""
    if PRECISION != "ieee":
        return tl.exp2(x * _LOG2E - base * _LOG2E)
    elif INTERPRET:
        return tl.exp(x - base)
    else:
        return libdevice.exp(x - base)  # tl.exp would round the product with log2(e)


@triton.jit
def dot_alone(x, y, PRECISION: tl.constexpr):
    """x @ y, which the compiler does not make a part of a longer sum."""
    return tl.dot(x, y, input_precision=PRECISION, max_num_imprecise_acc=1)


@triton.jit
def dot_rows(x, y, PRECISION: tl.constexpr):
    """x @ y.T. In float32 one running sum over more than 128 columns would err more than the reference does: even and
    odd columns, which lie in the same thread, have one each.
    """
    if PRECISION == "ieee" and x.shape[1] > 128:
        x_even, x_odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
        y_even, y_odd = tl.split(tl.reshape(y, [y.shape[0], y.shape[1] // 2, 2]))
        return dot_alone(x_even, y_even.T, PRECISION) + dot_alone(x_odd, y_odd.T, PRECISION)
    else:
        return tl.dot(x, y.T, input_precision=PRECISION)


@triton.jit
def dot_split(x, y, acc, dtype: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, INTERPRET: tl.constexpr):
    """acc + x @ y with x rounded to dtype, or in two such parts: the errors of a few terms do not average out.

    In float32 the product is summed first: one running sum over thousands of rows would err more than the reference.
    """
    high = as_operand(x, dtype, INTERPRET)
    if PRECISION == "ieee":
        return acc + dot_alone(high, y, PRECISION)
    acc = tl.dot(high, y, acc, input_precision=PRECISION)
    if SPLIT:
        low = as_operand(x - high.to(tl.float32), dtype, INTERPRET)
        acc = tl.dot(low, y, acc, input_precision=PRECISION)
    return acc


@triton.jit
def lane_of(tile_count, H):
    """Batch, head and tile of a program; the tiles of one head are neighbours, for its keys to stay in the cache."""
    lane = tl.program_id(0) // tile_count
    return (lane // H).to(tl.int64), (lane % H).to(tl.int64), tl.program_id(0) % tile_count


@triton.jit
def tiles_in(L, SIZE, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """How many tiles cover L rows, where each lies in one block of SIZE rows."""
    return tl.cdiv(L, SIZE) * tl.cdiv(SIZE, BLOCK) if HAS_BLOCKS else tl.cdiv(L, BLOCK)


@triton.jit
def span_of(tile, L, SIZE, HAS_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """First row of a tile, and the end of its block."""
    if HAS_BLOCKS:
        parts = tl.cdiv(SIZE, BLOCK)
        begin = tile // parts * SIZE
        return begin + tile % parts * BLOCK, tl.minimum(begin + SIZE, L)
    else:
        return tile * BLOCK, L


@triton.jit
def range_of(ranges, row, whole, count):
    """Begin, middle and end of a row's tiles: without mask up to the middle. Without a list, all of them."""
    if ranges is not None:
        return tl.load(ranges + row * 3), tl.load(ranges + row * 3 + 1), tl.load(ranges + row * 3 + 2)
    else:
        return 0, whole, count


@triton.jit
def entry_of(entries, i):
    if entries is not None:
        entry = tl.load(entries + i)
        return entry >> 1, entry & 1
    else:
        return i, 1


@triton.jit
def load_rows(where, there, d, D, EVEN_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a tile, 0 where they are not `there` and past D; `where` points at them."""
    if MASKED and EVEN_D:
        return tl.load(where, there[:, None], other=0.0)
    elif MASKED:
        return tl.load(where, there[:, None] & (d < D)[None, :], other=0.0)
    elif EVEN_D:
        return tl.load(where)
    else:
        return tl.load(where, (d < D)[None, :], other=0.0)


@triton.jit
def visible(key, stop, listed, rank, low, high, SINKS, HAS_BLOCKS: tl.constexpr, HAS_SINKS: tl.constexpr):
    """Which keys are seen from windows [low, high); keys along either axis, the rest broadcasts."""
    seen = key < stop
    listed += tl.zeros_like(key)
    if rank is not None:
        within = (rank >= low) & (rank < high)
        if HAS_BLOCKS and HAS_SINKS:
            within = within & (listed > 0)
        if HAS_SINKS:
            within = within | (key < SINKS)
        seen = seen & within
    elif HAS_SINKS:
        seen = seen & ((key < SINKS) | (listed > 0))
    return seen


@triton.jit
def span_of_windows(low, high):
    """The ranks that windows of a tile cover. Rows beyond are not loaded, since 0 times their NaN would be NaN."""
    some = low < high
    return tl.min(tl.where(some, low, 2147483647)), tl.max(tl.where(some, high, -1))


@triton.jit
def _attend(
    held,
    acc,
    row_max,
    row_sum,
    k,
    v,
    bias,
    rank,
    low,
    high,
    span_low,
    span_high,
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
    """One tile of keys joins the sums of a tile of queries."""
    tile, listed = entry_of(entries, i)
    start, stop = span_of(tile, LK, SIZE_K, HAS_BLOCKS, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    first = tl.cast(start, tl.int64)
    at = k + first * k_stride_l + (n.to(tl.int64)[:, None] * k_stride_l + d.to(tl.int64)[None, :] * k_stride_d)
    key = start + n
    inside = key < stop
    there = inside
    key_rank = None
    row_rank = None
    if MASKED:
        if rank is not None:
            key_rank = tl.load(rank + first + n, inside, other=0)
            row_rank = key_rank[None, :]
        there = visible(key, stop, listed, key_rank, span_low, span_high, SINKS, HAS_BLOCKS, HAS_SINKS)
    keys = as_operand(load_rows(at, there, d, D, EVEN, MASKED), k.dtype.element_ty, INTERPRET)
    score = dot_rows(held, keys, PRECISION) * SCALE
    if bias is not None:
        at_bias = bias + (first + n) * bias_stride_k
        score += (tl.load(at_bias, inside, other=0.0) if MASKED else tl.load(at_bias))[None, :]
    if MASKED:
        seen = visible(key[None, :], stop, listed, row_rank, low, high, SINKS, HAS_BLOCKS, HAS_SINKS)
        score = tl.where(seen, score, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(score, axis=1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = exp_minus(score, base[:, None], PRECISION, INTERPRET)
    decay = exp_minus(row_max, base, PRECISION, INTERPRET)
    row_sum = row_sum * decay + tl.sum(weight, axis=1)
    at = v + first * v_stride_l + (n.to(tl.int64)[:, None] * v_stride_l + dv.to(tl.int64)[None, :] * v_stride_d)
    values = as_operand(load_rows(at, there, dv, DV, EVEN_V, MASKED), v.dtype.element_ty, INTERPRET)
    acc = dot_split(weight, values, acc * decay[:, None], v.dtype.element_ty, SPLIT, PRECISION, INTERPRET)
    return acc, new_max, row_sum


@triton.jit
def _cross_attention_fwd_kernel(
    q,
    k,
    v,
    bias,
    rank,
    low,
    high,
    ranges,
    entries,
    out,
    lse,
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
    bias_stride_b,
    bias_stride_h,
    bias_stride_k,
    rank_stride_b,
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
    """out (B, Lq, H, Dv) and lse (B, H, Lq) of one tile of queries."""
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
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
    row_low = None
    row_high = None
    span_low = None
    span_high = None
    if rank is not None:
        rank += batch * rank_stride_b
        row_low = tl.load(low + batch * low_stride_b + row64, row < stop, other=0)[:, None]
        row_high = tl.load(high + batch * low_stride_b + row64, row < stop, other=0)[:, None]
        span_low, span_high = span_of_windows(row_low, row_high)
    lane = batch * tiles_stride_b + head * tiles_stride_h
    begin, middle, end = range_of(ranges, lane * count + tile, LK // BLOCK_N, tl.cdiv(LK, BLOCK_N))
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(begin, middle, num_stages=STAGES, disable_licm=not HOIST):
        acc, row_max, row_sum = _attend(
            held, acc, row_max, row_sum, k, v, bias, rank, row_low, row_high, span_low, span_high, entries, i, LK, D,
            DV, SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, False, HAS_BLOCKS,
            HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for i in tl.range(middle, end, num_stages=STAGES if ranges is not None else 1, disable_licm=not HOIST):
        acc, row_max, row_sum = _attend(
            held, acc, row_max, row_sum, k, v, bias, rank, row_low, row_high, span_low, span_high, entries, i, LK, D,
            DV, SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, True, HAS_BLOCKS,
            HAS_SINKS, SPLIT, PRECISION, INTERPRET, EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    empty = row_sum == 0
    total = tl.where(empty, 1.0, row_sum)
    result = acc / total[:, None]
    out += ((batch * LQ + row64[:, None]) * H + head) * DV + dv[None, :]
    tl.store(out, result.to(out.dtype.element_ty), (row < stop)[:, None] & (dv < DV)[None, :])
    log_sum = tl.where(empty, float("-inf"), row_max + tl.log(total))
    tl.store(lse + (batch * H + head) * LQ + row64, log_sum, row < stop)


FEW = 256  # terms of a sum, as of which roundings to half precision average out


def constants(q: Tensor, v: Tensor) -> dict[str, object]:
    """Arguments that follow from dtype and head sizes."""
    width, value_width = padded(q.shape[3]), padded(v.shape[3])
    return {
        # TF32 errs more than the reference in float32 does.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "INTERPRET": triton_interpret(),
        "EVEN": width == q.shape[3],
        "EVEN_V": value_width == v.shape[3],
        "BLOCK_D": width,
        "BLOCK_V": value_width,
    }


def strides(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Those of (B, L, H, D) tensors, by the names that kernels give them."""
    return {
        f"{name}_stride_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("blhd", tensor.stride(), strict=True)
    }


def check_blocks(block_index: Tensor | None, block_size: list[int], keys: int) -> None:
    """Raises IndexError for a block that is out of range, as the reference does."""
    if block_index is not None:
        check_index("cross_attention", "block_index", block_index, -1, -(-keys // block_size[1]))


def launch_cross_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out, lse); see `vidmem_kernels.cross_attention`."""
    batch, queries, heads, size = q.shape
    keys, value_size = k.shape[1], v.shape[3]
    check_blocks(block_index, block_size, keys)
    out = torch.empty(batch, queries, heads, value_size, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    call = Call.of(q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size)
    split = q.dtype != torch.float32 and keys < FEW
    block_m, block_n, warps, stages, hoist = pick("fwd", q, v, split, call.windowed)
    block_m, block_n = call.limits(block_m, block_n)
    grid = (batch * heads * call.query_tiles(block_m),)
    _cross_attention_fwd_kernel[grid](
        q,
        k,
        v,
        out=out,
        lse=lse,
        LQ=queries,
        LK=keys,
        H=heads,
        D=size,
        DV=value_size,
        SCALE=float(scale),
        **strides({"q": q, "k": k, "v": v}),
        **call.arguments(block_m, block_n, by_key=False),
        **constants(q, v),
        SPLIT=split,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        STAGES=stages,
        HOIST=hoist,
        num_warps=warps,
    )
    return out, lse


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_cross_attention_fwd_kernel": variants("fwd", ("q", "k", "v", "out"), {"lse": "*fp32"}, WANTED),
}
