"""Triton kernel of linear attention's outputs, and of the gradient of values."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_parts import (
    EPS,
    Plan,
    bounds_of,
    chunk_of,
    divide,
    empty_states,
    feature_columns,
    feature_rows,
    load_columns,
    load_rows,
    make_plan,
    padded,
    product,
    program_of,
    sees,
    tokens_to_walk,
)
from .triton_states import prefix_states, sum_pieces


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
    """phi(q) S of a piece's tokens, and in REVERSE that of keys, with what later queries have summed up.

    Everything is transposed, (channels, tokens): the running state is then the left factor of its product and goes
    there from the registers it is summed in. `factors` weigh the features of k: scale by denominator.
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
    exact: tl.constexpr = q.dtype.element_ty == tl.float32
    seen = states + (lane * PIECES + piece // PER_SPAN * PER_SPAN) * COUNT
    state = tl.load(seen + d[None, :] * DV + c[:, None], (d < D)[None, :] & (c < DV)[:, None], other=0.0)
    z = tl.load(seen + D * DV + d, d < D, other=0.0)
    groups = tl.cdiv(end - begin, GROUP)
    # Masked groups are the steps of the inner loop, so that loads run ahead there.
    for g in tl.range(0, 1 if MASKED else groups):
        start = (begin + (groups - 1 - g if REVERSE else g) * GROUP).to(tl.int32)
        stop = tl.minimum(start + GROUP, end).to(tl.int32)
        if SCAN and not MASKED:
            for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
                n = first + chunk
                y = feature_rows(load_rows(k, n, d, stop, D, k_stride_l, k_stride_d), n, d, stop, D, MAP)
                w = load_columns(v, n, c, stop, DV, v_stride_l, v_stride_d)
                if factors is not None:
                    y = y.to(tl.float32) * tl.load(factors + lane * 2 * L + n, n < stop, other=0.0)[:, None]
                state = product(w, y, state, exact)
                z += tl.sum(y.to(tl.float32), axis=0)
        for i in tl.range(0, groups if MASKED else tl.cdiv(stop - start, BLOCK_N), num_stages=STAGES):
            if MASKED:
                first = (begin + (groups - 1 - i if REVERSE else i) * GROUP).to(tl.int32)
                stop = tl.minimum(first + GROUP, end).to(tl.int32)
            else:
                first = start + i * BLOCK_N
            n = first + chunk
            x = feature_columns(load_columns(q, n, d, stop, D, q_stride_l, q_stride_d), n, d, stop, D, MAP)
            divisor = tl.sum(x.to(tl.float32) * z[:, None], axis=0)
            if MASKED:
                y = feature_rows(load_rows(k, n, d, stop, D, k_stride_l, k_stride_d), n, d, stop, D, MAP)
                w = load_columns(v, n, c, stop, DV, v_stride_l, v_stride_d)
                if factors is not None:
                    y = y.to(tl.float32) * tl.load(factors + lane * 2 * L + n, n < stop, other=0.0)[:, None]
                scores = product(y, x, tl.zeros([BLOCK_N, BLOCK_N], tl.float32), exact)
                scores = tl.where(sees(BLOCK_N, BLOCK, REVERSE), scores, 0.0)
                divisor += tl.sum(scores, axis=0)
                total = product(w, scores, tl.zeros([BLOCK_V, BLOCK_N], tl.float32), exact)
                total = product(state, x, total, exact)
                state = product(w, y, state, exact)
                z += tl.sum(y.to(tl.float32), axis=0)
            else:
                total = product(state, x, tl.zeros([BLOCK_V, BLOCK_N], tl.float32), exact)
            total *= scale
            if NORMALIZE:
                total = divide(total, (divisor * scale + EPS)[None, :], exact)
            target = out + n.to(tl.int64)[None, :] * H * DV + c[:, None]
            tl.store(target, total.to(out.dtype.element_ty), (n < stop)[None, :] & (c < DV)[:, None])


def output_config(size: int, value_size: int, plan: Plan, wide: bool) -> dict[str, int]:
    """Tile of a program: half as much of the state where scores need registers too, or operands are float32."""
    block_d = padded(size)
    tile = 16384 >> (plan.is_masked + wide)
    return {
        "BLOCK_N": plan.chunk if plan.is_masked else 32 if wide or size > 128 else 64,
        "BLOCK_D": block_d,
        "BLOCK_V": max(16, min(padded(value_size), tile // block_d)),
        "STAGES": 2,
    }


def output_warps(config: dict[str, int]) -> int:
    return 8 if config["BLOCK_D"] * config["BLOCK_V"] > 2048 else 4


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
    """(B, L, H, Dv): what tokens q find in the states, and in the keys and values of their piece."""
    batch, length, heads, size = q.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    wide = q.element_size() == 4 or feature_map == "elu1" or factors is not None
    config = output_config(size, v.shape[3], plan, wide)
    splits = max(1, triton.cdiv(v.shape[3], config["BLOCK_V"]))
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
        plan.group,
        min(block, plan.chunk),  # as far as a masked group knows
        states.shape[2],
        splits,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        MAP=feature_map,
        SCAN=plan.is_scan,
        MASKED=plan.is_masked,
        NORMALIZE=normalize,
        REVERSE=reverse,
        **config,
        num_warps=output_warps(config),
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
    chunk = chunk_of(size, q.element_size() == 4 or feature_map == "elu1")
    plan = make_plan(tokens_to_walk(q, v), causal, block_size, chunk)
    last_S = torch.empty(batch, heads, size, v.shape[3], dtype=torch.float32, device=q.device)
    last_z = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    states = empty_states(q, v, plan)
    sum_pieces(k, v, None, states, plan, feature_map)
    prefix_states(states, S, z, last_S, last_z, plan, reverse=False)
    out = outputs(q, k, v, None, states, plan, feature_map, block_size, normalize, scale, reverse=False)
    return out, last_S, last_z


def _entry(dtype: str, size: int, feature_map: str, causal: bool, block: int = 1, reverse: bool = False):
    wide = dtype == "fp32" or feature_map == "elu1" or reverse
    plan = make_plan(32760, causal, block, chunk_of(size, wide))
    config = output_config(size, size, plan, wide)
    pointers = {**{name: f"*{dtype}" for name in ("q", "k", "v", "out")}, "states": "*fp32", "scale": "fp32"}
    constants = {f"{name}_stride_d": 1 for name in "qkv"}
    constants |= {"MAP": feature_map, "SCAN": plan.is_scan, "MASKED": plan.is_masked}
    constants |= {"NORMALIZE": not reverse, "REVERSE": reverse}
    if reverse:
        pointers["factors"] = "*fp32"
    else:
        constants["factors"] = None
    return pointers, {**constants, **config}, output_warps(config)


AOT = {
    "_linear_outputs_kernel": [
        _entry("bf16", 128, "relu", causal=False),
        _entry("bf16", 128, "relu", causal=True),
        _entry("bf16", 256, "relu", causal=True),
        _entry("fp32", 64, "elu1", causal=True),
        _entry("bf16", 64, "relu", causal=True, block=390),
        _entry("bf16", 128, "relu", causal=True, reverse=True),
    ]
}
