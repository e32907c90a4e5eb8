"""Grouped-query attention: several query heads read one key head, which is not copied."""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import Attention, attend

_LONGEST = 2**30  # above the row limit of the kernels


def attend_groups(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call in which Hk divides H: query head h reads key head h // (H // Hk)."""
    heads, key_heads = a.q.shape[2], a.k.shape[2]
    if heads == key_heads:
        return attend(a)
    group = heads // key_heads
    bias_differs = a.key_bias is not None and a.key_bias.dim() == 3 and a.key_bias.shape[1] == heads
    blocks_differ = a.block_index is not None and a.block_index.shape[1] == heads
    if bias_differs or blocks_differ:
        return _one_by_one(a, group, bias_differs, blocks_differ)
    return _folded(a, group, key_heads)


def _one_by_one(a: Attention, group: int, bias_differs: bool, blocks_differ: bool) -> tuple[Tensor, Tensor]:
    """One call per group member, since a kernel has one bias and one block list per key head."""
    outs, lses = [], []
    for member in range(group):
        part = a._replace(q=a.q[:, :, member::group])
        if bias_differs:
            part = part._replace(key_bias=a.key_bias[:, member::group])
        if blocks_differ:
            part = part._replace(block_index=a.block_index[:, member::group])
        out, lse = attend(part)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs, 3).flatten(2, 3), torch.stack(lses, 2).flatten(1, 2)


def _folded(a: Attention, group: int, key_heads: int) -> tuple[Tensor, Tensor]:
    """One call with the queries of a group interleaved, so that a tile of keys is read once for all of them."""
    length = a.q.shape[1]
    q = a.q.unflatten(2, (key_heads, group)).transpose(2, 3).flatten(1, 2)
    q_time = a.q_time
    if q_time is not None:
        q_time = q_time.unsqueeze(-1).expand(*q_time.shape, group).flatten(-2)
    block_size = min(a.block_size[0], _LONGEST) * group, a.block_size[1]
    out, lse = attend(a._replace(q=q, q_time=q_time, block_size=block_size))
    out = out.unflatten(1, (length, group)).transpose(2, 3).flatten(2, 3)
    return out, lse.unflatten(2, (length, group)).transpose(2, 3).flatten(1, 2)
