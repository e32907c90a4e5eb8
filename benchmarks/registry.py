"""Defines a benchmark: its inputs, our call, the alternatives, and the minimum work of the task.

@benchmark("gather_tokens")
class GatherTokens(Benchmark):
    def make(self, s, dtype, device, rng): ...     # inputs by name
    def call(self, x, s, backend): ...             # ours
    def work(self, s, itemsize): ...               # Work of the forward pass

    @baseline("index_select")
    def index_select(self, x, s): ...              # the strongest known alternatives
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .shapes import SHAPES, VERIFIED_AT, Shape, smaller

Inputs = dict[str, Any]
Sizes = dict[str, Any]
PASSES = ("fwd", "bwd", "fwd+bwd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Work(NamedTuple):
    """The minimum work of the task: every input read and every result written once, and the arithmetic.

    `host_bytes` are the bytes that a GPU reads from host memory.
    """

    bytes: float
    flops: float = 0.0
    host_bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(mine + its for mine, its in zip(self, other, strict=True)))


class Unsupported(Exception):
    """A baseline does not support these inputs; the message says why. It is recorded and is not an error."""


class Baseline(NamedTuple):
    """An alternative to our function.

    Attributes:
        name: name in tables.
        function: (benchmark, inputs, sizes) -> results, comparable with those of `call`.
        devices: device types that it supports.
        compiled: whether to also run it under torch.compile, if that is requested.
        needs: module that must be installed, such as "fla" or "flash_attn.cute".
        on_request: device types on which it runs only if compilation is requested, because it takes long to compile
            there or because another baseline is known to be faster.
        is_compiled: whether this is the compiled variant.
    """

    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...]
    compiled: bool
    needs: str | None
    on_request: tuple[str, ...] = ()
    is_compiled: bool = False

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.needs is None:
            return None
        try:
            found = importlib.util.find_spec(self.needs)
        except ModuleNotFoundError:  # the parent package is missing
            found = None
        return None if found else f"{self.needs} is not installed"


def baseline(
    name: str,
    *,
    devices: tuple[str, ...] = ("cpu", "cuda"),
    compiled: bool = False,
    needs: str | None = None,
    on_request: tuple[str, ...] = (),
) -> Callable:
    """Marks a method of a benchmark as an alternative; see `Baseline`."""

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.baseline = Baseline(name, function, devices, compiled, needs, on_request)
        return function

    return mark


class Benchmark:
    """A benchmark; subclasses define its parts.

    Attributes:
        covers: the public function that it measures.
        differentiable: inputs whose gradients the passes "bwd" and "fwd+bwd" compute; none: forward only.
        selects: whether results are choices among near ties; `comparable` then returns the float64 scores of what was
            chosen, and ours may be off by SELECTION_TOLERANCE.
        by_frame: whether its lengths are whole frames.
        tolerance: largest error of a baseline, as a fraction of the largest magnitude; default by dtype.
    """

    name: str
    covers: str
    differentiable: tuple[str, ...] = ()
    selects = False
    by_frame = False
    tolerance: float | None = None

    def make(self, s: Sizes, dtype: torch.dtype, device: str, rng: torch.Generator) -> Inputs:
        """Returns inputs by name: tensors, or trees of tensors."""
        raise NotImplementedError

    def call(self, x: Inputs, s: Sizes, backend: str) -> Any:
        """Calls our public function on these inputs."""
        raise NotImplementedError

    def work(self, s: Sizes, itemsize: int) -> Work:
        """Minimum work of the forward pass, for elements of `itemsize` bytes."""
        raise NotImplementedError

    def work_backward(self, s: Sizes, itemsize: int) -> Work:
        """Minimum work of the backward pass."""
        raise NotImplementedError

    def exact(self, x: Inputs, s: Sizes) -> Any:
        """The results of the reference in float64."""

        def widen(t: Tensor) -> Tensor:
            return t.to(torch.float64) if t.is_floating_point() else t

        return self.call(pytree.tree_map_only(Tensor, widen, x), s, "reference")

    def comparable(self, results: Any, x: Inputs, s: Sizes) -> Any:
        """Converts results to the form in which those of ours, the reference and the baselines are compared."""
        return results

    def verified_at(self, s: Sizes) -> Iterator[Sizes]:
        """Sizes at which results may be verified, smaller ones first; the last are `s` itself."""
        found = [smaller(s, *most, self.by_frame) for most in VERIFIED_AT]
        yield from (small for i, small in enumerate(found) if small != s and small not in found[:i])
        yield s

    @property
    def shapes(self) -> dict[str, Shape]:
        return SHAPES[self.name]

    @property
    def passes(self) -> tuple[str, ...]:
        return PASSES if self.differentiable else ("fwd",)

    def baselines(self, device: str, compiled: bool) -> list[Baseline]:
        """The alternatives on a device type; with `compiled`, those that benefit are listed twice."""
        marked = [getattr(type(self), name).baseline for name in dir(self) if hasattr(getattr(self, name), "baseline")]
        found = [b for b in marked if device in b.devices and (compiled or device not in b.on_request)]
        if compiled:
            found += [b._replace(name=f"{b.name}, compiled", is_compiled=True) for b in found if b.compiled]
        return found

    def work_of(self, which: str, s: Sizes, itemsize: int) -> Work:
        """Minimum work of a pass."""
        if which == "fwd":
            return self.work(s, itemsize)
        backward = self.work_backward(s, itemsize)
        return backward if which == "bwd" else self.work(s, itemsize) + backward


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(
    name: str, *, covers: str | None = None, shapes: dict[str, Shape] | None = None
) -> Callable[[type[Benchmark]], type[Benchmark]]:
    """Registers a class that measures `covers` (default: `name`); its sizes are `shapes`, or those in shapes.py."""

    def register(cls: type[Benchmark]) -> type[Benchmark]:
        entry = cls()
        entry.name, entry.covers = name, covers or name
        if shapes is not None:
            SHAPES[name] = shapes
        BENCHMARKS[name] = entry
        return cls

    return register


def choose(option: str, wanted: Iterable[str], choices: Iterable[str]) -> list[str]:
    """Returns `wanted`, after checking that all are among `choices`.

    Raises:
        ValueError: one is not; names the option, the closest choice and all choices.
    """
    choices = list(dict.fromkeys(choices))
    wanted = list(wanted)
    for name in wanted:
        if name not in choices:
            close = difflib.get_close_matches(name, choices, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ValueError(f"{option}: must be one of {', '.join(choices)}, got {name}{hint}")
    return wanted


def randn(rng: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal values on the device of `rng`, drawn in float32."""
    return torch.randn(shape, generator=rng, device=rng.device).to(dtype)


