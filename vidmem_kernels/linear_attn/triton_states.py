"""Triton kernels for the states of linear attention: the sums of pieces, and the states before them.

With B * H = 12, L = 32,760 and D = Dv = 128, the 22 pieces of a head on a GPU of 132 multiprocessors have 17 MiB of
float32 sums: they are written, read and written again by the prefix sum, and read by the next kernel. The bfloat16 keys
and values are 2 * 96 MiB.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .._tuned import Tile, Tunable
from .triton_parts import (
    FIELDS,
    Plan,
    bounds_of,
    factor,
    feature_columns,
    fields_of,
    is_wide,
    load_columns,
    load_rows,
    padded,
    program_of,
    whole_product,
)


@triton.jit
def _linear_sums_kernel(
    k,
    v,
    factors,
    states,
    L,
    H,
    D,
    DV,
    PIECES,
    SPAN,
    PER_SPAN,
    PIECE,
    COUNT,
    SPLITS,
    k_stride_b,
    k_stride_l,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_l,
    v_stride_h,
    v_stride_d,
    MAP: tl.constexpr,
    WITH_Z: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """S and z of each piece's tokens alone; with `factors` (see launch_linear_attention_bwd), the sums for gradients.

    The columns of S are split over programs if they do not all fit in registers.
    """
    batch, head, piece, split = program_of(PIECES, H, SPLITS)
    begin, end = bounds_of(piece, L, SPAN, PER_SPAN, PIECE)
    d = tl.arange(0, BLOCK_D)
    c = split * BLOCK_V + tl.arange(0, BLOCK_V)
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    lane = batch * H + head
    dtype: tl.constexpr = v.dtype.element_ty
    state = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    keys = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)  # summed over tokens once, at the end
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = first + tl.arange(0, BLOCK_N)
        y = feature_columns(load_columns(k, n, d, end, D, k_stride_l, k_stride_d), n, d, end, D, MAP)
        w = load_rows(v, n, c, end, DV, v_stride_l, v_stride_d)
        # The same factors in S and z: the mean of equal values is exact, and the two nearly cancel in gradients.
        if factors is not None:
            at = factors + lane * 2 * L + n
            y = y.to(tl.float32) * tl.load(at, n < end, other=0.0)[None, :]
            keys -= y * tl.load(at + L, n < end, other=0.0)[None, :]
        else:
            y = factor(y, dtype)
            if WITH_Z:
                keys += y.to(tl.float32)
        state = whole_product(y, w, state, dtype, EXACT=True)
    target = states + (lane * PIECES + piece) * COUNT
    in_d = d < D
    tl.store(target + d[:, None] * DV + c[None, :], state, in_d[:, None] & (c < DV)[None, :])
    tl.store(target + D * DV + d, tl.sum(keys, axis=1), d < tl.where(split == 0, D, 0))


@triton.jit
def _linear_prefix_kernel(
    states,
    S,
    z,
    last_S,
    last_z,
    H,
    D,
    DV,
    PIECES,
    PER_SPAN,
    COUNT,
    S_stride_b,
    S_stride_h,
    S_stride_d,
    S_stride_c,
    z_stride_b,
    z_stride_h,
    z_stride_d,
    SCAN: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces the sums of pieces by the state before each (SCAN), or by that of its span in the span's first piece."""
    tiles = tl.cdiv(COUNT, BLOCK)
    lane = (tl.program_id(0) // tiles).to(tl.int64)
    at = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    in_S = at < D * DV
    in_z = (at >= D * DV) & (at < D * DV + D)
    row = (at // tl.maximum(DV, 1)).to(tl.int64)
    column = (at % tl.maximum(DV, 1)).to(tl.int64)
    state = tl.zeros([BLOCK], tl.float32)
    if S is not None:
        first = S + lane // H * S_stride_b + lane % H * S_stride_h
        state += tl.load(first + row * S_stride_d + column * S_stride_c, in_S, other=0.0)
        first = z + lane // H * z_stride_b + lane % H * z_stride_h
        state += tl.load(first + (at - D * DV).to(tl.int64) * z_stride_d, in_z, other=0.0)
    states += lane * PIECES * COUNT + at
    valid = in_S | in_z
    step = tl.full([], 1, tl.int64) * COUNT
    # The slot being written is behind those that are prefetched.
    for i in tl.range(0, PIECES, num_stages=4):
        piece = PIECES - 1 - i if REVERSE else i
        own = tl.load(states + piece * step, valid, other=0.0)
        if SCAN:
            tl.store(states + piece * step, state, valid)
            state += own
        else:
            state += own
            # In reverse, the first piece of a span comes last.
            if piece % PER_SPAN == (0 if REVERSE else PER_SPAN - 1):
                tl.store(states + piece // PER_SPAN * PER_SPAN * step, state, valid)
    tl.store(last_S + lane * D * DV + at, state, in_S)
    tl.store(last_z + lane * D + at - D * DV, state, in_z)


def _default(arch: int, *, dtype: str, size: int, value_size: int, features: str, walk: str, direction: str) -> Tile:
    """Products of float32 tokens need registers, and so do both parts of a weighted feature."""
    wide = is_wide(dtype, features, direction)
    block_v = min(value_size, (8192 if wide or size > 128 else 16384) // size)
    return {
        "BLOCK_N": 16 if dtype == "fp32" else 32 if wide or direction == "reverse" else 64,
        "BLOCK_V": block_v,
        "STAGES": 3,
        "num_warps": 8 if size * block_v > 4096 else 4,
    }


def _candidates(arch: int, **fields) -> list[Tile]:
    """Half of the values at a time leave room for two programs per multiprocessor, which both read the keys."""
    if fields["dtype"] == "fp32":
        return []
    widest = _default(arch, **fields)["BLOCK_V"]
    return [
        {"BLOCK_N": tokens, "BLOCK_V": block_v, "STAGES": stages, "num_warps": warps}
        for tokens, block_v, stages, warps in (
            (32, widest, 4, 8), (64, widest, 2, 8), (64, widest, 4, 8), (128, widest, 2, 8),
            (64, widest // 2, 3, 8), (64, widest // 2, 3, 4), (128, widest // 2, 2, 8), (128, widest // 2, 2, 4),
        )
        if block_v >= 16
    ]  # fmt: skip


SUMS = Tunable("_linear_sums_kernel", FIELDS, _default, _candidates)


def sum_pieces(
    k: Tensor, v: Tensor, factors: Tensor | None, states: Tensor, plan: Plan, feature_map: str, with_z: bool = True
) -> None:
    """Fills `states` with the sums of the pieces; without `with_z`, their z is 0."""
    batch, length, heads, size = k.shape
    tile = SUMS.tile(k.device, **fields_of(k, v, feature_map, plan, reverse=factors is not None))
    splits = max(1, triton.cdiv(v.shape[3], tile["BLOCK_V"]))  # z must be summed even without value channels
    grid = (batch * heads * plan.pieces * splits,)
    if grid[0] == 0:
        return
    _linear_sums_kernel[grid](
        k,
        v,
        factors,
        states,
        length,
        heads,
        size,
        v.shape[3],
        plan.pieces,
        plan.span,
        plan.per_span,
        plan.piece,
        states.shape[2],
        splits,
        *k.stride(),
        *v.stride(),
        MAP=feature_map,
        WITH_Z=with_z,
        BLOCK_D=padded(size),
        **tile,
    )


_PREFIX_BLOCK = 512


def prefix_states(
    states: Tensor, S: Tensor | None, z: Tensor | None, last_S: Tensor, last_z: Tensor, plan: Plan, reverse: bool
) -> None:
    """Replaces sums of pieces by the states that their tokens see; writes the final state to `last_S` and `last_z`."""
    lanes, pieces, count = states.shape
    grid = (lanes * triton.cdiv(count, _PREFIX_BLOCK),)
    if grid[0] == 0:
        return
    _linear_prefix_kernel[grid](
        states,
        S,
        z,
        last_S,
        last_z,
        last_S.shape[1],
        last_S.shape[2],
        last_S.shape[3],
        pieces,
        plan.per_span,
        count,
        *(S.stride() if S is not None else (0,) * 4),
        *(z.stride() if z is not None else (0,) * 3),
        SCAN=plan.is_scan,
        REVERSE=reverse,
        BLOCK=_PREFIX_BLOCK,
    )


def _entry(dtype: str, size: int, feature_map: str, weighted: bool = False):
    fields = {"dtype": dtype, "size": size, "value_size": size, "walk": ""}
    fields |= {"features": "elu1" if feature_map == "elu1" else "", "direction": "reverse" if weighted else ""}
    pointers = {"k": f"*{dtype}", "v": f"*{dtype}", "states": "*fp32"}
    constants = {"k_stride_d": 1, "v_stride_d": 1, "MAP": feature_map, "WITH_Z": True, "BLOCK_D": size}
    if weighted:
        pointers["factors"] = "*fp32"
    else:
        constants["factors"] = None
    return pointers, constants, (SUMS, fields)


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_linear_sums_kernel": [
        _entry("bf16", 128, "relu"),
        _entry("bf16", 256, "relu"),
        _entry("fp32", 128, "elu1"),
        _entry("bf16", 128, "relu", weighted=True),
        _entry("fp16", 128, "elu1"),
    ],
    "_linear_prefix_kernel": [
        (
            {name: "*fp32" for name in ("states", "S", "z", "last_S", "last_z")},
            {"S_stride_c": 1, "z_stride_d": 1, "SCAN": True, "REVERSE": False, "BLOCK": _PREFIX_BLOCK},
            4,
        )
    ],
}
