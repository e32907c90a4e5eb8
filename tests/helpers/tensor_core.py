"""Triton's interpreter with the arithmetic of a Hopper tensor core, which numpy's products are much kinder than.

Products are exact. Of 16 products of half factors, or 8 of TF32, and the accumulator, each is cut off two bits below
float32's last one of the largest, and then their sum to float32; nothing is rounded. Two errors that an H200 showed in
this project's tests came out the same to three digits. tl.exp is 2 to the power of a rounded product, as ex2.approx
makes it. Factors that are handed over as TF32 are asserted to be that short.
"""

from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime import interpreter

_SPARE_BITS = 2


def _step(acc, a, b):
    products = a[:, :, None] * b[None]
    exponent = np.frexp(a)[1][:, :, None] + np.frexp(b)[1][None]
    largest = np.where(products != 0, exponent, -10_000).max(1)
    largest = np.maximum(largest, np.where(acc != 0, np.frexp(acc)[1], -10_000))
    unit = np.ldexp(1.0, np.maximum(largest - 24 - _SPARE_BITS, -400))
    mantissa, exponent = np.frexp((np.trunc(products / unit[:, None]).sum(1) + np.trunc(acc / unit)) * unit)
    return np.ldexp(np.trunc(mantissa * 2**24), exponent - 24)


def _multiply(a, b, acc, at_once):
    a, b, acc = (x.astype(np.float64) for x in (a, b, acc))
    for i in range(0, a.shape[1], at_once):
        acc = _step(acc, a[:, i : i + at_once], b[i : i + at_once])
    return acc.astype(np.float32)


def _short(x, bits):
    """x rounded to float32 without its last `bits`."""
    raised = x.astype(np.float32).view(np.uint32) + np.uint32(1 << (bits - 1))
    return (raised & np.uint32(0xFFFFFFFF << bits & 0xFFFFFFFF)).view(np.float32)


def _tf32x3(a, b, acc):
    """As Triton takes it apart."""
    (high, low), (right, rest) = ((_short(x, 13), _short(x - _short(x, 13), 13)) for x in (a, b))
    total = _multiply(low, right, np.zeros_like(acc), 8)
    total = _multiply(high, rest, total, 8)
    return _multiply(high, right, total, 8) + acc


def _one_by_one(a, b, acc):
    for i in range(a.shape[1]):
        acc = (a[:, i : i + 1].astype(np.float64) * b[i : i + 1] + acc).astype(np.float32)
    return acc


def _is_half(x):
    # What lies outside of float16's range is infinite there.
    with np.errstate(over="ignore"):
        return (_short(x, 16) == x).all() or (x.astype(np.float16) == x).all()


def _create_dot(self, a, b, d, precision, imprecise):
    left, right, acc = a.data, b.data, d.data
    name = str(precision).rsplit(".", 1)[-1].lower()
    if not all(np.isfinite(x).all() for x in (left, right, acc)):
        out = np.matmul(left, right) + acc
    elif name == "ieee":
        out = _one_by_one(left, right, acc)
    elif name == "tf32x3":
        out = _tf32x3(left, right, acc)
    else:
        assert all((_short(x, 13) == x).all() for x in (left, right)), "bits that TF32 has not"
        out = _multiply(left, right, acc, 16 if _is_half(left) and _is_half(right) else 8)
    return interpreter.TensorHandle(out, d.dtype.scalar)


def _create_exp(self, x):
    power = x.data * np.float32(1.4426950408889634)
    return interpreter.TensorHandle(np.exp2(power.astype(np.float64)).astype(np.float32), x.dtype.scalar)


@contextmanager
def tensor_core():
    """Products and exponentials of interpreted kernels as a tensor core and its GPU compute them."""
    builder = interpreter.InterpreterBuilder
    with mock.patch.object(builder, "create_dot", _create_dot), mock.patch.object(builder, "create_exp", _create_exp):
        yield
