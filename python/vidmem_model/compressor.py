"""Two training-free compressors of a clip's patch tokens behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from vidmem_kernels import MemoryBank

from .config import CompressorConfig
from .vae import VideoCodec


@dataclass(frozen=True)
class CompressedMemory:
    """tokens (M, C), positions (M, 3) box midpoints (t, h, w) in patch-grid units, extras, meta."""

    tokens: torch.Tensor
    positions: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


def compress(
    latents: Iterable[torch.Tensor],
    codec: VideoCodec,
    size: tuple[int, int, int],
    config: CompressorConfig,
    progress: Callable[[int, int], None] | None = None,
) -> CompressedMemory:
    """latents: chunks (1, C, t', H', W') from codec.encode_chunks; size: true (T, H, W)."""
    raise NotImplementedError


def reconstruct(bank: MemoryBank, frame_index: int) -> torch.Tensor:
    """uint8 (H, W, 3) from a loaded bank, reading only the rows it needs."""
    raise NotImplementedError
