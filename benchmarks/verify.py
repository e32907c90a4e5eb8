"""Verifies results before their speed counts.

Ours must satisfy `vidmem_kernels.testing.assert_within_budget`: relative to the float64 reference, at most twice the
error of the reference at the same dtype, plus one rounding. Baselines may round differently (bf16 intermediates,
another order of sums), so they must satisfy TOLERANCE, which only distinguishes a wrong result from a rounded one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from vidmem_kernels.testing import assert_within_budget

from .registry import Benchmark, Inputs, Sizes, prepare

# Largest error, as a fraction of the largest magnitude.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
SELECTION_TOLERANCE = 1e-5  # for the scores of choices; ours are computed in float32 at every dtype


class Expected(NamedTuple):
    """The reference's results at the dtype of the inputs and in float64."""

    at_dtype: Any
    exact: Any


def _leaves(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def expect(bench: Benchmark, x: Inputs, s: Sizes, which: str, dtype: torch.dtype) -> Expected:
    """The expected results of a pass, in the form in which they are compared."""

    def run(function, inputs):
        results = prepare(function, inputs, which, bench.differentiable, dtype)()
        return _leaves(bench.comparable(results, x, s) if which == "fwd" else results)

    at_dtype = run(lambda inputs: bench.call(inputs, s, "reference"), x)
    # The choice among near ties is made once, at the dtype of the inputs.
    return Expected(at_dtype, at_dtype if bench.selects else run(lambda inputs: bench.exact(inputs, s), x))


def _assert_close(actual: list[Tensor], exact: list[Tensor], tolerance: float, what: str) -> None:
    assert len(actual) == len(exact), f"{what}: {len(actual)} results, not {len(exact)}"
    for i, (a, e) in enumerate(zip(actual, exact, strict=True)):
        assert a.shape == e.shape, f"{what} result {i}: shape {tuple(a.shape)} != {tuple(e.shape)}"
        if e.numel() == 0:
            continue
        error = (a.double() - e.double()).abs().max().item()
        limit = tolerance * e.double().abs().max().item()
        # Not `error > limit`, which is false for NaN.
        assert error <= limit, f"{what} result {i}: error {error:.3e} over {limit:.3e}"


def check_ours(bench: Benchmark, results: Any, expected: Expected, x: Inputs, s: Sizes, which: str) -> None:
    """Asserts that our results are within the derived budget."""
    what = f"{bench.name} {which}"
    actual = _leaves(bench.comparable(results, x, s) if which == "fwd" else results)
    if bench.selects:
        _assert_close(actual, expected.exact, SELECTION_TOLERANCE, what)
    else:
        assert_within_budget(actual, expected.at_dtype, expected.exact, what)


def check_baseline(
    bench: Benchmark, results: Any, expected: Expected, x: Inputs, s: Sizes, which: str, dtype: torch.dtype
) -> None:
    """Asserts that a baseline computed the same task."""
    actual = _leaves(bench.comparable(results, x, s) if which == "fwd" else results)
    _assert_close(actual[: len(expected.exact)], expected.exact, bench.tolerance or TOLERANCE[dtype], bench.name)
