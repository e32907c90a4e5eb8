"""How far a correct kernel's result may lie from the exact one: error bounds that are derived, element by element.

The house's budget, twice the error of plain torch plus one rounding, is a random number: on a tensor of three elements
plain torch may well hit all three by luck, and a kernel that rounds once differently is then over it. A fuzzer that
draws millions of small tensors would cry wolf. So the oracle here carries, beside every number, what rounding can do to
it (running error analysis: Wilkinson, 1963; Higham, Accuracy and Stability of Numerical Algorithms, chapter 3):

    x   the value in float64,
    m   its magnitude: the same formula with every minus made a plus, so |x| <= m. However sums of products are
        associated (scores first or states first, tiles in any order), K roundings err by at most K u m.
    e   the bound of the error.

What a kernel may do is that of the design: sums in float32 (float64 for float64); in half precision, each factor of a
product may be rounded once more to the dtype of the tensors. The bound is the worst case, n u for a sum of n terms:
values that repeat have roundings of one sign, for which square-root laws do not hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

EXP = 4  # roundings in exp and log: theirs, and those of the factor log2(e) where exp2 computes them
OWN = 2.0**-53  # the oracle's own unit


_truncated: set[torch.dtype] = set()  # dtypes that are cut rather than rounded to


@contextmanager
def truncating(*dtypes: torch.dtype) -> Iterator[None]:
    """Bounds for an arithmetic that cuts to these dtypes: twice a rounding. Triton's interpreter does, to bfloat16."""
    _truncated.update(dtypes)
    try:
        yield
    finally:
        _truncated.clear()


def unit_of(dtype: torch.dtype) -> float:
    """The largest relative error of storing a number as `dtype`, and a hundredth more for products of errors."""
    return 1.01 * torch.finfo(dtype).eps / (1 if dtype in _truncated else 2)


class Precision:
    """Roundings of an op on tensors of one dtype: `unit` of its sums, `factor` of what it multiplies."""

    def __init__(self, dtype: torch.dtype):
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        self.unit = unit_of(sums) + OWN
        self.vanishing = torch.finfo(sums).tiny  # what is smaller may be flushed to zero
        half = dtype in (torch.bfloat16, torch.float16)
        info = torch.finfo(dtype)
        self.factor = unit_of(dtype) if half else 0.0
        self.factor_vanishing = info.smallest_normal * info.eps if half else 0.0

    def num(self, x: Tensor) -> Num:
        """A number that is exact: an argument."""
        x = x.detach().to(torch.float64)
        return Num(self, x, x.abs(), torch.zeros_like(x))


