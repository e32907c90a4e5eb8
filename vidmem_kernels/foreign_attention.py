"""Runs attention calls of other libraries, with SDPA's arguments in (B, L, H, D) layout, by `cross_attention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import FLOAT_DTYPES
from .cross_attn.api import cross_attention

# What of `cross_attention` others may ask for beyond what a call of SDPA says.
FEATURES = ("backend", "block_index", "block_size", "k_time", "key_bias", "num_sinks", "q_time", "window")


def attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    features: Mapping[str, Any] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes an SDPA-style call in the layout (B, L, H, D); refuses what `cross_attention` cannot do.

    Args:
        op: prefix of error messages.
        query: (B, Lq, H, D).
        key: (B, Lk, H or fewer, D).
        value: (B, Lk, H or fewer, Dv).
        attn_mask: (B or 1, H or 1, 1, Lk): bool, True for visible keys, or float, added to the scores.
        dropout_p: must be 0.
        is_causal: must be False.
        scale: factor of the scores; default D**-0.5.
        enable_gqa: allows fewer key heads than query heads; their number must divide that of the query heads.
        return_lse: also return the log-sum-exp of the scores, in the layout of diffusers' context parallelism.
        features: options of `cross_attention`; a callable value is called with (query, key).

    Returns:
        (B, Lq, H, Dv); with `return_lse` also (B, Lq, H) float32.

    Raises:
        ValueError, TypeError: an argument is not supported, or has a wrong shape or dtype.
    """
    if dropout_p:
        raise ValueError(f"{op}: dropout_p must be 0, got {dropout_p}")
    if is_causal:
        raise ValueError(f"{op}: is_causal must be False, got {is_causal}")
    heads = query.shape[2]
    if heads != key.shape[2] and not enable_gqa:
        raise ValueError(
            f"{op}: enable_gqa must be True if keys and queries have different numbers of heads, "
            f"got {key.shape[2]} and {heads}"
        )
    if heads != key.shape[2]:
        if key.shape[2] == 0 or heads % key.shape[2]:
            raise ValueError(
                f"{op}: the number of key heads must divide that of query heads, got {key.shape[2]} and {heads}"
            )
        key, value = (x.repeat_interleave(heads // x.shape[2], 2) for x in (key, value))
    options = {name: x(query, key) if callable(x) else x for name, x in (features or {}).items()}
    if attn_mask is not None:
        bias = _bias(op, attn_mask, query.shape[0], heads, key.shape[1])
        more = options.get("key_bias")
        if more is not None and more.dim() != bias.dim():
            bias, more = (x.unsqueeze(1) if x.dim() == 2 else x for x in (bias, more))
        options["key_bias"] = bias if more is None else bias + more
    out = cross_attention(query, key, value, scale=scale, return_lse=return_lse, **options)
    return (out[0], out[1].transpose(1, 2)) if return_lse else out


def _bias(op: str, mask: Tensor, batch: int, heads: int, keys: int) -> Tensor:
    """Converts a mask over keys to `key_bias`, (B, Lk) or (B, H, Lk)."""
    wanted = f"({batch} or 1, {heads} or 1, 1, {keys})"
    if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads):
        raise ValueError(f"{op}: attn_mask must have shape {wanted}, a mask over keys, got {tuple(mask.shape)}")
    if mask.shape[2] != 1 or mask.shape[3] != keys:
        raise ValueError(f"{op}: attn_mask must have shape {wanted}, a mask over keys, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
    elif mask.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: attn_mask must be bool or of a float dtype, got {mask.dtype}")
    mask = mask.squeeze(2).expand(batch, -1, -1)
    return mask.squeeze(1) if mask.shape[1] == 1 else mask
