"""Time and peak memory of the stages of the demo."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .peak import PeakMemory


class Stages:
    """Time and peak memory of stages, in the order in which they ended."""

    def __init__(self) -> None:
        self.done: list[dict[str, Any]] = []

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Measure the body of the `with` statement as one stage."""
        with PeakMemory() as memory:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
        self.done.append(
            {
                "stage": name,
                "seconds": seconds,
                "peak_rss_bytes": memory.peak_bytes,
                "grown_bytes": memory.grown_bytes,
                "measured_with": memory.method,
            }
        )