class Num:
    """A number with its magnitude and error bound, see the module."""

    def __init__(self, precision: Precision, x: Tensor, m: Tensor, e: Tensor):
        self.precision, self.x, self.m, self.e = precision, x, m, e

    def _rounded(self, x: Tensor, m: Tensor, e: Tensor, times: float = 1) -> Num:
        return Num(self.precision, x, m, e + times * (self.precision.unit * m + self.precision.vanishing))

    def map(self, function: Callable[[Tensor], Tensor]) -> Num:
        """What moves elements, such as transpose."""
        return Num(self.precision, function(self.x), function(self.m), function(self.e))

    def linear(self, function: Callable[[Tensor], Tensor], terms: int) -> Num:
        """A function that adds up to `terms` elements into one, such as a sum over groups."""
        return self._rounded(function(self.x), function(self.m), function(self.e), terms)

    def where(self, keep: Tensor, other: float = 0.0) -> Num:
        """`other`, exactly, wherever not `keep`."""
        size = abs(other) if other > float("-inf") else 0.0
        fill = (other, size, 0.0)
        return Num(
            self.precision, *(torch.where(keep, t, f) for t, f in zip((self.x, self.m, self.e), fill, strict=True))
        )

    def __add__(self, other: Num) -> Num:
        return self._rounded(self.x + other.x, self.m + other.m, self.e + other.e)

    def __neg__(self) -> Num:
        return Num(self.precision, -self.x, self.m, self.e)

    def __sub__(self, other: Num) -> Num:
        return self + -other

    def __mul__(self, other: Num | float) -> Num:
        if isinstance(other, float | int):
            return self._rounded(self.x * other, self.m * abs(other), self.e * abs(other), 2)
        e = self.e * other.m + self.m * other.e + self.e * other.e
        return self._rounded(self.x * other.x, self.m * other.m, e)

    def matmul(self, other: Num, rounded: int) -> Num:
        """The matrix product, of which `rounded` factors may have been rounded to the tensors' dtype."""
        p = self.precision
        terms = self.x.shape[-1]
        m = self.m @ other.m
        e = self.e @ other.m + self.m @ other.e + self.e @ other.e + rounded * p.factor * m
        if rounded and p.factor_vanishing:
            e = e + p.factor_vanishing * (self.m.sum(-1, keepdim=True) + other.m.sum(-2, keepdim=True))
        return self._rounded(self.x @ other.x, m, e, terms + 2)

    def sum(self, dim: int, keepdim: bool = False) -> Num:
        return self.linear(lambda t: t.sum(dim, keepdim=keepdim), self.x.shape[dim])

    def __truediv__(self, other: Num) -> Num:
        x = self.x / other.x
        low = other.x.abs() - other.e
        e = (self.e + x.abs() * other.e) / low
        e = torch.where(low > 0, e, torch.inf)
        e = torch.where((self.x == 0) & (self.m == 0) & (other.x != 0), 0.0, e)
        return self._rounded(x, torch.maximum(x.abs(), self.m / other.x.abs()), e, 2)

    def exp(self) -> Num:
        x = self.x.exp()
        e = torch.where(x == 0, 0.0, x * self.e.expm1())
        return self._rounded(x, x, e, EXP)

    def to(self, dtype: torch.dtype) -> Num:
        """Stored as `dtype`."""
        info = torch.finfo(dtype)
        vanishing = info.smallest_normal * (info.eps if dtype == torch.float16 else 1)
        e = self.e + (unit_of(dtype) + OWN) * (self.x.abs() + self.e) + vanishing
        return Num(self.precision, self.x, self.m, torch.where(self.e == 0, torch.where(self.x == 0, 0.0, e), e))


def exact(x: Tensor) -> Num:
    """A result that must come to the bit."""
    x = x.detach().to(torch.float64)
    return Num(Precision(torch.float64), x, x.abs(), torch.zeros_like(x))


def log_sum_exp(scores: Num) -> Num:
    """Over the last axis; -inf where every score is."""
    p = scores.precision
    terms = scores.x.shape[-1]
    if terms == 0:
        empty = scores.x.new_full(scores.x.shape[:-1], -torch.inf)
        return Num(p, empty, torch.zeros_like(empty), torch.zeros_like(empty))
    x = scores.x.logsumexp(-1)
    seen = x > -torch.inf
    share = (scores.x - x.masked_fill(~seen, 0).unsqueeze(-1)).exp()
    largest = scores.x.amax(-1).masked_fill(~seen, 0)
    # An error of every score by at most its bound, of every weight and of their sum; those of the largest cancel.
    e = (share * scores.e.exp()).sum(-1).log()
    e = e + p.unit * (terms + EXP * (4 + largest.abs() + (x - largest).abs()))
    size = x.abs().masked_fill(~seen, 0)
    return Num(p, x, size, torch.where(seen, e, 0.0))


def worst(actual: Tensor, expected: Num) -> tuple[float, tuple[int, ...], int] | None:
    """Where a result is furthest over its bound: (how many bounds off, index, number of wrong elements), or None."""
    if actual.numel() == 0:
        return None
    a, x = actual.detach().cpu().to(torch.float64), expected.x
    e = expected.e.nan_to_num(nan=torch.inf, posinf=torch.inf)
    limit = torch.finfo(actual.dtype).max
    may_overflow = (x.abs() + e >= limit * (1 - torch.finfo(actual.dtype).eps)) & ~x.isnan()
    difference = (a - x).abs()
    fine = (difference <= e) | (a == x) | (a.isnan() & x.isnan()) | (may_overflow & (a.abs() >= limit))
    fine |= e.isinf() & x.isfinite()  # a denominator that may be 0, weights of scores that rounding moves by many
    if fine.all():
        return None
    off = (difference / e).nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(fine, -1)
    at = off.flatten().argmax()
    index = tuple(int(i) for i in torch.unravel_index(at, a.shape))
    return float(off.flatten()[at]), index, int((~fine).sum())
