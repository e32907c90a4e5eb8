"""Holds the memory of a model, also across gradient checkpointing, copies and pickles of the model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def _copyable(tensor: Tensor | None) -> Tensor | None:
    """A detached copy if the tensor is part of a graph: only leaves can be copied or pickled."""
    return tensor if tensor is None or tensor.grad_fn is None else tensor.detach()


class MemorySlot:
    """Holds the memory that all blocks of a model read; copied and pickled with the model.

    Gradient checkpointing runs a block again in the backward pass, when another memory may already be set. The slot
    therefore records which memory a forward pass read, identified by a tensor that each forward pass creates and hands
    to all its blocks.
    """

    def __init__(self) -> None:
        self.held: tuple | None = None
        self._of_forward = WeakTensorKeyDictionary()

    def get(self, forward: Tensor | None) -> tuple | None:
        """The memory of the forward pass that the tensor `forward` belongs to."""
        # A compiled graph keeps the memory that it read, like any input.
        if forward is None or torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.held
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            return self._of_forward.get(forward, self.held)
        self._of_forward[forward] = self.held
        return self.held

    def __getstate__(self) -> dict[str, tuple | None]:
        return {"held": self.held and type(self.held)(*map(_copyable, self.held))}

    def __setstate__(self, state: dict[str, tuple | None]) -> None:
        self.__init__()
        self.held = state["held"]
