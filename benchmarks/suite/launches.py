"""Records which Triton kernels a call launched, and how, to check that two calls take the same path.

    with recording() as launches:
        call()

For every launch: the kernel, its constants and options (tiles, warps, stages, features such as EVEN), and what Triton
specialises besides those: dtypes, strides and lengths that are 1 or multiples of 16, aligned pointers. Also which axes
of the grid have more than one program, and whether a kernel ran once or more often, so that work split in pieces
differs from work in one piece. Numbers of pieces, programs and launches above one make no difference.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from vidmem_kernels import _dispatch


class Launch(NamedTuple):
    """One launch: the kernel's name and its features by name."""

    kernel: str
    features: tuple[tuple[str, Any], ...]


class Path(NamedTuple):
    """The path of a call: "op: backend (library)" of every op, and every launch, once or several times."""

    choices: frozenset[str]
    launches: frozenset[tuple[Launch, str]]

    def kernels(self) -> list[str]:
        """Names of the Triton kernels."""
        return sorted({launch.kernel for launch, _ in self.launches})


def path_of(choices: Iterable[_dispatch.Choice], launches: Iterable[Launch]) -> Path:
    """The path of a call from what was recorded during it."""
    taken = frozenset(f"{c.op}: {c.backend}" + (f" ({c.library})" if c.library else "") for c in choices)
    return Path(taken, frozenset((launch, "once" if n == 1 else "many") for launch, n in Counter(launches).items()))


def differences(full: Path, small: Path) -> list[str]:
    """The differences between two paths, in words; empty if they are the same."""
    found = [f"{choice} at one shape only" for choice in sorted(full.choices ^ small.choices)]
    for kernel in sorted({launch.kernel for launch, _ in full.launches ^ small.launches}):
        here, there = (
            [dict(launch.features, launches=count) for launch, count in path.launches if launch.kernel == kernel]
            for path in (full, small)
        )
        if not here or not there:
            found.append(f"{kernel} at the {'full' if here else 'small'} shape only")
        elif len(here) == len(there) == 1:
            names = [name for name in here[0] | there[0] if here[0].get(name) != there[0].get(name)]
            told = [f"{name} {here[0].get(name)}, at the small one {there[0].get(name)}" for name in names]
            found.append(f"{kernel}: at the full shape {'; '.join(told)}")
        else:
            found.append(f"{kernel}: {len(here)} kinds of launches at the full shape, {len(there)} at the small")
    return found


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Records the launches of Triton kernels in this process; none if Triton is missing."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield []
        return
    launches: list[Launch] = []
    originals = {cls: cls.run for cls in (JITFunction, InterpretedFunction)}
    for cls, run in originals.items():
        cls.run = _recorded(run, launches)
    try:
        yield launches
    finally:
        for cls, run in originals.items():
            cls.run = run


def _recorded(run: Callable[..., Any], launches: list[Launch]) -> Callable[..., Any]:
    def record_and_run(self, *args, grid, warmup, **kwargs):
        if not warmup:
            options = getattr(self, "kwargs", None) or {}  # of the interpreter's functions
            unspecialised = getattr(self, "do_not_specialize", None) or options.get("do_not_specialize") or ()
            launches.append(launch_of(self.fn, args, kwargs, grid, unspecialised))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    return record_and_run


def launch_of(
    kernel: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grid: Any,
    unspecialised: Collection[str] = (),
) -> Launch:
    """The launch of a kernel's Python function with these arguments, some of which Triton does not specialise."""
    signature = inspect.signature(kernel)
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in signature.parameters})
    bound.apply_defaults()
    features = {}
    for name, value in bound.arguments.items():
        is_constant = "constexpr" in str(signature.parameters[name].annotation)
        features[name] = str(value) if is_constant else _specialised(value, name not in unspecialised)
    features |= {name: value for name, value in kwargs.items() if name not in signature.parameters}
    size = grid(dict(bound.arguments)) if callable(grid) else grid
    features["grid"] = tuple("many" if n > 1 else n for n in size)
    return Launch(kernel.__name__, tuple(sorted((name, feature) for name, feature in features.items())))


def _specialised(value: Any, by_value: bool = True) -> Any:
    """What Triton specialises an argument for; without `by_value` the type alone."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        kind = "1" if value == 1 else "multiple of 16" if value % 16 == 0 else "any"
        kind = kind if by_value else "any"
        return kind if -(2**31) <= value < 2**31 else f"{kind}, 64 bits"
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{', aligned' if value.data_ptr() % 16 == 0 else ''}"
    if isinstance(value, (tuple, list)):
        return tuple(map(_specialised, value))
    block = getattr(value, "block_shape", None)  # a tensor descriptor
    return type(value).__name__ if block is None else f"{value.base.dtype} {list(block)}"
