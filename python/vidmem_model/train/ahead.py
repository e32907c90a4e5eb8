"""Prepare batches in threads during the training steps before them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

# Batches that wait for their step, per thread.
_WAITING = 2


@contextmanager
def ahead(draw: Callable[[int], Any], steps: Iterable[int], threads: int) -> Iterator[Iterator[Any]]:
    """Prepare the batches of steps, in order.

    Args:
        draw: Makes the batch of a step, independent of other batches; threads call it concurrently.
        steps: Numbers of the steps.
        threads: Number of threads; 0 makes each batch when it is requested.

    Yields:
        An iterator over the batches. An exception of `draw` is raised when its batch is requested.
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

    # One core per thread, because there are many threads.
    with ThreadPoolExecutor(threads, "batches", lambda: torch.set_num_threads(1)) as pool:
        try:
            yield batches()
        finally:
            for each in drawn:
                each.cancel()
