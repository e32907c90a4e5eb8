"""The CPU kernels of quantize_rows and its gradient: equal to the reference to the bit, with every instruction set."""

import math

import pytest
import torch
from backend_helpers import compiled
from bank_helpers import ids

from vidmem_kernels import quantize_rows
from vidmem_kernels.testing import Make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
WIDTHS = [1, 7, 8, 16, 33, 511, 1031]
nan, inf = math.nan, math.inf


def same_bits(a, b):
    """Equal codes; floats of equal bits but for those of a NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    if a.dtype in QUANTIZED:
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        return
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    assert torch.equal(torch.signbit(a)[~a.isnan()], torch.signbit(b)[~b.isnan()])


def check(x, quantized):
    rows, scale = torch.ops.vidmem.quantize_rows(x, quantized, "cpu")
    expected = torch.ops.vidmem.quantize_rows(x, quantized, "reference")
    same_bits(scale, expected[1])
    same_bits(rows, expected[0])
    grad = torch.randn(scale.shape).to(scale.dtype)
    for g in (grad, grad[:1, :1].expand_as(grad), grad.T.contiguous().T if grad.dim() == 2 else grad):
        args = g, x, quantized
        same_bits(
            torch.ops.vidmem.quantize_rows_backward(*args, "cpu"),
            torch.ops.vidmem.quantize_rows_backward(*args, "reference"),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("quantized", QUANTIZED, ids=ids)
def test_random_rows(dtype, quantized, capability):
    make = Make(dtype)
    for width in WIDTHS:
        x = make.randn(2, 5, width)
        check(x, quantized)
        check(make.strided(x), quantized)
    check(make.randn(1, 600, 9).transpose(1, 2), quantized)
    check(make.randn(3, 40, 6)[1:, ::3, 1:4], quantized)


def test_rows_of_many_threads(capability):
    x = torch.randn(3, 4001, 65)
    check(x, torch.int8)
    check(x, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("quantized", QUANTIZED, ids=ids)
def test_special_rows(dtype, quantized, capability):
    """Zeros of both signs, NaN and infinity anywhere, limited scales, equal magnitudes, subnormal numbers."""
    info = torch.finfo(dtype)
    zeros, ones = [0.0] * 35, [1.0] * 35
    rows = [
        zeros,
        [-0.0] * 35,
        [-0.0, 1.0, *zeros[2:]],
        [nan, *ones[1:]],
        [*ones[:34], nan],
        [*ones[:30], -nan, nan, inf, -inf, 1.0],
        [inf, *ones[1:]],
        [*ones[:20], -inf, inf, *ones[22:]],
        [1.0, -2.0, 2.0, *ones[3:]],
        [1.0, 2.0, -2.0, *ones[3:]],
        [info.max, -info.max, *ones[2:]],
        [info.max / 2, 1.0, *ones[2:]],
        [info.tiny, -info.tiny / 4, *zeros[2:]],
        [info.tiny * 127, info.tiny * 126, *zeros[2:]],
        [info.tiny * 448, info.tiny * 3, *zeros[2:]],
        [info.smallest_normal / 8, *zeros[1:]],
    ]
    x = torch.tensor(rows, dtype=torch.float64).to(dtype).unsqueeze(0)
    assert len(set(x.isnan().any(dim=2)[0].tolist())) == 2
    for width in (35, 34, 3, 2, 1):
        check(x[..., :width], quantized)
        check(x[..., :width].contiguous(), quantized)


def test_gradient_of_a_special_gradient(capability):
    x = torch.tensor([[[1.0, -3.0]]]).expand(1, 4, 2)
    for value in (nan, inf, -inf, 0.0, -0.0):
        grad = torch.full((1, 4), value)
        args = grad, x, torch.int8
        same_bits(
            torch.ops.vidmem.quantize_rows_backward(*args, "cpu"),
            torch.ops.vidmem.quantize_rows_backward(*args, "reference"),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
def test_float8_rounds_to_even(dtype, capability):
    """Every code, the midpoints between neighbours and what lies beside them; 448 in the row makes its scale 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)
    middle = (codes[:-1] + codes[1:]) / 2
    beside = [middle.nextafter(torch.tensor(end, dtype=dtype)) for end in (0.0, 448.0)]
    values = torch.cat([codes, middle, *beside])
    values = torch.cat([values, -values]).view(1, 1, -1)
    rows, scale = quantize_rows(values, torch.float8_e4m3fn, backend="cpu")
    assert scale.item() == 1
    same_bits(rows, values.to(torch.float8_e4m3fn))
    assert torch.equal(rows[0, 0, :127].view(torch.uint8), torch.arange(127, dtype=torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_int8_rounds_to_even(dtype, capability):
    values = torch.arange(-127, 127.5, 0.5, dtype=torch.float64).to(dtype).view(1, 1, -1)
    rows, scale = quantize_rows(values, torch.int8, backend="cpu")
    assert scale.item() == 1
    assert rows.flatten().tolist() == [round(v) for v in values.flatten().tolist()]


@pytest.mark.parametrize("shape", [(0, 3, 5), (2, 0, 5), (2, 3, 0)])
def test_empty(shape, capability):
    for quantized in QUANTIZED:
        rows, scale = torch.ops.vidmem.quantize_rows(torch.empty(shape), quantized, "cpu")
        assert rows.shape == shape and rows.dtype == quantized
        assert torch.equal(scale, torch.zeros(shape[:2]))
        grad = torch.ops.vidmem.quantize_rows_backward(scale, torch.empty(shape), quantized, "cpu")
        assert grad.shape == shape


@compiled
def test_compiled_kernels_check_for_themselves():
    quantize, backward = torch.ops.vidmem_cpp.quantize_rows, torch.ops.vidmem_cpp.quantize_rows_backward
    x, grad = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="quantize_rows: x must have 3 dimensions, got 2"):
        quantize(x[0], torch.int8)
    with pytest.raises(ValueError, match="quantize_rows: x must have a float dtype"):
        quantize(x.to(torch.int8), torch.int8)
    with pytest.raises(ValueError, match="quantize_rows: dtype must be int8 or float8_e4m3fn"):
        quantize(x, torch.float16)
    with pytest.raises(ValueError, match="quantize_rows_backward: grad_scale must"):
        backward(grad[:1], x, torch.int8)
    with pytest.raises(ValueError, match="quantize_rows_backward: grad_scale must"):
        backward(grad, x.double(), torch.int8)
    with pytest.raises(ValueError, match="quantize_rows_backward: dtype must be int8 or float8_e4m3fn"):
        backward(grad, x, torch.float32)
