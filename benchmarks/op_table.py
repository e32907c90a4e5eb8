"""The tables of all ops, for README.md and docs/backends.md: read from the code, with nothing written by hand."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vidmem_kernels
from vidmem_kernels import _verified, testing
from vidmem_kernels._op import OPS, Op

from .page_parts import table

FAMILIES = ("token_merge", "sparse_gather", "linear_attn", "cross_attn")
# Arguments of ops that have another name in the public function.
PUBLIC_NAMES = {"S": "state", "z": "state"}
EIGHT_BITS = (torch.int8, torch.float8_e4m3fn)
FLOATS = "f"


def names() -> list[str]:
    """The public functions that have kernels, family by family, in the order of their definitions."""

    def place(name: str) -> tuple[int, str, int]:
        family = OPS[name].family.rpartition(".")[2]
        order = FAMILIES.index(family) if family in FAMILIES else len(FAMILIES)
        function = inspect.unwrap(getattr(vidmem_kernels, name))
        return order, family, function.__code__.co_firstlineno

    return sorted(testing.public_functions(), key=place)


def what(name: str) -> str:
    """What a function does: the first sentence of its docstring, up to a colon."""
    first = " ".join(inspect.getdoc(getattr(vidmem_kernels, name)).split("\n\n")[0].split())
    return re.split(r"[.:](?:\s|$)", first)[0].replace("|", "\\|")


def ops_of(name: str) -> list[Op]:
    """The ops that a public function calls: that of its name, and variants such as cross_attention_mixed."""
    variants = (op for op in OPS if op.startswith(f"{name}_") and not op.endswith("_backward"))
    return [OPS[op] for op in (name, *variants)]


def gradients(op: Op) -> Iterator[str]:
    """Arguments of an op that receive a gradient in its samples."""
    for sample in testing.samples(op.name) if op.backward else ():
        args = testing.with_grad(sample.args)
        results = [r for r in testing.float_leaves(testing.run(op, args, "reference")) if r.requires_grad]
        leaves = [(n, t) for n, arg in zip(op.arguments, args, strict=True) for t in testing.float_leaves(arg)]
        if not results:
            continue
        found = torch.autograd.grad([r.sum() for r in results], [t for _, t in leaves], allow_unused=True)
        yield from (n for (n, _), gradient in zip(leaves, found, strict=True) if gradient is not None)


def backward(name: str) -> str:
    """The arguments of a public function that have a gradient."""
    found = dict.fromkeys(PUBLIC_NAMES.get(arg, arg) for op in ops_of(name) for arg in gradients(op))
    return ", ".join(f"`{arg}`" for arg in found) or "indices only"


def dtypes(name: str) -> str:
    """Float dtypes, and the 8-bit ones that the samples of the contract tests have."""

    def among(values: Any) -> bool:
        return any((v.dtype if isinstance(v, Tensor) else v) in EIGHT_BITS for v in values)

    samples = [sample.args for op in ops_of(name) for sample in testing.samples(op.name)]
    eight = ", ".join(str(dtype).removeprefix("torch.") for dtype in EIGHT_BITS)
    if among(arg for args in samples for arg in args if isinstance(arg, Tensor)):
        return f"{FLOATS}, {eight}"
    return f"{FLOATS} → {eight}" if among(arg for args in samples for arg in args) else FLOATS


def kernels(name: str, root: Path) -> tuple[str, str]:
    """What runs an op on the CPU and on a GPU, beside the reference, which runs everywhere."""
    op = OPS[name]
    cpu = {"C++": name in _verified.cpu_fingerprints(root / "csrc"), "SDPA": op.library is not None}
    gpu = {
        "libraries": op.library is not None,
        "Triton": op.triton is not None,
        "CUDA C++": name in _verified.cuda_fingerprints(root / "csrc"),
    }
    return tuple(", ".join(kernel for kernel, there in side.items() if there) or "reference" for side in (cpu, gpu))


def runs(name: str, root: Path) -> str:
    """The runs on GPUs that an op's kernels passed, and whether they are still the same."""
    in_cuda = _verified.cuda_fingerprints(root / "csrc").get(name)
    found = {OPS[name].verified_on("triton")}
    if in_cuda:
        found.add(_verified.verified_on(name, "cuda", in_cuda))
    return "; ".join(sorted({str(run or "compiled, not run") for run in found}))


def short(root: Path) -> str:
    """The table of README.md."""
    rows = ([f"`{name}`", what(name), *kernels(name, root), backward(name)] for name in names())
    return table(["op", "what it does", "CPU", "GPU", "backward"], rows, left=5)


def full(root: Path) -> str:
    """The table of docs/backends.md."""
    rows = ([f"`{name}`", *kernels(name, root), dtypes(name), backward(name), runs(name, root)] for name in names())
    return table(["op", "CPU", "GPU", "dtypes", "backward", "GPU kernels verified on"], rows, left=6)
