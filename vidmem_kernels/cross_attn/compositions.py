"""Cross-attention as users would compose it from PyTorch in half precision: the yardstick of its kernels there."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numerics import accumulate_dtype
from ..testing import composition, product
from .mixed import dequantized, result_dtype


def _visible(q, k, num_sinks, q_time, k_time, window, block_index, block_size) -> Tensor:
    """Which query sees which key, broadcastable to (B, H, Lq, Lk)."""
    queries, keys = (torch.arange(t.shape[1], device=q.device) for t in (q, k))
    seen = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=q.device)
    if window is not None:
        single = q_time.dtype == k_time.dtype == torch.float32
        at, when = (torch.atleast_2d(t.to(torch.float32 if single else torch.float64)) for t in (q_time, k_time))
        at, when = at[:, None, :, None], when[:, None, None]
        seen = seen & (at - window[0] <= when) & (when <= at + window[1])
    if block_index is not None:
        blocks = torch.arange(-(-len(keys) // block_size[1]), device=q.device)
        listed = (block_index.unsqueeze(4) == blocks).any(3)
        seen = seen & listed[:, :, queries // block_size[0]][..., keys // block_size[1]]
    return seen | (keys < num_sinks)


def _scores(q: Tensor, k: Tensor, key_bias: Tensor | None, scale: float, *mask) -> Tensor:
    """(B, H, Lq, Lk), -inf where a key is hidden."""
    scores = product(_heads(q), _heads(k).mT, q.dtype) * scale
    if key_bias is not None:
        scores = scores + (key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)).unsqueeze(2).to(scores.dtype)
    return scores.masked_fill(~_visible(q, k, *mask), -torch.inf)


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).to(accumulate_dtype(x.dtype))


@composition("cross_attention")
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The weights are rounded to the dtype of q for the product with v; the scores, and so lse, are float32."""
    mask = num_sinks, q_time, k_time, window, block_index, block_size
    return cross_attention_mixed(q, k, v, None, None, key_bias, *mask, scale, q.dtype)


@composition("cross_attention_mixed")
def cross_attention_mixed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    key_bias: Tensor | None,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Dequantises 8-bit rows to the dtype of q, then computes cross_attention; the results are its float32 sums."""
    wide = accumulate_dtype(q.dtype)
    k, v = dequantized(k, k_scale, wide), dequantized(v, v_scale, wide)
    mask = num_sinks, q_time, k_time, window, block_index, block_size
    scores = _scores(q, k, key_bias, scale, *mask)
    empty = ~(scores > -torch.inf).any(3, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    out = product(scores.softmax(3), _heads(v), q.dtype).masked_fill(empty, 0)
    lse = scores.logsumexp(3).masked_fill(empty.squeeze(3), -torch.inf)
    return out.transpose(1, 2).to(result_dtype(q, out_dtype)), lse


@composition("cross_attention_backward")
def cross_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and gradients of scores are rounded to the dtype of q for products; the bias gradient sums them in
    float32."""
    dtype = q.dtype
    scores = _scores(q, k, key_bias, scale, num_sinks, q_time, k_time, window, block_index, block_size)
    weight = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(3)).exp()
    grad = _heads(grad_out)
    shared = (grad * _heads(out)).sum(3)
    if grad_lse is not None:
        shared = shared - grad_lse
    grad_scores = weight * (product(grad, _heads(v).mT, dtype) - shared.unsqueeze(3))
    grads = (
        product(grad_scores, _heads(k), dtype) * scale,
        product(grad_scores.mT, _heads(q), dtype) * scale,
        product(weight.mT, grad, dtype),
    )
    grads = (g.transpose(1, 2).to(t.dtype) for g, t in zip(grads, (q, k, v), strict=True))
    if key_bias is None:
        return *grads, lse.new_empty(0)
    grad_bias = grad_scores.sum(2)
    return *grads, (grad_bias if key_bias.dim() == 3 else grad_bias.sum(1)).to(key_bias.dtype)
