"""Declares an op once: schema, reference, fake, gradient, autocast and its faster backends.

vidmem::<op>       what everybody calls; last argument `str backend="auto"`. Autocast and autograd sit above one
                   kernel for all devices, which asks `_dispatch` for the backend and runs it.
vidmem_cpp::<op>   the same schema without `backend`; csrc/ registers its CPU and CUDA kernels here. They stand
                   apart because the choice between C++, Triton, a library and the reference is made per call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.library import Library
from torch.utils import _pytree as pytree

from . import _autograd, _dispatch, _extension, _transforms, _verified

_LIBRARY = Library("vidmem", "DEF")
_CPP_LIBRARY = Library("vidmem_cpp", "DEF")
OPS: dict[str, Op] = {}


@dataclass(eq=False)
class Op:
    """What the registry knows of one op; see `register_op` for the fields."""

    name: str
    family: str
    arguments: tuple[str, ...]
    tensors: tuple[int, ...]  # which arguments are tensors or lists of them
    defaults: tuple[Any, ...]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    autocast: tuple[str, ...]
    triton: str | None
    library: tuple[_dispatch.Library, ...] | None
    refuse: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    batch: str = ""
    broadcasts: tuple[str, ...] = ()
    without_batch: dict[str, int] = field(default_factory=dict)
    result_batch: int = 0
    head_axes: dict[str, int] = field(default_factory=dict)
    result_heads: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.overload: torch._ops.OpOverload = getattr(torch.ops.vidmem, self.name).default
        self.has_lists = any("List[Tensor]" in str(a.type) for a in self.overload._schema.arguments)
        self.function = _autograd.make_function(self)
        self.registry = OPS
        self.remembered: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self.differentiable = self._differentiable()

    def _differentiable(self) -> Callable[..., Any]:
        def differentiable(*args):
            """The reference with the op's autocast: what transforms differentiate."""
            device = self.device(args)
            if self.autocast and torch.is_autocast_enabled(device.type):
                args = self.cast(args, torch.get_autocast_dtype(device.type))
            with torch._C._DisableAutocast():
                return self.run_reference(*args)

        return differentiable

    def cast(self, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments as autocast to `dtype` wants them: float64 stays, as in torch's own autocast."""

        def lower(tensor: torch.Tensor) -> torch.Tensor:
            lowers = tensor.is_floating_point() and tensor.dtype != torch.float64
            return tensor.to(dtype) if lowers else tensor

        cast = [
            a if name not in self.autocast else pytree.tree_map_only(torch.Tensor, lower, a)
            for name, a in zip(self.arguments, args, strict=True)
        ]
        return tuple(cast)

    def fill(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
        """(arguments, backend); the dispatcher drops trailing arguments that equal their default."""
        *filled, backend = args + self.defaults[len(args) :]
        return tuple(filled), backend

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call, defaults added."""
        return args + self.defaults[len(args) : -1]

    def bind(self, args: tuple[Any, ...], backend: str) -> Callable[..., Any] | None:
        """The kernel of calls like this one, gradient included, past the dispatcher; None if only that can serve it."""
        device = self.device(args)
        chosen = _dispatch.select(self, device, args, backend)
        run = _dispatch.implementation(self, chosen, device, args)
        if device.type == "cuda":
            run = _on_device(run, device)
        if chosen == "triton":
            run = self._materialised(run, backend)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return run
        return None if self.backward is None else lambda *args: _autograd.apply(self, args, backend, run)

    def _materialised(self, run: Callable[..., Any], backend: str) -> Callable[..., Any]:
        """`run`, which reads memory, but the dispatcher where a tensor's values are not what its memory holds."""

        def run_or_dispatch(*args):
            tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            plain = not any(t.is_neg() or t._is_zerotensor() for t in tensors)
            return run(*args) if plain else self.overload(*args, backend)

        return run_or_dispatch

    @property
    def launch(self) -> str:
        """Name of the function that launches the op's Triton kernels."""
        forward = self.name.removesuffix("_backward")
        return f"launch_{forward}_{'fwd' if forward == self.name else 'bwd'}"

    def verified_on(self, backend: str) -> _verified.Verified | None:
        """The run on a GPU that a kernel passed, or None where it never did or there is no such kernel."""
        if backend == "triton" and self.triton:
            now = _verified.triton_fingerprint(self.family.rpartition(".")[2], self.triton)
        else:
            now = _extension.cuda_fingerprint(self.name) if backend == "cuda" else None
        return _verified.verified_on(self.name, backend, now)

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


def _on_device(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`run` with `device` as the current one: Triton launches there, whatever its tensors are on."""

    def run_there(*args):
        with torch.cuda.device(device):
            return run(*args)

    return run_there


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
    batch: str | None = None,
    broadcasts: tuple[str, ...] = (),
    without_batch: dict[str, int] | None = None,
    result_batch: int = 0,
    head_axes: dict[str, int] | None = None,
    result_heads: tuple[int, ...] = (),
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
        triton: the family's module with the launch function: launch_<op>_fwd, or launch_<op>_bwd for <op>_backward.
        library: libraries that compute it, the best one first.
        refuse: per backend, a function of the arguments that returns why it cannot run them, or None.
        batch: name of the tensor whose first axis is the batch, which vmap folds its axis into; default the first one.
        broadcasts: names of tensors that may have a batch of 1 where the batch is larger.
        without_batch: names of tensors that may lack the batch axis, with their number of dimensions then.
        result_batch: axis of the batch in the results.
        head_axes, result_heads: axes of the heads in tensor arguments and in the results, which DTensor may shard.

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
    )
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
            run = _on_device(run, device)
        # Autocast has had its say above; inside it would lower the float32 products of a reference.
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
