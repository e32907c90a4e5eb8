"""Declares an op once: schema, reference, fake, gradient, autocast and its faster backends.

vidmem::<op>       what everybody calls; last argument `str backend="auto"`. Autocast and autograd sit above one
                   kernel for all devices, which asks `_dispatch` for the backend and runs it.
vidmem_cpp::<op>   the same schema without `backend`; csrc/ registers its CPU and CUDA kernels here. They stand
                   apart because the choice between C++, Triton, a library and the reference is made per call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.library import Library
from torch.utils import _pytree as pytree

from . import _dispatch

_LIBRARY = Library("vidmem", "DEF")
_CPP_LIBRARY = Library("vidmem_cpp", "DEF")
OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Op:
    """What the registry knows of one op; see `register_op` for the fields."""

    name: str
    family: str
    arguments: tuple[str, ...]
    tensors: tuple[int, ...]  # which arguments are tensors or lists of them
    defaults: tuple[Any, ...]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    backward: Callable[..., Any] | None
    autocast: tuple[str, ...]
    triton: str | None
    library: tuple[_dispatch.Library, ...] | None
    refuse: dict[str, Callable[..., str | None]] = field(default_factory=dict)

    @property
    def overload(self) -> torch._ops.OpOverload:
        return getattr(torch.ops.vidmem, self.name).default

    def fill(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
        """(arguments, backend); the dispatcher drops trailing arguments that equal their default."""
        *filled, backend = args + self.defaults[len(args) :]
        return tuple(filled), backend

    def device(self, args: tuple[Any, ...]) -> torch.device:
        """Where the call runs: on an accelerator if any tensor is there (a bank may stay on the host)."""
        found = None
        for i in self.tensors:
            for tensor in (args[i],) if isinstance(args[i], torch.Tensor) else args[i] or ():
                found = tensor.device
                if found.type != "cpu":
                    return found
        return found

    def run_reference(self, *args: Any) -> Any:
        """The reference, with the contiguous results that the fake promises."""
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, self.reference(*args))


class BoundOps:
    """torch.ops.vidmem with the backend of the forward call: what gradients are computed with."""

    def __init__(self, backend: str):
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(getattr(torch.ops.vidmem, name), backend=self._backend)


def register_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: tuple[str, ...],
    triton: str | None = None,
    library: tuple[_dispatch.Library, ...] | None = None,
    refuse: dict[str, Callable[..., str | None]] | None = None,
) -> Op:
    """Registers torch.ops.vidmem.<op>.

    Args:
        schema: e.g. "gather_tokens(Tensor bank, Tensor index) -> Tensor"; `backend` is appended.
        reference: plain torch, runs on every device; new tensors out, never views of its arguments.
        fake: shapes, dtypes and devices of the (contiguous) results.
        setup_context: `(ctx, inputs, output)`, saves what `backward` needs.
        backward: `(ops, ctx, *grads) -> a gradient or None for each argument`; calls other vidmem ops through `ops`.
            Without it a result that has a float dtype refuses to be differentiated rather than cut the gradient.
        autocast: names of the tensor arguments that torch.autocast casts to its dtype; () for none.
        triton: name of the launch function in the family's triton_kernels.py.
        library: libraries that compute it, the best one first.
        refuse: per backend, a function of the arguments that returns why it cannot run them, or None.

    Returns:
        The `Op`; its family is the package that `reference` lives in.
    """
    name = schema.split("(", 1)[0]
    head, returns = schema.rsplit(") ->", 1)
    # A symbolic number stays one in a Scalar, `float` makes it a constant of the graph; the stable ABI knows `float`.
    _CPP_LIBRARY.define(schema.replace("Scalar ", "float "))
    # torch drops arguments that equal their default, and then miscounts the gradients of an op with lists of tensors.
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
        backward=backward,
        autocast=autocast,
        triton=triton,
        library=library,
        refuse=refuse or {},
    )
    OPS[name] = op
    _register_kernel(op)
    _register_autograd(op, setup_context)
    if autocast:
        _register_autocast(op)
    return op


def _register_kernel(op: Op) -> None:
    def kernel(*args):
        args, backend = op.fill(args)
        device = op.device(args)
        chosen = _dispatch.select(op, device, args, backend)
        # Triton launches on the current device, whatever its tensors are on.
        guard = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        # Autocast has had its say above; inside it would lower the float32 products of a reference.
        with guard, torch._C._DisableAutocast():
            return _dispatch.implementation(op, chosen, device, args)(*args)

    def fake(*args):
        args, backend = op.fill(args)
        if _dispatch.is_recording():
            _dispatch.select(op, op.device(args), args, backend)
        return op.fake(*args)

    _LIBRARY.impl(op.name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vidmem::{op.name}", fake, lib=_LIBRARY)


def _register_autograd(op: Op, setup_context: Callable[..., None] | None) -> None:
    def setup(ctx, inputs, output):
        ctx.backend = inputs[-1]
        if setup_context is not None:
            setup_context(ctx, inputs[:-1], output)

    def backward(ctx, *grads):
        if op.backward is None:
            raise RuntimeError(f"{op.name}: has no derivative (second derivatives are not supported)")
        grads = op.backward(BoundOps(ctx.backend), ctx, *grads)
        return *(grads if isinstance(grads, tuple) else (grads,)), None

    torch.library.register_autograd(f"vidmem::{op.name}", backward, setup_context=setup, lib=_LIBRARY)


def _lower(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as autocast wants it: float64 stays, as in torch's own autocast."""
    lowers = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if lowers else tensor


def _register_autocast(op: Op) -> None:
    positions = [op.arguments.index(name) for name in op.autocast]

    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):

        def cast_and_call(*args, device_type=device_type, key=key):
            args, backend = op.fill(args)
            args = list(args)
            dtype = torch.get_autocast_dtype(device_type)
            for i in positions:
                args[i] = pytree.tree_map_only(torch.Tensor, lambda t: _lower(t, dtype), args[i])
            keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return op.overload(*args, backend)

        _LIBRARY.impl(op.name, cast_and_call, key)
