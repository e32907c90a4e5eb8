"""What the references of several families share: the dtype of sums, the check of an index, a sum that is in order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch
from torch._subclasses.fake_tensor import is_fake
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype that sums are kept in: float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_index(op: str, name: str, index: Tensor, low: int, rows: int) -> None:
    """Raises IndexError unless every element of `index` is in [low, rows - 1]; waits for a GPU.

    Under torch.func the values below the transforms are looked at; in a trace there are none to look at.
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
    """`out` with `values` (K, C) added to its rows (K,); rows of equal index are added in order of K on every device.

    A new tensor: what adds in place cannot be batched by torch.func.
    """
    # index_put sorts on CUDA, index_add is in order on the CPU only.
    if out.device.type == "cpu":
        return out.index_add(0, row, values)
    return out.index_put((row,), values, accumulate=True)
