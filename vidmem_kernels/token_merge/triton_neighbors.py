"""Triton kernels that match tokens with their neighbours on a grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton_radix_select import order_key
from .._triton_tiles import distinct, tile_of
from .._tuned import Chosen, Tile, Tunable, dtype_name
from .triton_match import NO_SIMILARITY
from .triton_plan import count_at_least, plan_from_keys
from .triton_rows import launch_prepare, layout_of


def _tile(arch: int, dtype: str, width: int, block_c: int = 128, elements: int = 8) -> Tile:
    block_c = min(block_c, width)
    return {"BLOCK_N": max(1, 128 * elements // block_c), "BLOCK_C": block_c, "num_warps": 4}


def _tiles(arch: int, dtype: str, width: int) -> list[Tile]:
    return distinct(_tile(arch, dtype, width, block_c, elements) for block_c in (64, 128, 256) for elements in (8, 16))


NEIGHBORS = Tunable("_match_neighbors_kernel", ("dtype", "width"), _tile, _tiles)


@triton.jit
def _compare_neighbor(
    x, scale, norm, n, m, exists, best, at, C, x_stride_n, x_stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Updates the best similarity and neighbour of tokens n with neighbours m."""
    product = tl.zeros([BLOCK_N], dtype=tl.float32)
    scale_n, scale_m = tl.load(scale + n, exists, other=0.0), tl.load(scale + m, exists, other=0.0)
    for first in range(0, C, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mask = exists[:, None] & (c < C)[None, :]
        a = tl.load(x + n[:, None].to(tl.int64) * x_stride_n + c[None, :].to(tl.int64) * x_stride_c, mask, other=0)
        b = tl.load(x + m[:, None].to(tl.int64) * x_stride_n + c[None, :].to(tl.int64) * x_stride_c, mask, other=0)
        product += tl.sum((a.to(tl.float32) * scale_n[:, None]) * (b.to(tl.float32) * scale_m[:, None]), axis=1)
    lengths = tl.load(norm + n, exists, other=1.0) * tl.load(norm + m, exists, other=1.0)
    similarity = tl.div_rn(product, lengths)
    similarity = tl.where(similarity == similarity, similarity, NO_SIMILARITY)
    better = exists & (similarity > best)
    return tl.where(better, similarity, best), tl.where(better, m, at)


@triton.jit
def _match_neighbors_kernel(
    x,
    scale,
    norm,
    key,
    target,
    N,
    C,
    T,
    H,
    W,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Key and destination of each source; positions 2 i and 2 i + 1 hold one source and one destination."""
    batch, pair = tile_of(tl.cdiv(N, 2), BLOCK_N)
    even = 2 * pair.to(tl.int32)
    is_second = (even // (H * W) + even // W % H + even % W) % 2 == 0
    n = tl.where(is_second, even + 1, even)
    other = tl.where(is_second, even, even + 1)
    t, h, w = n // (H * W), n // W % H, n % W
    valid = n < N
    x += batch * x_stride_b
    scale += batch * N
    norm += batch * N
    best = tl.full([BLOCK_N], float("-inf"), dtype=tl.float32)
    at = tl.full([BLOCK_N], 0, dtype=tl.int32)
    # By ascending position, so that the first of equal neighbours wins.
    best, at = _compare_neighbor(
        x, scale, norm, n, n - H * W, valid & (t > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n - W, valid & (h > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n - 1, valid & (w > 0), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + 1, valid & (w < W - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + W, valid & (h < H - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    best, at = _compare_neighbor(
        x, scale, norm, n, n + H * W, valid & (t < T - 1), best, at, C, x_stride_n, x_stride_c, BLOCK_N, BLOCK_C
    )
    tl.store(key + batch * N + n, order_key(best), valid)
    tl.store(target + batch * N + n, at, valid)
    tl.store(key + batch * N + other, order_key(tl.full([BLOCK_N], float("-inf"), tl.float32)), other < N)
    tl.store(target + batch * N + other, other, other < N)


def _fields(metric: Tensor) -> dict[str, str | int]:
    return {"dtype": dtype_name(metric.dtype), "width": triton.next_power_of_2(metric.shape[2])}


def _neighbor_keys(metric: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = metric.shape
    tile = NEIGHBORS.tile(metric.device, **_fields(metric))
    norm = torch.empty(batch, tokens, dtype=torch.float32, device=metric.device)
    scale = torch.empty_like(norm)
    key = torch.empty(batch, tokens, dtype=torch.int32, device=metric.device)
    target = torch.empty_like(key)
    launch_prepare(
        metric,
        None,
        norm,
        scale,
        layout_of(tokens, grid, (1, 1, 1)),
        channels,
        False,
        min(128, triton.next_power_of_2(channels)),
    )
    _match_neighbors_kernel[(triton.cdiv(triton.cdiv(tokens, 2), tile["BLOCK_N"]) * batch,)](
        metric,
        scale,
        norm,
        key,
        target,
        tokens,
        channels,
        *grid,
        *metric.stride(),
        **tile,
    )
    return key, target


def launch_match_neighbors_fwd(
    metric: Tensor, num_merge: int, grid: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_neighbors`."""
    if num_merge == 0 or metric.shape[0] == 0:
        return plan_from_keys(None, None, metric, num_merge)
    return plan_from_keys(*_neighbor_keys(metric, grid), metric, num_merge)


def tiles_match_neighbors_fwd(metric: Tensor, num_merge: int, grid: Sequence[int]) -> list[Chosen]:
    """The tiles that `launch_match_neighbors_fwd` uses."""
    return [NEIGHBORS.chosen(metric.device, **_fields(metric))]


def launch_count_neighbors_fwd(metric: Tensor, grid: Sequence[int], threshold: float) -> Tensor:
    """(B,) int32; see the reference."""
    if metric.shape[0] == 0 or metric.shape[1] < 2:
        return torch.zeros(metric.shape[0], dtype=torch.int32, device=metric.device)
    return count_at_least(_neighbor_keys(metric, grid)[0], threshold)


# See sparse_gather.triton_gather.AOT.
AOT = {
    "_match_neighbors_kernel": [
        (
            {"x": f"*{x}", "scale": "*fp32", "norm": "*fp32", "key": "*i32", "target": "*i32"},
            {"x_stride_c": 1},
            (NEIGHBORS, {"dtype": x, "width": 128}),
        )
        for x in ("bf16", "fp32")
    ],
}
