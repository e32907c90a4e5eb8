"""Triton kernel of linear attention's gradients of queries and keys; its backward.

States, scores and denominators are computed anew. Between the passes of queries and of keys two numbers of a token and
head are kept; while heads are split over programs, those of every split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_tiles import major_of
from .triton_outputs import outputs
from .triton_parts import (
    EPS,
    Plan,
    bounds_of,
    chunk_of,
    divide,
    empty_states,
    exp_negative,
    feature_columns,
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
def _linear_gradients_kernel(
    x,
    a,
    y,
    b,
    factors,
    partial,
    states,
    grad,
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

    Transposed as in the outputs, with the roles of features and values exchanged: t = S a + sum of y (b a). With s
    the scale, d the denominator and z the sum of the keys that q sees, the gradient of phi(q) is
    s (t - s (q t) / d z) / d: what cancels in that difference is the same numbers. Rows of S are split over programs
    when they do not all fit; q t and d are then sums over splits, and t is computed once for them (FACTORS_ONLY) and
    once more for the gradient.
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
    # Of few channels hardly anything may be left of a query's difference.
    wider: tl.constexpr = tl.float32 if rounds else tl.float64
    weighted: tl.constexpr = factors is not None and REVERSE
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
                if weighted:
                    others = others.to(tl.float32) * tl.load(factors + n, n < stop, other=0.0)[None, :]
                    z -= tl.sum(others * tl.load(factors + L + n, n < stop, other=0.0)[None, :], axis=1)
                elif NORMALIZE:
                    z += tl.sum(others.to(tl.float32), axis=1)
                state = product(others, values, state, exact)
        for i in tl.range(0, groups if MASKED else tl.cdiv(stop - start, BLOCK_N), num_stages=STAGES):
            if MASKED:
                first = (begin + (groups - 1 - i if REVERSE else i) * GROUP).to(tl.int32)
                stop = tl.minimum(first + GROUP, end).to(tl.int32)
            else:
                first = start + i * BLOCK_N
            n = first + chunk
            given = load_columns(a, n, c, stop, DV, a_stride_l, a_stride_d)
            t = product(state, given, tl.zeros([BLOCK_D, BLOCK_N], tl.float32), exact)
            visible = tl.zeros([BLOCK_D, BLOCK_N], tl.float32) + z[:, None]
            if MASKED:
                others = load_columns(y, n, d, stop, D, y_stride_l, y_stride_d)
                others = feature_columns(others, n, d, stop, D, MAP)
                values = load_rows(b, n, c, stop, DV, b_stride_l, b_stride_d)
                mask = sees(BLOCK_N, BLOCK, REVERSE)
                scores = product(values, given, tl.zeros([BLOCK_N, BLOCK_N], tl.float32), exact)
                if weighted:
                    inverse = tl.load(factors + n, n < stop, other=0.0)
                    along = tl.load(factors + L + n, n < stop, other=0.0)
                    scores = (scores - along[:, None]) * inverse[:, None]
                t = product(others, tl.where(mask, scores, 0.0), t, exact)
                if NORMALIZE and not REVERSE:
                    seen_by = mask.to(tl.float32).to(x.dtype.element_ty)
                    visible = product(others, seen_by, visible, exact)
                if weighted:
                    others = others.to(tl.float32) * inverse[None, :]
                    z -= tl.sum(others * along[None, :], axis=1)
                elif NORMALIZE:
                    z += tl.sum(others.to(tl.float32), axis=1)
                state = product(others, values, state, exact)
            argument = load_columns(x, n, d, stop, D, x_stride_l, x_stride_d)
            wide = argument.to(tl.float32)
            if REVERSE:
                t += visible
            elif NORMALIZE:
                phi = feature_columns(argument, n, d, stop, D, MAP).to(wider)
                t, visible = t.to(wider), visible.to(wider)
                along = tl.sum(phi * t, axis=0)
                total = tl.sum(phi * visible, axis=0)
                if partial is not None:
                    at = partial + lane * 2 * L + n
                if FACTORS_ONLY:
                    tl.store(at + split * lanes * 2 * L, along, n < stop)
                    tl.store(at + split * lanes * 2 * L + L, total, n < stop)
                elif partial is not None:
                    along = tl.zeros([BLOCK_N], wider)
                    total = tl.zeros([BLOCK_N], wider)
                    for s in range(0, SPLITS):
                        along += tl.load(at + s * lanes * 2 * L, n < stop, other=0.0)
                        total += tl.load(at + s * lanes * 2 * L + L, n < stop, other=0.0)
                total = total * scale + EPS
                inverse = divide(tl.zeros([BLOCK_N], wider) + scale, total, True)
                along = divide(along * scale, total, True)
                t = ((t - along[None, :] * visible) * inverse[None, :]).to(tl.float32)
                if not FACTORS_ONLY:
                    own = n < tl.where(split == 0, stop, 0)
                    tl.store(factors + n, inverse, own)
                    tl.store(factors + L + n, along, own)
            else:
                t *= scale
            if not FACTORS_ONLY:
                if MAP == "relu":
                    t *= (wide > 0).to(tl.float32)
                elif MAP == "elu1":
                    t *= exp_negative(tl.where(wide > 0, 0.0, wide))
                target = grad + n.to(tl.int64)[None, :] * H * D + d[:, None]
                tl.store(target, t.to(grad.dtype.element_ty), (n < stop)[None, :] & (d < D)[:, None])


def gradient_config(
    size: int, value_size: int, plan: Plan, reverse: bool, dtype: torch.dtype, major: int
) -> dict[str, int]:
    """Tile of a program, see triton_outputs.output_config; products of float32 tokens take registers.

    Half tokens of heads of up to 128 channels have S in one tile, so that nothing is computed twice for FACTORS_ONLY.
    With 32,760 tokens of 12 heads of 128 bfloat16 channels, the backward pass took an H200 1.23 ms so, rather than 3.42
    with tiles of 4,096 elements (8,192: 1.77), causal 5.37 rather than 12.57 (8,192: 10.1); measured before products
    were EXACT. Elsewhere than on sm_90 that spills beside masked scores or parts of TF32 (on sm_90 16 bytes, for elu1).
    """
    block_v = padded(value_size)
    single = dtype == torch.float32
    if single or max(size, value_size) > 128:
        tile = 2048 if reverse and plan.is_masked else 4096
    else:
        tile = 8192 if major != 9 and (plan.is_masked or dtype == torch.float16) else 16384
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
    normalize: bool,
    scale: float,
    reverse: bool,
) -> Tensor:
    """Gradient of queries, which with `normalize` fills `factors`, or of keys, which reads them where there are any."""
    batch, length, heads, size = x.shape
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = gradient_config(size, a.shape[3], plan, reverse, x.dtype, major_of(x.device))
    splits = max(1, triton.cdiv(size, config["BLOCK_D"]))
    grid = (batch * heads * plan.pieces * splits,)
    if grid[0] == 0:
        return grad
    partial = None
    if normalize and not reverse and splits > 1:
        wider = torch.float64 if x.element_size() == 4 else torch.float32
        partial = torch.empty(splits, *factors.shape, dtype=wider, device=x.device)
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
            scale,
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
            NORMALIZE=normalize,
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
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, S and z."""
    batch, _, heads, size = q.shape
    tokens = tokens_to_walk(q, v)
    plan = make_plan(tokens, causal, block_size, chunk_of(size, wide=True))
    states = empty_states(q, v, plan)
    last_S = torch.empty(batch, heads, size, v.shape[3], dtype=torch.float32, device=q.device)
    last_z = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    # Of a query: what its features weigh in the sums for keys, scale by denominator, and grad_out along out.
    factors = None
    if normalize or scale != 1:
        factors = torch.empty(batch * heads, 2, tokens, dtype=torch.float32, device=q.device)
    if not normalize and scale != 1:
        factors[:, 0], factors[:, 1] = scale, 0
    sum_pieces(k, v, None, states, plan, feature_map)
    prefix_states(states, S, z, last_S, last_z, plan, reverse=False)
    options = (plan, feature_map, block_size, normalize, scale)
    grad_q = _gradients(q, grad_out, k, v, factors, states, *options, reverse=False)
    # In reverse: what a token's queries and those after it make of the state.
    sum_pieces(q, grad_out, factors, states, plan, feature_map, with_z=normalize)
    prefix_states(states, grad_S, grad_z, last_S, last_z, plan, reverse=True)
    grad_k = _gradients(k, v, q, grad_out, factors, states, *options, reverse=True)
    grad_v = outputs(k, q, grad_out, factors, states, plan, feature_map, block_size, False, 1.0, reverse=True)
    return grad_q, grad_k, grad_v, last_S, last_z


