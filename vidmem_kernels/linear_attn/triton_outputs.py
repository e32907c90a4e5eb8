"""Triton kernel for the outputs of linear attention, and for the gradient of values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tuned import Chosen, Tile, Tunable
from .triton_parts import (
    EPS,
    FIELDS,
    ONES,
    TENSOR_MEMORY,
    Plan,
    bounds_of,
    divide,
    empty_states,
    factor,
    feature_columns,
    feature_rows,
    fields_of,
    first_column,
    is_wide,
    load_columns,
    load_rows,
    make_plan,
    padded,
    product,
    program_of,
    sees,
    steps_of,
    tokens_to_walk,
)
from .triton_states import SUMS, prefix_states, sum_pieces


@triton.jit
def _sum_features(z, y, ones, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """z plus the features y (D, tokens) of all tokens; z is (D,), or (D, ONES) if a product computes the sum."""
    if len(z.shape) == 1:
        return z + tl.sum(y.to(tl.float32), axis=1)
    else:
        return product(y, ones, z, DTYPE, EXACT)


@triton.jit
def _weigh_features(x, z, ones, DTYPE: tl.constexpr, EXACT: tl.constexpr):
    """x z for rows x, with the factors that a product would have: (tokens,), or (tokens, ONES) by a product."""
    if len(z.shape) == 1:
        return tl.sum(x.to(tl.float32) * factor(z, DTYPE).to(tl.float32)[None, :], axis=1)
    else:
        return product(x, z, tl.zeros_like(ones).to(tl.float32), DTYPE, EXACT)


@triton.jit
def _linear_outputs_kernel(
    q,
    k,
    v,
    factors,
    states,
    out,
    scale,
    L,
    H,
    D,
    DV,
    PIECES,
    SPAN,
    PER_SPAN,
    PIECE,
    GROUP,
    BLOCK,
    COUNT,
    SPLITS,
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
    MAP: tl.constexpr,
    SCAN: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """phi(q) S for the tokens of a piece, and in REVERSE the same for keys, with the sums of later queries.

    Scores have one row per token, so they are a left factor in the registers in which they were computed; keys are
    loaded transposed. The denominator is computed like the sums for a value of one: z and the sums of scores use the
    same rounded factors, so that the mean of equal values is exactly that value. Denominators come from products too,
    except in float32, whose products do not use tensor cores, and for heads so large that columns of ones would spill
    registers. `factors` weigh the features of k by scale / denominator.
    """
    batch, head, piece, split = program_of(PIECES, H, SPLITS)
    begin, end = bounds_of(piece, L, SPAN, PER_SPAN, PIECE)
    d = tl.arange(0, BLOCK_D)
    c = split * BLOCK_V + tl.arange(0, BLOCK_V)
    chunk = tl.arange(0, BLOCK_N)
    q += batch * q_stride_b + head * q_stride_h
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    lane = batch * H + head
    out += (batch * L * H + head) * DV
    dtype: tl.constexpr = q.dtype.element_ty
    exact: tl.constexpr = dtype == tl.float32
    seen = states + (lane * PIECES + piece // PER_SPAN * PER_SPAN) * COUNT
    state = tl.load(seen + d[:, None] * DV + c[None, :], (d < D)[:, None] & (c < DV)[None, :], other=0.0)
    if exact or BLOCK_D > 128:
        z = tl.load(seen + D * DV + d, d < D, other=0.0)
    else:
        z = tl.load(seen + D * DV + d[:, None] + tl.zeros([1, ONES], tl.int32), (d < D)[:, None], other=0.0)
    ones = tl.full([BLOCK_N, ONES], 1.0, dtype)
    group = tl.full((), GROUP, tl.int32)  # at most the tokens of a piece
    groups = tl.cdiv(end - begin, group)
    # Masked groups are the steps of the inner loop, so that loads are prefetched.
    for g in tl.range(0, 1 if MASKED else groups):
        start = (begin + (groups - 1 - g if REVERSE else g) * group).to(tl.int32)
        stop = tl.minimum(start + group, end).to(tl.int32)
        if SCAN and not MASKED:
            for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
                n = first + chunk
                y = load_columns(k, n, d, stop, D, k_stride_l, k_stride_d)
                y = feature_columns(y, n, d, stop, D, MAP)
                if factors is not None:
                    y = y.to(tl.float32) * tl.load(factors + lane * 2 * L + n, n < stop, other=0.0)[None, :]
                y = factor(y, dtype)
                w = load_rows(v, n, c, stop, DV, v_stride_l, v_stride_d)
                state = product(y, w, state, dtype, exact)
                if NORMALIZE:
                    z = _sum_features(z, y, ones, dtype, exact)
        for i in tl.range(0, groups if MASKED else tl.cdiv(stop - start, BLOCK_N), num_stages=STAGES):
            if MASKED:
                first = (begin + (groups - 1 - i if REVERSE else i) * group).to(tl.int32)
                stop = tl.minimum(first + group, end).to(tl.int32)
            else:
                first = start + i * BLOCK_N
            n = first + chunk
            held, held_z = state, z
            if MASKED:  # first, because keys as a left factor take registers
                y = load_columns(k, n, d, stop, D, k_stride_l, k_stride_d)
                y = feature_columns(y, n, d, stop, D, MAP)
                if factors is not None:
                    y = y.to(tl.float32) * tl.load(factors + lane * 2 * L + n, n < stop, other=0.0)[None, :]
                y = factor(y, dtype)
                w = load_rows(v, n, c, stop, DV, v_stride_l, v_stride_d)
                held = factor(state, dtype)
                state = product(y, w, state, dtype, exact)
                if NORMALIZE:
                    z = _sum_features(z, y, ones, dtype, exact)
            x = factor(feature_rows(load_rows(q, n, d, stop, D, q_stride_l, q_stride_d), n, d, stop, D, MAP), dtype)
            total = product(x, held, tl.zeros([BLOCK_N, BLOCK_V], tl.float32), dtype, exact)
            if NORMALIZE:
                divisor = _weigh_features(x, held_z, ones, dtype, exact)
            if MASKED:
                scores = product(x, y, tl.zeros([BLOCK_N, BLOCK_N], tl.float32), dtype, exact)
                scores = factor(tl.where(sees(BLOCK_N, BLOCK, BACK=not REVERSE), scores, 0.0), dtype)
                total = product(scores, w, total, dtype, exact)
                if NORMALIZE and len(z.shape) == 1:
                    divisor += tl.sum(scores.to(tl.float32), axis=1)
                elif NORMALIZE:
                    divisor = product(scores, ones, divisor, dtype, exact)
            total *= scale
            if NORMALIZE:
                if len(z.shape) == 2:
                    divisor = first_column(divisor, ONES)
                total = divide(total, (divisor * scale + EPS)[:, None], exact)
            target = out + n.to(tl.int64)[:, None] * H * DV + c[None, :]
            tl.store(target, total.to(out.dtype.element_ty), (n < stop)[:, None] & (c < DV)[None, :])


def _default(arch: int, *, dtype: str, size: int, value_size: int, features: str, walk: str, direction: str) -> Tile:
    """As much of the state as fits in registers.

    A scan of half-precision tokens holds half of 128 values per program, so that two programs fit on a multiprocessor;
    before sm_90, and on sm_120, factors of products are in registers too.
    """
    wide = is_wide(dtype, features, direction)
    roomy = arch in TENSOR_MEMORY or arch == 90
    stages = 2
    if walk != "scan":
        block_n, block_v = 32 if wide or size > 128 else 64, (8192 if wide else 16384) // size
    elif dtype == "fp32" and arch == 120:  # with 64-bit strides, other tiles spill kilobytes of registers
        block_n, block_v, stages = 32, 2048 // size, 1
    elif dtype == "fp32" or size > 128 or (wide and not roomy):
        block_n, block_v, stages = 16, 4096 // size, 1
    elif wide:
        block_n, block_v = 32, 4096 // size
    elif roomy:
        block_n, block_v, stages = 64, 64, 1 if direction == "reverse" and arch == 90 else 2
        if arch == 90 and size == 128 and direction != "reverse":
            block_v = 32  # 64 columns spill registers under Triton 3.6
    else:
        block_n, block_v = 16 if arch == 120 else 32, 64 if direction == "reverse" else 32
    block_v = max(16, min(value_size, block_v))
    narrow = walk == "scan" and dtype != "fp32" and (stages > 1 or block_n > 16)
    warps = 8 if size * block_v > (8192 if narrow else 2048) or (dtype == "fp32" and arch == 120) else 4
    return {"BLOCK_N": block_n, "BLOCK_V": block_v, "STAGES": stages, "num_warps": warps}


def _candidates(arch: int, **fields) -> list[Tile]:
    if fields["dtype"] == "fp32":
        return []
    return [
        {"BLOCK_N": tokens, "BLOCK_V": block_v, "STAGES": stages, "num_warps": warps}
        for block_v in {min(128, fields["value_size"]), max(16, min(128, fields["value_size"]) // 2)}
        for tokens, stages, warps in ((32, 3, 4), (32, 2, 8), (64, 2, 4), (64, 1, 8), (64, 2, 8), (64, 3, 8))
    ]


OUTPUTS = Tunable("_linear_outputs_kernel", FIELDS, _default, _candidates)


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor | None,
    states: Tensor,
    plan: Plan,
    feature_map: str,
    block: int,
    normalize: bool,
    scale: float,
    reverse: bool,
) -> Tensor:
    """(B, L, H, Dv): what the tokens q read from the states and from the keys and values of their piece."""
    batch, length, heads, size = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    tile = OUTPUTS.tile(q.device, **fields_of(q, v, feature_map, plan, reverse))
    splits = max(1, triton.cdiv(v.shape[3], tile["BLOCK_V"]))
    group, block, masked = steps_of(plan, block, tile["BLOCK_N"])
    grid = (batch * heads * plan.pieces * splits,)
    if grid[0] == 0:
        return out
    _linear_outputs_kernel[grid](
        q,
        k,
        v,
        factors,
        states,
        out,
        scale,
        length,
        heads,
        size,
        v.shape[3],
        plan.pieces,
        plan.span,
        plan.per_span,
        plan.piece,
        group,
        block,
        states.shape[2],
        splits,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        MAP=feature_map,
        SCAN=plan.is_scan,
        MASKED=masked,
        NORMALIZE=normalize,
        REVERSE=reverse,
        BLOCK_D=padded(size),
        **tile,
    )
    return out


def launch_linear_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    causal: bool,
    block_size: int,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.linear_attention`."""
    batch, _, heads, size = q.shape
    plan = make_plan(tokens_to_walk(q, v), causal, block_size, batch * heads, q.device)
    last_S = torch.empty(batch, heads, size, v.shape[3], dtype=torch.float32, device=q.device)
    last_z = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    states = empty_states(q, v, plan)
    sum_pieces(k, v, None, states, plan, feature_map)
    prefix_states(states, S, z, last_S, last_z, plan, reverse=False)
    out = outputs(q, k, v, None, states, plan, feature_map, block_size, normalize, scale, reverse=False)
    return out, last_S, last_z


