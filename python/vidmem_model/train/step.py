"""The forward and backward pass of a step: op by op, or as captured CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..checks import shorten
from ..progress import note

# Passes before a capture, in which cuDNN, cuBLAS and Triton select and compile kernels.
_WARM_UP = 3


def change_tensors(batch: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Apply a function to every tensor of a batch of nested tuples and lists."""
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
        objective: Module whose output for a batch is the loss.
        dtype: bfloat16 for autocast, float32 for none.
        device: Device of the objective and of batches.

    Attributes:
        captures: Whether batches must consist of tensors only.
        flops: FLOPs of the passes so far, or None if they are not counted.
    """

    captures = False
    flops: int | None = None

    def __init__(self, objective: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.objective = objective
        self._amp = torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def __call__(self, batch: Any) -> torch.Tensor:
        """Accumulate the gradients of a batch; return its loss, detached."""
        with self._amp:
            loss = self.objective(batch)
        loss.backward()
        return loss.detach()


class CapturedPass(Pass):
    """Forward and backward pass as CUDA graphs, one per batch shape, which avoids the launch overhead of ops.

    Gradients stay at fixed addresses: they are set to zero, never to None, between steps. If a capture fails, a note is
    printed and all passes run op by op.

    FLOPs are counted by torch.utils.flop_counter: those of matrix products and convolutions, without the attention of
    vidmem_kernels.

    Args:
        objective: As for Pass; its method `fixed` returns a batch of tensors only.
        dtype: As for Pass.
        device: As for Pass.
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
        """Accumulate the gradients of a batch; return its loss, detached."""
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
        return loss.clone()  # a copy, because the next replay overwrites it

    def _count(self, batch: Any) -> int:
        """Count the FLOPs of a pass and discard its gradients, because counting may run ops differently."""
        with FlopCounterMode(display=False) as counter:
            with self._amp:
                loss = self.objective(batch)
            torch.autograd.grad(loss, self._weights, allow_unused=True)
        return counter.get_total_flops()

    def _capture(self, shape: tuple[torch.Size, ...], batch: Any) -> None:
        """Capture the pass of a batch; gradients are restored afterwards."""
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
            # Other threads allocate pinned memory for batches meanwhile, which would fail the capture in the default
            # mode.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                loss = super().__call__(given)
            self._graphs[shape] = graph, given, loss
        except RuntimeError as error:
            self.captures = False
            note([f"a step cannot be captured as a CUDA graph ({shorten(error)}); training continues op by op"])
        torch._foreach_copy_(gradients, before)
