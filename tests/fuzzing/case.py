"""What a case is: a call of a public function, and what its results and gradients must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .bounds import Num
from .draw import Draw

GENERATORS: dict[str, Callable[[Draw], Case]] = {}


class Wrong(AssertionError):
    """A result that is not what it must be."""


class Case:
    """One call.

    Attributes:
        function: a public function of vidmem_kernels.
        args: its arguments by name, without `backend`.
        differentiable: the tensors among them that get a gradient, by the name that messages use.
    """

    function: Callable[..., Any]

    def __init__(self, args: dict[str, Any], differentiable: dict[str, Tensor] | None = None):
        self.args = args
        self.differentiable = differentiable or {}

    def call(self, backend: str | None, swap: dict[int, Tensor] | None = None) -> dict[str, Tensor]:
        """The results by name; `swap` has other tensors for some of the arguments, by id."""
        swap = swap or {}
        args = pytree.tree_map_only(Tensor, lambda t: swap.get(id(t), t), self.args)
        return self.named(type(self).function(**args, backend=backend))

    def named(self, result: Any) -> dict[str, Tensor]:
        if isinstance(result, Tensor):
            return {"out": result}
        if hasattr(result, "_asdict"):
            return result._asdict()
        return {f"result {i}": r for i, r in enumerate(result)}

    def check(self, results: dict[str, Tensor]) -> None:
        """Raises `Wrong` where a choice, a plan or the form of a result is wrong."""

    def outputs(self, results: dict[str, Tensor]) -> dict[str, Num]:
        """The float results that these are held to; `results` only tells what was chosen where scores tie."""
        return {}

    def gradients(self, cotangents: dict[str, Tensor], results: dict[str, Tensor]) -> dict[str, Num]:
        """The gradients of `differentiable` for gradients of the results that require one, as `outputs`."""
        return {}

    def twin(self) -> dict[int, Tensor] | None:
        """Tensors to swap so that only what nobody may look at differs: the results must be the same to the bit."""
        return None


def must(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


def generator(make: Callable[[Draw], Case]) -> Callable[[Draw], Case]:
    """Decorator: draws the cases of the public function of its own name."""
    GENERATORS[make.__name__] = make
    return make


def zeros_if_none(cotangents: dict[str, Tensor], name: str, like: Tensor) -> Tensor:
    return cotangents[name] if name in cotangents else torch.zeros(like.shape, dtype=torch.float64)
