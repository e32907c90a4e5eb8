"""Argument checks shared by the families' api.py; all errors have the form `<op>: <what must hold>, got <what
came>`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ._symbolic import require, require_same

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn)
INDEX_DTYPES = (torch.int32, torch.int64)


def names(dtypes: Sequence[torch.dtype]) -> str:
    """ "float32, bfloat16 or int8" for an error message."""
    short = [str(d).removeprefix("torch.") for d in dtypes]
    return short[0] if len(short) == 1 else f"{', '.join(short[:-1])} or {short[-1]}"


def check_tensor(
    op: str, name: str, tensor: object, shape: str, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES
) -> torch.Tensor:
    """Checks that `tensor` is a tensor with the number of dimensions of `shape` ("B, N, C") and one of the dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{op}: {name} must have shape ({shape}), got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {names(dtypes)}, got {names([tensor.dtype])}")
    return tensor


def _out_of_bounds(op: str, name: str, value: int, low: int, high: int | None) -> str:
    bounds = f"at least {low}" if high is None else f"in [{low}, {high}]"
    return f"{op}: {name} must be {bounds}, got {value}"


def check_int(op: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Checks that `value` is an int (or a symbolic int) in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    require(value >= low, _out_of_bounds, op, name, value, low, high)
    if high is not None:
        require(value <= high, _out_of_bounds, op, name, value, low, high)


def is_number(value: object) -> bool:
    """Whether `value` is an int, a float or a symbolic number; a bool is not."""
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat) and not isinstance(value, bool)


def check_number(op: str, name: str, value: object) -> None:
    """Checks that `value` is a number."""
    if not is_number(value):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def check_finite(op: str, name: str, value: object) -> None:
    """Checks that `value` is a finite number."""
    check_number(op, name, value)
    # Only comparisons, which a compiled graph keeps for every value; math.isfinite would specialise a symbolic number.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {value}")


def check_same(op: str, what: str, first: object, second: object) -> None:
    """Checks that two sizes, shapes, dtypes or devices are equal; `what` names both: "q and k must have the same D"."""
    if isinstance(first, tuple):
        require_same(first, second, lambda: f"{op}: {what}, got {first} and {second}")
    elif first != second:
        raise ValueError(f"{op}: {what}, got {first} and {second}")


def check_same_dtype(op: str, **tensors: torch.Tensor) -> torch.dtype:
    """Checks that tensors have the same dtype after autocast; returns the dtype that the op will see."""
    first_name = next(iter(tensors))
    seen = {}
    for name, tensor in tensors.items():
        seen[name] = tensor.dtype
        # torch raises an error if asked for the autocast of meta tensors.
        autocast = tensor.device.type != "meta" and torch.is_autocast_enabled(tensor.device.type)
        if autocast and tensor.dtype != torch.float64:
            seen[name] = torch.get_autocast_dtype(tensor.device.type)
        check_same(op, f"{first_name} and {name} must have the same dtype", seen[first_name], seen[name])
    return seen[first_name]


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is 1 and may be broadcast; a symbolic size never counts as 1."""
    return isinstance(size, int) and size == 1


def common_batch(op: str, **tensors: torch.Tensor) -> int:
    """Checks that two tensors have the same batch, or one has batch 1; returns the batch of the result."""
    (first, a), (second, b) = ((name, tensor.shape[0]) for name, tensor in tensors.items())
    for one, other in ((a, b), (b, a)):
        if is_one(one):
            return other
    check_same(op, f"{first} and {second} must have the same B", a, b)
    return a
