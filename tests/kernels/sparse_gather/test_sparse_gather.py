"""gather_tokens, scatter_add_tokens and quantize_rows against values worked out by hand and by plain loops."""

import math

import pytest
import torch
from bank_helpers import QUANTIZED, ids, refuses
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_kernels import gather_tokens, quantize_rows, scatter_add_tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
nan, inf = math.nan, math.inf


def test_gather_by_hand(device):
    bank = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], device=device)
    index = torch.tensor([[2, -1, 0, 2], [1, 1, -1, 0]], dtype=torch.int32, device=device)
    expected = [[[5, 6], [0, 0], [1, 2], [5, 6]], [[3, 4], [3, 4], [0, 0], [1, 2]]]
    assert gather_tokens(bank, index).tolist() == expected
    assert gather_tokens(bank, index.long()).tolist() == expected
    assert gather_tokens(bank, index, out_dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES + QUANTIZED, ids=ids)
@pytest.mark.parametrize("out_dtype", [None, *DTYPES], ids=ids)
@pytest.mark.parametrize("batch", [1, 3])
def test_gather_by_loops(dtype, out_dtype, batch, device):
    rows, channels, count = 7, 13, 11
    quantized = dtype in QUANTIZED
    bank = (torch.randn(batch, rows, channels) * 20).to(dtype)
    scale = torch.rand(batch, rows) if quantized else None
    index = torch.randint(-1, rows, (3, count))
    expected = torch.zeros(3, count, channels, dtype=out_dtype or (torch.float32 if quantized else dtype))
    for b in range(3):
        for i, row in enumerate(index[b].tolist()):
            for c in range(channels) if row >= 0 else ():
                value = bank[b % batch, row, c]
                expected[b, i, c] = value.float() * scale[b % batch, row] if quantized else value
    got = gather_tokens(
        bank.to(device), index.to(device), scale=None if scale is None else scale.to(device), out_dtype=out_dtype
    )
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)


def test_gather_gradients_by_hand(device):
    bank = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], device=device, requires_grad=True)
    index = torch.tensor([[2, -1, 2], [0, 2, -1]], device=device)
    weight = torch.arange(1.0, 13.0, device=device).view(2, 3, 2)
    (gather_tokens(bank, index) * weight).sum().backward()
    # Row 2 is read at (0, 0), (0, 2) and (1, 1): 1 + 5 + 9 and 2 + 6 + 10. Row 1 is never read.
    assert bank.grad.tolist() == [[[7, 8], [0, 0], [15, 18]]]

    rows = torch.tensor([[[1, -2], [3, 4]]], dtype=torch.int8, device=device)
    scale = torch.tensor([[0.5, 2.0]], device=device, requires_grad=True)
    index = torch.tensor([[1, 0, 1, -1]], device=device)
    weight = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]]], device=device)
    (gather_tokens(rows, index, scale=scale) * weight).sum().backward()
    # scale[0]: 3 * 1 - 4 * 2; scale[1]: (1 + 5) * 3 + (2 + 6) * 4.
    assert scale.grad.tolist() == [[-5, 50]]


def test_gather_refuses():
    bank, index = torch.zeros(2, 4, 3), torch.zeros(2, 5, dtype=torch.int32)
    name = "gather_tokens: "
    refuses(TypeError, name + "bank must be a tensor, got list", gather_tokens, [1], index)
    refuses(ValueError, name + "bank must have shape (B, M, C), got (4, 3)", gather_tokens, bank[0], index)
    refuses(ValueError, name + "index must have shape (B, K), got (5,)", gather_tokens, bank, index[0])
    refuses(TypeError, name + "index must be int32 or int64, got float32", gather_tokens, bank, index.float())
    refuses(
        ValueError,
        name + "bank must have batch 1 or that of index, 2, got 3",
        gather_tokens,
        torch.zeros(3, 4, 3),
        index,
    )
    need = name + "scale is required for int8 or float8_e4m3fn banks and not allowed for others, got a "
    refuses(TypeError, need + "int8 bank and no scale", gather_tokens, bank.to(torch.int8), index)
    refuses(TypeError, need + "float32 bank and a scale", gather_tokens, bank, index, scale=torch.ones(2, 4))
    refuses(
        ValueError,
        name + "scale must have the bank's first two sizes, got torch.Size([2, 3]) and torch.Size([2, 4])",
        gather_tokens,
        bank.to(torch.int8),
        index,
        scale=torch.ones(2, 3),
    )
    refuses(
        TypeError,
        name + "out_dtype must be float32, bfloat16, float16 or float64, got torch.int8",
        gather_tokens,
        bank,
        index,
        out_dtype=torch.int8,
    )
    for backend in (None, "reference"):
        for wrong in (4, -2):
            refuses(
                IndexError,
                f"gather_tokens: index must be in [-1, 3], got {wrong}",
                gather_tokens,
                bank,
                torch.full((2, 1), wrong),
                backend=backend,
            )


