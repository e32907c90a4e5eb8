"""Batches drawn by threads while the steps before them are trained on."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

# Batches that wait to be trained on, for each thread.
_WAITING = 2


@contextmanager
def ahead(draw: Callable[[int], Any], steps: Iterable[int], threads: int) -> Iterator[Iterator[Any]]:
    """Draw the batches of steps, in their order.

    Args:
        draw: makes the batch of a step, whatever was drawn before; with threads it is called in several at once.
        steps: numbers of the steps.
        threads: that draw ahead; 0 draws each batch when it is asked for.

    Returns:
        Iterator over the batches. What `draw` raises comes when its batch is asked for.
    """
    if not threads:
        yield map(draw, steps)
        return
    left = iter(steps)
    drawn: deque[Future[Any]] = deque()

    def batches() -> Iterator[Any]:
        drawn.extend(pool.submit(draw, step) for step in itertools.islice(left, _WAITING * threads))
        while drawn:
            batch = drawn.popleft().result()
            drawn.extend(pool.submit(draw, step) for step in itertools.islice(left, 1))
            yield batch

    # Each thread with one core: they are many already.
    with ThreadPoolExecutor(threads, "batches", lambda: torch.set_num_threads(1)) as pool:
        try:
            yield batches()
        finally:
            for each in drawn:
                each.cancel()
