"""Fills newly allocated memory with NaN in tests, so that reads of uninitialised memory become visible."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# All allocations of uninitialised tensors end here: torch.empty, new_empty, empty_like, at::empty in C++ and the stable
# ABI. A dispatch mode would not do: it is off inside kernels, and the fast path does not run under one.
_ALLOCATORS = ("empty.memory_format", "empty_strided")

_lock = threading.Lock()
_depth = 0
_library: torch.library.Library | None = None


def _poison(tensor: Tensor) -> None:
    if tensor.numel() == 0:  # as in Storage.fill_ below
        return
    if tensor.dtype == torch.bool:
        tensor.untyped_storage().fill_(1)
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        tensor.untyped_storage().fill_(0xFF)
    else:
        # Not -1, which is a valid "none" in an index.
        tensor.fill_(torch.iinfo(tensor.dtype).max)


def _poisoning(name: str, key: str) -> Callable[..., Tensor]:
    original = torch.library.get_kernel(f"aten::{name}", key)

    def allocate(keyset, *args, **kwargs):
        tensor = original.call_boxed(keyset, *args, **kwargs)
        _poison(tensor)
        return tensor

    return allocate


def _begin() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for key in ("CPU", "CUDA") if torch.cuda.is_available() else ("CPU",):
            for name in _ALLOCATORS:
                library.impl(name, _poisoning(name, key), key, with_keyset=True)
    return library


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new uninitialised CPU or GPU tensor with NaN (integers: the maximum), also those of C++ kernels.

    No option of PyTorch is changed, so the kernels are those that run by default. May be nested. It affects all
    threads; no thread may create tensors while the outermost context is entered or left. Memory that PyTorch's own
    operators allocate without the dispatcher, and fake tensors, are not filled.
    """
    global _depth, _library
    with _lock:
        if _depth == 0:
            _library = _begin()
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _library._destroy()
                _library = None
