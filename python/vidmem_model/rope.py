"""Positions of tokens: rotary embedding over (time, height, width), and features of the absolute position.

A position is (t, h, w) in units of the patch-token grid, t in latent frames, and may be fractional: a
memory token stands at the midpoint of the box of patch tokens it covers.
"""

from __future__ import annotations

import math

import torch

THETA = 10000.0
# Periods of the absolute features, in tokens. 2, 4 and 8 tell apart the tokens and frames inside one
# box of memory, the long ones the boxes.
PERIODS = tuple(2.0**i for i in range(1, 10))
FEATURES = 3 * 2 * len(PERIODS)


def frame_positions(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Positions of the patch tokens of some frames.

    Args:
        frames: (B, K) positions in time, in latent frames.
        height, width: rows and columns of patch tokens in a frame.

    Returns:
        float32 (B, K * height * width, 3), ordered as patchify orders tokens.
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


def rotary(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rotation of each pair of channels at each position.

    Args:
        positions: float (B or 1, N, 3), (t, h, w).
        head_dim: channels of a head, even.

    Returns:
        complex64 (B or 1, N, head_dim / 2), of modulus 1.
    """
    angles = []
    for axis, size in enumerate(axis_sizes(head_dim)):
        exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
        angles.append(positions[..., axis, None].to(torch.float32) * THETA**-exponent)
    angle = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate pairs of neighbouring channels, so that products of two tokens depend on the offset only.

    Args:
        x: (B, N, ..., head_dim).
        rotation: from `rotary`, (B or 1, N, head_dim / 2).

    Returns:
        Like x, of its dtype; computed in float32.
    """
    # One complex product is a third of the time of the same in sines and cosines on a CPU.
    pairs = torch.view_as_complex(x.to(torch.float32).unflatten(-1, (-1, 2)))
    rotation = rotation.view(*rotation.shape[:2], *(1,) * (x.ndim - 3), -1)
    return torch.view_as_real(pairs * rotation).flatten(-2).to(x.dtype)


def position_features(positions: torch.Tensor) -> torch.Tensor:
    """Sines and cosines of absolute positions at periods of 2 to 512 tokens.

    Args:
        positions: float (B or 1, N, 3), (t, h, w).

    Returns:
        float32 (B or 1, N, FEATURES).
    """
    periods = torch.tensor(PERIODS, device=positions.device)
    angle = positions[..., None].to(torch.float32) * (2 * math.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)
