"""New uninitialised memory that shows where it is read: NaN instead of what was there before."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# All that makes a tensor without values comes here: torch.empty, new_empty, empty_like, and C++ by at::empty or the
# stable ABI. Not a dispatch mode: those are off inside kernels, and the fast path steps aside for them.
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
        # -1 would pass for "none" in an index.
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
    """Fills every new uninitialised tensor of a CPU or GPU with NaN (integers: the maximum), in C++ kernels too.

    No switch of torch is touched, so the kernels are those that run by default. May be nested. It holds for all
    threads, and none may make tensors while the outermost one is entered or left. What operators of torch itself
    allocate for their results, past the dispatcher, stays as it is, as do the fakes of a trace.
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
