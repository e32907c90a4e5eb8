"""Calls an op on behalf of a public function."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import _dispatch, _fast, _sharding, _symbolic, _transforms
from ._op import OPS


def call(name: str, *args: Any, backend: str | None) -> Any:
    """Calls an op by the dispatcher, or its reference if a transform takes the derivative.

    Args:
        name: name of the op.
        *args: its arguments.
        backend: the user's `backend` argument.

    Returns:
        The results of the op.

    Raises:
        ValueError: there is no such backend.
        BackendError: an explicit backend cannot run this call.
    """
    backend = _dispatch.requested(backend)
    _sharding.prepare()
    if _transforms.compiler_drops_tangents():
        return _call_uncompiled(name, args, backend)
    if _transforms.differentiates(args):
        return _call_differentiated(name, args, backend)
    results = _symbolic.unguarded(getattr(torch.ops.vidmem, name), *args, backend)
    if not torch.compiler.is_compiling():
        _fast.watch(OPS[name], args, backend, results)
    return results


@_transforms.uncompiled
def _call_uncompiled(name: str, args: tuple[Any, ...], backend: str) -> Any:
    return call(name, *args, backend=backend)


def _own(tensor: torch.Tensor) -> torch.Tensor:
    # torch.compile cannot make a view of a tensor whose tangent has other strides.
    return tensor.clone(memory_format=torch.contiguous_format) if tensor.is_floating_point() else tensor


@_transforms.when_traced
def _keep_whole(name: str) -> None:
    """Makes torch.compile keep the reference as one node of its graph, which AOTAutograd then traces."""
    torch.compiler.allow_in_graph(OPS[name].differentiable)


def _call_differentiated(name: str, args: tuple[Any, ...], backend: str) -> Any:
    """Runs the reference as plain PyTorch, which has all derivatives; ops without a gradient keep their kernel."""
    op = OPS[name]
    backend = _dispatch.resolve(backend)
    if backend not in ("auto", "reference"):
        raise _dispatch.BackendError(
            f"{name}: backend {backend!r} has no derivative under torch.func or in forward mode; "
            "use 'reference', or 'auto', which selects it"
        )
    if op.backward is None:
        args = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        return op.overload(*args, backend)
    if torch.compiler.is_compiling():
        _keep_whole(name)
        return op.differentiable(*pytree.tree_map_only(torch.Tensor, _own, args))
    if _dispatch.is_recording():
        _dispatch.record_differentiated(op, op.device(args))
    return _transforms.uncompiled(op.differentiable)(*args)
