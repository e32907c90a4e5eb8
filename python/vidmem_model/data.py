"""Video in: the sample clip, probing, and streaming decode to a constant rate and size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .config import ClipSpec


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself: display size in pixels, frames per second, seconds."""

    width: int
    height: int
    fps: float
    frames: int
    duration: float


@dataclass(frozen=True)
class Clip:
    """Decoded frames: uint8 (T, H, W, 3) RGB at a constant rate.

    `asked` is the number of frames the spec asked for (None: all there are); `short` says that the
    video held fewer.
    """

    frames: torch.Tensor
    fps: float
    source: Path
    asked: int | None

    @property
    def short(self) -> bool:
        return self.asked is not None and len(self.frames) < self.asked


def cache_dir() -> Path:
    raise NotImplementedError


def fetch_sample_clip(progress: bool = True) -> Path:
    raise NotImplementedError


def probe(path: str | Path) -> VideoInfo:
    raise NotImplementedError


def iter_frames(path: str | Path, spec: ClipSpec, chunk: int = 16) -> Iterator[np.ndarray]:
    raise NotImplementedError


def read_clip(
    path: str | Path, spec: ClipSpec, progress: Callable[[int, int | None], None] | None = None
) -> Clip:
    raise NotImplementedError
