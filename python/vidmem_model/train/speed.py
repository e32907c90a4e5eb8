"""How fast a training went: its steps and floating-point operations a second."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..machine import describe_device
from .step import Pass

# Steps after which the speed is taken: the first ones choose kernels, and capture graphs.
_SETTLED = 20


class Speed:
    """Clock of a training, which waits for the GPU when it starts and when it is read.

    Args:
        device: that is trained on.
        done: steps of the run that were done before.
        run: counts the operations of the passes.
    """

    def __init__(self, device: torch.device, done: int, run: Pass) -> None:
        self._device, self._run = device, run
        self._first = self._last = done
        self._mark(done)

    def _mark(self, step: int) -> None:
        self._from = (step, self._now(), self._run.flops)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, step: int) -> None:
        """Note that so many steps are done."""
        self._last = step
        if step == self._first + _SETTLED:
            self._mark(step)

    def result(self, dtype: torch.dtype) -> dict[str, Any]:
        """What speed.json holds.

        Args:
            dtype: of the matrix products.

        Returns:
            JSON: the steps of this call; steps and FLOPs a second without the first 20 of them, if there are more.
            FLOPs are None where the pass does not count them.
        """
        step, began, before = self._from
        seconds = self._now() - began
        count = self._last - step
        flops = self._run.flops - before if count and before is not None else None
        return {
            "steps": [self._first, self._last],
            "timed_steps": count,
            "steps_per_second": count / seconds if count else None,
            "flops_per_step": None if flops is None else flops / count,
            "flops_per_second": None if flops is None else flops / seconds,
            "precision": str(dtype).removeprefix("torch."),
            "cuda_graph": self._run.captures,
            "device": describe_device(self._device),
        }
