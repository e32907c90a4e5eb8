"""Triton kernel for the gradients of queries and keys of linear attention, and the launch of the backward pass.

States, scores and denominators are recomputed. Between the passes over queries and keys, two numbers per token and head
are kept; if heads are split over programs, two for every split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tuned import Chosen, Tile, Tunable
from .triton_outputs import OUTPUTS, outputs
from .triton_pairs import PAIRS, pair_gradients, takes_pairs
from .triton_parts import (
    EPS,
    FIELDS,
    TENSOR_MEMORY,
    Plan,
    bounds_of,
    divide,
    empty_states,
    factor,
    feature_columns,
    fields_of,
    load_columns,
    load_rows,
    make_plan,
    padded,
    product,
    program_of,
    sees,
    steps_of,
    times_derivative,
    tokens_to_walk,
    whole_product,
)
from .triton_states import SUMS, prefix_states, sum_pieces


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

    Transposed as in the outputs, with the roles of features and values exchanged: t = S a + sum of y (b a). With s the
    scale, d the denominator and z the sum of the keys that q sees, the gradient of phi(q) is s (t - s (q t) / d z) / d;
    the terms that cancel in this difference are computed from the same numbers. Rows of S are split over programs if
    they do not all fit; q t and d are then sums over splits, and t is computed once for them (FACTORS_ONLY) and once
    more for the gradient.
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
    dtype: tl.constexpr = x.dtype.element_ty
    # The factors of a query enter float32 sums, whatever dtype its gradient is rounded to.
    exact: tl.constexpr = dtype == tl.float32 or (NORMALIZE and not REVERSE)
    # For float16 gradients of few tokens, TF32's rounding of the state alone exceeds the yardstick's error.
    whole: tl.constexpr = exact or (dtype == tl.float16 and not SCAN)
    # With few channels, a query's difference may cancel almost completely.
    wider: tl.constexpr = tl.float64 if dtype == tl.float32 else tl.float32
    weighted: tl.constexpr = factors is not None and REVERSE
    seen = states + (lane * PIECES + piece // PER_SPAN * PER_SPAN) * COUNT
    state = tl.load(seen + d[:, None] * DV + c[None, :], (d < D)[:, None] & (c < DV)[None, :], other=0.0)
    z = tl.load(seen + D * DV + d, d < D, other=0.0)
    group = tl.full((), GROUP, tl.int32)  # at most the tokens of a piece
    groups = tl.cdiv(end - begin, group)
    # Masked groups are the steps of the inner loop, so that loads are prefetched.
    for g in tl.range(0, 1 if MASKED else groups):
        start = (begin + (groups - 1 - g if REVERSE else g) * group).to(tl.int32)
        stop = tl.minimum(start + group, end).to(tl.int32)
        if SCAN and not MASKED:
            for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
                n = first + chunk
                others = load_columns(y, n, d, stop, D, y_stride_l, y_stride_d)
                others = feature_columns(others, n, d, stop, D, MAP)
                values = load_rows(b, n, c, stop, DV, b_stride_l, b_stride_d)
                if weighted:
                    others = others.to(tl.float32) * tl.load(factors + n, n < stop, other=0.0)[None, :]
                others = factor(others, dtype)
                if weighted:
                    along = tl.load(factors + L + n, n < stop, other=0.0)
                    z -= tl.sum(others.to(tl.float32) * along[None, :], axis=1)
                elif NORMALIZE:
                    z += tl.sum(others.to(tl.float32), axis=1)
                state = product(others, values, state, dtype, exact)
        for i in tl.range(0, groups if MASKED else tl.cdiv(stop - start, BLOCK_N), num_stages=STAGES):
            if MASKED:
                first = (begin + (groups - 1 - i if REVERSE else i) * group).to(tl.int32)
                stop = tl.minimum(first + group, end).to(tl.int32)
            else:
                first = start + i * BLOCK_N
            n = first + chunk
            given = load_columns(a, n, c, stop, DV, a_stride_l, a_stride_d)
            t = whole_product(state, given, tl.zeros([BLOCK_D, BLOCK_N], tl.float32), dtype, whole)
            visible = tl.zeros([BLOCK_D, BLOCK_N], tl.float32) + z[:, None]
            if MASKED:
                others = load_columns(y, n, d, stop, D, y_stride_l, y_stride_d)
                others = feature_columns(others, n, d, stop, D, MAP)
                values = load_rows(b, n, c, stop, DV, b_stride_l, b_stride_d)
                mask = sees(BLOCK_N, BLOCK, BACK=REVERSE)  # (others, tokens)
                scores = product(values, given, tl.zeros([BLOCK_N, BLOCK_N], tl.float32), dtype, exact)
                if weighted:
                    inverse = tl.load(factors + n, n < stop, other=0.0)
                    along = tl.load(factors + L + n, n < stop, other=0.0)
                    scores = (scores - along[:, None]) * inverse[:, None]
                    weighed = factor(others.to(tl.float32) * inverse[None, :], dtype)
                others = factor(others, dtype)
                t = whole_product(others, tl.where(mask, scores, 0.0), t, dtype, exact)
                if NORMALIZE and not REVERSE:
                    seen_by = mask.to(tl.float32).to(dtype)
                    visible = product(others, seen_by, visible, dtype, exact)
                if weighted:
                    others = weighed
                    z -= tl.sum(others.to(tl.float32) * along[None, :], axis=1)
                elif NORMALIZE:
                    z += tl.sum(others.to(tl.float32), axis=1)
                state = product(others, values, state, dtype, exact)
            phi = load_columns(x, n, d, stop, D, x_stride_l, x_stride_d)
            phi = feature_columns(phi, n, d, stop, D, MAP).to(tl.float32)
            if REVERSE:
                t += visible
            elif NORMALIZE:
                t, visible = t.to(wider), visible.to(wider)
                along = tl.sum(phi.to(wider) * t, axis=0)
                total = tl.sum(phi.to(wider) * visible, axis=0)
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
                t = times_derivative(t, phi, MAP)
                target = grad + n.to(tl.int64)[None, :] * H * D + d[:, None]
                tl.store(target, t.to(grad.dtype.element_ty), (n < stop)[None, :] & (d < D)[:, None])


# GPU and fields -> what differs from the tile of the rule below, which spills registers there under Triton 3.6.
_FITTED: dict[tuple[int | str, ...], Tile] = {
    (89, "fp32", 64, 64, "elu1", "scan", ""): {"STAGES": 2},
    (90, "bf16", 128, 128, "", "scan", ""): {"BLOCK_N": 16, "STAGES": 2},
}


def _default(arch: int, *, dtype: str, size: int, value_size: int, features: str, walk: str, direction: str) -> Tile:
    """For half-precision heads of up to 128 channels, one tile holds all of S, so that FACTORS_ONLY is not needed.

    Before products of half-precision factors had one part, this took 1.23 ms on an H200 for the gradients of 32,760
    bfloat16 tokens of 12 heads of 128 channels, instead of 3.42 with tiles of 4,096 elements; causal 5.37 instead of
    12.57.
    """
    reverse = walk == "scan" and direction == "reverse"
    if dtype == "fp32" or max(size, value_size) > 128:
        tile = 2048 if reverse else 4096
        block_n = 16 if size > 128 or walk == "scan" else 32
    else:
        # For float16, the state of a whole sequence is two factors.
        tile = 8192 if dtype == "fp16" and direction == "reverse" and walk != "scan" else 16384
        block_n = 16 if walk == "scan" and (dtype == "fp16" or arch not in (90, *TENSOR_MEMORY)) else 32
        if reverse and dtype == "bf16":  # without the part of z that a query sees
            block_n = 64 if arch in TENSOR_MEMORY or arch == 90 else 16 if arch == 120 else 32
    block_d = max(16, min(size, tile // value_size))
    chosen = {
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "STAGES": 2 if direction == "reverse" and (dtype == "bf16" or arch in (90, *TENSOR_MEMORY)) else 1,
        "num_warps": 8 if dtype == "fp32" or block_d * value_size > 2048 else 4,
    }
    return chosen | _FITTED.get((arch, dtype, size, value_size, features, walk, direction), {})


def _candidates(arch: int, **fields) -> list[Tile]:
    if fields["dtype"] == "fp32" or max(fields["size"], fields["value_size"]) > 128:
        return []
    return [
        {"BLOCK_N": tokens, "BLOCK_D": block_d, "STAGES": stages, "num_warps": warps}
        for block_d, warps in ((fields["size"], 8), (fields["size"], 4), (max(16, fields["size"] // 2), 4))
        for tokens, stages in ((32, 1), (32, 2), (64, 1), (64, 2))
    ]


GRADIENTS = Tunable("_linear_gradients_kernel", FIELDS, _default, _candidates)


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
    """Gradient of the queries, which with `normalize` fills `factors`, or of the keys, which reads them."""
    batch, length, heads, size = x.shape
    grad = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = GRADIENTS.tile(x.device, **fields_of(x, a, feature_map, plan, reverse))
    splits = max(1, triton.cdiv(size, tile["BLOCK_D"]))
    group, block, masked = steps_of(plan, block, tile["BLOCK_N"])
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
            group,
            block,
            states.shape[2],
            splits,
            *x.stride(),
            *a.stride(),
            *y.stride(),
            *b.stride(),
            MAP=feature_map,
            SCAN=plan.is_scan,
            MASKED=masked,
            NORMALIZE=normalize,
            REVERSE=reverse,
            FACTORS_ONLY=factors_only,
            BLOCK_V=padded(a.shape[3]),
            **tile,
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
    plan = make_plan(tokens, causal, block_size, batch * heads, q.device)
    states = empty_states(q, v, plan)
    last_S = torch.empty(batch, heads, size, v.shape[3], dtype=torch.float32, device=q.device)
    last_z = torch.empty(batch, heads, size, dtype=torch.float32, device=q.device)
    # Per query: the weight of its features in the sums for keys, scale / denominator, and <grad_out, out>.
    factors = None
    if normalize or scale != 1:
        factors = torch.empty(batch * heads, 2, tokens, dtype=torch.float32, device=q.device)
    if not normalize and scale != 1:
        factors[:, 0], factors[:, 1] = scale, 0
    sum_pieces(k, v, None, states, plan, feature_map)
    prefix_states(states, S, z, last_S, last_z, plan, reverse=False)
    options = (plan, feature_map, block_size, normalize, scale)
    grad_q = _gradients(q, grad_out, k, v, factors, states, *options, reverse=False)
    # In reverse: the state from the queries of a token and those after it.
    sum_pieces(q, grad_out, factors, states, plan, feature_map, with_z=normalize)
    prefix_states(states, grad_S, grad_z, last_S, last_z, plan, reverse=True)
    if takes_pairs(q, v, plan):
        grad_k, grad_v = pair_gradients(k, v, states, plan, feature_map)
    else:
        grad_k = _gradients(k, v, q, grad_out, factors, states, *options, reverse=True)
        grad_v = outputs(k, q, grad_out, factors, states, plan, feature_map, block_size, False, 1.0, reverse=True)
    return grad_q, grad_k, grad_v, last_S, last_z


def tiles_linear_attention_bwd(
    grad_out, grad_S, grad_z, q, k, v, S, z, feature_map, causal, block_size, normalize, scale=1.0
) -> list[Chosen]:
    """The tiles of `launch_linear_attention_bwd`, for `explain`."""
    plan = make_plan(tokens_to_walk(q, v), causal, block_size, q.shape[0] * q.shape[2], q.device)
    ahead, reverse = (fields_of(q, v, feature_map, plan, way) for way in (False, True))
    launches = [(SUMS, ahead), (GRADIENTS, ahead), (SUMS, reverse if normalize or scale != 1 else ahead)]
    if takes_pairs(q, v, plan):
        launches += [(PAIRS, reverse)]
    else:
        launches += [(GRADIENTS, reverse), (OUTPUTS, reverse)]
    return [tunable.chosen(q.device, **fields) for tunable, fields in launches]


def _entry(dtype: str, size: int, feature_map: str, walk: str, masked: bool, reverse: bool, factors_only: bool = False):
    fields = {"dtype": dtype, "size": size, "value_size": size, "walk": walk}
    fields |= {"features": "elu1" if feature_map == "elu1" else "", "direction": "reverse" if reverse else ""}
    pointers = {**{name: f"*{dtype}" for name in ("x", "a", "y", "b", "grad")}, "states": "*fp32"}
    pointers |= {"factors": "*fp32", "scale": "fp32"}
    constants = {f"{name}_stride_d": 1 for name in "xayb"}
    constants |= {"MAP": feature_map, "SCAN": walk == "scan", "MASKED": masked, "BLOCK_V": size}
    constants |= {"NORMALIZE": True, "REVERSE": reverse, "FACTORS_ONLY": factors_only}
    if factors_only:
        pointers["partial"] = "*fp64" if dtype == "fp32" else "*fp32"
    else:
        constants["partial"] = None
    return pointers, constants, (GRADIENTS, fields)


# float32 at D = 128 spills only on sm_100 with 64-bit strides.
AOT = {
    "_linear_gradients_kernel": [
        _entry("bf16", 128, "relu", "scan", masked=True, reverse=False),
        _entry("bf16", 128, "relu", "scan", masked=True, reverse=True),
        _entry("bf16", 128, "relu", "", masked=False, reverse=False),
        _entry("bf16", 128, "elu1", "scan", masked=True, reverse=False),
        _entry("bf16", 64, "relu", "scan", masked=False, reverse=False),
        _entry("bf16", 256, "relu", "scan", masked=True, reverse=False, factors_only=True),
        _entry("fp16", 128, "elu1", "scan", masked=True, reverse=True),
        _entry("fp16", 128, "elu1", "", masked=False, reverse=True),
        _entry("bf16", 128, "relu", "", masked=False, reverse=True),
        _entry("fp32", 64, "elu1", "scan", masked=True, reverse=False),
        _entry("fp32", 64, "elu1", "scan", masked=True, reverse=True),
    ]
}
