"""linear_attention with separate queries and keys for the denominator, composed of two calls of the op.

One call computes the numerator, the other the denominator with values of one; half of each state is not used.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from .._call import call
from .._numerics import accumulate_dtype
from .reference import EPS


def attend_normalized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor,
    k2: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    causal: bool,
    block_size: int,
    scale: float,
    dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, S, z); see `vidmem_kernels.linear_attention`. `dtype` is the dtype of the tensors after autocast."""
    # The op returns its sums in the dtype of its tensors. With float32 copies they are neither rounded nor too large
    # for float16 before the division.
    wide = accumulate_dtype(dtype)
    q, k, v, q2, k2 = (x.to(dtype).to(wide) for x in (q, k, v, q2, k2))
    ones = v[..., :1].new_ones(()).expand(*v.shape[:3], 1)
    S2 = None if z is None else z.unsqueeze(3)
    options = feature_map, causal, block_size, False, scale
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):  # meta tensors have no autocast
        numerator, S, _ = call("linear_attention", q, k, v, S, z, *options, backend=backend)
        denominator, S2, _ = call("linear_attention", q2, k2, ones, S2, z, *options, backend=backend)
    return (numerator / (denominator + EPS)).to(dtype), S, S2.squeeze(3)
