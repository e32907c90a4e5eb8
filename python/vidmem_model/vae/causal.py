"""A small causal 3D VAE whose layers all run on the latent grid.

One linear map reads, and another writes, a block of 4 frames x 8 x 8 pixels; causal convolutions over the grid of
blocks are in between. A linear path in parallel is initialised to the principal components of the blocks
(`CausalVAE.start_from`), so that training starts from the quality of a linear codec.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from .base import VideoCodec
from .causal_layers import CausalConv3d, ChannelNorm
from .config import VAEConfig


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(norm(x))))), the first convolution over time and space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(width)
        self.first = CausalConv3d(width, width, (3, 3, 3))
        self.second = CausalConv3d(width, width, (1, 3, 3))
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor, cache: dict | None) -> torch.Tensor:
        """Map (B, width, T, H, W) to the same shape; the cache holds the state of a stream."""
        h, kept = self.first(F.silu(self.norm(x)), None if cache is None else cache.get(self))
        if cache is not None:
            cache[self] = kept.detach()
        return x + self.second(F.silu(h), None)[0]


class CausalVAE(nn.Module, VideoCodec):
    """The small causal 3D VAE.

    Args:
        config: Channels, stride, width and depth.

    Attributes:
        latent_mean: (channels,), mean of the latents of the training video.
        latent_std: (channels,), their standard deviation.
    """

    name = "causal"

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = config.channels
        self.stride = config.stride
        self.first_frames = config.stride[0]
        block = 3 * math.prod(config.stride)
        self.to_latent = nn.Linear(block, config.channels)
        self.from_latent = nn.Linear(config.channels, block)
        self.encoder_in = nn.Linear(block, config.width)
        self.encoder = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.encoder_norm = ChannelNorm(config.width)
        self.encoder_out = nn.Linear(config.width, 2 * config.channels)
        self.decoder_in = nn.Linear(config.channels, config.width)
        self.decoder = nn.ModuleList(ResidualBlock(config.width) for _ in range(config.depth))
        self.decoder_norm = ChannelNorm(config.width)
        self.decoder_out = nn.Linear(config.width, block)
        for last in (self.encoder_out, self.decoder_out):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        with torch.no_grad():  # log variance of the posterior: little noise at first
            self.encoder_out.bias[config.channels :] = -6.0
        self.register_buffer("latent_mean", torch.zeros(config.channels))
        self.register_buffer("latent_std", torch.ones(config.channels))

    @torch.no_grad()
    def start_from(self, frames: torch.Tensor) -> None:
        """Set the linear path to the principal components of the blocks of `frames` (N, 3, T, H, W)."""
        blocks = self._blocks(frames).flatten(0, -2).double()
        mean = blocks.mean(0)
        centred = blocks - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        basis = vectors.flip(1)[:, : self.channels]
        spread = (centred @ basis).std(0).clamp_min(1e-6).sqrt()
        self.to_latent.weight.copy_((basis / spread).T)
        self.to_latent.bias.copy_(-(mean @ basis) / spread)
        self.from_latent.weight.copy_(basis * spread)
        self.from_latent.bias.copy_(mean)

    def posterior(self, frames: torch.Tensor, cache: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log variance of the latents of frames (B, 3, T, H, W)."""
        blocks = self._blocks(frames)
        h = _channels_first(self.encoder_in(blocks))
        for layer in self.encoder:
            h = layer(h, cache)
        out = self.encoder_out(_channels_last(F.silu(self.encoder_norm(h))))
        mean, log_variance = out.float().chunk(2, dim=-1)
        mean = mean + self.to_latent(blocks).float()
        return _channels_first(mean), _channels_first(log_variance.clamp(-20.0, 4.0))

    def encode(self, frames: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Frames (B, 3, T, H, W) in [-1, 1] -> the posterior's mean (B, C, T/4, H/8, W/8), float32.

        Args:
            frames: Frames of whole blocks along every axis.
            cache: State of a stream: pass the same dict to every call, empty at first.

        Raises:
            ValueError: The frames do not have 3 colours or are not whole blocks.
        """
        if (
            frames.ndim != 5
            or frames.shape[1] != 3
            or any(n % s for n, s in zip(frames.shape[2:], self.stride, strict=True))
        ):
            raise ValueError(
                "CausalVAE.encode: frames must be (B, 3, T, H, W) in whole blocks of "
                f"{self.stride}, got {tuple(frames.shape)}"
            )
        return self.posterior(frames, cache)[0]

    def decode(self, latents: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Latents (B, C, T', H', W') -> float32 frames (B, 3, 4T', 8H', 8W').

        Args:
            latents: Raw latents, from `encode`.
            cache: As for `encode`, but another dict.

        Raises:
            ValueError: The latents do not have the VAE's channels.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"CausalVAE.decode: latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}"
            )
        cells = _channels_last(latents)
        h = _channels_first(self.decoder_in(cells))
        for layer in self.decoder:
            h = layer(h, cache)
        blocks = self.decoder_out(_channels_last(F.silu(self.decoder_norm(h)))).float()
        return self._frames(blocks + self.from_latent(cells).float())

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale raw latents (B, C, T, H, W) to zero mean and, over all channels, unit variance."""
        return (latents - _column(self.latent_mean)) / _column(self.latent_std)

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `scale`."""
        return latents * _column(self.latent_std) + _column(self.latent_mean)

    def _blocks(self, frames: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) -> (B, T', H', W', 3 * block)."""
        t, h, w = self.stride
        b, c, *size = frames.shape
        grid = [n // s for n, s in zip(size, self.stride, strict=True)]
        cut = frames.reshape(b, c, grid[0], t, grid[1], h, grid[2], w)
        return cut.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, *grid, -1)

    def _frames(self, blocks: torch.Tensor) -> torch.Tensor:
        """Inverse of `_blocks`."""
        t, h, w = self.stride
        b, *grid, _ = blocks.shape
        cut = blocks.view(b, *grid, 3, t, h, w).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return cut.reshape(b, 3, *(g * s for g, s in zip(grid, self.stride, strict=True)))


def _column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def _channels_first(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 4, 1, 2, 3)


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 4, 1)
