"""The shapes of a model's weights without the weights: what it needs is known before it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .errors import UserError
from .measure import available_bytes


class _NoValues(TorchFunctionMode):
    """Leaves out the initial values, of which the first on the meta device takes a second of imports."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model whose weights have shapes and no values, on the meta device."""
    with torch.device("meta"), _NoValues():
        return make()


def count_numbers(make: Callable[[int], nn.Module], depth: int) -> int:
    """Count the numbers of a model's state without making its blocks, however many.

    Args:
        make: the model with so many equal blocks.
        depth: how many it has.
    """
    one, two = (sum(t.numel() for t in skeleton(lambda d=d: make(d)).state_dict().values()) for d in (1, 2))
    return one + (depth - 1) * (two - one)


def require_room(need: float, what: str, instead: str) -> None:
    """Refuse what does not fit into memory.

    Args:
        need: bytes.
        what: takes them.
        instead: what the user can do.

    Raises:
        UserError: fewer are free.
    """
    free = available_bytes()
    if need > free:
        raise UserError(
            f"{what} takes about {need / 2**30:,.1f} GiB of memory and {free / 2**30:.1f} GiB are free; {instead}"
        )
