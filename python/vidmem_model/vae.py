"""Video codecs behind one interface, the embedded DCT codec, and the 2x2 patchify."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import torch

from .config import CodecConfig


class VideoCodec(ABC):
    channels: int
    stride: tuple[int, int, int] = (4, 8, 8)

    @abstractmethod
    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """frames (B, 3, T, H, W) in [-1, 1] -> latents (B, C, T', H', W')."""

    @abstractmethod
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents (B, C, T', H', W') -> frames (B, 3, T, H, W)."""

    def encode_chunks(
        self, frames: Iterable[torch.Tensor], dtype: torch.dtype = torch.float32
    ) -> Iterator[torch.Tensor]:
        """uint8 chunks (t, H, W, 3) of any lengths -> latents (1, C, t', H', W'), padded."""
        raise NotImplementedError

    def decode_chunks(
        self, latents: Iterable[torch.Tensor], size: tuple[int, int, int]
    ) -> Iterator[torch.Tensor]:
        """latent chunks -> float frames (1, 3, t, H, W), cropped to the true size (T, H, W)."""
        raise NotImplementedError


class DCTCodec(VideoCodec):
    def __init__(self, config: CodecConfig | None = None) -> None:
        raise NotImplementedError


def patchify(latents: torch.Tensor, patch: int = 2) -> tuple[torch.Tensor, tuple[int, int, int]]:
    raise NotImplementedError


def unpatchify(tokens: torch.Tensor, grid: tuple[int, int, int], patch: int = 2) -> torch.Tensor:
    raise NotImplementedError
