"""Triton kernels of topk_blocks.

Three steps: means of blocks; scores of some query blocks with all key blocks; the best of every row of scores, found
by bisection of their keys and not by a sort, in chunks of columns whose winners meet again. Only these are sorted.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulate_dtype
from .._triton_radix_select import order_key
from .triton_quantize import _divide

# Scores held at a time: 64 MiB in float32.
_SCORES = 1 << 24
_DOT = {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_D": 32}


@triton.jit
def _block_means_kernel(
    x,
    means,
    L,
    H,
    D,
    COUNT,
    SIZE,
    x_stride_b,
    x_stride_l,
    x_stride_h,
    x_stride_d,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(B, H, COUNT, D) means of SIZE rows each, added in order. Neighbouring programs share rows of all heads."""
    head = tl.program_id(0) % H
    blocks = tl.cdiv(COUNT, BLOCK_N)
    batch = (tl.program_id(0) // H // blocks).to(tl.int64)
    n = (tl.program_id(0) // H % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    in_d = (d < D)[None, :]
    sum_dtype: tl.constexpr = means.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_D], sum_dtype)
    row = n * SIZE
    source = x + batch * x_stride_b + head.to(tl.int64) * x_stride_h + d[None, :] * x_stride_d
    for i in tl.range(0, tl.minimum(SIZE, L), loop_unroll_factor=8):
        at = row + i
        total += tl.load(source + at[:, None] * x_stride_l, (at < L)[:, None] & in_d, other=0).to(sum_dtype)
    size = tl.maximum(tl.minimum(L - row, SIZE), 1)  # no division by zero past the end
    mean = _divide(total, size.to(sum_dtype)[:, None])
    target = means + ((batch * H + head) * COUNT + n[:, None]) * D + d[None, :]
    tl.store(target, mean, (n < COUNT)[:, None] & in_d)


def _block_means(x: Tensor, size: int) -> Tensor:
    """(B * H, ceil(L / size), D) means of blocks of (B, L, H, D)."""
    batch, length, heads, channels = x.shape
    count = triton.cdiv(length, size)
    means = torch.empty(batch * heads, count, channels, dtype=accumulate_dtype(x.dtype), device=x.device)
    if means.numel() == 0:
        return means
    block_d = min(128, triton.next_power_of_2(channels))
    block_n = 1024 // block_d
    grid = (batch * heads * triton.cdiv(count, block_n), triton.cdiv(channels, block_d))
    _block_means_kernel[grid](
        x, means, length, heads, channels, count, size, *x.stride(), BLOCK_N=block_n, BLOCK_D=block_d, num_warps=4
    )
    return means


