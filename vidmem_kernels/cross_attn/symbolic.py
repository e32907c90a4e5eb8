"""cross_attention in a torch.compile graph in which the window or the scale change from call to call.

torch.compile recompiles a graph for every value of a float argument of an op. The ops here take these floats in a
tensor instead, read them at run time and call the ops of ops.py. They expect q, k and v as autocast casts them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library

from .._numerics import accumulate_dtype
from . import mixed

_LIBRARY = Library("vidmem", "FRAGMENT")
_ARGUMENTS = (
    "SymInt num_sinks, Tensor? q_time, Tensor? k_time, Tensor numbers, Tensor? block_index, SymInt[] block_size"
)


def any_open(numbers: list[float]) -> bool:
    """Whether torch.compile, while tracing, leaves the value of any of the numbers open."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, but loaded by now

    limit = 2.0**1000  # a value that nothing else compares with, so that no known bound decides the comparison
    return not all(statically_known_true(n < limit) or statically_known_true(n >= limit) for n in numbers)


def as_tensor(numbers: list[float]) -> Tensor:
    """The tensor of window and scale: left, right and scale, or scale alone; float64 on the CPU."""
    # A sum, because torch.compile supports arithmetic between symbolic numbers and tensors, but no constructor.
    zero = torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([zero + number for number in numbers])


def _floats(numbers: Tensor) -> tuple[list[float] | None, float]:
    """(window, scale) from the tensor of `as_tensor`."""
    *window, scale = numbers.tolist()
    return window or None, scale


def _forward(q, k, v, key_bias, num_sinks, q_time, k_time, numbers, block_index, block_size, backend):
    window, scale = _floats(numbers)
    with torch._C._DisableAutocast():
        return torch.ops.vidmem.cross_attention(
            q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale, backend
        )


def _mixed_forward(
    q, k, v, k_scale, v_scale, key_bias, num_sinks, q_time, k_time, numbers, block_index, block_size, out_dtype, backend
):
    window, scale = _floats(numbers)
    with torch._C._DisableAutocast():
        return torch.ops.vidmem.cross_attention_mixed(
            q, k, v, k_scale, v_scale, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale,
            out_dtype, backend,
        )  # fmt: skip


def _backward(grad_out, grad_lse, q, k, v, bias, out, lse, sinks, q_time, k_time, numbers, index, block_size, backend):
    window, scale = _floats(numbers)
    with torch._C._DisableAutocast():
        return torch.ops.vidmem.cross_attention_backward(
            grad_out, grad_lse, q, k, v, bias, out, lse, sinks, q_time, k_time, window, index, block_size, scale,
            backend,
        )  # fmt: skip


def _fake(q, k, v, *rest):
    batch, length, heads, _ = q.shape
    lse = q.new_empty(batch, heads, length, dtype=accumulate_dtype(q.dtype))
    return q.new_empty(batch, length, heads, v.shape[3]), lse


def _backward_fake(grad_out, grad_lse, q, k, v, key_bias, out, lse, *rest):
    bias = lse.new_empty(0) if key_bias is None else key_bias.new_empty(key_bias.shape)
    return *(t.new_empty(t.shape) for t in (q, k, v)), bias


def _setup(ctx, inputs, output):
    q, k, v, key_bias, num_sinks, q_time, k_time, numbers, block_index, block_size, backend = inputs
    ctx.save_for_backward(q, k, v, key_bias, *output, q_time, k_time, numbers, block_index)
    ctx.options = num_sinks, block_size, backend
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_out, grad_lse):
    q, k, v, key_bias, out, lse, q_time, k_time, numbers, block_index = ctx.saved_tensors
    num_sinks, block_size, backend = ctx.options
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    *grads, grad_bias = torch.ops.vidmem.cross_attention_symbolic_backward(
        grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, numbers, block_index, block_size,
        backend,
    )  # fmt: skip
    return *grads, grad_bias if key_bias is not None else None, *[None] * 7


def _mixed_setup(ctx, inputs, output):
    *tensors, num_sinks, q_time, k_time, numbers, block_index, block_size, _, backend = inputs
    ctx.save_for_backward(*tensors, *output, q_time, k_time, numbers, block_index)
    ctx.options = num_sinks, block_size, backend
    ctx.set_materialize_grads(False)


def _mixed_gradients(ctx, grad_out, grad_lse):
    *tensors, out, lse, q_time, k_time, numbers, block_index = ctx.saved_tensors
    num_sinks, block_size, backend = ctx.options
    options = num_sinks, q_time, k_time, numbers, block_index, block_size, backend
    forward = torch.ops.vidmem.cross_attention_symbolic
    backward = torch.ops.vidmem.cross_attention_symbolic_backward
    of_scales = any(ctx.needs_input_grad[3:5])
    grads = mixed.gradients(forward, backward, grad_out, grad_lse, tensors, out, lse, of_scales, *options)
    return *grads, *[None] * 8


def _register(schema: str, kernel, fake) -> str:
    name = "vidmem::" + schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    return name


_FORWARD = _register(
    f"cross_attention_symbolic(Tensor q, Tensor k, Tensor v, Tensor? key_bias, {_ARGUMENTS}, str backend)"
    " -> (Tensor, Tensor)",
    _forward,
    _fake,
)
torch.library.register_autograd(_FORWARD, _gradients, setup_context=_setup, lib=_LIBRARY)
_MIXED = _register(
    "cross_attention_mixed_symbolic(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor? key_bias,"
    f" {_ARGUMENTS}, ScalarType out_dtype, str backend) -> (Tensor, Tensor)",
    _mixed_forward,
    lambda *args: mixed.fake(*args[:-1]),
)
torch.library.register_autograd(_MIXED, _mixed_gradients, setup_context=_mixed_setup, lib=_LIBRARY)
_register(
    "cross_attention_symbolic_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor? "
    f"key_bias, Tensor out, Tensor lse, {_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
