"""Makes the `torch.autograd.Function` of each op, used below the dispatcher and on the fast path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import _fast, _transforms
from ._op import OPS, Op


class BoundOps:
    """torch.ops.vidmem with the backend of the forward call, for the backward pass."""

    def __init__(self, backend: str):
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = OPS[name]
        return lambda *args: _fast.call_op(op, op.complete(args), self._backend)


def make_function(op: Op) -> type[torch.autograd.Function]:
    """Makes the Function of an op: `apply(*arguments, backend, run)` returns `run(*arguments)` with its gradient.

    autograd does not see tensors in lists, so an op with lists takes `apply(*leaves, structure, backend, run)`.
    """
    lists = op.has_lists

    def forward(ctx, *inputs):
        *args, backend, run = inputs
        if lists:
            *leaves, structure = args
            args = pytree.tree_unflatten(leaves, structure)
        result = run(*args)
        ctx.backend = backend
        if op.setup_context is not None:
            op.setup_context(ctx, tuple(args), result)
        return result

    def backward(ctx, *grads):
        if op.backward is None:
            raise RuntimeError(f"{op.name}: has no derivative; second derivatives are not supported")
        grads = op.backward(BoundOps(ctx.backend), ctx, *grads)
        grads = grads if isinstance(grads, tuple) else (grads,)
        if lists:
            grads = *(g for grad in grads for g in (grad if isinstance(grad, list | tuple) else (grad,))), None
        return *grads, None, None

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{op.name}_function", (torch.autograd.Function,), methods)


def autograd_kernel(op: Op) -> Callable[..., Any]:
    """The kernel to register at the op's Autograd key."""

    def kernel(keyset, *args):
        _transforms.check_no_tangent(op.name, args)
        below = keyset & torch._C._after_autograd_keyset

        def run(*args):
            with torch._C._AutoDispatchBelowAutograd():
                return op.overload.redispatch(below, *args, backend)

        args, backend = op.fill(args)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return op.apply(args, backend, run)
        return run(*args)

    return kernel
