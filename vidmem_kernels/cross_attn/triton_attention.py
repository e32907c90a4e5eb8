"""Triton kernel of cross_attention, and functions that its gradient shares.

It computes an online softmax over the tiles of keys that a tile of queries needs: first those without a mask, then
those with one. Masks, biases and tile lists that a call does not use are not compiled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._env import triton_interpret
from .._numerics import check_index
from .._tuned import DEFAULT, Chosen, Tile, arch_of
from . import triton_attention_specialised as specialised
from .triton_attention_parts import (
    as_operand,
    dot_rows,
    dot_split,
    entry_of,
    lane_of,
    load_rows,
    log_sum_of,
    range_of,
    seen_by_any,
    softmax_step,
    span_of,
    tiles_in,
    visible,
)
from .triton_attention_specialised import attend_specialised
from .triton_plan import Call
from .triton_tiles import FEW, FORWARD, fields_of, padded, variants


@triton.jit
def _attend(
    held,
    acc,
    row_max,
    row_sum,
    k,
    v,
    bias,
    k_scale,
    v_scale,
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
    k_scale_stride_l,
    v_scale_stride_l,
    DTYPE: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIVE: tl.constexpr,
    INTERPRET: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Adds one tile of keys to the sums of a tile of queries.

    8-bit rows are exact factors of scores, which are scaled afterwards. Values are scaled before they are rounded to
    DTYPE, as users do: weights times scales would lose bits to subnormal numbers of float16.
    """
    tile, listed = entry_of(entries, i)
    start, stop = span_of(tile, LK, SIZE_K, HAS_BLOCKS, BLOCK_N)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    first = tl.cast(start, tl.int64)
    key = start + n
    inside = key < stop
    at = k + first * k_stride_l + (n.to(tl.int64)[:, None] * k_stride_l + d.to(tl.int64)[None, :] * k_stride_d)
    keys = load_rows(at, inside, d, D, EVEN, MASKED)
    if k_scale is not None:
        keys = keys.to(tl.float32)  # the interpreter does not convert int8 to bfloat16
    keys = as_operand(keys, DTYPE, INTERPRET)
    score = dot_rows(held, keys, PRECISION)
    if k_scale is not None:
        at_scale = k_scale + (first + n) * k_scale_stride_l
        score *= (tl.load(at_scale, inside, other=0.0) if MASKED else tl.load(at_scale))[None, :]
    key_bias = None
    if bias is not None:
        at_bias = bias + (first + n) * bias_stride_k
        key_bias = (tl.load(at_bias, inside, other=0.0) if MASKED else tl.load(at_bias))[None, :]
    there = inside
    seen = None
    if MASKED:
        times = None
        if when is not None:
            times = tl.load(when + first + n, inside, other=0)[None, :]
        seen = visible(key[None, :], stop, listed, times, low, high, SINKS, HAS_BLOCKS, HAS_SINKS)
        if when is not None or HAS_SINKS:
            there = seen_by_any(seen, score)
    weight, decay, new_max = softmax_step(score, key_bias, seen, row_max, SCALE, PRECISION, POSITIVE, INTERPRET)
    row_sum = row_sum * decay + tl.sum(weight, axis=1)
    at = v + first * v_stride_l + (n.to(tl.int64)[:, None] * v_stride_l + dv.to(tl.int64)[None, :] * v_stride_d)
    values = load_rows(at, there, dv, DV, EVEN_V, MASKED)
    if v_scale is not None:
        at_scale = v_scale + (first + n) * v_scale_stride_l
        factor = tl.load(at_scale, there, other=0.0) if MASKED else tl.load(at_scale)
        values = values.to(tl.float32) * factor[:, None]
    values = as_operand(values, DTYPE, INTERPRET)
    acc = dot_split(weight, values, acc * decay[:, None], DTYPE, SPLIT, PRECISION, INTERPRET)
    return acc, new_max, row_sum


