"""Triton kernel for the gradients of keys and values of linear attention if all tokens of a piece see one state.

This is the case without `causal` and in large blocks. Keys and values are read once for both gradients. The state is in
shared memory in both orientations, for bfloat16 heads of up to 128 channels, or 64 on GPUs with less of it; other calls
use triton_gradients.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tuned import Tile, Tunable, arch_of
from .triton_parts import (
    FIELDS,
    TENSOR_MEMORY,
    Plan,
    bounds_of,
    factor,
    feature_columns,
    fields_of,
    load_columns,
    padded,
    product,
    program_of,
    times_derivative,
    whole_product,
)


@triton.jit
def _linear_pair_gradients_kernel(
    k,
    v,
    states,
    grad_k,
    grad_v,
    L,
    H,
    D,
    DV,
    PIECES,
    SPAN,
    PER_SPAN,
    PIECE,
    COUNT,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    MAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a piece's keys, dS v + dz, and values, dS^T phi(k), where dS and dz are the gradients of S and z.

    (channels, tokens), as in triton_gradients: the state is the left factor.
    """
    batch, head, piece, _ = program_of(PIECES, H, 1)
    begin, end = bounds_of(piece, L, SPAN, PER_SPAN, PIECE)
    d = tl.arange(0, BLOCK_D)
    c = tl.arange(0, BLOCK_V)
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    lane = batch * H + head
    grad_k += (batch * L * H + head) * D
    grad_v += (batch * L * H + head) * DV
    dtype: tl.constexpr = k.dtype.element_ty
    seen = states + (lane * PIECES + piece // PER_SPAN * PER_SPAN) * COUNT
    to_keys = tl.load(seen + d[:, None] * DV + c[None, :], (d < D)[:, None] & (c < DV)[None, :], other=0.0)
    to_values = tl.load(seen + d[None, :] * DV + c[:, None], (d < D)[None, :] & (c < DV)[:, None], other=0.0)
    to_values = factor(to_values, dtype)
    z = tl.load(seen + D * DV + d, d < D, other=0.0)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK_N)
        values = load_columns(v, n, c, end, DV, v_stride_l, v_stride_d)
        phi = load_columns(k, n, d, end, D, k_stride_l, k_stride_d)
        phi = feature_columns(phi, n, d, end, D, MAP)
        # The two terms nearly cancel if denominators are small, so dS is not rounded here.
        t = whole_product(to_keys, values, tl.zeros([BLOCK_D, BLOCK_N], tl.float32), dtype, EXACT=True) + z[:, None]
        t = times_derivative(t, phi.to(tl.float32), MAP)
        target = grad_k + n.to(tl.int64)[None, :] * H * D + d[:, None]
        tl.store(target, t.to(grad_k.dtype.element_ty), (n < end)[None, :] & (d < D)[:, None])
        t = product(to_values, factor(phi, dtype), tl.zeros([BLOCK_V, BLOCK_N], tl.float32), dtype, EXACT=False)
        target = grad_v + n.to(tl.int64)[None, :] * H * DV + c[:, None]
        tl.store(target, t.to(grad_v.dtype.element_ty), (n < end)[None, :] & (c < DV)[:, None])


def _default(arch: int, *, dtype: str, size: int, value_size: int, features: str, walk: str, direction: str) -> Tile:
    roomy = arch in TENSOR_MEMORY or arch == 90
    # Under Triton 3.6, elu1 of 64 tokens spills registers on sm_100.
    spills = arch in TENSOR_MEMORY and features == "elu1" and min(size, value_size) > 64
    return {
        "BLOCK_N": 64 if roomy and not spills else 32,
        "STAGES": 2 if roomy else 1,
        "num_warps": 8 if size * value_size > 4096 else 4,
    }


def _candidates(arch: int, **fields) -> list[Tile]:
    return [
        {"BLOCK_N": tokens, "STAGES": stages, "num_warps": warps}
        for tokens, warps in ((32, 4), (32, 8), (64, 4), (64, 8), (128, 8))
        for stages in (1, 2, 3)
    ]


PAIRS = Tunable("_linear_pair_gradients_kernel", FIELDS, _default, _candidates)


def takes_pairs(q: Tensor, v: Tensor, plan: Plan) -> bool:
    """Whether this kernel supports a call: three bfloat16 states must fit in shared memory next to the tokens."""
    largest = 128 if arch_of(q.device) in (80, 90, *TENSOR_MEMORY) else 64
    return not plan.is_scan and q.dtype == torch.bfloat16 and max(q.shape[3], v.shape[3]) <= largest


def pair_gradients(k: Tensor, v: Tensor, states: Tensor, plan: Plan, feature_map: str) -> tuple[Tensor, Tensor]:
    """Gradients of k and v, from the states that hold dS and dz."""
    batch, length, heads, size = k.shape
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    grid = (batch * heads * plan.pieces,)
    if grid[0] > 0:
        _linear_pair_gradients_kernel[grid](
            k,
            v,
            states,
            grad_k,
            grad_v,
            length,
            heads,
            size,
            v.shape[3],
            plan.pieces,
            plan.span,
            plan.per_span,
            plan.piece,
            states.shape[2],
            *k.stride(),
            *v.stride(),
            MAP=feature_map,
            BLOCK_D=padded(size),
            BLOCK_V=padded(v.shape[3]),
            **PAIRS.tile(k.device, **fields_of(k, v, feature_map, plan, reverse=True)),
        )
    return grad_k, grad_v


def _entry(size: int, feature_map: str, *archs: tuple[int, ...]):
    fields = {"dtype": "bf16", "size": size, "value_size": size, "walk": "", "direction": "reverse"}
    fields["features"] = "elu1" if feature_map == "elu1" else ""
    pointers = {**{name: "*bf16" for name in ("k", "v", "grad_k", "grad_v")}, "states": "*fp32"}
    constants = {"k_stride_d": 1, "v_stride_d": 1, "MAP": feature_map, "BLOCK_D": size, "BLOCK_V": size}
    return pointers, constants, (PAIRS, fields), *archs


AOT = {
    "_linear_pair_gradients_kernel": [
        _entry(128, "relu", (80, 90, 100)),
        _entry(128, "elu1", (80, 90, 100)),
        _entry(64, "relu"),
    ]
}
