"""Blocks of consecutive rows with different lengths, padded to a common block size."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import INDEX_DTYPES, check_same, check_tensor
from ._numerics import check_index
from ._symbolic import require


def check_values(op: str, name: str, index: Tensor, low: int, rows: int) -> None:
    """Raises IndexError unless all of `index` is in [low, rows - 1]; skipped where the check would cost a
    synchronisation."""
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        check_index(op, name, index, low, rows)


def _check_block_sizes(op: str, name: str, sizes: object, size: int, x: Tensor) -> None:
    """Checks the lengths (blocks,) of blocks of at most `size` rows, which must add up to the rows of x (B, L, ...)."""
    check_tensor(op, name, sizes, "blocks", INDEX_DTYPES)
    check_same(op, f"{name} and its rows must be on the same device", x.device, sizes.device)
    blocks, rows = sizes.shape[0], x.shape[1]
    require(
        rows <= blocks * size,
        lambda: f"{op}: {name} must cover all {rows} rows by blocks of at most {size} rows, got {blocks} blocks",
    )
    check_values(op, name, sizes, 0, size + 1)
    check_values(op, f"the sum of {name}", sizes.sum().unsqueeze(0), rows, rows + 1)


def check_pair_of_sizes(
    op: str, sizes: object, block_size: tuple[int, int], q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Checks the user's `block_sizes`, one tensor or a pair; returns the sizes for queries and for keys."""
    if isinstance(sizes, Tensor):
        sizes = sizes, sizes
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        raise TypeError(f"{op}: block_sizes must be a tensor or a pair of tensors, got {type(sizes).__name__}")
    for name, given, size, x in zip("qk", sizes, block_size, (q, k), strict=True):
        _check_block_sizes(op, f"block_sizes of {name}", given, size, x)
    return tuple(sizes)


def block_sizes_of(length: int, size: int, device: torch.device) -> Tensor:
    """(ceil(length / size),) lengths of blocks of `size` rows; the last one may be shorter."""
    first = torch.arange(0, length, size, device=device)
    return (length - first).clamp(max=size)


def padded_rows(sizes: Tensor, size: int) -> Tensor:
    """(blocks * size,) int32: the row at each place of the padded layout; -1 for padding."""
    start = sizes.cumsum(0) - sizes
    place = torch.arange(size, device=sizes.device)
    rows = start.unsqueeze(1) + place
    return torch.where(place < sizes.unsqueeze(1), rows, -1).flatten().to(torch.int32)


def block_of(rows: Tensor, sizes: Tensor) -> Tensor:
    """The block of each row, int64; rows beyond the last block get the last one."""
    return (sizes.cumsum(0) <= rows.unsqueeze(1)).sum(1).clamp(max=sizes.shape[0] - 1)


def padded_places(sizes: Tensor, size: int, length: int) -> Tensor:
    """(length,) int32: the place of each row in the padded layout of `padded_rows`."""
    rows = padded_rows(sizes, size).long()
    rows = rows.masked_fill(rows < 0, length).clamp(max=length)  # padding goes to one extra row
    place = torch.arange(rows.shape[0], device=sizes.device)
    return place.new_zeros(length + 1).scatter(0, rows, place)[:length].to(torch.int32)