@triton.jit
def _attend_all(
    q, k, v, bias, k_scale, v_scale, when, low, high, entries, begin, middle, end, batch, row, inside, LK, D, DV,
    SIZE_K, SINKS, SCALE, q_stride_l, q_stride_d, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k,
    k_scale_stride_l, v_scale_stride_l, when_stride_b, low_stride_b,
    HAS_LIST: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_SINKS: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, POSITIVE: tl.constexpr, INTERPRET: tl.constexpr, EVEN: tl.constexpr,
    EVEN_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, HOIST: tl.constexpr,
):  # fmt: skip
    """Sums, maxima and totals of a tile of queries over its tiles of keys."""
    d = tl.arange(0, BLOCK_D)
    at = q + row[:, None] * q_stride_l + d.to(tl.int64)[None, :] * q_stride_d
    held = as_operand(load_rows(at, inside, d, D, EVEN, True), q.dtype.element_ty, INTERPRET)
    row_low = None
    row_high = None
    if when is not None:  # rows past the end have an empty window
        when += batch * when_stride_b
        row_low = tl.load(low + batch * low_stride_b + row, inside, other=1)[:, None]
        row_high = tl.load(high + batch * low_stride_b + row, inside, other=0)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.range(begin, middle, num_stages=STAGES, disable_licm=not HOIST):
        acc, row_max, row_sum = _attend(
            held, acc, row_max, row_sum, k, v, bias, k_scale, v_scale, when, row_low, row_high, entries, i, LK, D, DV,
            SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, k_scale_stride_l,
            v_scale_stride_l, q.dtype.element_ty, False, HAS_BLOCKS, HAS_SINKS, SPLIT, PRECISION, POSITIVE, INTERPRET,
            EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    for i in tl.range(middle, end, num_stages=1, disable_licm=not HOIST):
        acc, row_max, row_sum = _attend(
            held, acc, row_max, row_sum, k, v, bias, k_scale, v_scale, when, row_low, row_high, entries, i, LK, D, DV,
            SIZE_K, SINKS, SCALE, k_stride_l, k_stride_d, v_stride_l, v_stride_d, bias_stride_k, k_scale_stride_l,
            v_scale_stride_l, q.dtype.element_ty, True, HAS_BLOCKS, HAS_SINKS, SPLIT, PRECISION, POSITIVE, INTERPRET,
            EVEN, EVEN_V, BLOCK_N, BLOCK_D, BLOCK_V,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def _cross_attention_fwd_kernel(
    q,
    k,
    v,
    bias,
    k_scale,
    v_scale,
    when,
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
    k_scale_stride_b,
    k_scale_stride_l,
    v_scale_stride_b,
    v_scale_stride_l,
    when_stride_b,
    low_stride_b,
    tiles_stride_b,
    tiles_stride_h,
    HAS_BLOCKS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    POSITIVE: tl.constexpr,
    INTERPRET: tl.constexpr,
    EVEN: tl.constexpr,
    EVEN_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    HOIST: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    TAIL: tl.constexpr,
):
    """out (B, Lq, H, Dv) and lse (B, H, Lq) of one tile of queries."""
    count = tiles_in(LQ, SIZE_Q, HAS_BLOCKS, BLOCK_M)
    batch, head, tile = lane_of(count, H)
    start, stop = span_of(tile, LQ, SIZE_Q, HAS_BLOCKS, BLOCK_M)
    row = start + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)
    dv = tl.arange(0, BLOCK_V)
    q += batch * q_stride_b + head * q_stride_h
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    if bias is not None:
        bias += batch * bias_stride_b + head * bias_stride_h
    if k_scale is not None:
        k_scale += batch * k_scale_stride_b
        v_scale += batch * v_scale_stride_b
    lane = batch * tiles_stride_b + head * tiles_stride_h
    begin, middle, end = range_of(ranges, lane * count + tile, LK // BLOCK_N, tl.cdiv(LK, BLOCK_N))
    if WARP_SPECIALIZE:
        acc, row_max, row_sum = attend_specialised(
            q, k, v, bias, entries, begin, end, start, LQ, LK, D, DV, SCALE, q_stride_l, k_stride_l, v_stride_l,
            PRECISION, POSITIVE, INTERPRET, TAIL, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, STAGES,
        )  # fmt: skip
    else:
        acc, row_max, row_sum = _attend_all(
            q, k, v, bias, k_scale, v_scale, when, low, high, entries, begin, middle, end, batch, row64, row < stop, LK,
            D, DV, SIZE_K, SINKS, SCALE, q_stride_l, q_stride_d, k_stride_l, k_stride_d, v_stride_l, v_stride_d,
            bias_stride_k, k_scale_stride_l, v_scale_stride_l, when_stride_b, low_stride_b, ranges is not None,
            HAS_BLOCKS, HAS_SINKS, SPLIT, PRECISION, POSITIVE, INTERPRET, EVEN, EVEN_V, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_V, STAGES, HOIST,
        )  # fmt: skip
    log_sum, total = log_sum_of(row_max, row_sum, PRECISION)
    broken = end < begin  # a block index is out of range
    log_sum = tl.where(broken, float("nan"), log_sum)
    result = tl.where(broken, float("nan"), acc / total[:, None])
    out += ((batch * LQ + row64[:, None]) * H + head) * DV + dv[None, :]
    tl.store(out, result.to(out.dtype.element_ty), (row < stop)[:, None] & (dv < DV)[None, :])
    tl.store(lse + (batch * H + head) * LQ + row64, log_sum, row < stop)


def constants(q: Tensor, v: Tensor) -> dict[str, object]:
    """Arguments that follow from the dtype and head sizes."""
    width, value_width = padded(q.shape[3]), padded(v.shape[3])
    return {
        # The error of TF32 exceeds that of the float32 reference.
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "INTERPRET": triton_interpret(),
        "EVEN": width == q.shape[3],
        "EVEN_V": value_width == v.shape[3],
        "BLOCK_D": width,
        "BLOCK_V": value_width,
    }


def strides(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Strides of (B, L, H, D) tensors, by the names of the kernel arguments."""
    return {
        f"{name}_stride_{axis}": stride
        for name, tensor in tensors.items()
        for axis, stride in zip("blhd", tensor.stride(), strict=True)
    }


def check_blocks(block_index: Tensor | None, block_size: list[int], keys: int) -> None:
    """Raises IndexError for a block that is out of range, as the reference does, unless the index is on a GPU.

    There the check would wait for the index; instead, kernels skip such a block and give NaN to its queries.
    """
    if block_index is not None and block_index.device.type == "cpu":
        check_index("cross_attention", "block_index", block_index, -1, -(-keys // block_size[1]))


def launch_cross_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, *options: object
) -> tuple[Tensor, Tensor]:
    """(out, lse); see `vidmem_kernels.cross_attention`."""
    return launch_cross_attention_mixed_fwd(q, k, v, None, None, key_bias, *options, q.dtype)


def launch_cross_attention_mixed_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_bias: Tensor | None,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(out, lse), with scales for 8-bit rows, and out of a separate dtype."""
    batch, queries, heads, size = q.shape
    keys, value_size = k.shape[1], v.shape[3]
    check_blocks(block_index, block_size, keys)
    out = torch.empty(batch, queries, heads, value_size, dtype=out_dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    call = Call.of(q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size)
    split = q.dtype != torch.float32 and keys < FEW
    tile, chosen = _tile_of(call, q, k, v)
    kernel = _cross_attention_fwd_kernel[(batch * heads * call.query_tiles(tile["BLOCK_M"]),)]
    arguments = {
        "out": out, "lse": lse, "LQ": queries, "LK": keys, "H": heads, "D": size, "DV": value_size,
        "SCALE": float(scale), **strides({"q": q, "k": k, "v": v}), **_scales(k_scale, v_scale),
        **call.arguments(tile, by_key=False), **constants(q, v), "SPLIT": split, "POSITIVE": scale > 0,
        "TAIL": keys % tile["BLOCK_N"] != 0, **tile,
    }  # fmt: skip
    if tile["WARP_SPECIALIZE"]:
        specialised.launch(lambda: kernel(q, k, v, **arguments), tile, chosen.key, q.device)
    else:
        kernel(q, k, v, **arguments)
    return out, lse


def _scales(k_scale: Tensor | None, v_scale: Tensor | None) -> dict[str, object]:
    """Scales of rows, and their strides."""
    found: dict[str, object] = {}
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        batch, row = (0, 0) if scale is None else scale.stride()
        found |= {name: scale, f"{name}_stride_b": batch, f"{name}_stride_l": row}
    return found


def _tile_of(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tile, Chosen]:
    """The tile of a call, fitted to its blocks, and the choice that it comes from."""
    features = call.features if k.dtype == q.dtype else f"{call.features} rows8".strip()
    fields = fields_of(q, v, features, k.shape[1] < FEW)
    tile, chosen = call.limited(FORWARD.tile(q.device, **fields)), FORWARD.chosen(q.device, **fields)
    if tile["WARP_SPECIALIZE"] and specialised.why_not(call, tile, chosen.key, q, k, v) is not None:
        default = FORWARD.default(arch_of(q.device), **fields)
        tile, chosen = call.limited(default), chosen._replace(tile=default, source=DEFAULT)
    return tile, chosen


def tiles_cross_attention_fwd(
    q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> list[Chosen]:
    """The tile that `launch_cross_attention_fwd` uses for the same arguments."""
    call = Call.of(q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size)
    return [_tile_of(call, q, k, v)[1]]


def tiles_cross_attention_mixed_fwd(q, k, v, k_scale, v_scale, key_bias, *options) -> list[Chosen]:
    """The tile that `launch_cross_attention_mixed_fwd` uses for the same arguments."""
    return tiles_cross_attention_fwd(q, k, v, key_bias, *options[:-1])


_TYPES = ("q", "k", "v", "out")
_PLAIN = {"lse": "*fp32"}
# See sparse_gather.triton_gather.AOT.
_UNSCALED = {"k_scale": None, "v_scale": None, "POSITIVE": True, "TAIL": False}
_SCALED = {"k_scale_stride_l": 1, "v_scale_stride_l": 1, "POSITIVE": True, "TAIL": False}
_SCALES = {**_PLAIN, "k_scale": "*fp32", "v_scale": "*fp32"}
_INT8 = (
    ("bf16", 64, "bias rows8", (80, 90, 120)),
    ("bf16", 128, "rows8", (80, 90, 120)),
    ("bf16", 128, "blocks rows8", (90,)),
    ("bf16", 128, "bias rows8 few", (80, 90)),
    ("bf16", 128, "bias window rows8 sinks", (80, 90, 120)),
    ("bf16", 256, "bias rows8", (80, 90)),
    ("fp32", 128, "rows8", (90,)),
)
_FLOAT8 = (("bf16", 128, "bias rows8", (90, 120)), ("fp16", 128, "rows8", (90,)))
AOT = {
    "_cross_attention_fwd_kernel": [
        *variants(FORWARD, _TYPES, _PLAIN, **_UNSCALED),
        *variants(FORWARD, _TYPES, {**_PLAIN, "out": "*fp32"}, (("bf16", 128, "", (90,)),), **_UNSCALED),
        *variants(FORWARD, _TYPES, {**_SCALES, "k": "*i8", "v": "*i8"}, _INT8, **_SCALED),
        *variants(FORWARD, _TYPES, {**_SCALES, "k": "*fp8e4nv", "v": "*fp8e4nv"}, _FLOAT8, **_SCALED),
    ]
}
