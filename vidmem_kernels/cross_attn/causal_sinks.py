"""Sinks that become visible at their own time, as in StreamingLLM: two calls over disjoint keys, merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._call import call
from .._numerics import accumulate_dtype
from .attend import Attention
from .groups import attend_groups

UNBOUNDED = torch.finfo(torch.float32).max  # replaces infinity; finite times are smaller


def attend_causal_sinks(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call whose window bounds the sinks on the right, too."""
    sinks = a.num_sinks
    # AOTInductor writes constants as JSON, which has no infinity.
    left = UNBOUNDED if torch.compiler.is_exporting() else math.inf
    # torch.export would add guards on the lengths of slices of the keys, because these affect strides.
    whole = torch.compiler.is_exporting()
    of_sinks = _hiding(a, sinks, hide_sinks=False) if whole else _part(a, slice(None, sinks))
    of_sinks = of_sinks._replace(window=[left, a.window[1]], block_index=None)
    all_keys = whole or a.block_index is not None  # blocks are counted from the first key
    others = _hiding(a, sinks, hide_sinks=True) if all_keys else _part(a, slice(sinks, None))
    # The results are rounded once, after merging.
    wide = accumulate_dtype(a.dtype)
    parts = [attend_groups(part._replace(num_sinks=0, out_dtype=wide)) for part in (of_sinks, others)]
    out, lse = call("merge_attention_states", [p[0] for p in parts], [p[1] for p in parts], backend=a.backend)
    return out.to(a.out_dtype), lse


def _part(a: Attention, keys: slice) -> Attention:
    """The call with a slice of its keys."""
    by_key = {name: getattr(a, name) for name in ("k_time", "key_bias")}
    by_row = {name: getattr(a, name) for name in ("k", "v", "k_scale", "v_scale")}
    found = {name: x if x is None else x[..., keys] for name, x in by_key.items()}
    return a._replace(**found, **{name: x if x is None else x[:, keys] for name, x in by_row.items()})


def _hiding(a: Attention, sinks: int, hide_sinks: bool) -> Attention:
    """The call with a bias of -inf for the sinks, or for all other keys."""
    bias = a.key_bias
    if bias is None:
        bias = a.q.new_zeros(*a.k.shape[:2], dtype=accumulate_dtype(a.dtype))
    is_sink = (
        torch.ones_like(bias, dtype=torch.int64).cumsum(-1) <= sinks
    )  # unlike arange, this also works for a DTensor
    return a._replace(key_bias=bias.masked_fill(is_sink if hide_sinks else ~is_sink, -torch.inf))
