"""Tile helpers shared by the Triton kernels of several families."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._tuned import Tile, dtype_name


@triton.jit
def tile_of(N, BLOCK: tl.constexpr):
    """Batch and positions of a program's tile, in int64, for B * cdiv(N, BLOCK) programs on axis 0.

    Only axis 0 of a grid can have more than 65,535 programs, so batch and tile share it.
    """
    tiles = tl.cdiv(N, BLOCK)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), n


@functools.cache
def major_of(device: torch.device) -> int:
    """Major compute capability of a GPU; that of Ampere for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


FIRST_WITH_FLOAT8 = 89  # compute capability from which GPUs convert e4m3fn by an instruction
_ITEMSIZE = {dtype_name(d): d.itemsize for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_ITEMSIZE |= {dtype_name(d): d.itemsize for d in (torch.int8, torch.float8_e4m3fn)}


def vector_of(*dtypes: str) -> int:
    """Elements that a thread reads and writes as one vector: 16 bytes of the widest of the dtypes.

    With 16 bytes of a narrower dtype, values would move between threads, by shared memory, between load and store.
    """
    return 16 // max(_ITEMSIZE[name] for name in dtypes)


class RowMove(NamedTuple):
    """How a program moves rows: `across` warps read one row side by side, each thread reads `loads` vectors at once."""

    warps: int
    across: int
    loads: int

    def tile(self, rows: str, width: int, vector: int) -> Tile:
        """The tile; `rows` names the constant for the rows, `width` is the power of two that holds the channels."""
        block_c = min(32 * self.across * vector, width)
        block_rows = max(1, self.loads * 32 * self.warps * vector // block_c)
        return {rows: block_rows, "BLOCK_C": block_c, "num_warps": self.warps}


def distinct(tiles: Iterable[Tile]) -> list[Tile]:
    """The tiles without duplicates, in order; for narrow rows several candidates are the same."""
    found: list[Tile] = []
    for tile in tiles:
        if tile not in found:
            found.append(tile)
    return found
