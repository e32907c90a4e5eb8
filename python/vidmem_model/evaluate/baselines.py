"""Baselines for trained memories: the methods without a model, and the mean frame.

Each compresses the frames of a history and reads them back.
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
    """A history read back from a memory.

    Attributes:
        frames: uint8 (T, H, W, 3).
        tokens: Number of memory tokens; 0 for the mean frame.
        width: Channels of a token.
    """

    frames: torch.Tensor
    tokens: int
    width: int


def mean_frame(frames: torch.Tensor) -> ReadBack:
    """Read every frame back as the mean of the history, the lower bound for a memory.

    Args:
        frames: uint8 (T, H, W, 3).

    Returns:
        The frames read back.
    """
    mean = frames.float().mean(0).round().to(torch.uint8)
    return ReadBack(mean.expand_as(frames), 0, 0)


def compress_alike(
    method: str, clip: Clip, compression: Compression, width: int, budget: int | None = None
) -> CompressedMemory:
    """Compress a clip with a method without a model, to tokens of a given width.

    A merge token is a patch of latents; it gets its width by keeping fewer channels of the codec. The token index of
    every patch token, which merge also stores, is not counted.

    Args:
        method: One of memory.untrained().
        clip: Frames.
        compression: Patch tokens per memory token.
        width: Maximum channels of a token, at least 4; stored as float16.
        budget: Number of tokens of merge; by default what the compression gives.

    Returns:
        The compressed clip.

    Raises:
        UserError: The clip is too small for the compression or the budget.
    """
    own_width = "channels" in METHODS[method].takes
    codec = DCTCodec(CodecConfig(_MOST_CHANNELS if own_width else min(_MOST_CHANNELS, width // PATCH**2)))
    whole = 3 * math.prod(box_grid(clip.size, codec.stride, compression)[1])
    config = CompressorConfig(method, compression, min(width, whole), budget)
    return compress(encoded(clip, codec, torch.float32), config)


def untrained_memory(method: str, frames: torch.Tensor, compression: Compression, width: int) -> ReadBack:
    """Read every frame back from a memory file that `compress_alike` made.

    Args:
        method: As for `compress_alike`.
        frames: uint8 (T, H, W, 3).
        compression: As for `compress_alike`.
        width: As for `compress_alike`.

    Returns:
        The frames read back.

    Raises:
        UserError: As for `compress_alike`.
    """
    memory = compress_alike(method, Clip(frames, 1.0, Path(), None), compression, width)
    with tempfile.TemporaryDirectory(prefix="vidmem-") as folder:
        path = Path(folder) / "memory.safetensors"
        write_memory(path, memory)
        opened = read_memory(path)
        read = torch.stack([opened.retrieve(i) for i in range(len(frames))])
    return ReadBack(read, *memory.tokens.shape)
