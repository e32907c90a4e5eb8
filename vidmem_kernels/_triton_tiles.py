"""What Triton kernels of several families share: which tile a program has, on what."""

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

    Not on two axes: axis 0 alone takes more than 65,535 programs.
    """
    tiles = tl.cdiv(N, BLOCK)
    n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // tiles).to(tl.int64), n


@functools.cache
def major_of(device: torch.device) -> int:
    """Major number of a GPU's compute capability; of Ampere for the interpreter."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


FIRST_WITH_FLOAT8 = 89  # compute capability from which GPUs convert e4m3fn by an instruction
_ITEMSIZE = {dtype_name(d): d.itemsize for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)}
_ITEMSIZE |= {dtype_name(d): d.itemsize for d in (torch.int8, torch.float8_e4m3fn)}


def vector_of(*dtypes: str) -> int:
    """Elements that a thread reads and writes side by side: 16 bytes of the widest of the dtypes' names.

    With 16 bytes of a narrower one, values would change threads, through shared memory, between load and store.
    """
    return 16 // max(_ITEMSIZE[name] for name in dtypes)


class RowMove(NamedTuple):
    """How a program moves rows: `across` warps read one row side by side, a thread reads `loads` vectors at once."""

    warps: int
    across: int
    loads: int

    def tile(self, rows: str, width: int, vector: int) -> Tile:
        """The tile; `rows` names the constant that counts rows, `width` is the power of two that holds the channels."""
        block_c = min(32 * self.across * vector, width)
        block_rows = max(1, self.loads * 32 * self.warps * vector // block_c)
        return {rows: block_rows, "BLOCK_C": block_c, "num_warps": self.warps}


def distinct(tiles: Iterable[Tile]) -> list[Tile]:
    """Every tile once, in order: where rows are narrow, several candidates are the same."""
    found: list[Tile] = []
    for tile in tiles:
        if tile not in found:
            found.append(tile)
    return found
