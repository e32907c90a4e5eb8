"""Cases of functions that only move elements: their public calls at drawn sizes, held to equal bits."""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch import Tensor

import vidmem_kernels as vk
from vidmem_kernels.testing import Call, Make, public_calls, to_float64

from .bounds import Num, exact
from .case import GENERATORS, Case, must
from .draw import Draw

MOST = 200_000  # elements, or thereabouts


class Moved(Case):
    """A public call that moves elements, of drawn tensors."""

    def __init__(self, call: Call, tensors: list[Tensor]):
        differentiable = {f"tensor {i}": tensors[i] for i in call.floats(tensors)}
        super().__init__({f"tensor {i}": t for i, t in enumerate(tensors)}, differentiable)
        self.public = call

    def call(self, backend, swap=None):
        tensors = [(swap or {}).get(id(t), t) for t in self.args.values()]
        with vk.use_backend(backend or "auto"):
            return self.named(self.public.call(*tensors))

    def _exact(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Results of the reference in float64, and the leaves that they came from."""
        leaves = {n: t.detach().to(torch.float64).requires_grad_() for n, t in self.differentiable.items()}
        tensors = [leaves.get(n, to_float64(t)) for n, t in self.args.items()]
        with vk.use_backend("reference"):
            return self.named(self.public.call(*tensors)), leaves

    def outputs(self, results: dict[str, Tensor]) -> dict[str, Num]:
        expected, _ = self._exact()
        for n, t in expected.items():
            must(t.is_floating_point() or torch.equal(results[n], t), f"{n} differs")
        return {n: exact(t) for n, t in expected.items() if t.is_floating_point()}

    def gradients(self, cotangents: dict[str, Tensor], results: dict[str, Tensor]) -> dict[str, Num]:
        found, leaves = self._exact()
        wanted = [c.to(torch.float64) for c in cotangents.values()]
        grads = torch.autograd.grad([found[n] for n in cotangents], list(leaves.values()), wanted)
        return {n: exact(g) for n, g in zip(leaves, grads, strict=True)}


def generate(calls: list[Call], draw: Draw) -> Case:
    """One of the calls of a function."""
    call = draw.pick(*calls)
    sizes = {name: max(draw.size(), call.least.get(name, 0)) for name in call.names}
    while prod(max(1, size) for size in sizes.values()) > MOST:
        largest = max(sizes, key=sizes.get)
        sizes[largest] = sizes[largest] * 2 // 3
    make = Make(draw.dtype(), seed=draw.between(0, 2**31))
    return Moved(call, [draw.layout(t) for t in call.make(make, sizes)])


MOVES = [call for call in public_calls() if call.moves]
for _function in {call.function: None for call in MOVES}:
    GENERATORS[_function] = partial(generate, [call for call in MOVES if call.function == _function])