def tiles_linear_attention_fwd(q, k, v, S, z, feature_map, causal, block_size, *options) -> list[Chosen]:
    """The tiles of `launch_linear_attention_fwd`, for `explain`."""
    plan = make_plan(tokens_to_walk(q, v), causal, block_size, q.shape[0] * q.shape[2], q.device)
    fields = fields_of(q, v, feature_map, plan)
    return [SUMS.chosen(q.device, **fields), OUTPUTS.chosen(q.device, **fields)]


def _entry(dtype: str, size: int, feature_map: str, walk: str = "", masked: bool = False, reverse: bool = False):
    fields = {"dtype": dtype, "size": size, "value_size": size, "walk": walk}
    fields |= {"features": "elu1" if feature_map == "elu1" else "", "direction": "reverse" if reverse else ""}
    pointers = {**{name: f"*{dtype}" for name in ("q", "k", "v", "out")}, "states": "*fp32", "scale": "fp32"}
    constants = {f"{name}_stride_d": 1 for name in "qkv"}
    constants |= {"MAP": feature_map, "SCAN": walk == "scan", "MASKED": masked, "BLOCK_D": size}
    constants |= {"NORMALIZE": not reverse, "REVERSE": reverse}
    if reverse:
        pointers["factors"] = "*fp32"
    else:
        constants["factors"] = None
    return pointers, constants, (OUTPUTS, fields)


AOT = {
    "_linear_outputs_kernel": [
        _entry("bf16", 128, "relu"),
        _entry("bf16", 128, "relu", "scan", masked=True),
        _entry("bf16", 256, "relu", "scan", masked=True),
        _entry("fp32", 64, "elu1", "scan", masked=True),
        _entry("bf16", 64, "relu", "scan"),
        _entry("bf16", 128, "relu", "scan", masked=True, reverse=True),
        _entry("bf16", 128, "relu", reverse=True),
        _entry("fp16", 128, "elu1", "scan", masked=True),
        _entry("bf16", 128, "elu1", "scan", masked=True),
    ]
}
