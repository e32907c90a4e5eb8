"""What the methods share: their functions, what they are given, what they make of it."""

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
    """The functions of a method's module."""

    def compress(self, clip: Clip | EncodedClip, config: CompressorConfig, progress: Progress | None) -> Rows:
        """Make the rows of a clip's memory.

        Args:
            clip: frames, or the latents that several methods share.
            config: what is asked for.
            progress: called with (steps done, steps in all).

        Raises:
            UserError: the clip cannot be compressed to what `config` asks; the message has the range.
            ValueError: a form of clip that the method does not take, or latents that are not all there.
        """

    def check(self, bank: MemoryBank, header: MemoryHeader) -> None:
        """Check that a loaded bank has all that `read` reads, before anything is allocated for it.

        Args:
            bank: loaded bank.
            header: what its entries say; those of Method.needs are there.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit the rows.
            MemoryFormatError: the rows belong to a codec or model that is not there.
        """

    def read(self, bank: MemoryBank, frame: int, **options: int) -> torch.Tensor:
        """Read one frame back, from the rows that it needs.

        Args:
            bank: that `check` has passed.
            frame: in range.
            options: "steps", for a method that takes them; by default the method's own number.

        Returns:
            uint8 (H, W, 3), RGB.
        """

    def open_model(self, name: str) -> Any:
        """Load a shipped checkpoint as a `learned.TrainedModel`; only of methods that run one.

        Raises:
            UserError: it is not there, or damaged.
        """


@dataclass(frozen=True)
class EncodedClip:
    """A clip as latents.

    Args:
        latents: raw chunks (1, C, t', H', W') as `codec.encode_chunks` gives them.
        codec: the codec they come from.
        size: frames, rows and columns before padding.
        fps: frames per second.
        source: the file they came from.
    """

    latents: Iterable[torch.Tensor]
    codec: VideoCodec
    size: tuple[int, int, int]
    fps: float
    source: Path


def encoded(
    clip: Clip | EncodedClip, codec: VideoCodec | None = None, dtype: torch.dtype = torch.float16
) -> EncodedClip:
    """A clip as latents; one of frames is encoded chunk by chunk while they are read, once.

    Args:
        clip: frames, or latents, which stay as they are.
        codec: makes latents of frames, DCTCodec by default.
        dtype: of these latents.

    Returns:
        EncodedClip.
    """
    if isinstance(clip, EncodedClip):
        return clip
    codec = codec or DCTCodec()
    latents = codec.encode_chunks(clip.frames.split(2 * codec.stride[0]), dtype)
    return EncodedClip(latents, codec, clip.size, clip.fps, clip.source)


class Rows(NamedTuple):
    """The rows that a method makes of a clip.

    Attributes:
        tokens: float32 (M, C).
        positions: float32 (M, 3), midpoints (t, h, w) in units of the patch-token grid.
        codec: of the latents that they were made of.
        extras: tensors that reading back needs.
        meta: header entries that reading back needs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    codec: VideoCodec
    extras: dict[str, torch.Tensor]
    meta: dict[str, str]


def context_tokens(size: tuple[int, int, int], codec_stride: tuple[int, int, int]) -> int:
    """Patch tokens of a clip of (frames, rows, columns): its context before compression."""
    cells = [codec_stride[0], *(stride * PATCH for stride in codec_stride[1:])]
    return math.prod(-(-n // cell) for n, cell in zip(size, cells, strict=True))


def box_grid(
    size: tuple[int, int, int], codec_stride: tuple[int, int, int], compression: Compression
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Cut a clip into boxes of `compression` patch tokens.

    Rows and columns are resampled to whole boxes (the number rounded down, at least one), so that
    nothing is cropped; the last frames are padded to a whole box.

    Args:
        size: frames, rows and columns.
        codec_stride: of the codec, (time, height, width).
        compression: patch tokens of a box.

    Returns:
        Number of boxes and size of a box in pixels, both as (time, height, width).
    """
    t, h, w = codec_stride
    box = (compression.time * t, compression.height * h * PATCH, compression.width * w * PATCH)
    return (-(-size[0] // box[0]), max(1, size[1] // box[1]), max(1, size[2] // box[2])), box
