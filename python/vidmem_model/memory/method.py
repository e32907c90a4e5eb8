"""What the methods share: the interface of their modules, their input and their result."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from vidmem_kernels import MemoryBank

from ..model.config import Compression
from ..vae import PATCH, DCTCodec, VideoCodec
from ..video import Clip
from .config import CompressorConfig
from .header import MemoryHeader

Progress = Callable[[int, int], None]


class Implementation(Protocol):
    """The functions that the module of a method must have."""

    def compress(self, clip: Clip | EncodedClip, config: CompressorConfig, progress: Progress | None) -> Rows:
        """Compress a clip to memory tokens.

        Args:
            clip: Frames, or latents that several methods share.
            config: Configuration.
            progress: Called with (steps done, steps in total).

        Returns:
            The memory tokens and what reading back needs.

        Raises:
            UserError: The clip cannot be compressed as `config` asks; the message gives the allowed range.
            ValueError: The method does not take this kind of clip, or latents are missing.
        """

    def check(self, bank: MemoryBank, header: MemoryHeader) -> None:
        """Check that a loaded bank has everything that `read` needs, before memory is allocated for it.

        Args:
            bank: Loaded bank.
            header: Its header, which has the entries of Method.needs.

        Raises:
            KeyError: An entry is missing.
            ValueError: An entry does not match the tokens.
            MemoryFormatError: The codec or model of the tokens is missing.
        """

    def read(self, bank: MemoryBank, frame: int, **options: int) -> torch.Tensor:
        """Read one frame back, from the tokens that it needs.

        Args:
            bank: Bank that has passed `check`.
            frame: Number of the frame, in range.
            **options: "steps", for a method with denoising steps.

        Returns:
            uint8 (H, W, 3), RGB.
        """

    def open_model(self, name: str) -> Any:
        """Load a shipped checkpoint as a `learned.TrainedModel`; only methods with a trained model have this function.

        Args:
            name: Name of the checkpoint.

        Raises:
            UserError: It is missing or damaged.
        """


@dataclass(frozen=True)
class EncodedClip:
    """The latents of a clip.

    Args:
        latents: Raw chunks (1, C, t', H', W'), from `codec.encode_chunks`.
        codec: Codec of the latents.
        size: Frames, rows and columns of the clip, before padding.
        fps: Frames per second.
        source: The video file.
    """

    latents: Iterable[torch.Tensor]
    codec: VideoCodec
    size: tuple[int, int, int]
    fps: float
    source: Path


def encoded(
    clip: Clip | EncodedClip, codec: VideoCodec | None = None, dtype: torch.dtype = torch.float16
) -> EncodedClip:
    """Encode a clip to latents, chunk by chunk while they are read; the latents can be read once.

    Args:
        clip: Frames, or latents, which are returned unchanged.
        codec: Codec for frames; by default DCTCodec.
        dtype: Dtype of the latents.

    Returns:
        The latents of the clip.
    """
    if isinstance(clip, EncodedClip):
        return clip
    codec = codec or DCTCodec()
    latents = codec.encode_chunks(clip.frames.split(2 * codec.stride[0]), dtype)
    return EncodedClip(latents, codec, clip.size, clip.fps, clip.source)


class Rows(NamedTuple):
    """The memory tokens of a clip.

    Attributes:
        tokens: float32 (M, C).
        positions: float32 (M, 3), centre (t, h, w) of each token, in patch tokens.
        codec: Codec of the latents that they were made from.
        extras: Tensors that reading back needs.
        meta: Header entries that reading back needs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    codec: VideoCodec
    extras: dict[str, torch.Tensor]
    meta: dict[str, str]


def context_tokens(size: tuple[int, int, int], codec_stride: tuple[int, int, int]) -> int:
    """Number of patch tokens of a clip of (frames, rows, columns), its context before compression."""
    cells = [codec_stride[0], *(stride * PATCH for stride in codec_stride[1:])]
    return math.prod(-(-n // cell) for n, cell in zip(size, cells, strict=True))


def box_grid(
    size: tuple[int, int, int], codec_stride: tuple[int, int, int], compression: Compression
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Cut a clip into boxes of `compression` patch tokens.

    Rows and columns are resampled to whole boxes (their number is rounded down, at least one), so that nothing is
    cropped. The last frames are padded to a whole box.

    Args:
        size: Frames, rows and columns.
        codec_stride: Stride of the codec, (time, height, width).
        compression: Patch tokens per box.

    Returns:
        Number of boxes and size of a box in frames and pixels, both as (time, height, width).
    """
    t, h, w = codec_stride
    box = (compression.time * t, compression.height * h * PATCH, compression.width * w * PATCH)
    return (-(-size[0] // box[0]), max(1, size[1] // box[1]), max(1, size[2] // box[2])), box