def test_scatter_by_hand(device):
    src = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]], device=device)
    index = torch.tensor([[1, -1, 1]], dtype=torch.int32, device=device)
    assert scatter_add_tokens(src, index, 3).tolist() == [[[0, 0], [6, 8], [0, 0]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_scatter_by_loops(dtype, device):
    src = torch.randint(-8, 9, (3, 17, 5)).to(dtype)  # sums are exact in every dtype
    index = torch.randint(-1, 6, (3, 17))
    expected = torch.zeros(3, 6, 5, dtype=dtype)
    for b in range(3):
        for i, row in enumerate(index[b].tolist()):
            for c in range(5) if row >= 0 else ():
                expected[b, row, c] += src[b, i, c]
    assert torch.equal(scatter_add_tokens(src.to(device), index.to(device), 6).cpu(), expected)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_scatter_sums_in_float32(backend, device):
    """300 ones: a bfloat16 sum would stay at 256."""
    src = torch.ones(1, 300, 1, dtype=torch.bfloat16, device=device)
    index = torch.zeros(1, 300, dtype=torch.int32, device=device)
    assert scatter_add_tokens(src, index, 1, backend=backend).item() == 300


def test_scatter_is_the_transpose_of_gather(device):
    bank = torch.randn(2, 6, 5, dtype=torch.float64, device=device)
    src = torch.randn(2, 9, 5, dtype=torch.float64, device=device)
    index = torch.randint(-1, 6, (2, 9), device=device)
    left = (gather_tokens(bank, index) * src).sum()
    right = (bank * scatter_add_tokens(src, index, 6)).sum()
    torch.testing.assert_close(left, right)


def test_scatter_second_derivative(device):
    src = torch.randn(1, 4, 2, dtype=torch.float64, device=device, requires_grad=True)
    index = torch.tensor([[0, 2, 0, -1]], device=device)
    assert torch.autograd.gradgradcheck(lambda s: scatter_add_tokens(s, index, 3).square(), (src,))


def test_scatter_refuses():
    src, index = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int32)
    name = "scatter_add_tokens: "
    refuses(TypeError, name + "num_rows must be an int, got float", scatter_add_tokens, src, index, 4.0)
    refuses(ValueError, name + "num_rows must be at least 0, got -1", scatter_add_tokens, src, index, -1)
    refuses(
        TypeError,
        name + "src must be float32, bfloat16, float16 or float64, got int8",
        scatter_add_tokens,
        src.to(torch.int8),
        index,
        4,
    )
    refuses(
        ValueError,
        name + "index must have the first two sizes of src, got torch.Size([2, 4]) and torch.Size([2, 5])",
        scatter_add_tokens,
        src,
        index[:, :4],
        4,
    )
    for backend in (None, "reference"):
        refuses(
            IndexError,
            "scatter_add_tokens: index must be in [-1, 3], got 4",
            scatter_add_tokens,
            src,
            index + 4,
            4,
            backend=backend,
        )


def test_quantize_int8_by_hand(device):
    x = torch.tensor([[127.0, -64.5, 0.5, 1.5, 2.5], [-2.54, 1.27, 0.0, 0.01, 2.0]], device=device)
    rows, scale = quantize_rows(x)
    # The first row has scale 1: halves go to the even neighbour.
    assert rows.tolist() == [[127, -64, 0, 2, 2], [-127, 64, 0, 0, 100]]
    torch.testing.assert_close(scale.cpu(), torch.tensor([1.0, 0.02]))
    assert rows.dtype == torch.int8 and scale.dtype == torch.float32


def test_quantize_float8_by_hand(device):
    # Three bits of mantissa; between 16 and 32 the step is 2, below 2**-6 it is 2**-9.
    x = torch.tensor([[448.0, -17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 1.0]], device=device)
    rows, scale = quantize_rows(x, torch.float8_e4m3fn)
    assert rows.float().tolist() == [[448.0, -16.0, 20.0, 0.0, 2.0**-8, 1.0]]
    assert scale.tolist() == [1.0]
    rows, scale = quantize_rows(x * 4, torch.float8_e4m3fn)
    assert rows.float().tolist() == [[448.0, -16.0, 20.0, 0.0, 2.0**-8, 1.0]]
    assert scale.tolist() == [4.0]


@pytest.mark.parametrize("dtype", QUANTIZED, ids=ids)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=ids)
def test_quantize_comes_back_within_the_bound(dtype, x_dtype, device):
    x = torch.randn(2, 3, 17, 41, device=device).to(x_dtype)
    rows, scale = quantize_rows(x, dtype)
    assert rows.shape == x.shape and scale.shape == x.shape[:-1]
    assert scale.dtype == (torch.float64 if x_dtype == torch.float64 else torch.float32)
    index = torch.arange(17, device=device).expand(6, 17)
    read = gather_tokens(rows.flatten(0, 1), index, scale=scale.flatten(0, 1).float())
    assert within_bound(x.flatten(0, 1), read, scale.flatten(0, 1), dtype)