@triton.jit
def _block_scores_kernel(
    q,
    k,
    scores,
    FIRST,
    ROWS,
    Q,
    K,
    D,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(B * H, ROWS, K) products of the query means from FIRST on with all key means."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    blocks_q = tl.cdiv(ROWS, BLOCK_Q)
    lane = (tl.program_id(0) // blocks_k // blocks_q).to(tl.int64)
    row = (tl.program_id(0) // blocks_k % blocks_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column = (tl.program_id(0) % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_Q, BLOCK_K], scores.dtype.element_ty)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        query = tl.load(
            q + (lane * Q + FIRST + row[:, None]) * D + d[None, :], (row < ROWS)[:, None] & (d < D)[None, :], other=0.0
        )
        key = tl.load(
            k + (lane * K + column[None, :]) * D + d[:, None], (column < K)[None, :] & (d < D)[:, None], other=0.0
        )
        total = tl.dot(query, key, total, input_precision="ieee", out_dtype=scores.dtype.element_ty)
    target = scores + (lane * ROWS + row[:, None]) * K + column[None, :]
    tl.store(target, total, (row < ROWS)[:, None] & (column < K)[None, :])


@triton.jit
def _best_columns_kernel(
    values,
    columns,
    best_keys,
    best_columns,
    ROWS,
    N,
    SLOTS,
    k,
    ARE_SCORES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The `k` smallest keys of every chunk of BLOCK_N columns (or all, of fewer), in the order of their columns.

    `values` are (ROWS, N) scores, or the keys that earlier chunks have found in `columns`.
    """
    chunks = tl.cdiv(N, BLOCK_N)
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    at = chunk * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (row < ROWS) & (at < N)
    if ARE_SCORES:
        key = ~order_key(tl.load(values + row * N + at, valid, other=0.0))  # the best first
        column = at + tl.zeros_like(row).to(tl.int32)
    else:
        key = tl.load(values + row * N + at, valid, other=0)
        column = tl.load(columns + row * N + at, valid, other=0)
    last: tl.constexpr = 0x7FFFFFFFFFFFFFFF if key.dtype == tl.int64 else 0x7FFFFFFF  # after any score's
    want = tl.where(tl.max(row, axis=1) < ROWS, tl.minimum(k, N - chunk * BLOCK_N), 0)
    # The smallest key that at least `want` columns do not exceed lies in [low, high].
    low = tl.min(tl.where(valid, key, last), axis=1)
    high = tl.max(tl.where(valid, key, -last), axis=1)
    key = tl.where(valid, key, last)
    open_rows = tl.max((low < high).to(tl.int32), axis=0)
    while open_rows > 0:
        middle = (low & high) + ((low ^ high) >> 1)
        count = tl.sum((key <= middle[:, None]).to(tl.int32), axis=1)
        # Where just `want` are below there is nothing left to tell apart.
        low = tl.where(count < want, middle + 1, tl.where(count == want, middle, low))
        high = tl.where(count < want, high, middle)
        open_rows = tl.max((low < high).to(tl.int32), axis=0)
    better = (key < low[:, None]).to(tl.int32)
    equal = (key == low[:, None]).to(tl.int32)
    missing = want - tl.sum(better, axis=1)
    kept = better | (equal & (tl.cumsum(equal, axis=1) <= missing[:, None]).to(tl.int32))
    slot = tl.cumsum(kept, axis=1) - 1
    begin = row * SLOTS + chunk * k
    tl.store(best_keys + begin + slot, key, kept > 0)
    tl.store(best_columns + begin + slot, column, kept > 0)


def _warps(width: int) -> int:
    return {256: 4, 4096: 8, 8192: 16}[width]


def _best_columns(scores: Tensor, k: int) -> Tensor:
    """(ROWS, k) int32 columns of the largest scores of (ROWS, N), best first, equal ones by column."""
    rows, count = scores.shape
    values, columns = scores, None
    key_dtype = torch.int64 if scores.dtype == torch.float64 else torch.int32
    # Two widths, whatever N is: a chunk of one row, or several rows at once.
    width, block_r = (256, 4) if count <= 256 else (max(4096, 2 * triton.next_power_of_2(k)), 1)
    chunks = None
    while chunks != 1:
        chunks = triton.cdiv(count, width)
        slots = (chunks - 1) * k + min(k, count - (chunks - 1) * width)
        keys = torch.empty(rows, slots, dtype=key_dtype, device=scores.device)
        found = torch.empty(rows, slots, dtype=torch.int32, device=scores.device)
        _best_columns_kernel[(triton.cdiv(rows, block_r) * chunks,)](
            values,
            columns,
            keys,
            found,
            rows,
            count,
            slots,
            k,
            ARE_SCORES=columns is None,
            BLOCK_R=block_r,
            BLOCK_N=width,
            num_warps=_warps(width),
        )
        values, columns, count = keys, found, slots
    order = values.sort(dim=1, stable=True).indices
    return columns.gather(1, order)


def launch_topk_blocks_fwd(q: Tensor, k: Tensor, block_q: int, block_k: int, topk: int) -> Tensor:
    """(B, H, blocks of queries, topk) int32; see `vidmem_kernels.topk_blocks`."""
    batch, _, heads, channels = q.shape
    lanes = batch * heads
    queries = triton.cdiv(q.shape[1], block_q)
    out = torch.empty(lanes, queries, topk, dtype=torch.int32, device=q.device)
    if out.numel() > 0:
        q_means, k_means = _block_means(q, block_q), _block_means(k, block_k)
        keys = k_means.shape[1]
        fits = _SCORES // (lanes * keys)
        step = max(1, fits // _DOT["BLOCK_Q"] * _DOT["BLOCK_Q"] or fits)
        for first in range(0, queries, step):
            rows = min(step, queries - first)
            scores = torch.empty(lanes, rows, keys, dtype=q_means.dtype, device=q.device)
            grid = (lanes * triton.cdiv(rows, _DOT["BLOCK_Q"]) * triton.cdiv(keys, _DOT["BLOCK_K"]),)
            _block_scores_kernel[grid](
                q_means, k_means, scores, first, rows, queries, keys, channels, **_DOT, num_warps=8
            )
            out[:, first : first + rows] = _best_columns(scores.flatten(0, 1), topk).view(lanes, rows, topk)
    return out.view(batch, heads, queries, topk)


_FOUND = {"best_columns": "*i32"}
# See triton_gather.AOT.
AOT = {
    "_block_means_kernel": [
        ({"x": f"*{x}", "means": f"*{means}"}, {**unit, "BLOCK_N": 8, "BLOCK_D": 128}, 4)
        for x, means, unit in (
            ("bf16", "fp32", {"x_stride_d": 1}),
            ("fp32", "fp32", {"x_stride_d": 1}),
            ("fp64", "fp64", {"x_stride_d": 1}),
            ("bf16", "fp32", {}),
        )
    ],
    "_block_scores_kernel": [
        ({"q": f"*{dtype}", "k": f"*{dtype}", "scores": f"*{dtype}"}, _DOT, 8) for dtype in ("fp32", "fp64")
    ],
    "_best_columns_kernel": [
        (
            {"values": f"*{dtype}", "best_keys": "*i64" if dtype == "fp64" else "*i32", **_FOUND},
            {"columns": None, "ARE_SCORES": True, "BLOCK_R": rows, "BLOCK_N": width},
            _warps(width),
        )
        for dtype, rows, width in (
            ("fp32", 1, 4096),
            ("fp32", 1, 8192),
            ("fp32", 4, 256),
            ("fp64", 4, 256),
            ("fp64", 1, 4096),
        )
    ]
    + [
        (
            {"values": "*i32", "columns": "*i32", "best_keys": "*i32", **_FOUND},
            {"ARE_SCORES": False, "BLOCK_R": 1, "BLOCK_N": 4096},
            _warps(4096),
        )
    ],
}
