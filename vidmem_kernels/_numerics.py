"""Numerics shared by the references of several families: the accumulation dtype, the index check, an ordered sum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are accumulated: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_index(op: str, name: str, index: Tensor, low: int, rows: int) -> None:
    """Raises IndexError unless all of `index` is in [low, rows - 1]; synchronises with a GPU.

    Under torch.func it checks the values below the transforms; in a trace there are none to check.
    """
    while _functorch.is_functorch_wrapped_tensor(index):
        index = _functorch.get_unwrapped(index)
    if index.numel() == 0 or is_fake(index) or get_proxy_mode() is not None:
        return
    smallest, largest = index.amin().item(), index.amax().item()
    if smallest < low or largest >= rows:
        wrong = smallest if smallest < low else largest
        raise IndexError(f"{op}: {name} must be in [{low}, {rows - 1}], got {wrong}")


def add_rows(out: Tensor, row: Tensor, values: Tensor) -> Tensor:
    """`out` with `values` (K, C) added to its rows (K,); rows with the same index are added in order of K on every
    device.

    Returns a new tensor, since torch.func cannot batch in-place additions.
    """
    # index_put sorts on CUDA; index_add adds in order only on the CPU.
    if out.device.type == "cpu":
        return out.index_add(0, row, values)
    return out.index_put((row,), values, accumulate=True)
