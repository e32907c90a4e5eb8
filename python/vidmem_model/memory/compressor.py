"""Compress a clip to a memory, by the method that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch

from ..checks import MOST_FPS, conform, positive, require
from ..video import Clip, load_clip
from ..video.clip import ClipSpec
from . import METHODS
from .config import CompressorConfig
from .method import EncodedClip


@dataclass(frozen=True)
class CompressedMemory:
    """What a method makes of a clip, to be written by `write_memory`.

    Attributes:
        tokens: float32 (M, C), each channel scaled to unit mean square over the rows.
        positions: float32 (M, 3), midpoints (t, h, w) in units of the patch-token grid.
        extras: tensors that reading back needs, among them `scale` (C,), which undoes the scaling.
        meta: header entries that reading back needs.
        fps: frames per second of the clip.
        source: name of the video it was made from.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    extras: dict[str, torch.Tensor]
    meta: dict[str, str]
    fps: float
    source: str


def compress(
    video: str | Path | torch.Tensor | np.ndarray | Clip | EncodedClip,
    config: CompressorConfig | None = None,
    clip: ClipSpec | None = None,
    *,
    fps: float | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> CompressedMemory:
    """Compress a video to a short context from which every frame can be read back.

    >>> from vidmem_model import ClipSpec, CompressorConfig, compress, read_memory, write_memory
    >>> memory = compress("film.mkv", CompressorConfig("merge"), ClipSpec(80, 112, fps=24, seconds=1))
    >>> memory.tokens.shape  # of 6 x 5 x 7 patch tokens
    torch.Size([3, 3072])
    >>> write_memory("memory.safetensors", memory)
    >>> opened = read_memory("memory.safetensors")
    >>> opened.frames, opened.fps, opened.source
    (24, 24.0, 'film.mkv')
    >>> opened.retrieve(23).shape
    torch.Size([80, 112, 3])

    Args:
        video: a video file; frames, a tensor or array, uint8 (T, H, W, 3) RGB; a Clip, as `video.read_clip` gives it,
            or its latents.
        config: method, compression, how rows are stored; by default dct at 4x4x2 in float16.
        clip: the part of a video file to take; by default its first 20 seconds at the size and rate that `raster`
            gives.
        fps: frames per second of a tensor or array.
        progress: called with (what is done, steps done, steps in all or None).

    Returns:
        CompressedMemory.

    Raises:
        UserError: more memory is needed than there is; the clip cannot be compressed to what `config` asks, or has
            another frame size than the trained model that is to compress it.
        MediaError: the video file is missing, damaged, or has no frame in that part.
        TypeError: `video` is none of these.
        ValueError: frames of another dtype or shape, or without `fps`; `fps` or `clip` beside what has its own.
    """
    config = config or CompressorConfig()
    method = METHODS[config.method]

    def step(name: str) -> Callable[[int, int | None], None] | None:
        return progress and (lambda *n: progress(name, *n))

    is_file = isinstance(video, (str, Path))
    is_frames = isinstance(video, (torch.Tensor, np.ndarray))
    require(clip is None or is_file, "compress: clip must be given with a video file only", clip)
    require((fps is not None) == is_frames, "compress: fps must be given with frames, and only then", fps)
    if isinstance(video, (str, Path)):
        video = load_clip(Path(video), clip or ClipSpec(*raster(config)), method.room, step("decode"))
    elif is_frames:
        video = torch.as_tensor(video)
        right = video.dtype == torch.uint8 and video.ndim == 4 and video.shape[3] == 3 and video.numel() > 0
        require(right, "compress: frames must be uint8 (T, H, W, 3)", (video.dtype, tuple(video.shape)))
        video = Clip(video, conform(Annotated[float, positive(MOST_FPS)], fps, "compress: fps"), Path(), None)
    elif not isinstance(video, (Clip, EncodedClip)):
        raise TypeError(f"compress: video must be a path, frames, a Clip or an EncodedClip, got {type(video).__name__}")
    made = method.load().compress(video, config, step(f"compress, {config.method}"))
    meta = {
        "method": config.method,
        "size": json.dumps(video.size),
        "codec": made.codec.name,
        "codec_channels": str(made.codec.channels),
        "dtype": config.dtype,
        **made.meta,
    }
    # Latents range over three decades. One mean square for all channels lets rows of 8 bits with one scale
    # keep the high frequencies, and is what a projection that reads the tokens wants anyway.
    scale = made.tokens.square().mean(0).sqrt_()
    scale[scale == 0] = 1.0
    extras = {"scale": scale, **made.extras}
    return CompressedMemory(made.tokens.div_(scale), made.positions, extras, meta, video.fps, video.source.name)


def raster(config: CompressorConfig) -> tuple[int, int, float]:
    """Height, width and frames per second that a method's clips have by default: 480x832 at 24, or its model's.

    Raises:
        UserError: the model is not there, or damaged.
    """
    if config.model_name is None:
        return ClipSpec.height, ClipSpec.width, ClipSpec.fps  # type: ignore[return-value]  # no default is None
    model = METHODS[config.method].load().open_model(config.model_name).model.config
    return model.height, model.width, model.fps
