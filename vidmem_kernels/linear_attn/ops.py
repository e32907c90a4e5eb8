"""Registers the ops of linear attention: schemas, fakes and gradients."""

from __future__ import annotations

import torch

from .._numerics import accumulate_dtype
from .._refusals import refuse_products
from .._registry import register_op
from . import reference

_HEADS = {"q": 2, "k": 2, "v": 2, "S": 1, "z": 1, "grad_out": 2, "grad_S": 1, "grad_z": 1}


def _state_sizes(q, v):
    """Sizes of S and z."""
    batch, _, heads, size = q.shape
    return (batch, heads, size, v.shape[3]), (batch, heads, size)


def _state_fake(q, v):
    return tuple(q.new_empty(sizes, dtype=accumulate_dtype(q.dtype)) for sizes in _state_sizes(q, v))


def _fake(q, k, v, *rest):
    return v.new_empty(v.shape), *_state_fake(q, v)


def _refuse_triton(q, v) -> str | None:
    if q.dtype == torch.float64:
        return "does not support float64: it sums in float32"
    sizes = (q.shape[3], v.shape[3])
    return None if max(sizes) <= 256 else f"needs head sizes of 1 to 256, got {sizes}"


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad_out, grad_S, grad_z):
    q, k, v, S, z = ctx.saved_tensors
    if grad_out is None and grad_S is None and grad_z is None:
        return (None,) * (5 + len(ctx.options))
    # An unused result has no gradient.
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    states = _state_sizes(q, v)
    grad_S, grad_z = (
        q.new_zeros(sizes, dtype=accumulate_dtype(q.dtype)) if g is None else g
        for g, sizes in zip((grad_S, grad_z), states, strict=True)
    )
    grads = ops.linear_attention_backward(grad_out, grad_S, grad_z, q, k, v, S, z, *ctx.options)
    *grads, grad_S, grad_z = grads
    if S is None:
        grad_S = grad_z = None
    return *grads, grad_S, grad_z, *(None for _ in ctx.options)


register_op(
    "linear_attention(Tensor q, Tensor k, Tensor v, Tensor? S, Tensor? z, str feature_map, bool causal,"
    " SymInt block_size, bool normalize, Scalar scale=1.0) -> (Tensor, Tensor, Tensor)",
    reference=reference.linear_attention,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=("q", "k", "v"),
    triton="triton_outputs",
    refuse={"cpu": refuse_products, "triton": lambda q, k, v, *_: _refuse_triton(q, v)},
    head_axes=_HEADS,
    result_heads=(2, 1, 1),
)


def _backward_fake(grad_out, grad_S, grad_z, q, k, v, *rest):
    return *(t.new_empty(t.shape) for t in (q, k, v)), *_state_fake(q, v)


register_op(
    "linear_attention_backward(Tensor grad_out, Tensor grad_S, Tensor grad_z, Tensor q, Tensor k, Tensor v,"
    " Tensor? S, Tensor? z, str feature_map, bool causal, SymInt block_size, bool normalize, Scalar scale=1.0)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.linear_attention_backward,
    fake=_backward_fake,
    autocast=(),
    triton="triton_gradients",
    refuse={"cpu": refuse_products, "triton": lambda grad_out, grad_S, grad_z, q, k, v, *_: _refuse_triton(q, v)},
    head_axes=_HEADS,
    result_heads=(2, 2, 2, 1, 1),
)
