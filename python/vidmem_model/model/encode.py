"""Encode video frames to the latents that a model reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..model.encoder import low_resolution
from ..vae import PATCH, VideoCodec, frames_to_float, pad_frames
from .config import Compression


@torch.no_grad()
def encode_block(frames: torch.Tensor, vae: VideoCodec, compression: Compression | None = None) -> torch.Tensor:
    """Encode consecutive frames as one stream, or their low-resolution video.

    Args:
        frames: uint8 (T, H, W, 3), a whole number of latent frames.
        vae: The VAE.
        compression: Compression of the memory encoder whose low-resolution video is encoded; None to encode the
            frames themselves.

    Returns:
        float16 (C, T', H', W'), scaled latents. With a compression, T' is the number of boxes that the latent frames
        of `frames` fill.

    Raises:
        ValueError: The frames do not fill a box.
    """
    if compression is None:
        pieces = (frames_to_float(piece) for piece in _pieces(frames, vae))
        return _stream(pieces, vae)
    boxes = filled_latents(len(frames), vae) // compression.time
    if not boxes:
        raise ValueError(f"encode_block: frames must fill a box of {compression}, got {len(frames)}")
    # Pieces start at multiples of compression.time, so that the same frames are kept as in a single call.
    small = [low_resolution(frames_to_float(p), compression)[0] for p in frames.split(8 * compression.time)]
    low = torch.cat(small, dim=1).transpose(0, 1)
    pieces = (piece.transpose(0, 1)[None] for piece in _pieces(low[: filled_frames(len(low), vae)], vae))
    return _stream(pieces, vae)[:, :boxes]


def _stream(pieces: Iterable[torch.Tensor], vae: VideoCodec) -> torch.Tensor:
    cache: dict = {}
    _, h, w = vae.stride
    latents = [_scaled(pad_frames(x, (1, h * PATCH, w * PATCH)), vae, cache) for x in pieces]
    return torch.cat(latents, dim=2)[0].contiguous()


def _scaled(frames: torch.Tensor, vae: VideoCodec, cache: dict) -> torch.Tensor:
    return vae.scale(vae.encode(frames.to(vae.device), cache)).to("cpu", torch.float16)


def _pieces(frames: torch.Tensor, vae: VideoCodec) -> tuple[torch.Tensor, ...]:
    """Cut frames (T, ...) into pieces, which are encoded one by one in bounded memory."""
    first = min(len(frames), vae.first_frames + vae.stride[0])
    return frames[:first], *(piece for piece in frames[first:].split(2 * vae.stride[0]) if len(piece))


def filled_latents(frames: int, vae: VideoCodec) -> int:
    """Number of latent frames that `frames` video frames fill."""
    return max(0, 1 + (frames - vae.first_frames) // vae.stride[0])


def filled_frames(frames: int, vae: VideoCodec) -> int:
    """Number of video frames in whole latent frames, of `frames`."""
    latent = filled_latents(frames, vae)
    return vae.first_frames + (latent - 1) * vae.stride[0] if latent else 0
