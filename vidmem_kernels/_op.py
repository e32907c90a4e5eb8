"""The description of an op, and the table of all ops; nothing here runs a kernel.

`_registry.register_op` fills the table. `_dispatch`, `_fast`, `_autograd`, `_transforms` and `_sharding` read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import _extension, _verified

OPS: dict[str, Op] = {}


@dataclass(frozen=True)
class Library:
    """A library that computes an op on some types of device.

    Attributes:
        name: name that `explain` shows.
        devices: device types that it supports.
        call: function of the op's arguments that returns its results.
        refuse: function of the op's arguments that returns why it cannot run them, or None.
        avoid: function of the op's arguments that returns why other backends are faster, or None. The library still
            runs the call if requested explicitly, or if the reference is the only alternative.
    """

    name: str
    devices: tuple[str, ...]
    call: Callable[..., Any]
    refuse: Callable[..., str | None]
    avoid: Callable[..., str | None] = lambda *args: None


@dataclass(eq=False)
class Op:
    """The description of one op; see `_registry.register_op` for the fields."""

    name: str
    family: str
    arguments: tuple[str, ...]
    tensors: tuple[int, ...]  # which arguments are tensors or lists of them
    defaults: tuple[Any, ...]
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    autocast: tuple[str, ...]
    triton: str | None
    library: tuple[Library, ...] | None
    refuse: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    batch: str = ""
    broadcasts: tuple[str, ...] = ()
    without_batch: dict[str, int] = field(default_factory=dict)
    result_batch: int = 0
    head_axes: dict[str, int] = field(default_factory=dict)
    result_heads: tuple[int, ...] = ()
    varies: tuple[str, ...] = ()
    function: type[torch.autograd.Function] | None = None  # its gradient: see `_autograd.make_function`

    def __post_init__(self) -> None:
        self.overload: torch._ops.OpOverload = getattr(torch.ops.vidmem, self.name).default
        self.has_lists = any("List[Tensor]" in str(a.type) for a in self.overload._schema.arguments)
        self.remembered: dict[tuple[Any, ...], Callable[..., Any] | None] = {}
        self.differentiable = self._differentiable()

    def _differentiable(self) -> Callable[..., Any]:
        def differentiable(*args):
            """The reference with the op's autocast: what transforms differentiate."""
            device = self.device(args)
            if self.autocast and torch.is_autocast_enabled(device.type):
                args = self.cast(args, torch.get_autocast_dtype(device.type))
            with torch._C._DisableAutocast():
                return self.run_reference(*args)

        return differentiable

    def cast(self, args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
        """The arguments cast by autocast to `dtype`; float64 and 8-bit rows with scales are left unchanged."""

        def lower(tensor: torch.Tensor) -> torch.Tensor:
            lowers = tensor.is_floating_point() and 1 < tensor.dtype.itemsize < 8
            return tensor.to(dtype) if lowers else tensor

        cast = [
            a if name not in self.autocast else pytree.tree_map_only(torch.Tensor, lower, a)
            for name, a in zip(self.arguments, args, strict=True)
        ]
        return tuple(cast)

    def apply(self, args: tuple[Any, ...], backend: str, run: Callable[..., Any]) -> Any:
        """Runs `run(*args)` and records it for autograd."""
        if self.has_lists:
            leaves, structure = pytree.tree_flatten(args)
            return self.function.apply(*leaves, structure, backend, run)
        return self.function.apply(*args, backend, run)

    def fill(self, args: tuple[Any, ...]) -> tuple[tuple[Any, ...], str]:
        """(arguments, backend), with the defaults that the dispatcher dropped."""
        *filled, backend = args + self.defaults[len(args) :]
        return tuple(filled), backend

    def complete(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments of a call, with defaults added."""
        return args + self.defaults[len(args) : -1]

    @property
    def launch(self) -> str:
        """Name of the function that launches the op's Triton kernels."""
        forward = self.name.removesuffix("_backward")
        return f"launch_{forward}_{'fwd' if forward == self.name else 'bwd'}"

    def verified_on(self, backend: str) -> _verified.Verified | None:
        """The test run on a GPU that a kernel passed, or None if there is no such run or kernel."""
        if backend == "triton" and self.triton:
            now = _verified.triton_fingerprint(self.family.rpartition(".")[2], self.triton)
        else:
            now = _extension.cuda_fingerprint(self.name) if backend == "cuda" else None
        return _verified.verified_on(self.name, backend, now)

    def device(self, args: tuple[Any, ...]) -> torch.device:
        """The device of the call: the accelerator if any tensor is on one (a bank may be on the host)."""
        found = None
        for i in self.tensors:
            for tensor in (args[i],) if isinstance(args[i], torch.Tensor) else args[i] or ():
                found = tensor.device
                if found.type != "cpu":
                    return found
        return found

    def run_reference(self, *args: Any) -> Any:
        """Runs the reference; its results are contiguous, as the fake promises."""
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.contiguous, self.reference(*args))
