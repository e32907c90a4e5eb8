"""Tokens of a video in the order of tiles, so that a block of consecutive tokens is a box in time and space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_int
from .._symbolic import saveable, unguarded


@saveable
class TileOrder(NamedTuple):
    """Tokens tile by tile, and back: `x[:, order][:, inverse]` is x.

    Attributes:
        order: (N,) int32, the token that stands at each place.
        inverse: (N,) int32, the place of each token.
        block_sizes: (tiles,) int32, tokens of each tile: those at a border have fewer than the others.
    """

    order: Tensor
    inverse: Tensor
    block_sizes: Tensor


def _check_sizes(op: str, name: str, sizes: object, low: int) -> None:
    if not isinstance(sizes, tuple | list) or len(sizes) != 3:
        raise TypeError(f"{op}: {name} must be three numbers (time, height, width), got {sizes!r}")
    for i, size in enumerate(sizes):
        check_int(op, f"{name}[{i}]", size, low)


def tile_order(grid: Sequence[int], tile: Sequence[int], *, device: torch.device | str | None = None) -> TileOrder:
    """Orders the tokens of a video tile by tile, whatever the grid: tiles at its far borders hold what is left.

    In this order a block of consecutive tokens is a box in time and space, whose tokens look alike and want the same
    keys: `topk_blocks` and `cross_attention` take its `block_sizes`.

    Args:
        grid: (T, H, W) tokens of the video, in the order of frames, rows and columns (W fastest).
        tile: (t, h, w) tokens of a tile, each at least 1. Tiles come in the order of time, row and column too, and so
            do the tokens in one.
        device: of the results.

    Returns:
        TileOrder(order, inverse, block_sizes), int32, of ceil(T / t) * ceil(H / h) * ceil(W / w) tiles. Computed anew
        at every call, in a few passes over the N tokens: a model keeps it for all of its blocks.

    Raises:
        ValueError, TypeError: `grid` or `tile` that are no three numbers, or too small ones.

    Equivalent PyTorch:
        t, h, w = (torch.arange(n) // s for n, s in zip(grid, tile))
        number = (t[:, None, None] * ceil(H / tile[1]) + h[:, None]) * ceil(W / tile[2]) + w
        order = number.flatten().argsort(stable=True)

    Example, attention of every tile to the tenth of all tiles that it wants most and to itself:
        order, inverse, sizes = tile_order((21, 30, 52), (4, 8, 8), device=q.device)
        q, k, v = (x[:, order] for x in (q, k, v))
        own = torch.eye(len(sizes), dtype=torch.bool, device=q.device)
        blocks = {"block_size": (256, 256), "block_sizes": sizes}
        index = topk_blocks(q, k, topk=len(sizes) // 10, always=own, **blocks)
        out = cross_attention(q, k, v, block_index=index, **blocks)[:, inverse]

    Source: tiles as in Sliding Tile Attention (arXiv 2502.04507) and VSA (arXiv 2505.13389), which want a grid that
    they divide.
    """
    op = "tile_order"
    _check_sizes(op, "grid", grid, 0)
    _check_sizes(op, "tile", tile, 1)
    return unguarded(_order, tuple(grid), tuple(tile), device)


def _split(number: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Time, row and column of what is numbered in the order of a grid of such sizes."""
    _, height, width = sizes
    return number // (height * width), number // width % height, number % width


def _order(grid: tuple[int, ...], tile: tuple[int, ...], device: torch.device | str | None) -> TileOrder:
    # Flat arithmetic alone: a broadcast would make a compiled graph ask which sizes are 1.
    _, height, width = grid
    counts = tuple(-(-size // side) for size, side in zip(grid, tile, strict=True))
    number = torch.arange(math.prod(counts), device=device)
    sizes = torch.ones_like(number)
    for place, size, side in zip(_split(number, counts), grid, tile, strict=True):
        sizes = sizes * (size - place * side).clamp(max=side)
    token = torch.arange(math.prod(grid), device=device)
    places = _split(token, grid)
    t, h, w = (place - place % side for place, side in zip(places, tile, strict=True))  # where its tile starts
    depth, rows, columns = ((size - x).clamp(max=side) for x, size, side in zip((t, h, w), grid, tile, strict=True))
    # Before a tile come whole slabs of time, whole strips of rows of its slab, and tiles of its strip.
    before = t * (height * width) + depth * (h * width + rows * w)
    inside = ((places[0] - t) * rows + places[1] - h) * columns + places[2] - w
    inverse = before + inside
    order = torch.empty_like(token).scatter_(0, inverse, token)
    return TileOrder(*(x.to(torch.int32) for x in (order, inverse, sizes)))
