"""Compress a video to a memory with one of the methods."""

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
    """A compressed clip in memory; `write_memory` stores it.

    Attributes:
        tokens: float32 (M, C), memory tokens; each channel is scaled to a mean square of 1.
        positions: float32 (M, 3), centre (t, h, w) of each token, in patch tokens.
        extras: Tensors that reading frames back needs, among them `scale` (C,), which undoes the scaling.
        meta: Header entries that reading frames back needs.
        fps: Frames per second of the clip.
        source: Name of the video file.
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
        video: Path of a video file; frames as a uint8 (T, H, W, 3) tensor or array, RGB; a Clip from
            `video.read_clip`; or an EncodedClip, its latents.
        config: Method, compression and storage format; by default dct at 4x4x2 (height x width x time) in float16.
        clip: Part, frame size and frame rate to take of a video file; by default the first 20 seconds, at 480x832
            pixels (height x width) and 24 frames per second or, for learned, at the size and rate of its model.
        fps: Frames per second of frames given as a tensor or array; required for these, and not allowed for others.
        progress: Called with (stage name, steps done, steps in total or None).

    Returns:
        The compressed clip, ready for `write_memory`.

    Raises:
        UserError: There is not enough memory, the clip cannot be compressed as `config` asks, or its frame size is
            not that of the trained model.
        MediaError: The video file is missing or damaged, or has no frame in the requested part.
        TypeError: `video` is of none of these types.
        ValueError: The frames have a wrong dtype or shape, or `fps` or `clip` is missing or not allowed.
    """
    config = config or CompressorConfig()
    method = METHODS[config.method]

    def step(name: str) -> Callable[[int, int | None], None] | None:
        return progress and (lambda *n: progress(name, *n))

    is_file = isinstance(video, (str, Path))
    is_frames = isinstance(video, (torch.Tensor, np.ndarray))
    require(clip is None or is_file, "compress: clip is allowed for a video file only", clip)
    require((fps is not None) == is_frames, "compress: fps is required for frames and not allowed for others", fps)
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
    # Channels of latents differ in size by a factor of a thousand. Scaling all to one mean square keeps the high
    # frequencies in 8-bit tokens with one scale per token, and suits a projection that reads the tokens.
    scale = made.tokens.square().mean(0).sqrt_()
    scale[scale == 0] = 1.0
    extras = {"scale": scale, **made.extras}
    return CompressedMemory(made.tokens.div_(scale), made.positions, extras, meta, video.fps, video.source.name)


def raster(config: CompressorConfig) -> tuple[int, int, float]:
    """Default frame height, frame width (pixels) and frame rate of a method: 480, 832, 24, or those of its model.

    Raises:
        UserError: The model is missing or damaged.
    """
    if config.model_name is None:
        return ClipSpec.height, ClipSpec.width, ClipSpec.fps  # type: ignore[return-value]  # no default is None
    model = METHODS[config.method].load().open_model(config.model_name).model.config
    return model.height, model.width, model.fps
