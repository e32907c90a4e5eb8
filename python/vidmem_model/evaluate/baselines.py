"""What a trained memory is measured against: memories that need no training, and one mean frame.

Each takes a history's frames and gives them back as read from what it kept of them.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..memory.config import CompressorConfig
from ..memory.dct import CompressedMemory, box_grid, compress
from ..memory.file import read_memory, write_memory
from ..vae import PATCH, DCTCodec
from ..vae.config import CodecConfig

_MOST_CHANNELS = CodecConfig().channels


@dataclass(frozen=True)
class ReadBack:
    """A history as read back from a memory.

    Attributes:
        frames: uint8 (T, H, W, 3).
        tokens: how many the memory has; 0 where it is not made of tokens.
        width: numbers a token holds.
    """

    frames: torch.Tensor
    tokens: int
    width: int


def mean_frame(frames: torch.Tensor) -> ReadBack:
    """Answer every question with the mean of the history: what all memories must beat.

    Args:
        frames: uint8 (T, H, W, 3).

    Returns:
        ReadBack.
    """
    mean = frames.float().mean(0).round().to(torch.uint8)
    return ReadBack(mean.expand_as(frames), 0, 0)


def compress_training_free(
    method: str, frames: torch.Tensor, rate: tuple[int, int, int], width: int, budget: int | None = None
) -> CompressedMemory:
    """Compress frames with dct or merge to tokens of a given width.

    A token of merge is a patch of latents: it gets its width by keeping as many of the codec's
    channels. What merge stores beside its tokens (the row of every patch token) comes on top.

    Args:
        method: "dct" or "merge".
        frames: uint8 (T, H, W, 3).
        rate: patch tokens that a token covers, (height, width, time).
        width: numbers a token may hold, at least 4; stored as float16.
        budget: number of tokens of merge; by default what the rate gives.

    Returns:
        CompressedMemory.

    Raises:
        UserError: the history is too small for the rate or the budget.
    """
    codec = DCTCodec(CodecConfig(_MOST_CHANNELS if method == "dct" else min(_MOST_CHANNELS, width // PATCH**2)))
    size = tuple(frames.shape[:3])
    whole = 3 * math.prod(box_grid(size, codec.stride, rate)[1])
    config = CompressorConfig(method, rate, min(width, whole), budget)
    return compress(codec.encode_chunks(frames.split(2 * codec.stride[0])), codec, size, config)


def training_free(method: str, frames: torch.Tensor, rate: tuple[int, int, int], width: int) -> ReadBack:
    """Read every frame back from a memory file that `compress_training_free` filled.

    Args:
        method, frames, rate, width: as there.

    Returns:
        ReadBack.

    Raises:
        UserError: as there.
    """
    memory = compress_training_free(method, frames, rate, width)
    with tempfile.TemporaryDirectory(prefix="vidmem-") as folder:
        path = Path(folder) / "memory.safetensors"
        write_memory(path, memory, fps=1.0, source="")
        opened = read_memory(path)
        read = torch.stack([opened.retrieve(i) for i in range(len(frames))])
    return ReadBack(read, *memory.tokens.shape)
