"""The memory file: a MemoryBank with a header that says how to read frames back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from vidmem_kernels import MemoryBank

from .compressor import CompressedMemory


@dataclass(frozen=True)
class Memory:
    bank: MemoryBank
    method: str
    frames: int
    height: int
    width: int
    fps: float
    source: str

    def retrieve(self, frame: int) -> torch.Tensor:
        """uint8 (H, W, 3); frame out of range -> UserError."""
        raise NotImplementedError


def write_memory(
    path: str | Path, compressed: CompressedMemory, *, fps: float, source: str
) -> None:
    raise NotImplementedError


def read_memory(path: str | Path) -> Memory:
    raise NotImplementedError
