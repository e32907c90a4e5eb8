"""Training of the small causal VAE: the clips of a step, and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..vae.base import frames_to_float
from ..vae.causal import CausalVAE
from .blocks import seeded

# Weights of the loss beside the absolute error: squared error, error of the differences between
# neighbouring pixels (for edges), and the divergence from a standard normal distribution.
_SQUARED, _EDGES, _DIVERGENCE = 2.0, 0.5, 1e-4
# One step in so many sees frames averaged to a quarter of the size: the low-resolution branch of the
# memory encoder gives the VAE such frames.
_SMALL_ONE_IN = 6
SMALL = 4


class Clips(NamedTuple):
    """What a step of the VAE sees: frames (B, 3, T, H, W) in [-1, 1], and noise for their latents."""

    frames: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> Clips:
        """Return the clips on a device."""
        return Clips(self.frames.to(device), self.noise.to(device))


class Drawn(NamedTuple):
    """Clips as they are drawn, a quarter of the bytes: uint8 frames (B, T, H, W, 3), to be shrunk or not, and noise."""

    frames: torch.Tensor
    noise: torch.Tensor
    small: bool

    def to(self, device: torch.device) -> Clips:
        """Return the clips on a device, made there."""
        frames = self.frames.to(device, non_blocking=True).permute(0, 4, 1, 2, 3)
        clips = frames.to(torch.float32).div_(127.5).sub_(1.0)
        if self.small:
            clips = F.avg_pool3d(clips, (1, SMALL, SMALL))
        return Clips(clips, self.noise.to(device, non_blocking=True))


class ClipSampler:
    """Clips of film, a function of seed, step and number of the sample.

    Args:
        blocks: uint8 (T, H, W, 3), stretches of film.
        vae: its stride and channels say the size of the noise.
        frames: length of a clip, a multiple of the VAE's time stride.
        seed: of all choices.

    Raises:
        ValueError: no block is as long as a clip, or the length is no multiple of the stride.
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
        """Return the batch of these samples of a step."""
        return self.draw(step, samples).to(torch.device("cpu"))

    def draw(self, step: int, samples: Sequence[int]) -> Drawn:
        """Return the same as it is on its way to a device."""
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
    """The VAE's loss: reconstruction through a sampled latent, and the divergence of the posterior.

    Args:
        model: what is trained.
    """

    def __init__(self, model: CausalVAE) -> None:
        super().__init__()
        self.model = model

    def parts(self) -> list[nn.Module]:
        """Modules whose weights are gathered one at a time."""
        return [*self.model.encoder, *self.model.decoder]

    def fixed(self, batch: Drawn) -> Drawn:
        """The batch itself, which is nothing but tensors."""
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

    One deviation for all channels: scaling each by its own would make the last detail count as much as
    the brightness of a block, for the diffusion's noise and for the loss.
    """
    latents = [
        vae.encode(frames_to_float(block[start : start + frames]).to(vae.device)).transpose(0, 1).flatten(1)
        for block in blocks
        for start in range(0, len(block) - frames + 1, 4 * frames)
    ]
    variance, mean = torch.var_mean(torch.cat(latents, 1), dim=1)
    vae.latent_mean.copy_(mean)
    vae.latent_std.fill_(variance.mean().sqrt())
