"""cross_attention with blocks of different lengths: pads them to one length, hides the padding, and removes it again.

Nothing is read back from the device: the layout follows from the lengths and the block size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._blocks import padded_places, padded_rows
from .._call import call
from .._checks import QUANTIZED_DTYPES
from .._numerics import accumulate_dtype
from .._sharding import replicating
from .attend import Attention


def _take(x: Tensor, rows: Tensor) -> Tensor:
    """Rows (n,) of x (B, L, H, D), zeros for -1."""
    if x.dtype in QUANTIZED_DTYPES:  # gather_tokens would return floats
        codes = x.view(torch.uint8)
        return torch.cat([codes, codes.new_zeros(x.shape[0], 1, *x.shape[2:])], dim=1)[:, rows].view(x.dtype)
    index = rows.unsqueeze(0).expand(x.shape[0], -1)
    # A plain copy, so the backend of the attention does not matter.
    return call("gather_tokens", x.flatten(2), index, None, None, backend="auto").unflatten(2, x.shape[2:])


def _take_last(x: Tensor | None, rows: Tensor, fill: float) -> Tensor | None:
    """Elements (n,) along the last axis of x, `fill` for -1."""
    if x is None:
        return None
    return torch.cat([x, x.new_full((*x.shape[:-1], 1), fill)], dim=-1)[..., rows]


def _lay_out(a: Attention, q_sizes: Tensor, k_sizes: Tensor) -> Attention:
    """The call with every query and key block padded to the block size.

    Sinks are visible to all queries and must be the first keys: they are copied to extra blocks before all others and
    hidden at their original places.
    """
    block_q, block_k = a.block_size
    queries, keys = padded_rows(q_sizes, block_q), padded_rows(k_sizes, block_k)
    block_index, sinks = a.block_index, 0
    if a.num_sinks > 0:
        blocks = -(-a.num_sinks // block_k)
        sinks = blocks * block_k
        first = torch.arange(sinks, dtype=keys.dtype, device=keys.device)
        keys = torch.cat([first.masked_fill(first >= a.num_sinks, -1), keys.masked_fill(keys < a.num_sinks, -1)])
        block_index = torch.where(block_index < 0, block_index, block_index + blocks)
    bias = a.key_bias
    if bias is None:
        bias = a.q.new_zeros(*a.k.shape[:2], dtype=accumulate_dtype(a.dtype))
    return a._replace(
        q=_take(a.q, queries),
        k=_take(a.k, keys),
        v=_take(a.v, keys),
        key_bias=_take_last(bias, keys, -torch.inf),
        num_sinks=sinks,
        q_time=_take_last(a.q_time, queries, 0),
        k_time=_take_last(a.k_time, keys, 0),
        block_index=block_index,
        k_scale=_take_last(a.k_scale, keys, 0),
        v_scale=_take_last(a.v_scale, keys, 0),
    )


def attend_blocks(
    attend: Callable[[Attention], tuple[Tensor, Tensor]], a: Attention, q_sizes: Tensor, k_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with these block lengths; `attend` handles blocks of equal length."""
    with replicating(a.q):
        out, lse = attend(_lay_out(a, q_sizes, k_sizes))
        places = padded_places(q_sizes, a.block_size[0], a.q.shape[1])
        return _take(out, places), lse.index_select(2, places)
