"""What a call of cross_attention may give once for a whole batch or leave to others: spread, masked and hidden."""

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
    """A tensor of batch 1 seen by a whole batch; another one as it is."""
    if x is None or not is_one(x.shape[0]) or is_one(batch):
        return x
    return x.expand(batch, *x.shape[1:])


def spread_times(time: Tensor | None, batch: int) -> Tensor | None:
    """Times (1, L) as `spread` has them; times (L,) serve every batch anyway."""
    return time if time is None or time.dim() == 1 else spread(time, batch)


def masked_bias(key_bias: Tensor | None, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias of keys with -inf for those that a mask hides; without a bias one of zeros, (B|1, Lk) of a dtype."""
    if key_mask is None:
        return key_bias
    if key_bias is None:
        return torch.zeros_like(key_mask, dtype=dtype).masked_fill(~key_mask, -torch.inf)
    return key_bias.masked_fill(~(key_mask if key_bias.dim() == 2 else key_mask.unsqueeze(1)), -torch.inf)


def harmless(scale: Tensor | None, key_bias: Tensor | None) -> Tensor | None:
    """The scales (B, Lk) of rows with 0 where a bias of -inf hides the key: tiles multiply by hidden ones too."""
    if scale is None or key_bias is None:
        return scale
    gone = key_bias == -torch.inf
    return scale.masked_fill(gone.all(1) if gone.dim() == 3 else gone, 0)
