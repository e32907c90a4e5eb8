"""Computes rotary embeddings of memory tokens exactly as the video model does."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from .._checks import FLOAT_DTYPES, check_tensor

FAMILIES = ("wan", "hunyuan-video", "framepack")  # families whose rotary embedding is known here
_DTYPES = (*FLOAT_DTYPES, torch.int32, torch.int64)
_WAN_THETA = 10000.0  # its constructor has no argument for it


def rotary_tables(model: nn.Module, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Computes cosines and sines of positions by the model's own rotary embedding, equal bit by bit.

    Args:
        model: a model of one of `FAMILIES`.
        positions: (M, 3) or (B, M, 3) of time, row and column, in patches.

    Returns:
        (cos, sin), (M, D) or (B, M, D) float32 each, with every column twice.
    """
    rope = model.rope
    if hasattr(rope, "t_dim"):  # Wan
        axes, theta = (rope.t_dim, rope.h_dim, rope.w_dim), _WAN_THETA
        options = {"repeat_interleave_real": True, "freqs_dtype": torch.float64}
        positions = positions.to(torch.float64)
    else:
        axes, theta, options = rope.rope_dim, rope.theta, {}
        positions = positions.to(torch.float32)
    tables = [
        get_1d_rotary_pos_embed(size, positions[..., i].reshape(-1), theta, use_real=True, **options)
        for i, size in enumerate(axes)
    ]
    return tuple(torch.cat(parts, -1).unflatten(0, positions.shape[:-1]) for parts in zip(*tables, strict=True))


def check_positions(op: str, positions: object, tokens: Tensor, by_sample: bool) -> None:
    """Checks positions of tokens (B, M, C): (M, 3) or, if `by_sample`, (B or 1, M, 3), on the device of the tokens."""
    batched = isinstance(positions, Tensor) and positions.dim() == 3
    check_tensor(op, "positions", positions, "B, M, 3" if batched else "M, 3", _DTYPES)
    batch, length = tokens.shape[:2]
    wanted = f"({length}, 3)" + (f" or ({batch} or 1, {length}, 3)" if by_sample else "")
    if positions.shape[-2:] != (length, 3) or (batched and not (by_sample and positions.shape[0] in (1, batch))):
        raise ValueError(f"{op}: positions must have shape {wanted}, got {tuple(positions.shape)}")
    if positions.device != tokens.device:
        got = f"{tokens.device} and {positions.device}"
        raise ValueError(f"{op}: tokens and positions must be on the same device, got {got}")
