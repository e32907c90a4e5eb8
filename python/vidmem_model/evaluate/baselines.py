"""What a trained memory is measured against: memories that need no training, and one mean frame.

Each takes a history's frames and gives them back as read from what it kept of them.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from ..memory import METHODS
from ..memory.compressor import CompressedMemory, compress
from ..memory.config import CompressorConfig
from ..memory.file import read_memory, write_memory
from ..memory.method import box_grid, encoded
from ..model.config import Compression
from ..vae import PATCH, DCTCodec
from ..vae.config import CodecConfig
from ..video import Clip

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


def compress_alike(
    method: str, clip: Clip, compression: Compression, width: int, budget: int | None = None
) -> CompressedMemory:
    """Compress a clip by a method without a model to tokens of a given width.

    A token that is made of a patch of latents, as those of merge are, gets its width by keeping as many of the
    codec's channels. What merge stores beside its tokens (the row of every patch token) comes on top.

    Args:
        method: one of memory.untrained().
        clip: the frames.
        compression: patch tokens that a token stands for.
        width: numbers a token may hold, at least 4; stored as float16.
        budget: number of tokens of merge; by default what the compression gives.

    Returns:
        CompressedMemory.

    Raises:
        UserError: the history is too small for the compression or the budget.
    """
    own_width = "channels" in METHODS[method].takes
    codec = DCTCodec(CodecConfig(_MOST_CHANNELS if own_width else min(_MOST_CHANNELS, width // PATCH**2)))
    whole = 3 * math.prod(box_grid(clip.size, codec.stride, compression)[1])
    config = CompressorConfig(method, compression, min(width, whole), budget)
    return compress(encoded(clip, codec, torch.float32), config)


def untrained_memory(method: str, frames: torch.Tensor, compression: Compression, width: int) -> ReadBack:
    """Read every frame back from a memory file that `compress_alike` filled.

    Args:
        method, compression, width: as there.
        frames: uint8 (T, H, W, 3).

    Returns:
        ReadBack.

    Raises:
        UserError: as there.
    """
    memory = compress_alike(method, Clip(frames, 1.0, Path(), None), compression, width)
    with tempfile.TemporaryDirectory(prefix="vidmem-") as folder:
        path = Path(folder) / "memory.safetensors"
        write_memory(path, memory)
        opened = read_memory(path)
        read = torch.stack([opened.retrieve(i) for i in range(len(frames))])
    return ReadBack(read, *memory.tokens.shape)
