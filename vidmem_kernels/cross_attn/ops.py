"""Registers the ops of cross-attention: schemas, fakes and gradients."""

from __future__ import annotations

from functools import cache

import torch

from .._numerics import accumulate_dtype
from .._refusals import refuse_float64, refuse_products
from .._registry import register_op
from . import library, mixed, reference
from .library_sdpa import capability

_OPTIONS = (
    "SymInt num_sinks, Tensor? q_time, Tensor? k_time, float[]? window, Tensor? block_index,"
    " SymInt[] block_size, float scale"
)
_TIMES = {"q_time": 1, "k_time": 1}
_HEADS = {"q": 2, "k": 2, "v": 2, "key_bias": 1, "block_index": 1, "out": 2, "lse": 1, "grad_out": 2, "grad_lse": 1}
_PARTS = {"outs": 2, "lses": 1, "lse": 1, "grad_out": 2, "grad_lse": 1}


# --- cross_attention ---


_WIDE_TILES = 131_328  # of the gradient of keys on sm_80; sm_86, sm_89 and sm_120 have 101,376


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; without a GPU, enough for every tile."""
    if not torch.cuda.is_available():
        return _WIDE_TILES
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _refuse_triton(q, k, v, *rest) -> str | None:
    """Why the Triton kernels cannot run a call, or None."""
    if why := refuse_float64(q):
        return why
    if not 1 <= min(q.shape[3], v.shape[3]) <= max(q.shape[3], v.shape[3]) <= 256:
        return f"needs D and Dv of 1 to 256, got {q.shape[3]} and {v.shape[3]}"
    if max(q.shape[1], k.shape[1]) >= 2**30:
        return "needs fewer than 2**30 queries and keys"
    if max(q.shape[3], v.shape[3]) > 128 and q.device.type == "cuda" and _shared_memory(q.device) < _WIDE_TILES:
        return f"tiles of D=256 need {_WIDE_TILES} bytes of shared memory, this GPU has {_shared_memory(q.device)}"
    return None


def _fake(q, k, v, *rest):
    batch, length, heads, _ = q.shape
    out = q.new_empty(batch, length, heads, v.shape[3])
    return out, q.new_empty(batch, heads, length, dtype=accumulate_dtype(q.dtype))


def _setup(ctx, inputs, output):
    q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale = inputs
    ctx.save_for_backward(q, k, v, key_bias, *output, q_time, k_time, block_index)
    ctx.options = num_sinks, window, block_size, scale
    # A gradient of zeros for an unused lse would exclude library kernels.
    ctx.set_materialize_grads(False)


def _backward(ops, ctx, grad_out, grad_lse):
    q, k, v, key_bias, out, lse, q_time, k_time, block_index = ctx.saved_tensors
    num_sinks, window, block_size, scale = ctx.options
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = ops.cross_attention_backward(
        grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index,
        block_size, scale,
    )  # fmt: skip
    return *grads, grad_bias if key_bias is not None else None, *[None] * 7


register_op(
    f"cross_attention(Tensor q, Tensor k, Tensor v, Tensor? key_bias, {_OPTIONS}) -> (Tensor, Tensor)",
    reference=reference.cross_attention,
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=("q", "k", "v"),
    triton="triton_attention",
    library=library.FORWARD,
    refuse={"library": library.refuse, "cpu": refuse_products, "triton": _refuse_triton},
    without_batch=_TIMES,
    head_axes=_HEADS,
    result_heads=(2, 1),
)


def _refuse_triton_backward(grad_out, grad_lse, *rest) -> str | None:
    return _refuse_triton(*rest)


def _backward_fake(grad_out, grad_lse, q, k, v, key_bias, out, lse, *rest):
    bias = lse.new_empty(0) if key_bias is None else key_bias.new_empty(key_bias.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v)), bias


register_op(
    "cross_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? key_bias,"
    f" Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.cross_attention_backward,
    fake=_backward_fake,
    autocast=(),
    triton="triton_attention_grad",
    library=library.BACKWARD,
    varies=("library", "triton"),
    refuse={"library": library.refuse_backward, "cpu": refuse_products, "triton": _refuse_triton_backward},
    without_batch=_TIMES,
    head_axes=_HEADS,
    result_heads=(2, 2, 2, 1),
)

# --- cross_attention_mixed ---


def _refuse_triton_mixed(q, k, v, *rest) -> str | None:
    if k.dtype == torch.float8_e4m3fn and q.device.type == "cuda" and capability(q.device) < (8, 9):
        return "float8 rows need compute capability 8.9 or later"
    return _refuse_triton(q, k, v)


def _mixed_setup(ctx, inputs, output):
    *tensors, num_sinks, q_time, k_time, window, block_index, block_size, scale, _ = inputs
    ctx.save_for_backward(*tensors, *output, q_time, k_time, block_index)
    ctx.options = num_sinks, window, block_size, scale
    ctx.set_materialize_grads(False)


def _mixed_backward(ops, ctx, grad_out, grad_lse):
    *tensors, out, lse, q_time, k_time, block_index = ctx.saved_tensors
    num_sinks, window, block_size, scale = ctx.options
    options = num_sinks, q_time, k_time, window, block_index, block_size, scale
    of_scales = any(ctx.needs_input_grad[3:5])
    forward, backward = ops.cross_attention, ops.cross_attention_backward
    grads = mixed.gradients(forward, backward, grad_out, grad_lse, tensors, out, lse, of_scales, *options)
    return *grads, *[None] * 8


register_op(
    "cross_attention_mixed(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? key_bias,"
    f" {_OPTIONS}, ScalarType out_dtype) -> (Tensor, Tensor)",
    reference=mixed.cross_attention_mixed,
    fake=mixed.fake,
    setup_context=_mixed_setup,
    backward=_mixed_backward,
    autocast=("q", "k", "v"),
    triton="triton_attention",
    refuse={"cpu": refuse_products, "triton": _refuse_triton_mixed},
    without_batch=_TIMES,
    head_axes=_HEADS,
    result_heads=(2, 1),
)

# --- merge_attention_states ---


def _refuse_merge(outs, *rest) -> str | None:
    # The first argument of the backward op is grad_out.
    return refuse_float64(outs[0] if isinstance(outs, list) else outs)


def _merge_fake(outs, lses):
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_setup(ctx, inputs, output):
    outs, lses = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, output[1])
    ctx.set_materialize_grads(False)


def _merge_backward(ops, ctx, grad_out, grad_lse):
    *parts, lse = ctx.saved_tensors
    outs, lses = parts[: ctx.parts], parts[ctx.parts :]
    if grad_out is None:
        grad_out = torch.zeros_like(outs[0])
    grad_outs, grad_lses = ops.merge_attention_states_backward(grad_out, grad_lse, outs, lses, lse)
    return list(grad_outs.unbind()), list(grad_lses.unbind())


register_op(
    "merge_attention_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    reference=reference.merge_attention_states,
    fake=_merge_fake,
    setup_context=_merge_setup,
    backward=_merge_backward,
    autocast=(),
    triton="triton_merge",
    refuse={"cpu": _refuse_merge, "triton": _refuse_merge},
    head_axes=_PARTS,
    result_heads=(2, 1),
)


def _merge_backward_fake(grad_out, grad_lse, outs, lses, lse):
    return (
        grad_out.new_empty(len(outs), *grad_out.shape),
        lse.new_empty(len(lses), *lse.shape),
    )


register_op(
    "merge_attention_states_backward(Tensor grad_out, Tensor? grad_lse, Tensor[] outs, Tensor[] lses, Tensor lse)"
    " -> (Tensor, Tensor)",
    reference=reference.merge_attention_states_backward,
    fake=_merge_backward_fake,
    autocast=(),
    triton="triton_merge",
    refuse={"cpu": _refuse_merge, "triton": _refuse_merge},
    result_batch=1,  # the results are stacked
    head_axes=_PARTS,
    result_heads=(3, 2),
)
