"""Orders the tokens of a video by tiles, so that a block of consecutive tokens is a box in time and space."""

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
    """A permutation of tokens into tile order, and its inverse: `x[:, order][:, inverse]` equals x.

    Attributes:
        order: (N,) int32, the token at each position in tile order.
        inverse: (N,) int32, the position of each token in tile order.
        block_sizes: (tiles,) int32, the number of tokens of each tile; tiles at a border may have fewer.
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
    """Computes the permutation that orders the tokens of a video tile by tile.

    In this order a block of consecutive tokens is a box in time and space. Such tokens are similar and attend to
    similar keys; `topk_blocks` and `cross_attention` accept the tiles by `block_sizes`. The grid need not be divisible
    by the
    tile: tiles at the far borders hold the remaining tokens.

    Args:
        grid: (T, H, W) of the tokens, ordered by frame, row and column (W fastest).
        tile: (t, h, w) of a tile, each at least 1. Tiles, and the tokens within each tile, are also ordered by time,
            row and column.
        device: device of the results.

    Returns:
        TileOrder(order, inverse, block_sizes), int32, for ceil(T / t) * ceil(H / h) * ceil(W / w) tiles. Each call
        computes it anew in a few passes over the N tokens: compute it once per model, not once per block.

    Raises:
        ValueError, TypeError: `grid` or `tile` is not three numbers, or one of them is too small.

    Equivalent PyTorch:
        t, h, w = (torch.arange(n) // s for n, s in zip(grid, tile))
        number = (t[:, None, None] * ceil(H / tile[1]) + h[:, None]) * ceil(W / tile[2]) + w
        order = number.flatten().argsort(stable=True)

    Examples:
        Each tile attends to the best tenth of all tiles and to itself:

        >>> order, inverse, sizes = tile_order((21, 30, 52), (4, 8, 8), device=q.device)
        >>> q, k, v = (x[:, order] for x in (q, k, v))
        >>> own = torch.eye(len(sizes), dtype=torch.bool, device=q.device)
        >>> blocks = {"block_size": (256, 256), "block_sizes": sizes}
        >>> index = topk_blocks(q, k, topk=len(sizes) // 10, always=own, **blocks)
        >>> out = cross_attention(q, k, v, block_index=index, **blocks)[:, inverse]

    Source: tiles as in Sliding Tile Attention (arXiv 2502.04507) and VSA (arXiv 2505.13389), which require that the
    tile divides the grid.
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
