"""Follows `torch.use_deterministic_algorithms`, in the same way as PyTorch's own attention.

With the flag on, a call returns the same bits every time. With `warn_only=True` the faster kernel runs and warns, as
PyTorch's flash and cuDNN attention do. The flag is read at every kernel launch, so compiled graphs follow it too.
"""

from __future__ import annotations

import warnings

import torch


def must_be_deterministic() -> bool:
    """Whether a kernel must give the same bits in every run: the flag is on, without `warn_only`."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def warn_if_asked(kernel: str) -> None:
    """Warns before the launch of a kernel that is not deterministic, if the flag is on with `warn_only`."""
    if torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled():
        warnings.warn(
            f"{kernel} is not deterministic; torch.use_deterministic_algorithms(True) without warn_only selects a"
            " deterministic kernel",
            stacklevel=2,
        )
