"""Training of the small causal VAE: which blocks of film a step sees, and its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .base import frames_to_float
from .causal import CausalVAE

# Weights of the loss beside the absolute error: squared error, error of the differences between
# neighbouring pixels (for edges), and the divergence from a standard normal distribution.
_SQUARED, _EDGES, _DIVERGENCE = 2.0, 0.5, 1e-4
# One clip in so many is averaged to a quarter of the size: the low-resolution branch of the memory
# encoder gives the VAE such frames.
_SMALL_ONE_IN = 6


@dataclass(frozen=True)
class VAEBatches:
    """Clips of a VAE's training steps, a function of seed and step only.

    Args:
        blocks: uint8 (T, H, W, 3), stretches of film.
        frames: length of a clip, a multiple of the VAE's time stride.
        batch: clips a step.
        seed: of the choice.
    """

    blocks: tuple[torch.Tensor, ...]
    frames: int = 16
    batch: int = 4
    seed: int = 0

    def __call__(self, step: int) -> torch.Tensor:
        """Return the clips of a step, (batch, 3, frames, H, W) in [-1, 1]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        starts = [len(block) - self.frames + 1 for block in self.blocks]
        usable = torch.tensor([max(0, n) for n in starts], dtype=torch.float64)
        chosen = torch.multinomial(usable, self.batch, replacement=True, generator=generator)
        clips = []
        for index in chosen.tolist():
            start = int(torch.randint(starts[index], (), generator=generator))
            clips.append(frames_to_float(self.blocks[index][start : start + self.frames]))
        clip = torch.cat(clips)
        if torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        if torch.randint(_SMALL_ONE_IN, (), generator=generator) == 0:
            clip = F.avg_pool3d(clip, (1, 4, 4))
        return clip


def vae_loss(vae: CausalVAE, clip: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Loss of one step: reconstruction through a sampled latent, and the divergence of the posterior.

    Args:
        vae: the VAE.
        clip: frames (B, 3, T, H, W) in [-1, 1].
        generator: of the latent's noise.

    Returns:
        Scalar, float32.
    """
    mean, log_variance = vae.posterior(clip)
    noise = torch.randn(mean.shape, generator=generator)
    error = vae.decode(mean + noise * (0.5 * log_variance).exp()).float() - clip
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).mean()
    return error.abs().mean() + _SQUARED * error.square().mean() + _EDGES * edges + _DIVERGENCE * divergence


@torch.no_grad()
def measure_latents(vae: CausalVAE, blocks: tuple[torch.Tensor, ...], frames: int = 16) -> None:
    """Set latent_mean and latent_std from the latents of `blocks` (uint8 (T, H, W, 3) each).

    One deviation for all channels: scaling each by its own would make the last detail count as much as
    the brightness of a block, for the diffusion's noise and for the loss.
    """
    latents = [
        vae.encode(frames_to_float(block[start : start + frames])).transpose(0, 1).flatten(1)
        for block in blocks
        for start in range(0, len(block) - frames + 1, 4 * frames)
    ]
    variance, mean = torch.var_mean(torch.cat(latents, 1), dim=1)
    vae.latent_mean.copy_(mean)
    vae.latent_std.fill_(variance.mean().sqrt())