def randint(rng: torch.Generator, high: int, *shape: int) -> Tensor:
    """int32 in [0, high) on the device of `rng`."""
    return torch.randint(high, shape, generator=rng, device=rng.device, dtype=torch.int32)


def upstream(result: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient with respect to a result: the same values for every dtype of the result."""
    rng = torch.Generator(result.device).manual_seed(1)
    return randn(rng, dtype, *result.shape).to(result.dtype)


def prepare(
    function: Callable[[Inputs], Any], x: Inputs, which: str, differentiable: tuple[str, ...], dtype: torch.dtype
) -> Callable[[], Any]:
    """Makes the call to time or verify, which returns the results ("fwd") or the gradients of the first of them.

    Everything that the pass does not include is done before this returns.
    """
    if which == "fwd":

        def forward() -> Any:
            with torch.no_grad():
                return function(x)

        return forward
    leaves = {name: x[name].detach().requires_grad_() for name in differentiable}

    def run() -> Tensor:
        results = pytree.tree_leaves(function(x | leaves))
        return next(r for r in results if isinstance(r, Tensor) and r.requires_grad)

    done = [run()]
    gradient = upstream(done[0], dtype)
    if which == "fwd+bwd":
        done.clear()
    return lambda: torch.autograd.grad(done.pop() if done else run(), tuple(leaves.values()), gradient)
