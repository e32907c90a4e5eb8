"""The interface of VAEs and codecs, and how frames are padded and streamed.

Pad rule, for every codec and compressor: frames are padded at the end (last frame, last row, last
column, replicated) up to the next multiple of what is needed, and the true size is remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from .patchify import PATCH


def pad_frames(frames: torch.Tensor, multiple: tuple[int, int, int]) -> torch.Tensor:
    """Pad (B, C, T, H, W) at the end by replication until T, H, W are multiples of `multiple`."""
    missing = [-n % m for n, m in zip(frames.shape[2:], multiple, strict=True)]
    if not any(missing):
        return frames
    t, h, w = missing
    return F.pad(frames, (0, w, 0, h, 0, t), mode="replicate")


def rechunk(chunks: Iterable[torch.Tensor], length: int, dim: int) -> Iterator[torch.Tensor]:
    """Regroup chunks of any lengths along `dim` into chunks of `length`; the last may be shorter."""
    held: list[torch.Tensor] = []
    have = 0
    for chunk in chunks:
        held.append(chunk)
        have += chunk.shape[dim]
        if have >= length:
            joined = torch.cat(held, dim) if len(held) > 1 else chunk
            full = have - have % length
            yield from joined.narrow(dim, 0, full).split(length, dim)
            held = [joined.narrow(dim, full, have - full)] if have > full else []
            have -= full
    if have:
        yield torch.cat(held, dim)


def frames_to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> float32 (1, 3, T, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].to(torch.float32).div_(127.5).sub_(1.0)


def frames_to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Float (1, 3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3); values outside saturate."""
    scaled = frames[0].permute(1, 2, 3, 0).add(1.0).mul_(127.5)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


class VideoCodec(ABC):
    """A map between frames and latents; `stride` is frames, rows and columns a latent cell covers.

    Attributes:
        name: what a memory file calls the codec.
        channels: latent channels.
        stride: (time, height, width).
    """

    name: str
    channels: int
    stride: tuple[int, int, int] = (4, 8, 8)

    @abstractmethod
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1], multiples of the stride -> latents (B, C, T', H', W')."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, C, T', H', W') -> frames (B, 3, T, H, W)."""

    def encode_chunks(
        self, frames: Iterable[torch.Tensor | np.ndarray], dtype: torch.dtype = torch.float32
    ) -> Iterator[torch.Tensor]:
        """Encode a stream of frames in bounded memory.

        Args:
            frames: uint8 arrays (t, H, W, 3) of any lengths.
            dtype: of the latents.

        Returns:
            Iterator over latents (1, C, t', H', W'), t' <= 2; rows and columns are padded to whole
            patches, the last frames to a whole latent frame.
        """
        t, h, w = self.stride
        for chunk in rechunk((torch.as_tensor(f) for f in frames), 2 * t, 0):
            padded = pad_frames(frames_to_float(chunk), (t, h * PATCH, w * PATCH))
            yield self.encode(padded).to(dtype)

    def decode_chunks(self, latents: Iterable[torch.Tensor], size: tuple[int, int, int]) -> Iterator[torch.Tensor]:
        """Decode a stream of latents, cropped to the true size.

        Args:
            latents: chunks (1, C, t', H', W').
            size: frames, rows and columns of the clip before padding.

        Returns:
            Iterator over float32 frames (1, 3, t, H, W).
        """
        left, height, width = size
        for chunk in latents:
            frames = self.decode(chunk)[:, :, :left, :height, :width]
            left -= frames.shape[2]
            if frames.shape[2]:
                yield frames
