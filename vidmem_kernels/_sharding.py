"""Tells DTensor how the ops may be sharded: along the batch, along the heads in attention, or not at all."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

from torch import Tensor

from ._op import OPS, Op
from ._transforms import when_traced


@when_traced
def prepare() -> None:
    """Registers the sharding rules with DTensor, if it is imported."""
    if "torch.distributed.tensor" in sys.modules:
        _register()


@cache
def _register() -> None:
    from torch.distributed.tensor.experimental import register_sharding

    for op in OPS.values():
        register_sharding(op.overload)(_rules(op))


def _rules(op: Op) -> Any:
    from torch.distributed.tensor import Partial, Replicate, Shard

    results = len(op.overload._schema.returns)

    def along_batch(name: str, tensor: Any) -> Any:
        shared = tensor.ndim == op.without_batch.get(name) or (tensor.shape[0] == 1 and name in op.broadcasts)
        return Replicate() if shared else Shard(0)

    def along_heads(name: str, tensor: Any) -> Any:
        axis = op.head_axes.get(name)
        # A bias (B, Lk) and block lists (B, 1, ...) serve all heads.
        shared = axis is None or tensor.ndim == 2 or tensor.shape[axis] == 1
        return Replicate() if shared else Shard(axis)

    def rules(*args):
        arguments, _ = op.fill(args)

        def placed(place: Any) -> list[Any]:
            found = []
            for i, (name, value) in enumerate(zip(op.arguments, arguments, strict=True)):
                leaves = value if isinstance(value, list | tuple) and i in op.tensors else (value,)
                found += [place(name, v) if i in op.tensors and v is not None else None for v in leaves]
            return found

        acceptable = [
            ([Replicate()] * results, placed(lambda name, tensor: Replicate())),
            ([Shard(op.result_batch)] * results, placed(along_batch)),
        ]
        if op.head_axes:
            placements = [Shard(axis) for axis in op.result_heads]
            bias = dict(zip(op.arguments, arguments, strict=True)).get("key_bias")
            if op.name.endswith("_backward") and bias is not None and bias.ndim == 2:
                placements[-1] = Partial()  # shared by the heads, so its gradient is their sum
            acceptable.append((placements, placed(along_heads)))
        return acceptable

    return rules


def replicating(tensor: Tensor) -> AbstractContextManager:
    """A context in which index tensors created on the way count as replicated over the ranks that share `tensor`."""
    if type(tensor) is Tensor or "torch.distributed.tensor" not in sys.modules:
        return nullcontext()
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication() if isinstance(tensor, DTensor) else nullcontext()
