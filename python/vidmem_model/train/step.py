"""The forward and backward pass of a step: launched op by op, or captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..checks import shorten
from ..progress import note

# Passes before a capture: cuDNN, cuBLAS and Triton choose and compile their kernels in the first ones.
_WARM_UP = 3


def change_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a batch, tuples and lists in one another, with every tensor changed and all else as it is."""
    if isinstance(batch, torch.Tensor):
        return change(batch)
    if not isinstance(batch, (tuple, list)):
        return batch
    made = [change_tensors(part, change) for part in batch]
    return type(batch)(*made) if hasattr(batch, "_fields") else type(batch)(made)


def tensors(batch: Any) -> Iterator[torch.Tensor]:
    """Iterate over the tensors of a batch."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from tensors(part)


class Pass:
    """Forward and backward pass of a batch, op by op.

    Args:
        objective: module whose output for a batch is the loss.
        dtype: bfloat16 for autocast to it, float32 for none.
        device: of both.

    Attributes:
        captures: whether it asks for batches with nothing but tensors in them.
        flops: floating-point operations of the passes so far, or None where they are not counted.
    """

    captures = False
    flops: int | None = None

    def __init__(self, objective: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.objective = objective
        self._amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def __call__(self, batch: Any) -> torch.Tensor:
        """Add the gradients of a batch to those that the weights have; its loss, detached."""
        with self._amp:
            loss = self.objective(batch)
        loss.backward()
        return loss.detach()


class CapturedPass(Pass):
    """The same as CUDA graphs, one for each shape of a batch: the GPU does not wait for Python to launch each op.

    The gradients stay in one place: they are set to zero, never to None, between steps. Where a capture fails, that is
    said, and all passes go on op by op.

    FLOPs are counted by torch.utils.flop_counter: those of matrix products and convolutions, without the attention of
    vidmem_kernels.

    Args:
        objective, dtype, device: as for Pass; the method `fixed` of the objective gives a batch of nothing but tensors.
    """

    def __init__(self, objective: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(objective, dtype, device)
        self.captures, self.flops = True, 0
        self._flops: dict[tuple[torch.Size, ...], int] = {}
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Any, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._weights = [weight for weight in objective.parameters() if weight.requires_grad]
        for weight in self._weights:
            weight.grad = torch.zeros_like(weight)

    def __call__(self, batch: Any) -> torch.Tensor:
        """Add the gradients of a batch to those that the weights have; its loss, detached."""
        shape = tuple(tensor.shape for tensor in tensors(batch))
        if shape not in self._flops:
            self._flops[shape] = self._count(batch)
            if self.captures:
                self._capture(shape, batch)
        self.flops += self._flops[shape]
        if shape not in self._graphs:
            return super().__call__(batch)
        graph, given, loss = self._graphs[shape]
        for ours, theirs in zip(tensors(given), tensors(batch), strict=True):
            ours.copy_(theirs)
        graph.replay()
        return loss.clone()  # the next replay writes its own there

    def _count(self, batch: Any) -> int:
        """FLOPs of a pass, by one whose gradients are given up: counting may take other ways through an op."""
        with FlopCounterMode(display=False) as counter:
            with self._amp:
                loss = self.objective(batch)
            torch.autograd.grad(loss, self._weights, allow_unused=True)
        return counter.get_total_flops()

    def _capture(self, shape: tuple[torch.Size, ...], batch: Any) -> None:
        """Capture the pass of a batch; what that adds to the gradients is taken back."""
        gradients = [weight.grad for weight in self._weights]
        before = [gradient.clone() for gradient in gradients]
        given = change_tensors(batch, torch.Tensor.clone)
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP):
                    super().__call__(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads draw batches into pinned memory meanwhile; in the default mode that would spoil the capture.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = super().__call__(given)
            self._graphs[shape] = graph, given, loss
        except RuntimeError as error:
            self.captures = False
            note([f"a step cannot be captured as a CUDA graph ({shorten(error)}); its ops are launched one by one"])
        torch._foreach_copy_(gradients, before)
