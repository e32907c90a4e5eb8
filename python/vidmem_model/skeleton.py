"""The shapes of a model's weights without the weights: what it needs is known before it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

from .checks import shorten
from .errors import UserError
from .machine import available_bytes

# Weights, gradients, their moving average, and the two moments of AdamW.
_TRAINED_COPIES = 5
# Weights that stay as they are, in the model that is trained and in that with the moving average.
_FROZEN_COPIES = 2


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


def require_trainable(make: Callable[[int], nn.Module], depth: int, device: torch.device) -> None:
    """Refuse a model whose training cannot fit into memory, before it is made.

    Args:
        make: the model with so many equal blocks; what is frozen in it is there with any number.
        depth: how many it has.
        device: of the training. A GPU holds gradients, moments and averages, several processes share them; the
            weights are made on the CPU in any case.

    Raises:
        UserError: there is too little memory, or the sizes do not go together.
    """
    try:
        numbers = count_numbers(make, depth)
        frozen = sum(p.numel() for p in skeleton(lambda: make(1)).parameters() if not p.requires_grad)
    except ValueError as error:
        raise UserError(f"the model cannot be made ({shorten(error)})") from error
    on_cpu = device.type == "cpu" and not dist.is_initialized()
    need = numbers + on_cpu * ((_TRAINED_COPIES - 1) * (numbers - frozen) + (_FROZEN_COPIES - 1) * frozen)
    what = f"training a model of {numbers:,} weights"
    require_room(4.0 * need, what, "choose a smaller model, or train it on several GPUs")


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
