"""What Triton kernels of several families share: which tile a program has, on what."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl


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
