"""Training clips and loss of the small causal VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..vae.base import frames_to_float
from ..vae.causal import CausalVAE
from .blocks import seeded

# Weights of the loss terms besides the absolute error: squared error, error of differences between neighbouring pixels
# (edges), and KL divergence from the standard normal distribution.
_SQUARED, _EDGES, _DIVERGENCE = 2.0, 0.5, 1e-4
# One step in six uses frames averaged to a quarter of the size, like the input of the memory encoder's low-resolution
# branch.
_SMALL_ONE_IN = 6
SMALL = 4


class Clips(NamedTuple):
    """A batch of the VAE: frames (B, 3, T, H, W) in [-1, 1], and noise for their latents."""

    frames: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> Clips:
        """Return the clips on a device."""
        return Clips(self.frames.to(device), self.noise.to(device))


class Drawn(NamedTuple):
    """A batch before its transfer to the device: uint8 frames (B, T, H, W, 3), whether to shrink them, and noise."""

    frames: torch.Tensor
    noise: torch.Tensor
    small: bool

    def to(self, device: torch.device) -> Clips:
        """Convert the batch to clips on a device."""
        frames = self.frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3)
        clips = frames.to(torch.float32).div_(127.5).sub_(1.0)
        if self.small:
            clips = F.avg_pool3d(clips, (1, SMALL, SMALL))
        return Clips(clips, self.noise.to(device, non_blocking=True))


class ClipSampler:
    """Training clips, determined by seed, step and sample number.

    Args:
        blocks: uint8 (T, H, W, 3), blocks of video.
        vae: VAE whose stride and channels determine the size of the noise.
        frames: Length of a clip, a multiple of the VAE's time stride.
        seed: Random seed.

    Raises:
        ValueError: No block is as long as a clip, or the length is not a multiple of the stride.
    """

    def __init__(self, blocks: Sequence[torch.Tensor], vae: CausalVAE, frames: int = 16, seed: int = 0) -> None:
        if frames % vae.stride[0]:
            raise ValueError(f"ClipSampler: frames must be a multiple of {vae.stride[0]}, got {frames}")
        self.blocks = [block for block in blocks if len(block) >= frames]
        if not self.blocks:
            raise ValueError(f"ClipSampler: a block must have at least {frames} frames, got {len(blocks)} shorter ones")
        self.starts = torch.tensor([len(b) - frames + 1.0 for b in self.blocks])
        self.frames, self.seed = frames, seed
        self.channels, self.stride = vae.channels, vae.stride

    def __call__(self, step: int, samples: Sequence[int]) -> Clips:
        """Return the batch of these samples at a step."""
        return self.draw(step, samples).to(torch.device("cpu"))

    def draw(self, step: int, samples: Sequence[int]) -> Drawn:
        """Return the same batch before its transfer to a device."""
        small = bool(torch.randint(_SMALL_ONE_IN, (), generator=seeded(self.seed, step)) == 0)
        drawn = [self._sample(seeded(self.seed, step, number), small) for number in samples]
        frames, noise = zip(*drawn, strict=True)
        return Drawn(torch.stack(frames), torch.cat(noise), small)

    def _sample(self, generator: torch.Generator, small: bool) -> tuple[torch.Tensor, torch.Tensor]:
        block = int(torch.multinomial(self.starts, 1, generator=generator))
        start = int(torch.randint(int(self.starts[block]), (), generator=generator))
        clip = self.blocks[block][start : start + self.frames]
        if torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(2)
        shrunk = (1, SMALL, SMALL) if small else (1, 1, 1)
        size = [n // m // s for n, m, s in zip(clip.shape[:3], shrunk, self.stride, strict=True)]
        return clip, torch.randn((1, self.channels, *size), generator=generator)


class Reconstruction(nn.Module):
    """The loss of the VAE: reconstruction from a sampled latent, and KL divergence of the posterior.

    Args:
        model: VAE to train.
    """

    def __init__(self, model: CausalVAE) -> None:
        super().__init__()
        self.model = model

    def parts(self) -> list[nn.Module]:
        """Modules whose weights FSDP gathers one at a time."""
        return [*self.model.encoder, *self.model.decoder]

    def fixed(self, batch: Drawn) -> Drawn:
        """Return the batch, which consists of tensors only."""
        return batch

    def forward(self, clips: Clips) -> torch.Tensor:
        """Loss of a batch, a float32 scalar."""
        mean, log_variance = self.model.posterior(clips.frames)
        sample = mean + clips.noise * (0.5 * log_variance).exp()
        error = self.model.decode(sample).float() - clips.frames
        edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
        return error.abs().mean() + _SQUARED * error.square().mean() + _EDGES * edges + _DIVERGENCE * divergence


@torch.no_grad()
def measure_latents(vae: CausalVAE, blocks: Sequence[torch.Tensor], frames: int = 16) -> None:
    """Set latent_mean and latent_std from the latents of `blocks` (uint8 (T, H, W, 3) each).

    All channels share one standard deviation: with one per channel, the finest details would weigh as much as the
    brightness of a block in the noise and in the loss.
    """
    latents = [
        vae.encode(frames_to_float(block[start : start + frames]).to(vae.device)).transpose(0, 1).flatten(1)
        for block in blocks
        for start in range(0, len(block) - frames + 1, 4 * frames)
    ]
    variance, mean = torch.var_mean(torch.cat(latents, 1), dim=1)
    vae.latent_mean.copy_(mean)
    vae.latent_std.fill_(variance.mean().sqrt())
