"""Chooses the backend of a call, from an ordered list of backends per device; each backend that cannot run it says why.

`backend="auto"` takes the first backend that can run the call. An explicit backend (argument, `use_backend` or
VIDMEM_BACKEND) is used or refused, never replaced. The choice is passed to the op as its last argument, so that a
compiled graph and the backward pass, which may run on another thread, use the same one.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from . import _env, _extension
from ._op import Library, Op
from ._tuned import Chosen

logger = logging.getLogger("vidmem_kernels")

BACKENDS = ("cpu", "triton", "cuda", "library", "reference")
ENVIRONMENT = "environment"  # the backend argument of an op in a compiled graph if the user named none
# On the CPU our kernels are faster than SDPA's; on a GPU a library that supports the call is usually the fastest.
LADDERS = {
    "cpu": ("cpu", "library", "reference"),
    "cuda": ("library", "triton", "cuda", "reference"),
}

_local = threading.local()
_logged: set[tuple[str, str]] = set()


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run this call; the message says why."""


def check_backend(name: str, source: str) -> str:
    """Returns `name` if it is "auto" or a backend; otherwise raises a ValueError that suggests the closest name."""
    choices = ("auto", *BACKENDS)
    if name in choices:
        return name
    close = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"{source} must be one of {', '.join(choices)}, got {name!r}{hint}")


def requested(backend: str | None = None) -> str:
    """The backend of a call: its argument, else the innermost `use_backend`, else VIDMEM_BACKEND."""
    if backend is not None:
        return check_backend(backend, "backend")
    # threading.local, not a ContextVar: torch.compile traces and guards the former only.
    chosen: str | None = getattr(_local, "backend", None)
    if chosen is not None:
        return chosen
    # A compiled graph would keep the value of its trace, so it reads the variable each time it runs.
    return ENVIRONMENT if torch.compiler.is_compiling() else resolve(ENVIRONMENT)


def resolve(backend: str) -> str:
    """Replaces ENVIRONMENT by the backend that VIDMEM_BACKEND names now; returns other names unchanged."""
    return check_backend(_env.backend(), "VIDMEM_BACKEND") if backend == ENVIRONMENT else backend


