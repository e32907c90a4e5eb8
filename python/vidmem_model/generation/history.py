"""The memory of a growing history, and its growth in tokens per second."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..model.config import Compression
from ..model.encoder import MemoryTokens, low_resolution
from ..model.memory_model import MemoryModel
from ..vae import PATCH, VideoCodec, pad_frames


def context_per_second(
    compression: Compression,
    height: int,
    width: int,
    fps: float,
    stride: tuple[int, int, int] = (4, 8, 8),
    whole_boxes: bool = False,
) -> float:
    """Number of tokens by which a memory grows with each second of video.

    Args:
        compression: Patch tokens per memory token; (1, 1, 1) is no compression.
        height: Rows of a frame, in pixels.
        width: Columns of a frame, in pixels.
        fps: Frames per second.
        stride: Frames, rows and columns per latent cell.
        whole_boxes: Whether to count as the encoder does, which crops rows and columns that do not fill a box. By
            default tokens are counted by area, as in papers: 195 tokens/s for 480x832 at 16 fps and 4x4x2, for which
            the encoder makes 182, because 30 rows of patch tokens are not a multiple of 4.

    Returns:
        Tokens per second.
    """
    rows = -(-height // (stride[1] * PATCH)) / compression.height
    columns = -(-width // (stride[2] * PATCH)) / compression.width
    if whole_boxes:
        rows, columns = math.floor(rows), math.floor(columns)
    return rows * columns * fps / (stride[0] * compression.time)


class GrowingMemory:
    """The memory of a growing history: each part is encoded separately and its tokens are appended.

    Args:
        model: Model with the memory encoders.
        vae: VAE for the low-resolution branches.
    """

    def __init__(self, model: MemoryModel, vae: VideoCodec) -> None:
        self.model, self.vae = model, vae
        self.made: list[list[MemoryTokens]] = [[] for _ in model.encoders]
        self.states: list[Any] = [None] * len(model.encoders)
        self.lows = [LowStream(vae, e.config.compression) if e.config.reads_low else None for e in model.encoders]

    def append(self, latents: torch.Tensor, frames: torch.Tensor) -> None:
        """Append the next part of the history.

        Args:
            latents: (1, C, T, H, W), scaled latents.
            frames: (1, 3, T', H', W') in [-1, 1], the video frames of these latents.
        """
        for i, encoder in enumerate(self.model.encoders):
            low = self.lows[i](frames) if self.lows[i] is not None else None
            tokens, self.states[i] = encoder.append(latents, low, self.model.dit.patch_embed, self.states[i])
            self.made[i].append(tokens)

    @property
    def tokens(self) -> MemoryTokens | None:
        """The concatenated tokens of all encoders, as from `MemoryModel.remember`; None without a history."""
        parts = [part for made in self.made for part in made]
        if not parts:
            return None
        return MemoryTokens(torch.cat([p.tokens for p in parts], 1), torch.cat([p.positions for p in parts], 1))


class LowStream:
    """Encodes the low-resolution video of a history, part by part.

    Args:
        vae: The VAE.
        compression: Compression of the memory encoder.
    """

    def __init__(self, vae: VideoCodec, compression: Compression) -> None:
        self.vae, self.compression = vae, compression
        self.cache: dict = {}
        self.seen = 0  # frames of the history
        self.begun = False
        self.held: torch.Tensor | None = None  # low-resolution frames that do not fill a latent frame yet

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents (1, C, T', h, w), T' >= 0, that the next frames (1, 3, T, H, W) complete."""
        skip = -self.seen % self.compression.time  # so that the same frames are kept as for the whole video
        self.seen += frames.shape[2]
        time, *cell = self.vae.stride
        low = pad_frames(low_resolution(frames[:, :, skip:], self.compression), (1, *(s * PATCH for s in cell)))
        low = low if self.held is None else torch.cat([self.held, low], 2)
        count = low.shape[2]
        if self.begun:
            whole = count - count % time
        else:
            first = self.vae.first_frames
            whole = count - (count - first) % time if count >= first else 0
        self.held = low[:, :, whole:].clone()
        if not whole:
            size = [n // s for n, s in zip(low.shape[3:], cell, strict=True)]
            return low.new_zeros(len(low), self.vae.channels, 0, *size)
        self.begun = True
        return self.vae.scale(self.vae.encode(low[:, :, :whole], self.cache))
