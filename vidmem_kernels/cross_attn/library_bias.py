"""A key bias for libraries that do not support one, as extra channels of queries and keys.

The extra channels of q hold constants; those of k hold the bias divided by the scale, split into three parts in the
dtype of the tensors whose sum is accurate to 2^-24, so that q.k contains the bias. A bias of -inf becomes a finite
floor, far below all others; the rows of k and v that it hides are set to zero, and where it hides all keys, the result
is set to 0 and lse to -inf afterwards. The gradient of the bias is one more channel of the gradient of k, with a
constant in q and 0 in k. It has the dtype of k, and so meets the error budget only for a bias of that dtype. Nothing
waits for the GPU.

The call needs additional memory for the widened tensors: width / D times that of q and k (1.125 for D=128 in 144
channels, 1.5 in 192), and a copy of v.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import names

PARTS = 3
# The constants in q. The range of float16 is too small: its first part has the magnitude, the others the low digits.
_FACTORS = {torch.bfloat16: (1.0, 1.0, 1.0), torch.float16: (2.0**15, 2.0**4, 2.0**-7)}
_LIMITS = {
    torch.bfloat16: 2.0**126,
    torch.float16: 2.0**30,
}  # of the bias divided by the scale; larger ones are clamped
_FLOOR = 2.0**100  # of the bias: scaled scores must not overflow
_SCALES = {torch.bfloat16: (2.0**-60, 2.0**60), torch.float16: (2.0**-10, 2.0**10)}
# Below this number of scores, widening (about 20 small launches) is predicted to take more time than it saves.
_WORTH = 2**29


def refuse(q: Tensor, scale: float, sizes: tuple[int, ...]) -> str | None:
    """Why a library that gets the bias as channels, for the head sizes `sizes`, cannot run a call, or None."""
    if q.shape[3] not in sizes:
        return f"a key bias needs D of {', '.join(map(str, sizes))}, got {q.shape[3]}"
    low, high = _SCALES[q.dtype]
    if not low <= scale <= high:
        return f"a key bias needs a scale of {low:.0e} to {high:.0e}, got {scale}"
    return None


def refuse_gradient(q: Tensor, key_bias: Tensor) -> str | None:
    """Why the gradient of a bias cannot be computed as a channel, or None."""
    if key_bias.dtype == q.dtype:
        return None
    return f"would round the gradient of a {names([key_bias.dtype])} key_bias to {names([q.dtype])}"


def avoid(q: Tensor, k: Tensor) -> str | None:
    """Why our kernel is faster than a library with widened tensors, or None."""
    scores = q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1]
    return (
        None
        if scores >= _WORTH
        else "slower than our kernel here: too few scores to pay for the extra channels of the bias"
    )


def width(size: int) -> int:
    """Channels of q and k with room for a bias and its gradient, a multiple of 16."""
    return math.ceil((size + PARTS + 1) / 16) * 16


def _split(key_bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """(..., PARTS): the parts of the bias divided by the scale; their sum, weighted by the constants, is that
    quotient."""
    rest = key_bias.to(torch.float64) / scale
    limit = min(_LIMITS[dtype], _FLOOR / scale)
    # An infinite score makes the softmax NaN.
    rest = rest.clamp(-limit, limit).masked_fill(key_bias == torch.inf, torch.nan)
    parts = []
    for factor in _FACTORS[dtype]:
        parts.append((rest / factor).to(dtype))
        rest = rest - parts[-1].to(torch.float64) * factor
    return torch.stack(parts, dim=-1)


def _hidden(key_bias: Tensor) -> Tensor:
    """(B, Lk, H or 1, 1): the keys that a bias of -inf hides from all queries."""
    by_head = key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)
    return (by_head == -torch.inf).transpose(1, 2).unsqueeze(3)


def widen(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, scale: float, channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, Lq, H, channels), k (B, Lk, H, channels) and v, with zeros for hidden keys."""
    size = q.shape[3]
    wide_q = q.new_empty(*q.shape[:3], channels)
    wide_q[..., :size] = q
    first, *others = _FACTORS[q.dtype]
    wide_q[..., size:].fill_(first)  # also for the padding, where k is zero
    for i, factor in enumerate(others, 1):
        if factor != first:
            wide_q[..., size + i].fill_(factor)
    hidden = _hidden(key_bias)
    wide_k = k.new_zeros(*k.shape[:3], channels)
    wide_k[..., :size] = k.masked_fill(hidden, 0)
    parts = _split(key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1), scale, k.dtype)
    wide_k[..., size : size + PARTS] = parts.transpose(1, 2)
    return wide_q, wide_k, v.masked_fill(hidden, 0)


def forward(
    attend: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    scale: float,
    channels: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse) with the bias, by `attend`, which computes a plain call with that scale."""
    out, lse = attend(*widen(q, k, v, key_bias, scale, channels))
    nothing = _hidden(key_bias).all(1, keepdim=True)  # (B, 1, H|1, 1)
    return out.masked_fill(nothing, 0), lse.masked_fill(nothing.squeeze(3).transpose(1, 2), -torch.inf)


def backward(
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor,
    lse: Tensor,
    scale: float,
    channels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias by `gradients` of (q, k, v, lse), which computes those of a plain call."""
    size = q.shape[3]
    # Queries that see no key: their weights are those of the floor, which are 0 relative to any finite lse.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    wide_q, wide_k, seen_v = widen(q, k, v, key_bias, scale, channels)
    one = 2.0 ** -round(math.log2(scale))  # about 1 / scale, so that the channel has the magnitude of the bias gradient
    wide_q[..., size + PARTS].fill_(one)
    grad_q, grad_k, grad_v = gradients(wide_q, wide_k, seen_v, lse)
    grad_bias = grad_k[..., size + PARTS].transpose(1, 2).to(torch.float32) / (scale * one)
    if key_bias.dim() == 2:
        grad_bias = grad_bias.sum(1)
    grad_q, grad_k = (g[..., :size].contiguous() for g in (grad_q, grad_k))
    return grad_q, grad_k, grad_v.contiguous(), grad_bias.to(key_bias.dtype).contiguous()