def within_bound(x, read, scale, dtype):
    """The bound that quantize_rows documents, evaluated in float64."""
    x, read, scale = x.double(), read.double(), scale.double().unsqueeze(-1)
    bound = scale / 2 if dtype == torch.int8 else torch.maximum(x.abs() / 16, scale / 1024)
    return bool(((x - read).abs() <= bound + 2**-23 * x.abs()).all())


finite32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(values=st.lists(finite32, min_size=1, max_size=6), dtype=st.sampled_from(QUANTIZED))
def test_quantize_bound_holds_from_subnormal_to_largest(values, dtype):
    x = torch.tensor([values])
    rows, scale = quantize_rows(x, dtype)
    assert scale.isfinite().all() and rows.float().isfinite().all()
    assert within_bound(x, rows.float() * scale.unsqueeze(-1), scale, dtype)
    assert (scale.item() == 0) == (x.abs().max().item() == 0)
    assert scale.item() == 0 or scale.item() >= 2.0**-126


@pytest.mark.parametrize("dtype", QUANTIZED, ids=ids)
def test_quantize_zero_and_not_finite_rows(dtype, device):
    x = torch.tensor([[0.0, -0.0], [1.0, nan], [inf, 1.0], [-inf, nan], [3.0, 1.0]], device=device)
    rows, scale = quantize_rows(x, dtype)
    assert rows[:4].float().abs().max() == 0
    assert scale[0] == 0 and scale[1:4].isnan().all() and scale[4] > 0
    read = gather_tokens(rows[None], torch.arange(5, device=device)[None], scale=scale[None])[0]
    assert read[0].tolist() == [0, 0] and read[1:4].isnan().all() and read[4].isfinite().all()


@pytest.mark.parametrize(("dtype", "qmax"), [(torch.int8, 127), (torch.float8_e4m3fn, 448)])
def test_quantize_gradient_by_hand(dtype, qmax, device):
    # A largest magnitude that is shared: all of the gradient goes to the first. Zero and subnormal rows: none.
    x = torch.tensor(
        [[3.0, -5.0, 5.0], [7.0, 1.0, -7.0], [0.0, 0.0, 0.0], [1e-40, 0.0, 0.0]], device=device, requires_grad=True
    )
    rows, scale = quantize_rows(x, dtype)
    assert not rows.requires_grad and scale.requires_grad
    (scale * torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)).sum().backward()
    expected = torch.tensor([[0, -1, 0], [2, 0, 0], [0, 0, 0], [0, 0, 0]]) / qmax
    torch.testing.assert_close(x.grad.cpu(), expected)


def test_quantize_straight_through_training(device):
    """Rows that were quantised with learned scales give the gradient of both: scale by the op, rows by the caller."""
    x = torch.randn(1, 5, 8, dtype=torch.float64, device=device, requires_grad=True)
    rows, scale = quantize_rows(x)
    index = torch.arange(5, device=device).unsqueeze(0)
    read = gather_tokens(rows, index, scale=scale.float())
    (grad,) = torch.autograd.grad(read.sum(), x)
    at = x.abs().argmax(-1, keepdim=True)
    expected = torch.zeros_like(x).scatter(-1, at, x.gather(-1, at).sign() / 127 * rows.double().sum(-1, keepdim=True))
    torch.testing.assert_close(grad, expected)


def test_quantize_refuses():
    name = "quantize_rows: "
    refuses(TypeError, name + "x must be a tensor, got int", quantize_rows, 3)
    refuses(ValueError, name + "x must have shape (..., M, C), got (3,)", quantize_rows, torch.zeros(3))
    refuses(
        TypeError,
        name + "x must be float32, bfloat16, float16 or float64, got int64",
        quantize_rows,
        torch.zeros(3, 3, dtype=torch.int64),
    )
    refuses(
        TypeError,
        name + "dtype must be int8 or float8_e4m3fn, got torch.uint8",
        quantize_rows,
        torch.zeros(3, 3),
        torch.uint8,
    )


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 2, 5), (2, 0, 3, 5)])
def test_quantize_empty(shape):
    rows, scale = quantize_rows(torch.zeros(shape))
    assert rows.shape == shape and scale.shape == shape[:-1] and not scale.any()


def test_an_index_of_batch_1_serves_the_batch(device):
    bank, index = torch.randn(3, 7, 5, device=device), torch.randint(-1, 7, (1, 9), device=device)
    every = index.expand(3, -1)
    for some in (bank, bank.half(), bank[:0]):
        copy = some.clone().requires_grad_()
        got = gather_tokens(copy, index)
        assert torch.equal(got, gather_tokens(some, every[: len(some)]))
        (grad,) = torch.autograd.grad(got.sin().sum(), copy)
        (wanted,) = torch.autograd.grad(gather_tokens(copy, every[: len(some)]).sin().sum(), copy)
        assert torch.equal(grad, wanted)
    src = torch.randn(3, 9, 5, device=device)
    assert torch.equal(scatter_add_tokens(src, index, 7), scatter_add_tokens(src, every, 7))
    rows, scale = quantize_rows(bank.double())
    assert torch.equal(gather_tokens(rows, index, scale=scale), gather_tokens(rows, every, scale=scale))
