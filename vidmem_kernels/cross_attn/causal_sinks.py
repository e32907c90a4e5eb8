"""Sinks that are seen from their own time on, as StreamingLLM has them: two calls over disjoint keys, merged."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._call import call
from .._numerics import accumulate_dtype
from .attend import Attention
from .groups import attend_groups

UNBOUNDED = torch.finfo(torch.float32).max  # stands for infinity beside finite times


def attend_causal_sinks(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with a window whose right bound holds for the sinks too."""
    sinks = a.num_sinks
    # AOTInductor writes constants as JSON, which has no infinity.
    left = UNBOUNDED if torch.compiler.is_exporting() else math.inf
    # torch.export would guard the lengths of parts of the keys against those that make a difference to their strides.
    whole = torch.compiler.is_exporting()
    of_sinks = _hiding(a, sinks, hide_sinks=False) if whole else _part(a, slice(None, sinks))
    of_sinks = of_sinks._replace(window=[left, a.window[1]], block_index=None)
    all_keys = whole or a.block_index is not None  # blocks are counted from the first key
    others = _hiding(a, sinks, hide_sinks=True) if all_keys else _part(a, slice(sinks, None))
    # Rounded once, after they are merged.
    wide = accumulate_dtype(a.dtype)
    parts = [attend_groups(part._replace(num_sinks=0, out_dtype=wide)) for part in (of_sinks, others)]
    out, lse = call("merge_attention_states", [p[0] for p in parts], [p[1] for p in parts], backend=a.backend)
    return out.to(a.out_dtype), lse


def _part(a: Attention, keys: slice) -> Attention:
    """The call with some of its keys."""
    by_key = {name: getattr(a, name) for name in ("k_time", "key_bias")}
    by_row = {name: getattr(a, name) for name in ("k", "v", "k_scale", "v_scale")}
    found = {name: x if x is None else x[..., keys] for name, x in by_key.items()}
    return a._replace(**found, **{name: x if x is None else x[:, keys] for name, x in by_row.items()})


def _hiding(a: Attention, sinks: int, hide_sinks: bool) -> Attention:
    """The call with a bias of -inf for the sinks, or for all other keys."""
    bias = a.key_bias
    if bias is None:
        bias = a.q.new_zeros(*a.k.shape[:2], dtype=accumulate_dtype(a.dtype))
    is_sink = torch.ones_like(bias, dtype=torch.int64).cumsum(-1) <= sinks  # of a DTensor too
    return a._replace(key_bias=bias.masked_fill(is_sink if hide_sinks else ~is_sink, -torch.inf))
