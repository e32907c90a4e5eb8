"""Function transforms: what an op does under torch.func and with forward-mode tangents.

grad, jvp and what is built of them (jacrev, jacfwd, hessian), and forward-mode gradients, run the reference: plain
torch operations, which have derivatives of every order and kind. vmap keeps the kernels: it folds the mapped axis
into the batch and calls the op once. Nothing is ever differentiated silently to zero: a raw op, and an explicit
backend other than the reference, raise where a transform would need their derivative.
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
    """How many transforms of torch.func are under way."""
    return _functorch.get_dynamic_layer_stack_depth()


def when_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile calls the function while it traces, and takes the result for a constant.

    It guards what these functions read, the stack of transforms. As `torch.compiler.assume_constant_result`, which
    would import torch._dynamo, and with it Triton.
    """
    function._dynamo_marked_constant = True
    return function


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: torch.compile breaks its graph at a call of the function, which it then leaves alone.

    As `torch.compiler.disable`, which would import torch._dynamo.
    """

    @functools.wraps(function)
    def run(*args):
        dynamo = sys.modules.get("torch._dynamo")
        return function(*args) if dynamo is None else dynamo.disable(function)(*args)

    run._torchdynamo_disable = True
    return run


@when_traced
def _is_under_way(*kinds: str) -> bool:
    """Whether a transform of one of these kinds ("Grad", "Jvp", "Vmap") is under way, at any depth."""
    return any(level.key().name in kinds for level in _functorch.get_interpreter_stack() or ())


def compiler_drops_tangents() -> bool:
    """Whether torch.compile traces a function that is given forward-mode tangents, for a compiler that drops them."""
    return torch.compiler.is_compiling() and forward_ad._current_level >= 0 and depth() == 0 and _tangents_are_lost()


@when_traced
def _tangents_are_lost() -> bool:
    from torch._dynamo.symbolic_convert import tls  # imported already where torch.compile is at work

    graph = getattr(getattr(tls, "current_tx", None), "output", None)
    if graph is None or graph.dual_level < 0:  # the level was entered inside what is traced, which is served
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
    """Whether a call with these arguments happens under a grad or jvp transform, or meets a forward-mode tangent."""
    if depth() > 0 and _is_under_way("Grad", "Jvp"):
        return True
    if forward_ad._current_level < 0:
        return False
    return torch.compiler.is_compiling() or _has_tangent(args)  # a traced tensor does not tell


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


class Lane(NamedTuple):
    """A tensor that an op is called with under vmap: its mapped axis is the first one, unless it is `shared` by all."""

    tensor: Tensor
    shared: bool


def _fold_argument(op: Op, name: str, lane: Lane, size: int, batch: int, one_for_all: bool) -> Tensor:
    """The argument with mapped axis and batch as one first axis; `one_for_all`: tensors that may broadcast do so."""
    tensor, shared = lane
    if shared and (tensor.dim() == op.without_batch.get(name) or (one_for_all and name in op.broadcasts)):
        return tensor
    if shared:
        tensor = tensor.unsqueeze(0)
    if tensor.dim() - 1 == op.without_batch.get(name):
        tensor = tensor.unsqueeze(1)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


def fold(op: Op, size: int, args: Sequence[Any]) -> Any:
    """Calls an op once for a mapped axis of that size, by making it part of the batch.

    Args:
        op: what is called.
        size: of the mapped axis.
        args: all arguments of the schema, tensors as `Lane`.

    Returns:
        The results, mapped axis first.
    """
    *arguments, backend = args
    leading = arguments[op.arguments.index(op.batch)]
    leading = leading if isinstance(leading, Lane) else leading[0]
    batch = leading.tensor.shape[0 if leading.shared else 1]

    broadcast = [lane for name, lane in zip(op.arguments, arguments, strict=True) if lane and name in op.broadcasts]
    one_for_all = all(lane.shared and lane.tensor.shape[0] == 1 for lane in broadcast)

    def folded(name: str, value: Any) -> Any:
        if isinstance(value, Lane):
            return _fold_argument(op, name, value, size, batch, one_for_all)
        return [folded(name, v) for v in value] if isinstance(value, list | tuple) else value

    results = op.overload(*map(folded, op.arguments, arguments), backend)

    def unfold(result: Tensor) -> Tensor:
        if result.dim() <= op.result_batch or result.shape[op.result_batch] != size * batch:
            # Stands for no result, such as the gradient of a bias that is not there.
            return result.expand(size, *result.shape)
        return result.unflatten(op.result_batch, (size, batch)).movedim(op.result_batch, 0)

    return pytree.tree_map_only(Tensor, unfold, results)


def vmap_rule(op: Op) -> Callable[..., Any]:
    """The rule of `torch.vmap`, as `torch.library.register_vmap` takes it."""

    def lane(value: Any, dim: int | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        return Lane(value, True) if dim is None else Lane(value.movedim(dim, 0), False)

    def rule(info, in_dims, *args):
        values, backend = op.fill(pytree.tree_map(lane, args, in_dims))
        results = fold(op, info.batch_size, (*values, backend))
        return results, pytree.tree_map(lambda _: 0, results)

    return rule


def batched_gradient_rule(op: Op) -> Callable[..., Any]:
    """The rule of `torch.autograd.grad(is_grads_batched=True)`, which has a vmap of its own."""

    def rule(*args):
        # The level is told only by entering one more.
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()

        def lane(value: Tensor) -> Lane:
            shared = not _functorch.is_legacy_batchedtensor(value)
            return Lane(value if shared else torch._remove_batch_dim(value, level, 1, 0), shared)

        lanes = pytree.tree_map_only(Tensor, lane, args)
        leaves = pytree.tree_leaves(lanes, is_leaf=lambda x: isinstance(x, Lane))
        size = next(x.tensor.shape[0] for x in leaves if isinstance(x, Lane) and not x.shared)
        values, backend = op.fill(lanes)
        results = fold(op, size, (*values, backend))
        return pytree.tree_map_only(Tensor, lambda t: torch._add_batch_dim(t, 0, level), results)

    return rule
