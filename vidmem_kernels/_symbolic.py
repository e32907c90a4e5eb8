"""Checks of symbolic sizes that do not restrict an exported program, and results that it can save.

An `if` on a symbol becomes a guard. torch.export rejects a guard that it cannot prove for the whole range of a dynamic
dimension, and it can prove little: not even `n // 2 <= n`. Such a condition is therefore tested only on the sizes of
the example, and added to the graph as an assertion for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.compiler import is_dynamo_compiling, is_exporting
from torch.utils import _pytree as pytree

# torch.fx.experimental imports sympy, which takes a second, so it is imported only where needed.

Result = TypeVar("Result", bound=type)


def saveable(cls: Result) -> Result:
    """Registers a NamedTuple with PyTorch, so that an exported program that takes or returns one can be saved."""
    pytree._register_namedtuple(cls, serialized_type_name=f"vidmem_kernels.{cls.__name__}")
    return cls


def require(condition: bool | torch.SymBool, message: Callable[..., str], *args: Any) -> None:
    """Raises ValueError(message(*args)) unless a condition on sizes holds."""
    if is_dynamo_compiling():
        from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true

        if is_exporting():
            # With strict=True neither the example's sizes nor the graph are accessible; the kernels check again.
            return
        # torch.compile guards anyway, and a guard raises the same error as eager mode.
        if guard_or_false(condition):
            return
        if not guard_or_true(condition):
            raise ValueError(message(*args))
        torch._check(condition)  # it depends on data
    elif isinstance(condition, bool):
        if not condition:
            raise ValueError(message(*args))
    else:
        _require_symbolic(condition, lambda: message(*args))


def _require_symbolic(condition: torch.SymBool, message: Callable[[], str]) -> None:
    from torch.fx.experimental.symbolic_shapes import guard_or_false, guard_or_true, statically_known_true

    if statically_known_true(condition):
        return
    with condition.node.shape_env.suppress_guards():
        if guard_or_false(condition):
            torch.ops.aten._assert_scalar(condition, message())
            return
        if not guard_or_true(condition):
            raise ValueError(message())
    torch._check(condition, message)  # it depends on data


def _is_plain(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_Symbol


def require_same(first: tuple[int, ...], second: tuple[int, ...], message: Callable[[], str]) -> None:
    """Raises ValueError(message()) unless two sequences of sizes are equal."""
    if is_dynamo_compiling() or not is_exporting():
        if first != second:
            raise ValueError(message())
        return
    if len(first) != len(second):
        raise ValueError(message())
    for a, b in zip(first, second, strict=True):
        # A guard is right for two dimensions that must be equal: torch then uses one symbol for both.
        if not (_is_plain(a) and _is_plain(b)):
            require(a == b, message)
        elif a != b:
            raise ValueError(message())


def minus(total: int | torch.SymInt, part: int | torch.SymInt) -> int | torch.SymInt:
    """total - part; if the part is a fraction of the total, in a form that PyTorch knows to be non-negative."""
    if not isinstance(part, torch.SymInt):
        return total - part
    from torch.utils._sympy.functions import FloorDiv

    if not isinstance(part.node.expr, FloorDiv):
        return total - part
    base, divisor = part.node.expr.args
    whole = total.node.expr if isinstance(total, torch.SymInt) else total
    # n - n // 2 is (n + 1) // 2; other fractions likewise.
    base = divisor * whole - base + divisor - 1
    return part.node.shape_env.create_symintnode(FloorDiv(base, divisor), hint=None)


def unguarded(function: Callable[..., Any], *args: Any) -> Any:
    """Calls function(*args) without guards on the sizes of its results.

    PyTorch asks of every result whether a size is 1; for a computed size, such as n // 2, the answer would become a
    guard that excludes small sizes.
    """
    if is_dynamo_compiling() or not is_exporting():
        return function(*args)
    first = args[0] if isinstance(args[0], torch.Tensor) or not isinstance(args[0][0], torch.Tensor) else args[0][0]
    sizes = [n for n in getattr(first, "shape", first) if isinstance(n, torch.SymInt)]
    if not sizes:
        return function(*args)
    with sizes[0].node.shape_env.suppress_guards():
        return function(*args)
