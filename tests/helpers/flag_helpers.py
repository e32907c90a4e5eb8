"""torch.use_deterministic_algorithms, on for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FLAGS = ("off", "on", "warn only")


@contextmanager
def determinism(flag: str) -> Iterator[None]:
    """The flag as one of `FLAGS` says."""
    was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(flag != "off", warn_only=flag == "warn only")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was[0], warn_only=was[1])
