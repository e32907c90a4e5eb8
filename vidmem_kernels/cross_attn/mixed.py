"""cross_attention with 8-bit keys and values, or with results of another dtype than the arguments.

It is a separate op, `cross_attention_mixed`, because no library supports it; its gradient is that of cross_attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._numerics import accumulate_dtype
from . import reference


def result_dtype(q: Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype of the results: `out_dtype`, except that float64 always has float64 results."""
    return q.dtype if q.dtype == torch.float64 else out_dtype


def dequantized(rows: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows (B, Lk, H, C) times their scales (B, Lk), rounded once to a dtype."""
    if scale is None:
        return rows.to(dtype)
    wide = torch.promote_types(scale.dtype, accumulate_dtype(dtype))
    return (rows.to(wide) * scale[:, :, None, None].to(wide)).to(dtype)


def cross_attention_mixed(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, key_bias: Tensor | None, *options
) -> tuple[Tensor, Tensor]:
    """The reference; `options` are those of cross_attention and out_dtype. Sums and products are float32."""
    *options, out_dtype = options
    wide = accumulate_dtype(q.dtype)
    k, v = dequantized(k, k_scale, wide), dequantized(v, v_scale, wide)
    out, lse = reference.cross_attention(q.to(wide), k, v, key_bias, *options)
    return out.to(result_dtype(q, out_dtype)), lse


def fake(q, k, v, k_scale, v_scale, key_bias, *options):
    batch, length, heads, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[3], dtype=result_dtype(q, options[-1]))
    return out, q.new_empty(batch, heads, length, dtype=accumulate_dtype(q.dtype))


def gradients(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    tensors: Sequence[Tensor | None],
    out: Tensor,
    lse: Tensor,
    of_scales: bool,
    *options: Any,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, k_scale, v_scale and key_bias.

    The rows are dequantised to the dtype of q, and the results and their gradients, as factors of products, are rounded
    to it. The gradient of a scale sums terms that largely cancel, so rounded factors would leave little of it: if it is
    needed, everything is computed in float32, including the results of the forward pass.

    Args:
        forward: the op cross_attention, or its symbolic counterpart.
        backward: the op cross_attention_backward, or its symbolic counterpart.
        grad_out: gradient of out, or None.
        grad_lse: gradient of lse, or None.
        tensors: q, k, v, k_scale, v_scale and key_bias.
        out: result of the forward pass.
        lse: result of the forward pass.
        of_scales: whether the gradients of the scales are needed.
        *options: further arguments of `forward` and `backward`.

    Returns:
        The gradients in this order, None where there is none.
    """
    q, k, v, k_scale, v_scale, key_bias = tensors
    dtype = accumulate_dtype(q.dtype) if of_scales else q.dtype
    grad_out = torch.zeros_like(out, dtype=dtype) if grad_out is None else grad_out.to(dtype)
    wide = q.to(dtype), dequantized(k, k_scale, dtype), dequantized(v, v_scale, dtype)
    if dtype != q.dtype:  # the results come from rounded values, and are rounded
        out, lse = forward(*wide, key_bias, *options)
    grad_q, grad_k, grad_v, grad_bias = backward(grad_out, grad_lse, *wide, key_bias, out.to(dtype), lse, *options)
    if key_bias is None:
        grad_bias = None
    if k_scale is None:
        return grad_q, grad_k, grad_v, None, None, grad_bias
    if not of_scales:
        return grad_q, None, None, None, None, grad_bias
    of_k, of_v = _of_scale(grad_k, k, k_scale), _of_scale(grad_v, v, v_scale)
    return grad_q.to(q.dtype), None, None, of_k, of_v, grad_bias


def _of_scale(grad: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """The gradient (B, Lk) of scales from the gradient of the scaled rows; 0 for keys that no query sees, even if they
    are NaN."""
    along = grad.to(scale.dtype) * rows.to(scale.dtype)
    return along.masked_fill(grad == 0, 0).sum((2, 3))