def of_this_thread() -> str | None:
    """The backend of the innermost `use_backend` on this thread, or None."""
    return getattr(_local, "backend", None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Sets the default backend for all calls of this thread inside the `with` block.

    A call with its own `backend` argument is not affected.

    Args:
        name: "auto" (the first backend that can run the call), "cpu" (C++), "triton", "cuda" (CUDA C++), "library" (an
            attention library, such as PyTorch's SDPA) or "reference" (plain PyTorch).

    Yields:
        None.

    Raises:
        ValueError: `name` is not a backend.
        BackendError: raised by a call inside the block that the backend cannot run.

    Examples:
        >>> with use_backend("triton"):
        ...     out = cross_attention(q, k, v)
    """
    check_backend(name, "use_backend: name")
    previous = getattr(_local, "backend", None)
    _local.backend = name
    try:
        yield
    finally:
        _local.backend = previous


@cache
def _triton_missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@cache
def _too_old() -> str | None:
    """Why this GPU cannot run the CUDA kernels of the build, or None; the lowest architecture's PTX runs on later
    GPUs."""
    assert _extension.module is not None  # `unavailable` looks first
    lowest = min(int(arch.rstrip("af")) for arch in _extension.module.cuda_archs.split())
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (lowest // 10, lowest % 10)
    return None if 10 * major + minor >= lowest else f"built for sm_{lowest} and later, this GPU is sm_{major}{minor}"


def unavailable(op: Op, backend: str, device_type: str) -> str | None:
    """Why `backend` runs no call of `op` on this type of device, or None if it may."""
    if backend == "reference":
        return None
    if backend in ("cpu", "cuda"):
        if device_type != backend:
            return f"needs {backend} tensors, got {device_type}"
        if _extension.module is None:
            return _extension.reason
        if not _extension.has_kernel(op.name, backend):
            built = backend == "cpu" or _extension.module.cuda_archs
            return "this op has no such kernel" if built else "built without CUDA"
        return _too_old() if backend == "cuda" else None
    if backend == "triton":
        if op.triton is None:
            return "this op has no such kernel"
        if device_type != "cuda" and not (device_type == "cpu" and _env.triton_interpret()):
            return f"needs cuda tensors (or TRITON_INTERPRET=1), got {device_type}"
        return _triton_missing()
    return None if op.library else "this op has no such kernel"


def first_library(op: Op, device: torch.device, args: Sequence[Any]) -> tuple[Library | None, dict[str, str]]:
    """The library of `op` that runs a call (None if there is none), and why the libraries before it do not.

    It is the first library that can run the call and is not slower than another backend. If all that can run it are
    slower, it is the first of those, and the reason is in the dict as well.
    """
    refused: dict[str, str] = {}
    slow = None
    for library in op.library or ():
        if device.type not in library.devices:
            continue
        reason = library.refuse(*args)
        if reason is None:
            reason = library.avoid(*args)
            if reason is None:
                return library, refused
            slow = slow or library
        refused[library.name] = reason
    return slow, refused


def _avoided(op: Op, device: torch.device, args: Sequence[Any]) -> str | None:
    """Why the library that would run a call is slower than other backends, or None."""
    library, refused = first_library(op, device, args)
    return None if library is None else refused.get(library.name)


def refusal(op: Op, backend: str, device: torch.device, args: Sequence[Any]) -> str | None:
    """Why `backend` cannot run this call, or None if it can."""
    reason = unavailable(op, backend, device.type)
    if reason is None and backend in op.refuse:
        reason = op.refuse[backend](*args)
    if reason is None and backend == "library":
        library, refused = first_library(op, device, args)
        if library is None:
            reason = "; ".join(f"{name}: {why}" for name, why in refused.items()) or f"none for {device.type}"
    return reason


def implementation(op: Op, backend: str, device: torch.device, args: Sequence[Any]) -> Callable[..., Any]:
    """The function that runs a call on a backend. Triton is imported here, on first use."""
    if backend == "reference":
        return op.run_reference
    if backend == "triton":
        return getattr(importlib.import_module(f"{op.family}.{op.triton}"), op.launch)
    if backend == "library":
        library, _ = first_library(op, device, args)
        assert library is not None  # else `select` would have refused
        return library.call
    return getattr(torch.ops.vidmem_cpp, op.name)


def on_device(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Wraps `run` to make `device` the current device, on which Triton launches regardless of its tensors."""

    def run_there(*args: Any) -> Any:
        with torch.cuda.device(device):
            return run(*args)

    return run_there


def _materialised(op: Op, run: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """Wraps `run`, which reads memory directly, to send tensors with lazy negation or zeros through the dispatcher."""

    def run_or_dispatch(*args: Any) -> Any:
        tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
        plain = not any(t.is_neg() or t._is_zerotensor() for t in tensors)
        return run(*args) if plain else op.overload(*args, backend)

    return run_or_dispatch


@dataclass
class Choice:
    """The backend that runs one op of an explained call, and why the backends before it do not.

    Attributes:
        op: name of the op.
        device: device of the call.
        backend: backend that runs it.
        refused: reason of every backend before it, by name; libraries are named "library <name>".
        library: name of the library if `backend` is "library", else None.
        tiles: for "triton", the tiles that the kernels are launched with and their origin: the tuned table of this
            class of GPUs, or the default of the kernel.
    """

    op: str
    device: str
    backend: str
    refused: dict[str, str] = field(default_factory=dict)
    library: str | None = None
    tiles: list[Chosen] = field(default_factory=list)

    def __str__(self) -> str:
        which = f" ({self.library})" if self.library else ""
        lines = [f"{self.op} on {self.device}: {self.backend}{which}"]
        lines += [f"  tile {tile}" for tile in self.tiles]
        lines += [f"  not {name}: {why}" for name, why in self.refused.items()]
        return "\n".join(lines)


def select(op: Op, device: torch.device, args: Sequence[Any], backend: str) -> str:
    """The backend that runs this call; raises BackendError if an explicit one cannot."""
    backend = check_backend(resolve(backend), f"{op.name}: backend")
    refused: dict[str, str] = {}
    chosen = backend
    if backend != "auto":
        reason = refusal(op, backend, device, args)
        if reason is not None:
            others = [b for b in BACKENDS if b != backend and not refusal(op, b, device, args)]
            raise BackendError(
                f"{op.name}: backend {backend!r} cannot run this call: {reason}; these can: {', '.join(others)}"
            )
    else:
        slow = None
        for chosen in LADDERS.get(device.type, ("reference",)):
            reason = refusal(op, chosen, device, args)
            if reason is None and chosen == "library":
                slow = reason = _avoided(op, device, args)
            if reason is None:
                break
            refused[chosen] = reason
        if chosen == "reference" and slow is not None:
            chosen = "library"
            del refused[chosen]
    if chosen == "reference" and refused:
        _log_fallback(op.name, refused)
    if is_recording():
        _local.recorder.append(_describe(op, device, args, chosen, refused))
    return chosen


def bind(op: Op, args: tuple[Any, ...], backend: str) -> Callable[..., Any] | None:
    """The kernel for calls like this one, gradient included, without the dispatcher; None if only that can serve it."""
    device = op.device(args)
    chosen = select(op, device, args, backend)
    run = implementation(op, chosen, device, args)
    if device.type == "cuda":
        run = on_device(run, device)
    if chosen == "triton":
        run = _materialised(op, run, backend)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return run
    return None if op.backward is None else lambda *args: op.apply(args, backend, run)


def _describe(op: Op, device: torch.device, args: Sequence[Any], chosen: str, refused: dict[str, str]) -> Choice:
    choice = Choice(op.name, str(device), chosen, refused)
    if chosen == "library":
        library, others = first_library(op, device, args)
        assert library is not None  # it was chosen
        choice.library = library.name
        others.pop(library.name, None)
        choice.refused = refused | {f"library {name}": why for name, why in others.items()}
    if chosen == "triton":
        module = importlib.import_module(f"{op.family}.{op.triton}")
        tiles = getattr(module, op.launch.replace("launch_", "tiles_"), None)  # some kernels have no tile to choose
        choice.tiles = tiles(*args) if tiles else []
    return choice


def _log_fallback(op: str, refused: dict[str, str]) -> None:
    reason = "; ".join(f"{name}: {why}" for name, why in refused.items())
    if (op, reason) not in _logged:
        _logged.add((op, reason))
        logger.info("%s runs its PyTorch reference (%s)", op, reason)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether a host tensor is pinned; also works for the fake tensors of `explain`."""
    return getattr(tensor, "_vidmem_pinned", False) or tensor.is_pinned()


def is_recording() -> bool:
    """Whether `explain` or `recording` is active on this thread."""
    return getattr(_local, "recorder", None) is not None


def record_differentiated(op: Op, device: torch.device) -> None:
    """Records, for `explain`, that an op runs its reference because a transform takes its derivative."""
    why = "has no derivative under torch.func or in forward mode"
    refused = {backend: why for backend in LADDERS.get(device.type, ()) if backend != "reference"}
    _local.recorder.append(Choice(op.name, str(device), "reference", refused))


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """Records the backend choice of every op that this thread calls inside the `with` block.

    Yields:
        A list that receives one `Choice` for each op called.

    Examples:
        >>> with recording() as choices:
        ...     out = cross_attention(q, k, v)
        >>> print(*choices, sep="\\n")
    """
    previous = getattr(_local, "recorder", None)
    _local.recorder = []
    try:
        yield _local.recorder
    finally:
        _local.recorder = previous


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Reports which backend each op of a call would use, and why others are refused, without computing anything.

    Args:
        function: a public function of this package, or any function that calls some.
        *args: its positional arguments; tensors are replaced by fake tensors of their shape, dtype and device.
        **kwargs: its keyword arguments, likewise.

    Returns:
        One `Choice(op, device, backend, refused)` for each op called; `print` shows it in readable form. If a tensor
        argument requires a gradient, the ops of the backward pass follow.

    Examples:
        >>> print(*explain(gather_tokens, bank, index), sep="\\n")
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    # With a shape environment, numbers that depend on data, such as the rows of a plan with a threshold, get a symbol.
    fakes = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        imitation: Any = fakes.from_tensor(tensor, static_shapes=True)
        imitation._vidmem_pinned = is_pinned(tensor)  # a fake tensor is never pinned
        return imitation

    fake_args, fake_kwargs = pytree.tree_map_only(torch.Tensor, fake, (args, kwargs))
    with fakes, recording() as choices:
        results = function(*fake_args, **fake_kwargs)
        _differentiate(results, (fake_args, fake_kwargs))
    return choices


def _differentiate(results: Any, args: Any) -> None:
    """Computes the gradients of a call with respect to its arguments, on this thread."""
    outputs, inputs = (
        [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.requires_grad]
        for tree in (results, args)
    )
    if outputs and inputs:
        with torch.autograd.set_multithreading_enabled(False):
            torch.autograd.grad(outputs, inputs, [torch.ones_like(t) for t in outputs], allow_unused=True)
