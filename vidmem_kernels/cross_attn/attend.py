"""Calls the cross-attention op for one call of the public function, also from a compiled graph."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._call import call
from .._checks import QUANTIZED_DTYPES
from .._dispatch import requested
from .._transforms import depth
from . import symbolic


class Attention(NamedTuple):
    """Checked arguments of `cross_attention` with a common batch; see its docstring for their meaning."""

    q: Tensor
    k: Tensor
    v: Tensor
    key_bias: Tensor | None
    num_sinks: int
    q_time: Tensor | None
    k_time: Tensor | None
    window: list[float] | None
    block_index: Tensor | None
    block_size: tuple[int, int]
    scale: float
    k_scale: Tensor | None
    v_scale: Tensor | None
    dtype: torch.dtype  # dtype that the op sees, after autocast
    out_dtype: torch.dtype
    backend: str | None


def attend(a: Attention) -> tuple[Tensor, Tensor]:
    """(out, lse) of a call with equal numbers of query and key heads."""
    mixed = a.k_scale is not None or a.out_dtype != a.dtype
    scales = (a.k_scale, a.v_scale) if mixed else ()
    results = (a.out_dtype,) if mixed else ()
    name = "cross_attention_mixed" if mixed else "cross_attention"
    times = (a.q_time, a.k_time)
    if torch.compiler.is_compiling() and depth() == 0 and symbolic.any_open([*(a.window or ()), a.scale]):
        qkv = (x if x.dtype in QUANTIZED_DTYPES else x.to(a.dtype) for x in (a.q, a.k, a.v))
        numbers = symbolic.as_tensor([*(a.window or ()), a.scale])
        return getattr(torch.ops.vidmem, f"{name}_symbolic")(
            *qkv, *scales, a.key_bias, a.num_sinks, *times, numbers, a.block_index, list(a.block_size), *results,
            requested(a.backend),
        )  # fmt: skip
    window = a.window and [float(side) for side in a.window]
    return call(
        name, a.q, a.k, a.v, *scales, a.key_bias, a.num_sinks, *times, window, a.block_index, list(a.block_size),
        float(a.scale), *results, backend=a.backend,
    )  # fmt: skip
