"""Triton kernel of the gradients of linear attention's queries and keys; its backward. Not yet run on a GPU.

States, scores and denominators are computed anew. Between the passes of queries and of keys two numbers of a token and
head are kept; while heads are split over programs, those of every split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_outputs import outputs
from .triton_parts import (
    EPS,
    Plan,
    bounds_of,
    chunk_of,
    divide,
    empty_states,
    feature_columns,
    load_columns,
    load_rows,
    make_plan,
    padded,
    product,
    program_of,
    sees,
)
from .triton_states import prefix_states, sum_pieces


@triton.jit
def _linear_gradients_kernel(
    x,
    a,
    y,
    b,
    factors,
    partial,
    states,
    grad,
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
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_d,
    a_stride_b,
    a_stride_l,
    a_stride_h,
    a_stride_d,
    y_stride_b,
    y_stride_l,
    y_stride_h,
    y_stride_d,
    b_stride_b,
    b_stride_l,
    b_stride_h,
    b_stride_d,
    MAP: tl.constexpr,
    SCAN: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    REVERSE: tl.constexpr,
    FACTORS_ONLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradient of x = q, with a = grad_out, y = k, b = v; in REVERSE of x = k, with a = v, y = q, b = grad_out.

    Transposed as in the outputs, with the roles of features and values exchanged: t = S a + sum of y (b a). With d
    the denominator and z the sum of the keys that q sees, the gradient of phi(q) is (t - (q t) / d z) / d: what
    cancels in that difference is the same numbers. Rows of S are split over programs when they do not all fit; q t
    and d are then sums over splits, and t is computed once for them (FACTORS_ONLY) and once more for the gradient.
    """
    batch, head, piece, split = program_of(PIECES, H, SPLITS)
    begin, end = bounds_of(piece, L, SPAN, PER_SPAN, PIECE)
    d = split * BLOCK_D + tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_V)
    chunk = tl.arange(0, BLOCK_N)
    x += batch * x_stride_b + head * x_stride_h
    a += batch * a_stride_b + head * a_stride_h
    y += batch * y_stride_b + head * y_stride_h
    b += batch * b_stride_b + head * b_stride_h
    lane = batch * H + head
    lanes = tl.num_programs(0).to(tl.int64) // SPLITS // PIECES
    grad += (batch * L * H + head) * D
    if factors is not None:
        factors += lane * 2 * L
    rounds: tl.constexpr = x.dtype.element_ty != tl.float32
    # The factors of a query go into float32 sums, whatever its gradient is rounded to.
    exact: tl.constexpr = (NORMALIZE and not REVERSE) or not rounds
    weighted: tl.constexpr = NORMALIZE and REVERSE
    # In parts of tf32 the factors of float32 tokens would not fit in registers.
    single: tl.constexpr = "tf32x3" if rounds else "ieee"
    seen = states + (lane * PIECES + piece // PER_SPAN * PER_SPAN) * COUNT
    state = tl.load(seen + d[:, None] * DV + c[None, :], (d < D)[:, None] & (c < DV)[None, :], other=0.0)
    z = tl.load(seen + D * DV + d, d < D, other=0.0)
    groups = tl.cdiv(end - begin, GROUP)
    # Masked groups are the steps of the inner loop, so that loads run ahead there.
    for g in tl.range(0, 1 if MASKED else groups):
        start = (begin + (groups - 1 - g if REVERSE else g) * GROUP).to(tl.int32)
        stop = tl.minimum(start + GROUP, end).to(tl.int32)
        if SCAN and not MASKED:
            for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
                n = first + chunk
                others = load_columns(y, n, d, stop, D, y_stride_l, y_stride_d)
                others = feature_columns(others, n, d, stop, D, MAP)
                values = load_rows(b, n, c, stop, DV, b_stride_l, b_stride_d)
                sums = others.to(tl.float32)
                if weighted:
                    values = values.to(tl.float32) * tl.load(factors + n, n < stop, other=0.0)[:, None]
                    sums *= tl.load(factors + L + n, n < stop, other=0.0)[None, :]
                state = product(others, values, state, exact, single)
                if NORMALIZE:
                    z += tl.sum(sums, axis=1)
        for i in tl.range(0, groups if MASKED else tl.cdiv(stop - start, BLOCK_N), num_stages=STAGES):
            if MASKED:
                first = (begin + (groups - 1 - i if REVERSE else i) * GROUP).to(tl.int32)
                stop = tl.minimum(first + GROUP, end).to(tl.int32)
            else:
                first = start + i * BLOCK_N
            n = first + chunk
            given = load_columns(a, n, c, stop, DV, a_stride_l, a_stride_d)
            t = product(state, given, tl.zeros([BLOCK_D, BLOCK_N], tl.float32), exact, single)
            visible = tl.zeros([BLOCK_D, BLOCK_N], tl.float32) + z[:, None]
            if MASKED:
                others = load_columns(y, n, d, stop, D, y_stride_l, y_stride_d)
                others = feature_columns(others, n, d, stop, D, MAP)
                values = load_rows(b, n, c, stop, DV, b_stride_l, b_stride_d)
                mask = sees(BLOCK_N, BLOCK, REVERSE)
                sums = others.to(tl.float32)
                if weighted:
                    values = values.to(tl.float32) * tl.load(factors + n, n < stop, other=0.0)[:, None]
                    grad_total = tl.load(factors + L + n, n < stop, other=0.0)
                    sums *= grad_total[None, :]
                scores = product(values, given, tl.zeros([BLOCK_N, BLOCK_N], tl.float32), exact, single)
                if weighted:
                    scores += grad_total[:, None]
                t = product(others, tl.where(mask, scores, 0.0), t, exact, single)
                if NORMALIZE and not REVERSE:
                    seen_by = mask.to(tl.float32).to(others.dtype)
                    visible = product(others, seen_by, visible, exact, single)
                state = product(others, values, state, exact, single)
                if NORMALIZE:
                    z += tl.sum(sums, axis=1)
            argument = load_columns(x, n, d, stop, D, x_stride_l, x_stride_d)
            wide = argument.to(tl.float32)
            if REVERSE:
                t += visible
            elif NORMALIZE:
                phi = feature_columns(argument, n, d, stop, D, MAP).to(tl.float32)
                along = tl.sum(phi * t, axis=0)
                total = tl.sum(phi * visible, axis=0)
                if partial is not None:
                    at = partial + lane * 2 * L + n
                if FACTORS_ONLY:
                    tl.store(at + split * lanes * 2 * L, along, n < stop)
                    tl.store(at + split * lanes * 2 * L + L, total, n < stop)
                elif partial is not None:
                    along = tl.zeros([BLOCK_N], tl.float32)
                    total = tl.zeros([BLOCK_N], tl.float32)
                    for s in range(0, SPLITS):
                        along += tl.load(at + s * lanes * 2 * L, n < stop, other=0.0)
                        total += tl.load(at + s * lanes * 2 * L + L, n < stop, other=0.0)
                total += EPS
                ratio = tl.div_rn(along, total)
                t = divide(t - ratio[None, :] * visible, total[None, :], not rounds)
                if not FACTORS_ONLY:
                    own = n < tl.where(split == 0, stop, 0)
                    tl.store(factors + n, tl.div_rn(tl.full([BLOCK_N], 1.0, tl.float32), total), own)
                    tl.store(factors + L + n, tl.div_rn(-ratio, total), own)
            if not FACTORS_ONLY:
                if MAP == "relu":
                    t *= (wide > 0).to(tl.float32)
                elif MAP == "elu1":
                    t *= tl.exp(tl.where(wide > 0, 0.0, wide))
                target = grad + n.to(tl.int64)[None, :] * H * D + d[:, None]
                tl.store(target, t.to(grad.dtype.element_ty), (n < stop)[None, :] & (d < D)[:, None])


def gradient_config(size: int, value_size: int, plan: Plan, reverse: bool, single: bool) -> dict[str, int]:
    """Tile of a program, see triton_outputs.output_config; another accumulator and the factors take registers."""
    block_v = padded(value_size)
    tile = 2048 if reverse and plan.is_masked else 4096
    return {
        "BLOCK_N": plan.chunk if plan.is_masked else 32 if size <= 128 else 16,
        "BLOCK_D": max(16, min(padded(size), tile // block_v)),
        "BLOCK_V": block_v,
        "STAGES": 2 if reverse and not single else 1,
    }


def gradient_warps(config: dict[str, int], single: bool) -> int:
    return 8 if single or config["BLOCK_D"] * config["BLOCK_V"] > 2048 else 4


def _gradients(
    x: Tensor,
    a: Tensor,
    y: Tensor,
    b: Tensor,
    factors: Tensor | None,
    states: Tensor,
    plan: Plan,
    feature_map: str,
    block: int,
    reverse: bool,
) -> Tensor:
    """Gradient of queries, which fills `factors`, or of keys, which reads them; without `factors` not normalised."""
    batch, length, heads, size = x.shape
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = gradient_config(size, a.shape[3], plan, reverse, x.element_size() == 4)
    splits = triton.cdiv(size, config["BLOCK_D"])
    grid = (batch * heads * plan.pieces * splits,)
    if grid[0] == 0:
        return grad
    partial = None
    if factors is not None and not reverse and splits > 1:
        partial = torch.empty(splits, *factors.shape, dtype=torch.float32, device=x.device)
    for factors_only in (True, False) if partial is not None else (False,):
        _linear_gradients_kernel[grid](
            x,
            a,
            y,
            b,
            factors,
            partial,
            states,
            grad,
            length,
            heads,
            size,
            a.shape[3],
            plan.pieces,
            plan.span,
            plan.per_span,
            plan.piece,
            plan.group,
            min(block, plan.chunk),
            states.shape[2],
            splits,
            *x.stride(),
            *a.stride(),
            *y.stride(),
            *b.stride(),
            MAP=feature_map,
            SCAN=plan.is_scan,
            MASKED=plan.is_masked,
            NORMALIZE=factors is not None,
            REVERSE=reverse,
            FACTORS_ONLY=factors_only,
            **config,
            num_warps=gradient_warps(config, x.element_size() == 4),
        )
    return grad


def launch_linear_attention_bwd(
    grad_out: Tensor,
    grad_S: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    causal: bool,
    block_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, S and z."""
    batch, length, heads, size = q.shape
    plan = make_plan(length, causal, block_size, chunk_of(size, wide=True))
    states = empty_states(q, v, plan)
    last_S = torch.empty(batch, heads, size, v.shape[3], dtype=torch.float32, device=q.device)
    last_z = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    factors = torch.empty(batch * heads, 2, length, dtype=torch.float32, device=q.device) if normalize else None
    sum_pieces(k, v, None, states, plan, feature_map)
    prefix_states(states, S, z, last_S, last_z, plan, reverse=False)
    grad_q = _gradients(q, grad_out, k, v, factors, states, plan, feature_map, block_size, reverse=False)
    # In reverse: what a token's queries and those after it make of the state.
    sum_pieces(q, grad_out, factors, states, plan, feature_map, with_z=normalize)
    prefix_states(states, grad_S, grad_z, last_S, last_z, plan, reverse=True)
    grad_k = _gradients(k, v, q, grad_out, factors, states, plan, feature_map, block_size, reverse=True)
    grad_v = outputs(k, q, grad_out, factors, states, plan, feature_map, block_size, normalize=False, reverse=True)
    return grad_q, grad_k, grad_v, last_S, last_z


def _entry(dtype: str, size: int, feature_map: str, block: int, reverse: bool, factors_only: bool = False):
    plan = make_plan(32760, True, block, chunk_of(size, wide=True))
    config = gradient_config(size, size, plan, reverse, dtype == "fp32")
    pointers = {**{name: f"*{dtype}" for name in ("x", "a", "y", "b", "grad")}, "states": "*fp32", "factors": "*fp32"}
    constants = {f"{name}_stride_d": 1 for name in "xayb"}
    constants |= {"MAP": feature_map, "SCAN": plan.is_scan, "MASKED": plan.is_masked}
    constants |= {"NORMALIZE": True, "REVERSE": reverse}
    if factors_only:
        pointers["partial"] = "*fp32"
    else:
        constants["partial"] = None
    return pointers, {**constants, "FACTORS_ONLY": factors_only, **config}, gradient_warps(config, dtype == "fp32")


# float32 at D = 128 spills only for sm_100 with strides of 64 bits: 408 bytes here, 16 in the outputs.
AOT = {
    "_linear_gradients_kernel": [
        _entry("bf16", 128, "relu", block=1, reverse=False),
        _entry("bf16", 128, "relu", block=1, reverse=True),
        _entry("bf16", 64, "relu", block=390, reverse=False),
        _entry("bf16", 256, "relu", block=1, reverse=False, factors_only=True),
        _entry("fp32", 64, "elu1", block=1, reverse=True),
    ]
}
