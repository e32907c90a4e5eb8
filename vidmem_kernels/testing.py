"""For tests of backends, ours and others': sample inputs of every op, derived error budgets, poisoned memory.

A family's samples.py yields labelled argument tuples for each op, which the contract tests run, and calls of every
public function with named sizes. Its compositions.py defines the error budget of an op in half precision.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import _dispatch
from ._op import OPS, Op
from ._poison import poisoned_memory as poisoned_memory

_SAMPLES: dict[str, Callable[[Make], Iterator[tuple[str, tuple]]]] = {}
_COMPOSITIONS: dict[str, Callable[..., Any]] = {}
_CALLS: list[Call] = []

HALF = (torch.bfloat16, torch.float16)


class Sample(NamedTuple):
    """Arguments of torch.ops.vidmem.<op>: all of the schema except `backend`."""

    label: str
    args: tuple[Any, ...]


class Make:
    """Makes random tensors of one dtype and device; the same seed gives the same tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
        self.dtype = dtype
        self.device = device
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal values, drawn in float64 and rounded, so that all dtypes share their values."""
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return values.to(dtype or self.dtype).to(self.device)

    def rand(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Values in [0.5, 1.5): sizes, scales and other positive numbers."""
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64) + 0.5
        return values.to(dtype or self.dtype).to(self.device)

    def randint(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self._generator).to(dtype).to(self.device)

    def strided(self, tensor: Tensor) -> Tensor:
        """The same values without a contiguous dimension: axes reversed in memory, every second element."""
        axes = tuple(reversed(range(tensor.dim())))
        spread = tensor.permute(axes).repeat_interleave(2, dim=-1)
        return spread[..., ::2].permute(axes)


def sample_inputs(op: str) -> Callable:
    """Decorator of a generator `make -> (label, args)` that yields the samples of one op."""

    def register(generator: Callable) -> Callable:
        _SAMPLES[op] = generator
        return generator

    return register


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Adds to an error inside the `with` block what was being tested."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error


def samples(op: str, make: Make | None = None) -> list[Sample]:
    """Returns all samples of an op.

    Raises:
        KeyError: the family's samples.py has none.
    """
    importlib.import_module(f"{OPS[op].family}.samples")
    if op not in _SAMPLES:
        raise KeyError(f"{op}: add @sample_inputs({op!r}) to {OPS[op].family}.samples")
    return [Sample(label, args) for label, args in _SAMPLES[op](make or Make())]


class Call(NamedTuple):
    """A call of a public function, for suites that run every public function at sizes they choose.

    Attributes:
        function: its name in vidmem_kernels.
        label: what is special about the call.
        call: function of the tensors.
        shapes: the dimension names of each tensor; in "B N 4" the last dimension is fixed.
        make: (Make, sizes by name) -> the tensors.
        least: smallest size of a dimension, if there is one.
        constant: indices of float tensors that get no gradient, such as times.
        moves: whether the results, and the gradients, only copy elements of the tensors.
    """

    function: str
    label: str
    call: Callable[..., Any]
    shapes: tuple[str, ...]
    make: Callable[[Make, dict[str, int]], tuple[Tensor, ...]]
    least: dict[str, int]
    constant: tuple[int, ...] = ()
    moves: bool = False

    def __str__(self) -> str:
        return f"{self.function}[{self.label}]"

    @property
    def names(self) -> list[str]:
        """Names of the dimensions, in order."""
        found = (d for shape in self.shapes for d in shape.split() if not d.isdigit() and d.isalnum())
        return list(dict.fromkeys(found))

    def floats(self, tensors: Sequence[Tensor]) -> list[int]:
        """Indices of the tensors that get a gradient."""
        return [i for i, t in enumerate(tensors) if is_differentiable(t) and i not in self.constant]


def named_call(
    function: str,
    label: str,
    call: Callable[..., Any],
    *shapes: str,
    make: Callable[[Make, dict[str, int]], tuple[Tensor, ...]] | None = None,
    constant: tuple[int, ...] = (),
    moves: bool = False,
    **least: int,
) -> Call:
    """Makes a `Call`; without `make` all tensors are normal."""

    def normal(m: Make, sizes: dict[str, int]) -> tuple[Tensor, ...]:
        return tuple(m.randn(*(int(d) if d.isdigit() else sizes[d] for d in shape.split())) for shape in shapes)

    return Call(function, label, call, shapes, make or normal, least, constant, moves)


