"""Runs a case on every backend that takes it, and tells what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels import _env, _extension
from vidmem_kernels.testing import determinism, poisoned_memory

from . import attention, gathering, merging, moving  # noqa: F401  (register their generators)
from .bounds import Num, truncating, worst
from .case import GENERATORS, Case, Wrong, must
from .draw import Draw, describe

TRITON_SHARE = 1 / 150  # of the cases, small ones, that Triton's interpreter runs too: a twentieth of the time
THREADS_SHARE = 1 / 30  # of the cases, run by three threads


@dataclass
class Fault:
    """What went wrong in a case on one backend."""

    seed: int
    case: int
    op: str
    backend: str
    what: str
    args: str

    def __str__(self) -> str:
        return (
            f"{self.op} on {self.backend}: {self.what}\n    {self.args}\n"
            f"    python tests/fuzz.py --seed {self.seed} --case {self.case}"
        )

    @property
    def kind(self) -> tuple[str, str, str]:
        """Faults of one kind are told once: op, backend, and what it is about without its numbers."""
        about = self.what if self.what.startswith("raised") else self.what.split(":")[0]
        return self.op, self.backend, re.sub(r"\d+", "#", about)[:120]


def backends() -> list[str]:
    """All that run on this machine: cpu/<instruction set>, and those of the ladder."""
    found = ["reference", "library", "auto"]
    if _extension.module is not None:
        found += [f"cpu/{name}" for name in _extension.module.available_cpu_capabilities()]
    if torch.cuda.is_available():
        found += [f"gpu/{name}" for name in ("triton", "cuda", "library", "reference", "auto")]
    elif _env.triton_interpret():
        found.append("triton")
    return found


def draw_case(seed: int, number: int) -> tuple[str, Draw]:
    """The op of a case and its further choices: cheap, so that a run over few ops can skip the others."""
    draw = Draw(seed, number)
    name = draw.pick(*GENERATORS)
    draw.small = draw.chance(TRITON_SHARE)
    draw.large = not draw.small and draw.chance(0.02)
    return name, draw


@contextmanager
def _capability(name: str) -> Iterator[None]:
    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(name)
    try:
        yield
    finally:
        _extension.module.set_cpu_capability(before)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count != before:
            torch.set_num_threads(before)


def tell_arguments(case: Case) -> str:
    return ", ".join(f"{name}={describe(value)}" for name, value in case.args.items())


def lost(seed: int, number: int, backend: str, how: str) -> Fault:
    """The fault of a case that ended its process or did not end."""
    name, draw = draw_case(seed, number)
    return Fault(seed, number, name, backend, how, tell_arguments(GENERATORS[name](draw)))


def run_case(
    seed: int,
    number: int,
    ops: set[str],
    wanted: set[str],
    begin: Callable[[str], None] = lambda backend: None,
) -> list[Fault]:
    """The faults of one case.

    Args:
        ops: public functions; a case of another is not run.
        wanted: names of `backends`, or their first part.
        begin: is told of each backend before it runs.
    """
    name, draw = draw_case(seed, number)
    if name not in ops:
        return []
    names = [b for b in backends() if not wanted or b in wanted or b.split("/")[0] in wanted]
    if not draw.small:
        names = [b for b in names if b != "triton"]
    if not names:
        return []
    case = GENERATORS[name](draw)
    trial = _Trial(case, draw)
    found: dict[str, Fault] = {}
    for backend in names:
        begin(backend)
        try:
            trial.on(backend)
        except vk.BackendError:
            continue
        except Exception as error:
            what = str(error) if isinstance(error, Wrong) else f"raised {type(error).__name__}: {error}"
            fault = Fault(seed, number, name, backend, what, f"{tell_arguments(case)}; {trial}")
            first = found.setdefault(fault.kind[2], fault)
            if first is not fault:
                first.backend += f", {backend}"
    return list(found.values())


class _Trial:
    """A case with the choices that are not the op's: what requires a gradient, its cotangents, threads, poison."""

    def __init__(self, case: Case, draw: Draw):
        self.case = case
        self.draw = draw
        self.grad = {n for n in case.differentiable if draw.chance(0.8)} if draw.chance(0.8) else set()
        self.poisoned = draw.chance(0.5)
        self.threads = 3 if draw.chance(THREADS_SHARE) else 1
        self.flag = draw.pick("off", "off", "on", "warn only")  # torch.use_deterministic_algorithms
        self.cotangents: dict[str, Tensor] = {}
        self.kinds = {n: draw.pick("normal", "normal", "expanded", "layout", "none") for n in ("out", "other")}
        self.twin = case.twin()
        tensors = [t for t in pytree.tree_leaves(case.args) if isinstance(t, Tensor)]
        self.memory = [(t, _bytes(t).clone()) for t in tensors]

    def __str__(self) -> str:
        return f"gradients of {', '.join(sorted(self.grad)) or 'none'}, deterministic: {self.flag}"

    def on(self, backend: str) -> None:
        """Raises `Wrong`, or whatever the call raises; BackendError where the backend refuses the call."""
        device, _, name = backend.rpartition("/")
        capability = name if device == "cpu" else None
        device = "cuda" if device == "gpu" else "cpu"
        with (
            _capability(capability) if capability else nullcontext(),
            _threads(self.threads),
            determinism(self.flag),
            poisoned_memory() if self.poisoned else nullcontext(),
            truncating(torch.bfloat16) if backend == "triton" else nullcontext(),
        ):
            self._on("cpu" if capability else name, device)
        for tensor, before in self.memory:
            must(torch.equal(_bytes(tensor), before), "an argument was written to, or the memory around it")

    def _on(self, backend: str, device: str) -> None:
        case = self.case
        leaves = {n: _moved(t, device).requires_grad_() for n, t in case.differentiable.items() if n in self.grad}
        swap = {id(case.differentiable[n]): leaf for n, leaf in leaves.items()}
        if device != "cpu":
            for t, _ in self.memory:
                swap.setdefault(id(t), _moved(t, device))
        results = case.call(backend, swap)
        seen = self._judge(results)
        if leaves:
            self._gradients(results, seen, leaves)
        if backend == "auto" or self.flag == "on":
            again = self._judge(case.call(backend, swap))  # what was called before may go another, faster way
            must(self.flag != "on" or all(_same(t, seen[n]) for n, t in again.items()), "runs differ")
        if self.twin is not None:
            others = {i: _moved(t, device) for i, t in self.twin.items()}
            if backend == "triton":  # which promises it of numbers, and of the rest in tiles that no query sees
                others = {i: t.nan_to_num(500, 500, 500) for i, t in others.items()}
            for n, value in case.call(backend, {**swap, **others}).items():
                must(_same(value, results[n]), f"{n} depends on what is hidden")

    def _judge(self, results: dict[str, Tensor]) -> dict[str, Tensor]:
        """Results on the CPU, that are right."""
        seen = {n: t.detach().cpu() for n, t in results.items()}
        self.case.check(seen)
        for n, value in self.case.outputs(seen).items():
            _compare(n, seen[n], value)
        return seen

    def _gradients(self, results: dict[str, Tensor], seen: dict[str, Tensor], leaves: dict[str, Tensor]) -> None:
        outputs = {n: t for n, t in results.items() if t.requires_grad and self._kind(n) != "none"}
        if not outputs:
            return
        for n, t in outputs.items():
            if n not in self.cotangents:
                self.cotangents[n] = self._cotangent(self._kind(n), t)
        cotangents = {n: self.cotangents[n] for n in outputs}
        given = [_moved(c, results[n].device.type) for n, c in cotangents.items()]
        grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given, allow_unused=True)
        found = self.case.gradients(cotangents, seen)
        for (n, leaf), grad in zip(leaves.items(), grads, strict=True):
            grad = torch.zeros_like(leaf) if grad is None else grad
            must(grad.shape == leaf.shape, f"gradient of {n}: shape {tuple(grad.shape)}, not {tuple(leaf.shape)}")
            _compare(f"gradient of {n}", grad, found[n])

    def _kind(self, name: str) -> str:
        return self.kinds["out" if name in ("out", "tokens", "scale") else "other"]

    def _cotangent(self, kind: str, like: Tensor) -> Tensor:
        if kind == "expanded":  # as of .sum()
            return torch.ones((), dtype=like.dtype).expand(like.shape)
        values = self.draw.values(*like.shape, dtype=like.dtype, kind="normal")
        return self.draw.layout(values) if kind == "layout" else values


def _bytes(tensor: Tensor) -> Tensor:
    """All memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),))


def _moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor as a leaf with the same strides on a device."""
    if device == "cpu":
        return tensor.detach()
    memory = _bytes(tensor).to(device).view(tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _compare(name: str, actual: Tensor, expected: Num) -> None:
    must(actual.shape == expected.x.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.x.shape)}")
    found = worst(actual, expected)
    if found is None:
        return
    times, index, count = found
    value, right, bound = (float(t[index]) for t in (actual, expected.x, expected.e))
    raise Wrong(
        f"{name}: {value:.9g} at {list(index)}, not {right:.9g} within {bound:.2g} ({times:.3g} times that); "
        f"{count} of {actual.numel()} elements"
    )


def all_ops() -> list[str]:
    return list(GENERATORS)
