"""Position embeddings of tokens: rotary embedding (RoPE) over (time, height, width), and absolute position features.

A position is (t, h, w) in patch tokens, t in latent frames. It may be fractional: that of a memory token is the centre
of its box of patch tokens.
"""

from __future__ import annotations

import math

import torch

THETA = 10000.0
_EPSILON = 1e-6
# Periods of the absolute features, in tokens. 2, 4 and 8 distinguish tokens and frames inside a box, longer ones boxes.
PERIODS = tuple(2.0**i for i in range(1, 10))
FEATURES = 3 * 2 * len(PERIODS)


def frame_positions(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions of the patch tokens of frames.

    Args:
        frames: (B, K), positions in time, in latent frames.
        height: Rows of patch tokens in a frame.
        width: Columns of patch tokens in a frame.

    Returns:
        float32 (B, K * height * width, 3), in the token order of `patchify`.
    """
    b, k = frames.shape
    rows = torch.arange(height, device=frames.device, dtype=torch.float32)
    columns = torch.arange(width, device=frames.device, dtype=torch.float32)
    grid = torch.broadcast_tensors(
        frames.to(torch.float32).view(b, k, 1, 1), rows.view(1, 1, -1, 1), columns.view(1, 1, 1, -1)
    )
    return torch.stack(grid, -1).flatten(1, 3)


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Split the channels of a head over (t, h, w): about a third each, all even, the rest to t."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotary(
    positions: torch.Tensor, head_dim: int, axes: tuple[int, int, int] | None = None, theta: float = THETA
) -> torch.Tensor:
    """Rotation of each pair of channels at each position.

    Args:
        positions: float (B or 1, N, 3), (t, h, w).
        head_dim: Channels per head, even.
        axes: Channels that rotate with t, h and w; by default `axis_sizes`, as in Wan.
        theta: Base of the frequencies: the longest period divided by 2 pi.

    Returns:
        complex64 (B or 1, N, head_dim / 2), of modulus 1.
    """
    angles = []
    for axis, size in enumerate(axes or axis_sizes(head_dim)):
        exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles.append(positions[..., axis, None].to(torch.float32) * theta**-exponent)
    angle = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angle), angle)


class _NormRotate(torch.autograd.Function):
    """RMS norm, scale and rotation as one autograd function with few passes over memory.

    As separate ops they took half of a training step of a small model on a CPU: ten passes forward and twenty backward,
    each of which reads and writes all queries and keys.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, scale: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
        wide = _wide(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1]
        inverse = torch.rsqrt(mean_square + _EPSILON)
        y = (wide * inverse).contiguous().mul_(scale)
        ctx.save_for_backward(x, scale, inverse, rotation)
        return _turn(y, rotation).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, scale, inverse, rotation = ctx.saved_tensors
        back = None if rotation is None else rotation.conj().resolve_conj()
        grad = _turn(torch.empty_like(x, dtype=inverse.dtype, memory_format=torch.contiguous_format).copy_(grad), back)
        normed = _wide(x) * inverse
        grad_scale = (grad * normed).flatten(0, 1).sum(0).sum_to_size(scale.shape)
        grad = grad.mul_(scale)
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), grad_scale.to(scale.dtype), None


def norm_rotate(x: torch.Tensor, scale: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
    """RMS-normalise the channels of every head, scale them, and rotate them.

    Args:
        x: (B, N, ..., head_dim).
        scale: Broadcast to the dimensions of x after the first two.
        rotation: Result of `rotary`, or None for no rotation.

    Returns:
        Tensor of the shape and dtype of x, computed in float32 (float64 for float64).
    """
    return _NormRotate.apply(x, scale, rotation)


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _turn(x: torch.Tensor, rotation: torch.Tensor | None) -> torch.Tensor:
    """Rotate pairs of neighbouring channels of contiguous x in place."""
    if rotation is None:
        return x
    # On a CPU one complex product takes a third of the time of sines and cosines.
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    pairs.mul_(rotation.view(*rotation.shape[:2], *(1,) * (x.ndim - 3), -1))
    return x


def position_features(positions: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of absolute positions at periods of 2 to 512 tokens.

    Args:
        positions: float (B or 1, N, 3), (t, h, w).

    Returns:
        float32 (B or 1, N, FEATURES).
    """
    # Created on the device, because a copy to it cannot be captured in a CUDA graph.
    periods = 1 << torch.arange(1, 1 + len(PERIODS), device=positions.device)
    angle = positions[..., None].to(torch.float32) * (2 * math.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
