"""What `torch.use_deterministic_algorithms` asks of our kernels: that of torch's own attention.

With it on, a call gives the same bits each time. With `warn_only=True` the faster kernel runs, as torch's flash and
cuDNN attention do then, and warns. The flag is read whenever a kernel is launched, so a compiled graph follows it too.
"""

from __future__ import annotations

import warnings

import torch


def must_be_deterministic() -> bool:
    """Whether a kernel may not give other bits from run to run: the flag is on, and not to warn only."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def warn_if_asked(kernel: str) -> None:
    """Called before a kernel is launched that is not deterministic: warns where the flag is on, to warn only."""
    if torch.is_deterministic_algorithms_warn_only_enabled() and torch.are_deterministic_algorithms_enabled():
        warnings.warn(
            f"{kernel} is not deterministic; torch.use_deterministic_algorithms(True) without warn_only selects a"
            " deterministic kernel",
            stacklevel=2,
        )
