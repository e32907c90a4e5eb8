"""Models without weight values, on the meta device, to check memory before a model is made."""

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

# Weights, gradients, EMA, and the two moments of AdamW.
_TRAINED_COPIES = 5
# Frozen weights are in the trained model and in the EMA model.
_FROZEN_COPIES = 2


class _NoValues(TorchFunctionMode):
    """Skips the initialisation of weights; the first one on the meta device imports modules for a second."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def skeleton(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model on the meta device, whose weights have shapes but no values."""
    with torch.device("meta"), _NoValues():
        return make()


def count_numbers(make: Callable[[int], nn.Module], depth: int) -> int:
    """Count the numbers of a model's state, from models with one and two blocks.

    Args:
        make: Makes the model with a given number of equal blocks.
        depth: Number of blocks.
    """
    one, two = (sum(t.numel() for t in skeleton(lambda d=d: make(d)).state_dict().values()) for d in (1, 2))
    return one + (depth - 1) * (two - one)


def require_trainable(make: Callable[[int], nn.Module], depth: int, device: torch.device) -> None:
    """Check that the training of a model fits into memory, before the model is made.

    Args:
        make: Makes the model with a given number of equal blocks; its frozen part does not depend on the number.
        depth: Number of blocks.
        device: Device of the training. A GPU holds gradients, moments and EMA, which several processes share; the
            weights are initialised on the CPU in any case.

    Raises:
        UserError: There is not enough memory, or the sizes do not fit together.
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
    """Check that there is enough free memory.

    Args:
        need: Bytes needed.
        what: What needs them, for the message.
        instead: Remedy, for the message.

    Raises:
        UserError: Fewer bytes are free.
    """
    free = available_bytes()
    if need > free:
        raise UserError(
            f"{what} takes about {need / 2**30:,.1f} GiB of memory and {free / 2**30:.1f} GiB are free; {instead}"
        )
