"""Prepares the arguments of cross_attention that a batch may share: expands them, and applies masks."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from .._checks import is_one


@overload
def spread(x: Tensor, batch: int) -> Tensor: ...


@overload
def spread(x: Tensor | None, batch: int) -> Tensor | None: ...


def spread(x: Tensor | None, batch: int) -> Tensor | None:
    """Expands a tensor of batch 1 to the batch; returns other tensors unchanged."""
    if x is None or not is_one(x.shape[0]) or is_one(batch):
        return x
    return x.expand(batch, *x.shape[1:])


def spread_times(time: Tensor | None, batch: int) -> Tensor | None:
    """Expands times (1, L) to the batch; times (L,) are shared by every batch already."""
    return time if time is None or time.dim() == 1 else spread(time, batch)


def masked_bias(key_bias: Tensor | None, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias of the keys, with -inf where the mask hides a key; without a bias, zeros (B or 1, Lk) of the dtype."""
    if key_mask is None:
        return key_bias
    if key_bias is None:
        return torch.zeros_like(key_mask, dtype=dtype).masked_fill(~key_mask, -torch.inf)
    return key_bias.masked_fill(~(key_mask if key_bias.dim() == 2 else key_mask.unsqueeze(1)), -torch.inf)


def harmless(scale: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """The scales (B, Lk) with 0 where a bias of -inf hides the key, because tiles multiply by hidden keys too."""
    if scale is None or key_bias is None:
        return scale
    gone = key_bias == -torch.inf
    return scale.masked_fill(gone.all(1) if gone.dim() == 3 else gone, 0)
