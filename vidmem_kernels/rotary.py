"""Rotary position embedding over several axes (time, row, column), as in Wan and HunyuanVideo.

Plain PyTorch: torch.compile fuses it into one pass over memory, and autograd provides every derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES, check_finite, check_int, check_same, check_tensor
from ._numerics import accumulate_dtype
from ._symbolic import saveable

__all__ = ["Rotary", "apply_rotary", "rotary"]

_POSITION_DTYPES = (*FLOAT_DTYPES, torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


@saveable
class Rotary(NamedTuple):
    """The rotation of each pair of neighbouring channels at each position.

    Attributes:
        cos: (N, D / 2) or (B, N, D / 2) float32, the cosine of the angle of channels 2i and 2i + 1. The tables of
            diffusers have each column twice: `cos.repeat_interleave(2, -1)`.
        sin: the sine, of the same shape.
    """

    cos: Tensor
    sin: Tensor


def rotary(positions: Tensor, axes: Sequence[int], theta: float = 10000.0) -> Rotary:
    """Computes the rotary embedding of tokens with a position along several axes.

    An axis with d channels rotates its pair i by position * theta ** (-2i / d). The channels of the axes are
    concatenated in a head. No table limits the positions: they may be negative, fractional or arbitrarily large.

    Args:
        positions: (N, A), or (B, N, A) with batch B or 1; float or integer. One column per axis, such as time, row and
            column, in the units of the model (in Wan and HunyuanVideo: patches; time in latent frames).
        axes: channels of a head for each of the A axes, all even. Wan has (D - 2 * h, h, h) with h = 2 * (D // 6);
            HunyuanVideo has (16, 56, 56).
        theta: base of the geometric series of the angles; 10000 in Wan, 256 in HunyuanVideo.

    Returns:
        Rotary(cos, sin) with D = sum(axes) channels, on the device of `positions`. Angles are computed in float64,
        their cosines and sines are rounded to float32. Differentiable in float `positions`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or value.

    Equivalent PyTorch:
        angle = cat([positions[..., a, None].double() / theta ** (arange(0, d, 2) / d) for a, d in enumerate(axes)], -1)
        Rotary(angle.cos().float(), angle.sin().float())

    Source: RoFormer, Su et al., 2021 (arXiv 2104.09864); over three axes as in Wan (arXiv 2503.20314) and HunyuanVideo
    (arXiv 2412.03603).
    """
    op = "rotary"
    batched = isinstance(positions, Tensor) and positions.dim() == 3
    check_tensor(op, "positions", positions, "B, N, A" if batched else "N, A", _POSITION_DTYPES)
    if not isinstance(axes, tuple | list) or len(axes) == 0:
        raise TypeError(f"{op}: axes must be a non-empty sequence of channel counts, got {axes!r}")
    for i, channels in enumerate(axes):
        check_int(op, f"axes[{i}]", channels, 0)
        if channels % 2:
            raise ValueError(f"{op}: axes must be even, got {tuple(axes)}")
    check_same(op, "positions must have a column for each of the axes", positions.shape[-1], len(axes))
    check_finite(op, "theta", theta)
    if not theta > 0:
        raise ValueError(f"{op}: theta must be positive, got {theta}")
    angles = []
    for axis, channels in zip(positions.to(torch.float64).unbind(-1), axes, strict=True):
        pair = torch.arange(0, channels, 2, dtype=torch.float64, device=positions.device)
        angles.append(axis.unsqueeze(-1) * (1.0 / theta ** (pair / channels)))
    angle = torch.cat(angles, dim=-1)
    return Rotary(angle.cos().to(torch.float32), angle.sin().to(torch.float32))


def apply_rotary(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotates the pairs of neighbouring channels of queries or keys by their positions.

    Args:
        x: (B, L, H, D) float queries or keys.
        rotary: cosines and sines for L positions and D channels, with the batch of x, batch 1 or none: from `rotary`,
            or any pair of tensors of such shapes, float32 or float64.

    Returns:
        (B, L, H, D) of the dtype of x, computed in float32 (float64 for float64) and rounded once. Differentiable, any
        number of times, in x (the map is orthogonal: the gradient is rotated back) and in the cosines and sines.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.

    Equivalent PyTorch:
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = (t.unsqueeze(-2) for t in rotary)
        stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)

    Source: see `rotary`.
    """
    op = "apply_rotary"
    check_tensor(op, "x", x, "B, L, H, D")
    if not isinstance(rotary, tuple) or len(rotary) != 2:
        raise TypeError(f"{op}: rotary must be a Rotary (cos, sin), got {type(rotary).__name__}")
    if x.shape[3] % 2:
        raise ValueError(f"{op}: x must have an even D, got {x.shape[3]}")
    for name, table in zip(Rotary._fields, rotary, strict=True):
        batched = isinstance(table, Tensor) and table.dim() == 3
        name = f"rotary.{name}"
        check_tensor(op, name, table, "B, L, D / 2" if batched else "L, D / 2", (torch.float32, torch.float64))
        check_same(
            op, f"x and {name} must have the same L and D / 2", (x.shape[1], x.shape[3] // 2), tuple(table.shape[-2:])
        )
        if batched and table.shape[0] != 1:
            check_same(op, f"x and {name} must have the same B", x.shape[0], table.shape[0])
        check_same(op, f"x and {name} must be on the same device", x.device, table.device)
    wide = accumulate_dtype(x.dtype)
    even, odd = (
        x.to(wide).unflatten(3, (x.shape[3] // 2, 2)).unbind(4)
    )  # not -1, which cannot be inferred for an empty x
    cos, sin = (table.to(wide).unsqueeze(-2) for table in rotary)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3).to(x.dtype)
