"""Function transforms: the behaviour of an op under torch.func and with forward-mode tangents.

grad, jvp and what builds on them (jacrev, jacfwd, hessian), and forward-mode gradients, run the reference: plain
PyTorch operations, which have derivatives of every order and kind. vmap keeps the kernels: it folds the mapped axis
into the batch and calls the op once. No derivative is silently zero: a raw op, and an explicit backend other than the
reference, raise an error where a transform would need their derivative.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C import _functorch
from torch.utils import _pytree as pytree

from ._op import Op


def depth() -> int:
    """The number of active torch.func transforms."""
    return _functorch.get_dynamic_layer_stack_depth()


def when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile calls the function while tracing and treats the result as a constant.

    torch.compile already guards what these functions read, the stack of transforms. Same as
    `torch.compiler.assume_constant_result`, which would import torch._dynamo and with it Triton.
    """
    function._dynamo_marked_constant = True
    return function


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile breaks its graph at a call of the function and does not compile it.

    Same as `torch.compiler.disable`, which would import torch._dynamo.
    """

    @functools.wraps(function)
    def run(*args):
        dynamo = sys.modules.get("torch._dynamo")
        return function(*args) if dynamo is None else dynamo.disable(function)(*args)

    run._torchdynamo_disable = True
    return run


@when_traced
def _is_under_way(*kinds: str) -> bool:
    """Whether a transform of one of these kinds ("Grad", "Jvp", "Vmap") is active, at any depth."""
    return any(level.key().name in kinds for level in _functorch.get_interpreter_stack() or ())


def compiler_drops_tangents() -> bool:
    """Whether torch.compile traces a function with forward-mode tangents for a compiler that drops them."""
    return torch.compiler.is_compiling() and forward_ad._current_level >= 0 and depth() == 0 and _tangents_are_lost()


@when_traced
def _tangents_are_lost() -> bool:
    from torch._dynamo.symbolic_convert import tls  # torch.compile has imported it already

    graph = getattr(getattr(tls, "current_tx", None), "output", None)
    if graph is None or graph.dual_level < 0:  # entered inside the traced function, which works
        return False
    return getattr(graph.compiler_fn, "compiler_name", None) not in ("eager", "aot_eager")


def check_values(name: str, what: str) -> None:
    """Raises RuntimeError under vmap, where sizes cannot depend on values."""
    if depth() > 0 and _is_under_way("Vmap"):
        raise RuntimeError(f"{name}: {what}, which cannot be read under vmap")


@uncompiled
def _has_tangent(args: Sequence[Any]) -> bool:
    level = forward_ad._current_level
    tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
    return any(torch._VF._unpack_dual(t, level=level)[1] is not None for t in tensors if t.is_floating_point())


def differentiates(args: Sequence[Any]) -> bool:
    """Whether a call with these arguments is inside a grad or jvp transform, or has a forward-mode tangent."""
    if depth() > 0 and _is_under_way("Grad", "Jvp"):
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or _has_tangent(args)  # a traced tensor does not say whether it has a tangent


def check_no_tangent(name: str, args: Sequence[Any]) -> None:
    """Raises RuntimeError where the derivative of a raw op would be dropped; called at its autograd key."""
    if depth() > 0:
        level = _functorch.peek_interpreter_stack().key()
        if level == _functorch.TransformType.Grad:
            lost = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        else:
            lost = level == _functorch.TransformType.Jvp and _has_tangent(args)
    else:
        lost = forward_ad._current_level >= 0 and _has_tangent(args)
    if lost:
        raise RuntimeError(
            f"{name}: torch.ops.vidmem.{name} has no derivative under torch.func or in forward mode; "
            "call the public function of vidmem_kernels, which then runs its reference"
        )


# --- vmap ---


class Mapped(NamedTuple):
    """An argument of an op under vmap: its mapped axis is the first one, unless the tensor is `shared` by all."""

    tensor: Tensor
    shared: bool


def _fold_argument(op: Op, name: str, argument: Mapped, size: int, batch: int, one_for_all: bool) -> Tensor:
    """The argument with the mapped axis folded into the batch; with `one_for_all`, tensors of batch 1 keep it."""
    tensor, shared = argument
    if shared and (tensor.dim() == op.without_batch.get(name) or (one_for_all and name in op.broadcasts)):
        return tensor
    if shared:
        tensor = tensor.unsqueeze(0)
    if tensor.dim() - 1 == op.without_batch.get(name):
        tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def fold(op: Op, size: int, args: Sequence[Any]) -> Any:
    """Calls an op once for a whole mapped axis, folded into the batch.

    Args:
        op: the op to call.
        size: length of the mapped axis.
        args: all arguments of the schema, with tensors as `Mapped`.

    Returns:
        The results, with the mapped axis first.
    """
    *arguments, backend = args
    leading = arguments[op.arguments.index(op.batch)]
    leading = leading if isinstance(leading, Mapped) else leading[0]
    batch = leading.tensor.shape[0 if leading.shared else 1]

    broadcast = [x for name, x in zip(op.arguments, arguments, strict=True) if x and name in op.broadcasts]
    one_for_all = all(x.shared and x.tensor.shape[0] == 1 for x in broadcast)

    def folded(name: str, value: Any) -> Any:
        if isinstance(value, Mapped):
            return _fold_argument(op, name, value, size, batch, one_for_all)
        return [folded(name, v) for v in value] if isinstance(value, list | tuple) else value

    results = op.overload(*map(folded, op.arguments, arguments), backend)

    def unfold(result: Tensor) -> Tensor:
        if result.dim() <= op.result_batch or result.shape[op.result_batch] != size * batch:
            # A placeholder, such as the gradient of a bias that was not given.
            return result.expand(size, *result.shape)
        return result.unflatten(op.result_batch, (size, batch)).movedim(op.result_batch, 0)

    return pytree.tree_map_only(Tensor, unfold, results)


def vmap_rule(op: Op) -> Callable[..., Any]:
    """The rule for `torch.vmap`, as `torch.library.register_vmap` takes it."""

    def mapped(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Mapped(value, True) if dim is None else Mapped(value.movedim(dim, 0), False)

    def rule(info, in_dims, *args):
        values, backend = op.fill(pytree.tree_map(mapped, args, in_dims))
        results = fold(op, info.batch_size, (*values, backend))
        return results, pytree.tree_map(lambda _: 0, results)

    return rule


def batched_gradient_rule(op: Op) -> Callable[..., Any]:
    """The rule for `torch.autograd.grad(is_grads_batched=True)`, which has its own vmap."""

    def rule(*args):
        # The current level is found only by entering one more.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def mapped(value: Tensor) -> Mapped:
            shared = not _functorch.is_legacy_batchedtensor(value)
            return Mapped(value if shared else torch._remove_batch_dim(value, level, 1, 0), shared)

        arguments = pytree.tree_map_only(Tensor, mapped, args)
        leaves = pytree.tree_leaves(arguments, is_leaf=lambda x: isinstance(x, Mapped))
        size = next(x.tensor.shape[0] for x in leaves if isinstance(x, Mapped) and not x.shared)
        values, backend = op.fill(arguments)
        results = fold(op, size, (*values, backend))
        return pytree.tree_map_only(Tensor, lambda t: torch._add_batch_dim(t, 0, level), results)

    return rule
