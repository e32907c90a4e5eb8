"""Speed of a training: steps and floating-point operations (FLOPs) per second."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..machine import describe_device
from .step import Pass

# Steps before the speed is measured: the first ones select kernels and capture graphs.
_SETTLED = 20


class Speed:
    """Measures the speed of a training; synchronises with the GPU at the start and when it is read.

    Args:
        device: Device of the training.
        done: Steps done before.
        run: Pass that counts the FLOPs.
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
        """Record the number of steps done."""
        self._last = step
        if step == self._first + _SETTLED:
            self._mark(step)

    def result(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the content of speed.json.

        Args:
            dtype: Dtype of the matrix products.

        Returns:
            Steps of this call, and steps and FLOPs per second after the first 20 steps, if there are more. FLOPs are
            None if the pass does not count them.
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