def public_call(function: str, *args: Any, **options: Any) -> None:
    """Declares a call of a public function in its family's samples.py; takes the arguments of `named_call`."""
    _CALLS.append(named_call(function, *args, **options))


def public_calls() -> list[Call]:
    """The calls that all families declare, sorted by function name."""
    for family in {op.family for op in OPS.values()}:
        if importlib.util.find_spec(f"{family}.samples") is not None:
            importlib.import_module(f"{family}.samples")
    return sorted(_CALLS, key=lambda call: call.function)


def public_functions() -> set[str]:
    """Names of the public functions that call an op, i.e. take a backend."""
    return {
        name
        for name, function in _public().items()
        if inspect.isfunction(function) and "backend" in inspect.signature(function).parameters
    }


def public_modules() -> set[str]:
    """Names of the public modules."""
    return {name for name, cls in _public().items() if isinstance(cls, type) and issubclass(cls, torch.nn.Module)}


def _public() -> dict[str, Any]:
    package = sys.modules[__package__]
    return {name: getattr(package, name) for name in package.__all__}


def is_differentiable(tensor: object) -> bool:
    """Whether autograd supports `tensor`: a float tensor other than float8."""
    return isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype.itemsize >= 2


def with_grad(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Detached copies of the arguments (with the same strides) in which every float tensor requires a gradient."""

    def leaf(t: Tensor) -> Tensor:
        copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
        return copy.requires_grad_(is_differentiable(t))

    return pytree.tree_map_only(Tensor, leaf, args)


def to_float64(args: Any) -> Any:
    """The arguments with every float tensor (except float8) converted to float64, values unchanged."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(torch.float64) if is_differentiable(t) else t, args)


class _Product(torch.autograd.Function):
    """See `product`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        a, b = _rounded(a, dtype), _rounded(b, dtype)
        ctx.save_for_backward(a, b)
        ctx.dtype = dtype
        return a @ b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        grad = _rounded(grad, ctx.dtype)
        return _rounded(grad @ b.mT, ctx.dtype), _rounded(a.mT @ grad, ctx.dtype), None


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the precision and range of a half dtype; float16 is scaled to fit, as users do."""
    if dtype not in HALF:
        return x
    scale = 2 / torch.finfo(dtype).eps
    mantissa, exponent = torch.frexp(x.detach())
    return torch.ldexp((mantissa * scale).round() / scale, exponent)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes a @ b for a composition that holds its tensors in `dtype`, summed in float32 (float64 for float64).

    Its gradient does the same: the gradient of the sums is rounded before it is multiplied, and the gradients of a and
    b have their dtype, as autograd's do.

    Args:
        a: matrices in the dtype of the sums; in half precision they are rounded once.
        b: matrices in the dtype of the sums, with the batch shape of a.
        dtype: dtype of the tensors that the op was given.

    Returns:
        The products, in the dtype of the sums.
    """
    return _Product.apply(a, b, dtype)


def composition(op: str) -> Callable:
    """Decorator of a function of the op's arguments: the op as users would compose it from PyTorch in half precision.

    Every tensor in a matrix product has the dtype of the op's arguments, see `product`; sums are not rounded, except as
    results.
    """

    def register(function: Callable) -> Callable:
        _COMPOSITIONS[op] = function
        return function

    return register


def yardstick(op: str, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that sets the error budget of a call: the op's composition in half precision, else the reference.

    An op without a matrix product has no composition: PyTorch also computes its intermediate values in float32.
    """
    if not any(isinstance(t, Tensor) and t.dtype in HALF for t in pytree.tree_leaves(args)):
        return OPS[op].reference
    module = f"{OPS[op].family}.compositions"
    if importlib.util.find_spec(module) is not None:
        importlib.import_module(module)
    return _COMPOSITIONS.get(op, OPS[op].reference)


def assert_within_budget(actual: Any, at_dtype: Any, exact: Any, what: str = "") -> None:
    """Asserts that a kernel's results are as accurate as plain PyTorch's; the bound is derived, not tuned.

    The largest error against `exact` may be twice that of `at_dtype`, plus one rounding of the largest result. Integer
    results must be equal.

    Args:
        actual: the kernel's results, a tensor or a tree of tensors.
        at_dtype: the yardstick's results for the same inputs, at the same dtype; see `yardstick`.
        exact: the reference's results for the inputs converted to float64.
        what: description for the message.

    Raises:
        AssertionError: the error exceeds the budget.
    """
    leaves = [pytree.tree_leaves(tree) for tree in (actual, at_dtype, exact)]
    assert len(leaves[0]) == len(leaves[1]) == len(leaves[2]), f"{what}: number of results differs"
    for i, (a, r, e) in enumerate(zip(*leaves, strict=True)):
        if a is None and r is None:
            continue
        where = f"{what} result {i}"
        assert a.shape == r.shape, f"{where}: shape {tuple(a.shape)} != {tuple(r.shape)}"
        assert a.dtype == r.dtype, f"{where}: dtype {a.dtype} != {r.dtype}"
        if not a.is_floating_point():
            assert torch.equal(a, r), f"{where}: {(a != r).sum().item()} of {a.numel()} differ"
            continue
        if a.numel() == 0:
            continue
        a, r, e = (t.detach().to(torch.float64) for t in (a, r, e))
        special = ~torch.isfinite(e)
        assert torch.equal(special, ~torch.isfinite(a)), f"{where}: NaN or infinity differ"
        same = (a == e) | (a.isnan() & e.isnan())
        assert same[special].all(), f"{where}: NaN or infinity differ"
        finite = ~special
        if not finite.any():
            continue
        assert torch.isfinite(r[finite]).all(), f"{where}: the yardstick is not finite, it sets no budget"
        rounding = torch.finfo(leaves[0][i].dtype).eps * e[finite].abs().max()
        budget = 2 * (r - e)[finite].abs().max() + rounding
        error = (a - e)[finite].abs().max()
        assert error <= budget, f"{where}: error {error:.3e} over the budget {budget:.3e}"


FLAGS = ("off", "on", "warn only")


@contextmanager
def determinism(flag: str) -> Iterator[None]:
    """Sets torch.use_deterministic_algorithms as one of `FLAGS`, for the whole process."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(flag != "off", warn_only=flag == "warn only")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


def run(op: Op, args: tuple[Any, ...], backend: str = "auto") -> Any:
    """Calls torch.ops.vidmem.<op>."""
    return op.overload(*args, backend=backend)


def float_leaves(tree: Any) -> list[Tensor]:
    """The tensors of a tree that autograd supports."""
    return [t for t in pytree.tree_leaves(tree) if is_differentiable(t)]


def gradients(args: tuple[Any, ...], results: Any, like: Any = None, seed: int = 1) -> list[Tensor]:
    """Gradients of a random projection of the float results with respect to every float argument, zero where there is
    none.

    With `like`, the results of the same call at another dtype, the projection is the same as for those.
    """
    results = float_leaves(results)
    dtypes = [t.dtype for t in (results if like is None else float_leaves(like))]
    differentiable = [(t, dtype) for t, dtype in zip(results, dtypes, strict=True) if t.requires_grad]
    inputs = float_leaves(args)
    if not differentiable:
        return [torch.zeros_like(t) for t in inputs]
    make = Make(seed=seed)
    weights = [make.randn(*t.shape, dtype=dtype).to(t.device, t.dtype) for t, dtype in differentiable]
    outputs = [t for t, _ in differentiable]
    grads = torch.autograd.grad(outputs, inputs, weights, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


def check_backend(op: Op, backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Asserts that a backend's results and gradients are within budget on every sample that it does not refuse.

    Memory is poisoned, so that reads of uninitialised memory become visible.
    """
    for sample in samples(op.name, Make(dtype, device)):
        if _dispatch.refusal(op, backend, torch.device(device), sample.args) is not None:
            continue
        what = f"{op.name}[{sample.label}] on {backend}"
        args, ref_args = with_grad(sample.args), with_grad(sample.args)
        exact_args = with_grad(to_float64(sample.args))
        with poisoned_memory():
            actual = run(op, args, backend)
        # Autograd through the yardstick, not op.backward: an error in that formula must not widen its own budget.
        at_dtype, exact = yardstick(op.name, ref_args)(*ref_args), op.reference(*exact_args)
        assert_within_budget(actual, at_dtype, exact, what)
        if op.backward is None:
            continue
        with poisoned_memory():
            grads = gradients(args, actual)
        exact_grads = gradients(exact_args, exact, like=actual)
        assert_within_budget(grads, gradients(ref_args, at_dtype), exact_grads, f"gradient of {what}")
