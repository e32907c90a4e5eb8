"""The interface of VAEs and codecs, and how frames are padded and streamed.

Padding, for every codec and method: the last frame, row and column are replicated up to the next required multiple, and
the true size is stored. If the first latent frame covers one frame and the others four (Wan, HunyuanVideo), frames are
padded to 1 + 4k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .patchify import PATCH


def pad_frames(frames: torch.Tensor, multiple: tuple[int, int, int], first: int = 0) -> torch.Tensor:
    """Pad (B, C, T, H, W) at the end by replication until T, H, W are multiples of `multiple`.

    With `first`, T becomes `first` plus a multiple, as for a codec whose first latent frame covers one frame and the
    others four.
    """
    short = [-(n - f) % m for n, m, f in zip(frames.shape[2:], multiple, (first, 0, 0), strict=True)]
    if not any(short):
        return frames
    t, h, w = short
    return F.pad(frames, (0, w, 0, h, 0, t), mode="replicate")


def rechunk(chunks: Iterable[torch.Tensor], length: int, dim: int, first: int | None = None) -> Iterator[torch.Tensor]:
    """Regroup chunks of any lengths along `dim` into chunks of `length`; the last may be shorter.

    `first` is the length of the first chunk, if it differs.
    """
    held: list[torch.Tensor] = []
    have = 0
    want = length if first is None else first
    for chunk in chunks:
        held.append(chunk)
        have += chunk.shape[dim]
        if have >= want:
            joined = torch.cat(held, dim) if len(held) > 1 else chunk
            sizes = [want] + [length] * ((have - want) // length)
            full = sum(sizes)
            yield from joined.narrow(dim, 0, full).split(sizes, dim)
            held = [joined.narrow(dim, full, have - full)] if have > full else []
            have -= full
            want = length
    if have:
        yield torch.cat(held, dim)


def frames_to_float(frames: torch.Tensor) -> torch.Tensor:
    """uint8 (T, H, W, 3) -> float32 (1, 3, T, H, W) in [-1, 1]."""
    return frames.permute(3, 0, 1, 2)[None].to(torch.float32).div_(127.5).sub_(1.0)


def frames_to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """float (1, 3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3); values outside are clamped."""
    scaled = frames[0].permute(1, 2, 3, 0).add(1.0).mul_(127.5)
    return scaled.round_().clamp_(0, 255).to(torch.uint8)


class VideoCodec(ABC):
    """Interface of VAEs and codecs: encodes frames to latents and decodes them.

    To encode or decode a stream piece by piece, pass the same `cache` to every call: a dict that is empty at first (one
    for encoding, another for decoding). The first piece has `video_frames(k)` frames, each later one a multiple of the
    time stride. Without a cache every call is a separate stream.

    Attributes:
        name: Name of the codec in memory files.
        channels: Latent channels.
        stride: Frames, rows and columns per latent cell.
        first_frames: Frames in the first latent frame of a stream; the others have stride[0].
        chunk: Latent frames that `encode_chunks` makes at a time.
    """

    name: str
    channels: int
    stride: tuple[int, int, int] = (4, 8, 8)
    first_frames: int = 4
    chunk: int = 2

    @abstractmethod
    def encode(self, frames: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1], whole latent frames, rows and columns -> latents (B, C, T', H', W')."""

    @abstractmethod
    def decode(self, latents: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Latents (B, C, T', H', W') -> frames (B, 3, T, H, W)."""

    @property
    def device(self) -> torch.device:
        """Device of the codec; frames and latents must be on it."""
        parameters = self.parameters() if isinstance(self, nn.Module) else ()
        return next((p.device for p in parameters), torch.device("cpu"))

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale raw latents (B, C, T, H, W) to about unit variance, as a model reads and generates them."""
        return latents

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `scale`."""
        return latents

    def latent_frames(self, video_frames: int) -> int:
        """Number of latent frames of `video_frames` video frames; the last one is padded."""
        if video_frames <= 0:
            return 0
        return 1 + max(0, -(-(video_frames - self.first_frames) // self.stride[0]))

    def video_frames(self, latent_frames: int) -> int:
        """Number of video frames in the first `latent_frames` latent frames of a stream."""
        return self.first_frames + (latent_frames - 1) * self.stride[0] if latent_frames > 0 else 0

    def encode_chunks(
        self, frames: Iterable[torch.Tensor | np.ndarray], dtype: torch.dtype = torch.float32
    ) -> Iterator[torch.Tensor]:
        """Encode a stream of frames in bounded memory.

        Args:
            frames: uint8 arrays (t, H, W, 3) of any lengths.
            dtype: Dtype of the latents.

        Returns:
            Iterator over raw latents (1, C, t', H', W'), t' <= chunk; rows and columns are padded to whole patches, the
            last frames to a whole latent frame.
        """
        t, h, w = self.stride
        cache: dict = {}
        first = self.video_frames(self.chunk)
        pieces = rechunk((torch.as_tensor(f) for f in frames), self.chunk * t, 0, first)
        for i, piece in enumerate(pieces):
            padded = pad_frames(frames_to_float(piece), (t, h * PATCH, w * PATCH), 0 if i else self.first_frames)
            yield self.encode(padded.to(self.device), cache).to(dtype)

    def decode_chunks(self, latents: Iterable[torch.Tensor], size: tuple[int, int, int]) -> Iterator[torch.Tensor]:
        """Decode a stream of latents, cropped to the true size.

        Args:
            latents: Raw chunks (1, C, t', H', W') from the start of the stream.
            size: Frames, rows and columns of the clip, before padding.

        Returns:
            Iterator over float32 frames (1, 3, t, H, W).
        """
        left, height, width = size
        cache: dict = {}
        for chunk in latents:
            frames = self.decode(chunk, cache)[:, :, :left, :height, :width]
            left -= frames.shape[2]
            if frames.shape[2]:
                yield frames
