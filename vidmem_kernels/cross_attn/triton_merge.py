"""Triton kernels of merge_attention_states.

Log-sum-exps are small: they are stacked. Outputs are read in place, _GROUP parts at a time because a kernel takes no
lists; further parts are added to a float32 sum that the last group rounds. The gradient processes one part at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._tuned import Chosen, Tile, Tunable, dtype_name

_GROUP = 4
_ELEMENTS = 1024  # per tile


@triton.jit
def _lse_of(at, valid):
    """lse, with -inf for a part without a visible key, for which some libraries return +inf."""
    lse = tl.load(at, valid, other=0.0)
    return tl.where(lse == float("inf"), float("-inf"), lse)


@triton.jit
def _weight(lse, base):
    """exp(lse - base), but 0 for a part without a visible key, whatever the others' base."""
    return tl.where(lse == float("-inf"), 0.0, tl.exp(lse - base))


@triton.jit
def _add_part(acc, part, at, total, largest, offset, valid, mask):
    lse = _lse_of(at, valid)
    row = tl.load(part + offset, mask & (lse > float("-inf"))[:, None], other=0.0).to(tl.float32)
    return acc + (_weight(lse, largest) / total)[:, None] * row


@triton.jit
def _merge_states_kernel(
    part0,
    part1,
    part2,
    part3,
    lses,
    group_lses,
    sums,
    out,
    lse,
    PARTS,
    ROWS,
    L,
    H,
    D,
    COUNT: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds COUNT parts; rows are those of (B, L, H), lse tensors are (parts, B, H, L), of all parts and of these."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < ROWS
    place = ((row // H // L) * H + row % H) * L + row // H % L
    largest = tl.full([BLOCK_N], float("-inf"), tl.float32)
    at = lses + place
    for _ in range(PARTS):
        value = _lse_of(at, valid)
        largest = tl.where(value > largest, value, largest)
        at += ROWS
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([BLOCK_N], tl.float32)
    at = lses + place
    for _ in range(PARTS):
        total += _weight(_lse_of(at, valid), largest)  # NaN stays NaN
        at += ROWS
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    if not ADDS:
        tl.store(lse + place, tl.where(empty, float("-inf"), largest + tl.log(total)), valid)
    at0 = group_lses + place
    at1 = at0 + ROWS
    at2 = at1 + ROWS
    at3 = at2 + ROWS
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        offset = row[:, None] * D + d[None, :]
        mask = valid[:, None] & (d < D)[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        if ADDS:
            acc = tl.load(sums + offset, mask, other=0.0)
        acc = _add_part(acc, part0, at0, total, largest, offset, valid, mask)
        if COUNT > 1:
            acc = _add_part(acc, part1, at1, total, largest, offset, valid, mask)
        if COUNT > 2:
            acc = _add_part(acc, part2, at2, total, largest, offset, valid, mask)
        if COUNT > 3:
            acc = _add_part(acc, part3, at3, total, largest, offset, valid, mask)
        tl.store(out + offset, acc.to(out.dtype.element_ty), mask)


@triton.jit
def _merge_states_part_backward_kernel(
    grad_out,
    part,
    lses,
    lse,
    grad_part,
    along,
    ROWS,
    L,
    H,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """For one part: the gradient of its output, and the product of that output with the gradient of the result."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < ROWS
    place = ((row // H // L) * H + row % H) * L + row // H % L
    base = tl.load(lse + place, valid, other=0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    part_lse = _lse_of(lses + place, valid)
    seen = part_lse != float("-inf")
    weight = _weight(part_lse, base)
    product = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        offset = row[:, None] * D + d[None, :]
        mask = valid[:, None] & (d < D)[None, :]
        grad = tl.load(grad_out + offset, mask, other=0.0).to(tl.float32)
        product += grad * tl.load(part + offset, mask, other=0.0).to(tl.float32)
        scaled = tl.where(seen[:, None], weight[:, None] * grad, 0.0)
        tl.store(grad_part + offset, scaled.to(grad_part.dtype.element_ty), mask)
    tl.store(along + place, tl.where(seen, tl.sum(product, axis=1), 0.0), valid)


@triton.jit
def _merge_states_lse_backward_kernel(
    lses,
    lse,
    grad_lse,
    grad_lses,
    PARTS,
    N,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of the log-sum-exps; they replace the products in `grad_lses`."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = n < N
    base = tl.load(lse + n, valid, other=0.0)
    base = tl.where(base == float("-inf"), 0.0, base)
    shared = tl.zeros([BLOCK], tl.float32)
    if HAS_GRAD:
        shared -= tl.load(grad_lse + n, valid, other=0.0)
    at = n
    for _ in range(PARTS):
        shared += _weight(_lse_of(lses + at, valid), base) * tl.load(grad_lses + at, valid, other=0.0)
        at += N
    at = n
    for _ in range(PARTS):
        part_lse = _lse_of(lses + at, valid)
        grad = _weight(part_lse, base) * (tl.load(grad_lses + at, valid, other=0.0) - shared)
        tl.store(grad_lses + at, tl.where(part_lse != float("-inf"), grad, 0.0), valid)
        at += N


def _width(channels: int) -> int:
    """Number of channels processed at a time."""
    return min(256, triton.next_power_of_2(max(1, channels)))


def _tile(elements: int, channels: int, warps: int) -> Tile:
    return {"BLOCK_N": max(1, elements // channels), "BLOCK_D": channels, "num_warps": warps}


def _tunable(kernel: str) -> Tunable:
    """`channels`: number of channels processed at a time."""
    return Tunable(
        kernel,
        ("dtype", "channels"),
        default=lambda arch, dtype, channels: _tile(_ELEMENTS, channels, 4),
        candidates=lambda arch, dtype, channels: [
            _tile(elements, channels, warps) for elements in (512, 1024, 2048, 4096) for warps in (2, 4, 8)
        ],
    )


MERGE = _tunable("_merge_states_kernel")
MERGE_GRAD = _tunable("_merge_states_part_backward_kernel")
_LSE = {"BLOCK": _ELEMENTS}
_LSE_WARPS = {"num_warps": 4}


def _fields(x: Tensor) -> dict[str, object]:
    return {"dtype": dtype_name(x.dtype), "channels": _width(x.shape[-1])}


def tiles_merge_attention_states_fwd(outs: list[Tensor], lses: list[Tensor]) -> list[Chosen]:
    """The tile that `launch_merge_attention_states_fwd` uses for the same arguments."""
    return [MERGE.chosen(outs[0].device, **_fields(outs[0]))]


def tiles_merge_attention_states_bwd(grad_out: Tensor, *rest) -> list[Chosen]:
    """The tile that `launch_merge_attention_states_bwd` uses for the same arguments."""
    return [MERGE_GRAD.chosen(grad_out.device, **_fields(grad_out))]


def launch_merge_attention_states_fwd(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.merge_attention_states`."""
    _, length, heads, channels = outs[0].shape
    out = torch.empty(outs[0].shape, dtype=outs[0].dtype, device=outs[0].device)
    lse = torch.empty(lses[0].shape, dtype=lses[0].dtype, device=out.device)
    rows = lse.numel()
    if rows == 0:
        return out, lse
    tile = MERGE.tile(out.device, **_fields(out))
    stacked = torch.stack(lses)
    sums = out if len(outs) <= _GROUP else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    for first in range(0, len(outs), _GROUP):
        parts = [part.contiguous() for part in outs[first : first + _GROUP]]
        last = first + _GROUP >= len(outs)
        _merge_states_kernel[(triton.cdiv(rows, tile["BLOCK_N"]),)](
            *parts,
            *[None] * (_GROUP - len(parts)),
            stacked,
            stacked[first:],
            sums,
            out if last else sums,
            lse,
            len(outs),
            rows,
            length,
            heads,
            channels,
            COUNT=len(parts),
            ADDS=first > 0,
            **tile,
        )
    return out, lse


def launch_merge_attention_states_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor], lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of outs (n, B, L, H, D) and lses (n, B, H, L), stacked."""
    _, length, heads, channels = grad_out.shape
    grad_outs = torch.empty(len(outs), *grad_out.shape, dtype=grad_out.dtype, device=grad_out.device)
    grad_lses = torch.empty(len(lses), *lse.shape, dtype=lse.dtype, device=lse.device)
    rows = lse.numel()
    if rows == 0:
        return grad_outs, grad_lses
    tile = MERGE_GRAD.tile(grad_out.device, **_fields(grad_out))
    stacked, lse, grad_out = torch.stack(lses), lse.contiguous(), grad_out.contiguous()
    for i, part in enumerate(outs):
        _merge_states_part_backward_kernel[(triton.cdiv(rows, tile["BLOCK_N"]),)](
            grad_out,
            part.contiguous(),
            stacked[i],
            lse,
            grad_outs[i],
            grad_lses[i],
            rows,
            length,
            heads,
            channels,
            **tile,
        )
    _merge_states_lse_backward_kernel[(triton.cdiv(rows, _ELEMENTS),)](
        stacked,
        lse,
        None if grad_lse is None else grad_lse.contiguous(),
        grad_lses,
        len(lses),
        rows,
        HAS_GRAD=grad_lse is not None,
        **_LSE,
        **_LSE_WARPS,
    )
    return grad_outs, grad_lses


_SUMS = {"lses": "*fp32", "lse": "*fp32"}
_ALL_SUMS = _SUMS | {"grad_lse": "*fp32", "grad_lses": "*fp32"}
# See triton_gather.AOT.
AOT = {
    "_merge_states_kernel": [
        (
            {f"part{i}": f"*{dtype}" for i in range(count)}
            | {**_SUMS, "group_lses": "*fp32", "sums": "*fp32", "out": f"*{out}"},
            {f"part{i}": None for i in range(count, _GROUP)} | {"COUNT": count, "ADDS": adds},
            (MERGE, {"dtype": dtype, "channels": block_d}),
        )
        for dtype, out, count, adds, block_d in (
            ("bf16", "bf16", 2, False, 128),
            ("bf16", "fp32", 4, False, 128),
            ("bf16", "bf16", 4, True, 128),
            ("fp16", "fp16", 2, False, 64),
            ("fp32", "fp32", 2, False, 128),
            ("fp32", "fp32", 4, True, 256),
        )
    ],
    "_merge_states_part_backward_kernel": [
        (
            {"grad_out": f"*{dtype}", "part": f"*{dtype}", "grad_part": f"*{dtype}", **_SUMS, "along": "*fp32"},
            {},
            (MERGE_GRAD, {"dtype": dtype, "channels": block_d}),
        )
        for dtype, block_d in (("bf16", 128), ("fp16", 64), ("fp32", 128), ("fp32", 256))
    ],
    "_merge_states_lse_backward_kernel": [
        (_ALL_SUMS, {"HAS_GRAD": True, "BLOCK": _ELEMENTS}, 4),
        (_ALL_SUMS, {"grad_lse": None, "HAS_GRAD": False, "BLOCK": _ELEMENTS}, 4),
    ],
}
