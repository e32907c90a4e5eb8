"""Registers an op with its schema, reference, fake, gradient, autocast rule and faster backends.

vidmem::<op>       the op that is called; its last argument is `str backend="auto"`. Autocast and autograd are
                   registered above one kernel for all devices, which asks `_dispatch` for the backend and runs it.
vidmem_cpp::<op>   the same schema without `backend`; csrc/ registers its CPU and CUDA kernels here. They are separate
                   because the choice between C++, Triton, a library and the reference is made per call.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from . import _autograd, _dispatch, _transforms
from ._op import OPS, Library, Op

_LIBRARY = torch.library.Library("vidmem", "DEF")
_CPP_LIBRARY = torch.library.Library("vidmem_cpp", "DEF")


def load_families() -> None:
    """Registers the ops of every family, i.e. of each package next to this file that has an ops.py."""
    for ops in sorted(Path(__file__).parent.glob("*/ops.py")):
        importlib.import_module(f"{__package__}.{ops.parent.name}.ops")


def register_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: tuple[str, ...],
    triton: str | None = None,
    library: tuple[Library, ...] | None = None,
    refuse: dict[str, Callable[..., str | None]] | None = None,
    batch: str | None = None,
    broadcasts: tuple[str, ...] = (),
    without_batch: dict[str, int] | None = None,
    result_batch: int = 0,
    head_axes: dict[str, int] | None = None,
    result_heads: tuple[int, ...] = (),
    varies: tuple[str, ...] = (),
) -> Op:
    """Registers torch.ops.vidmem.<op>.

    Args:
        schema: e.g. "gather_tokens(Tensor bank, Tensor index) -> Tensor"; `backend` is appended.
        reference: plain PyTorch that runs on every device and returns new tensors, never views of its arguments.
        fake: function that returns the (contiguous) results as fake tensors.
        setup_context: `(ctx, inputs, output)`: saves what `backward` needs.
        backward: `(ops, ctx, *grads) -> a gradient or None for each argument`; calls other vidmem ops by `ops`. Without
            it, differentiating a float result raises an error.
        autocast: names of the tensor arguments that torch.autocast casts; () for none.
        triton: module of the family with the launch function, launch_<op>_fwd, or launch_<op>_bwd for <op>_backward.
        library: libraries that compute the op, the best one first.
        refuse: per backend, a function of the arguments that returns why it cannot run them, or None.
        batch: name of the tensor whose first axis is the batch, into which vmap folds its axis; default the first
            tensor.
        broadcasts: names of tensors that may have batch 1 when the batch is larger; either all or none of them have it.
        without_batch: names of tensors that may lack the batch axis, with their number of dimensions in that case.
        result_batch: axis of the batch in the results.
        head_axes: head axis of tensor arguments, by name, which DTensor may shard.
        result_heads: head axis of each result.
        varies: backends whose results on a GPU may differ in the last bits from run to run, unless
            torch.use_deterministic_algorithms(True) is set; see docs/determinism.md.

    Returns:
        The `Op`; its family is the package of `reference`.
    """
    name = schema.split("(", 1)[0]
    head, returns = schema.rsplit(") ->", 1)
    # `Scalar` keeps symbolic numbers, `float` would make them constants of the graph; the stable ABI only has `float`.
    _CPP_LIBRARY.define(schema.replace("Scalar ", "float "))
    # torch drops arguments that equal their default and then miscounts the gradients of an op with tensor lists.
    default = "" if "Tensor[]" in head else '="auto"'
    _LIBRARY.define(f"{head}, str backend{default}) ->{returns}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(torch.ops.vidmem, name).default
    arguments = overload._schema.arguments
    op = Op(
        name=name,
        family=reference.__module__.rpartition(".")[0],
        arguments=tuple(a.name for a in arguments[:-1]),
        tensors=tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type)),
        defaults=tuple(a.default_value if a.has_default_value() else None for a in arguments),
        reference=reference,
        fake=fake,
        setup_context=setup_context,
        backward=backward,
        autocast=autocast,
        triton=triton,
        library=library,
        refuse=refuse or {},
        batch=batch or next(a.name for a in arguments if "Tensor" in str(a.type)),
        broadcasts=broadcasts,
        without_batch=without_batch or {},
        result_batch=result_batch,
        head_axes=head_axes or {},
        result_heads=result_heads,
        varies=varies,
    )
    op.function = _autograd.make_function(op)
    OPS[name] = op
    _register_kernel(op)
    _LIBRARY.impl(name, _autograd.autograd_kernel(op), "Autograd", with_keyset=True)
    torch.library.register_vmap(f"vidmem::{name}", _transforms.vmap_rule(op), lib=_LIBRARY)
    _LIBRARY.impl(name, _transforms.batched_gradient_rule(op), "Batched")
    if autocast:
        _register_autocast(op)
    return op


def _register_kernel(op: Op) -> None:
    def kernel(*args):
        args, backend = op.fill(args)
        device = op.device(args)
        chosen = _dispatch.select(op, device, args, backend)
        run = _dispatch.implementation(op, chosen, device, args)
        if device.type == "cuda":
            run = _dispatch.on_device(run, device)
        # Autocast was applied above; here it would lower the float32 products of a reference.
        with torch._C._DisableAutocast():
            return run(*args)

    def fake(*args):
        args, backend = op.fill(args)
        if _dispatch.is_recording():
            _dispatch.select(op, op.device(args), args, backend)
        return op.fake(*args)

    _LIBRARY.impl(op.name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vidmem::{op.name}", fake, lib=_LIBRARY)


def _register_autocast(op: Op) -> None:
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def cast_and_call(*args, device_type=device_type, key=key):
            args, backend = op.fill(args)
            args = op.cast(args, torch.get_autocast_dtype(device_type))
            keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return op.overload(*args, backend)

        _LIBRARY.impl(op.name, cast_and_call, key)