def _entry(dtype: str, size: int, feature_map: str, block: int, reverse: bool, factors_only: bool = False, majors=()):
    plan = make_plan(32760, True, block, chunk_of(size, wide=True))
    single = dtype == "fp32"
    tokens = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    config = gradient_config(size, size, plan, reverse, tokens, 9 if majors == (9,) else 8)
    pointers = {**{name: f"*{dtype}" for name in ("x", "a", "y", "b", "grad")}, "states": "*fp32"}
    pointers |= {"factors": "*fp32", "scale": "fp32"}
    constants = {f"{name}_stride_d": 1 for name in "xayb"}
    constants |= {"MAP": feature_map, "SCAN": plan.is_scan, "MASKED": plan.is_masked}
    constants |= {"NORMALIZE": True, "REVERSE": reverse, "FACTORS_ONLY": factors_only, **config}
    if factors_only:
        pointers["partial"] = "*fp64" if single else "*fp32"
    else:
        constants["partial"] = None
    held = (tuple(10 * major for major in majors),) if majors else ()
    return pointers, constants, gradient_warps(config, single), *held


# float32 at D = 128 spills only for sm_100 with strides of 64 bits.
AOT = {
    "_linear_gradients_kernel": [
        *(_entry("bf16", 128, "relu", 1, reverse, majors=(9,)) for reverse in (False, True)),
        _entry("bf16", 128, "relu", 1, reverse=False, factors_only=True, majors=(8, 10)),
        _entry("bf16", 128, "relu", 1, reverse=True, majors=(8, 10)),
        *(_entry("bf16", 128, "relu", 40_000, reverse) for reverse in (False, True)),
        _entry("bf16", 64, "relu", block=390, reverse=False),
        _entry("bf16", 256, "relu", block=1, reverse=False, factors_only=True),
        _entry("fp16", 128, "elu1", 40_000, reverse=True, majors=(9,)),
        _entry("fp16", 128, "elu1", 40_000, reverse=True, majors=(8, 10)),
        _entry("fp32", 64, "elu1", block=1, reverse=False),
        _entry("fp32", 64, "elu1", block=1, reverse=True),
    ]
}
