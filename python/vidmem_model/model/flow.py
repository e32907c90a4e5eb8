"""Flow matching: straight paths from samples to noise, the loss on their velocity, and the Euler sampler."""

from __future__ import annotations

from collections.abc import Callable

import torch


def logit_normal(
    shape: tuple[int, ...] | torch.Size,
    mean: float = 0.0,
    std: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draw from the logit-normal distribution: the sigmoid of normal numbers.

    Args:
        shape: Shape of the result.
        mean: Mean of the normal numbers.
        std: Standard deviation of the normal numbers.
        generator: Random generator; the result is on its device.

    Returns:
        float32 in (0, 1).
    """
    device = generator.device if generator is not None else None
    return torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean).sigmoid_()


def shift_timesteps(t: torch.Tensor, shift: float) -> torch.Tensor:
    """Shift timesteps towards the noise: shift * t / (1 + (shift - 1) * t); 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


def interpolate(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Interpolate between a sample and noise at timestep t.

    Args:
        x0: (B, C, K, H, W), samples.
        noise: (B, C, K, H, W).
        t: (B,) in [0, 1], or (B, K), one timestep per frame.

    Returns:
        float32 (1 - t) * x0 + t * noise.
    """
    t = over_frames(t)
    return (1 - t) * x0.to(torch.float32) + t * noise.to(torch.float32)


def over_frames(t: torch.Tensor) -> torch.Tensor:
    """Reshape timesteps (B,) or (B, K) to float32 (B, 1, 1 or K, 1, 1), to broadcast with (B, C, K, H, W)."""
    return t.to(torch.float32).view(t.shape[0], 1, -1, 1, 1)


def velocity_loss(velocity: torch.Tensor, x0: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Mean squared error of a velocity against noise - x0, in float32.

    Args:
        velocity: (B, C, K, H, W), predicted velocity.
        x0: (B, C, K, H, W), samples.
        noise: (B, C, K, H, W).

    Returns:
        float32 (B,), the mean over all dimensions but the batch.
    """
    target = noise.to(torch.float32) - x0.to(torch.float32)
    return (velocity.to(torch.float32) - target).square().flatten(1).mean(1)


def sample(
    velocity: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor,
    steps: int,
    shift: float = 1.0,
) -> torch.Tensor:
    """Integrate a velocity from noise (t = 1) to a sample (t = 0) by Euler steps.

    Args:
        velocity: Function of x (B, ...) and t (B,).
        noise: (B, ...), the start.
        steps: Number of denoising steps.
        shift: Timestep shift, see `shift_timesteps`.

    Returns:
        float32, of the shape of `noise`.

    Raises:
        ValueError: `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"sample: steps must be positive, got {steps}")
    times = shift_timesteps(torch.linspace(1, 0, steps + 1), shift).tolist()
    x = noise.to(torch.float32)
    for now, following in zip(times[:-1], times[1:], strict=True):
        t = torch.full((len(x),), now, device=x.device)
        x = x + (following - now) * velocity(x, t).to(torch.float32)
    return x
