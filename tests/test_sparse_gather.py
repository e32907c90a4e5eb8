"""Sparse gathering against values worked out by hand and by plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vidmem_kernels import gather_tokens, quantize_rows, scatter_add_tokens, select_tokens, topk_blocks
from vidmem_kernels.sparse_gather import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
QUANTIZED = [torch.int8, torch.float8_e4m3fn]
nan, inf = math.nan, math.inf


def ids(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def refuses(error, message, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == message


# --- gather_tokens ---


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
    need = name + "scale must be given exactly for int8 or float8_e4m3fn banks, got a "
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


# --- scatter_add_tokens ---


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


# --- quantize_rows ---


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


# --- select_tokens ---


def test_select_by_hand(device):
    x = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, -6.0], [5.0, 0.0], [0.0, 0.0]]], device=device)
    tokens, index = select_tokens(x, 2)  # norms 5, 1, 6, 5, 0: the tie at 5 goes to token 0
    assert index.tolist() == [[0, 2]] and index.dtype == torch.int32
    assert tokens.tolist() == [[[3, 4], [0, -6]]]
    score = torch.tensor([[nan, 2.0, -inf, 2.0, inf]], device=device)
    assert select_tokens(x, 1, score=score).index.tolist() == [[4]]
    assert select_tokens(x, 2, score=score).index.tolist() == [[1, 4]]
    assert select_tokens(x, 3, score=score).index.tolist() == [[1, 3, 4]]
    assert select_tokens(x, 4, score=score).index.tolist() == [[0, 1, 3, 4]]  # NaN counts as -inf
    assert select_tokens(x, 5).index.tolist() == [[0, 1, 2, 3, 4]]
    assert select_tokens(x, 0).tokens.shape == (1, 0, 2)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_select_is_a_stable_sort(data):
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 9))
    keep = data.draw(st.integers(0, count))
    draws = st.lists(st.integers(-2, 2), min_size=count, max_size=count)
    scores = [data.draw(draws) for _ in range(batch)]
    x = torch.randn(batch, count, 3)
    tokens, index = select_tokens(x, keep, score=torch.tensor(scores, dtype=torch.float32).view(batch, count))
    for b in range(batch):
        best = sorted(sorted(range(count), key=lambda i: (-scores[b][i], i))[:keep])
        assert index[b].tolist() == best
        assert torch.equal(tokens[b], x[b, best])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_select_norm_is_taken_in_float32(dtype, device):
    """Squares of 300 overflow float16, and 256 + 1 is lost in bfloat16."""
    x = torch.full((1, 3, 257), 1.0, device=device)
    x[0, 0, -1] = 0
    x[0, 2] = 300
    assert select_tokens(x.to(dtype), 2).index.tolist() == [[1, 2]]


def test_select_gradient_by_hand(device):
    x = torch.tensor([[[1.0, 0.0], [5.0, 0.0], [2.0, 2.0]]], device=device, requires_grad=True)
    score = torch.tensor([[1.0, 0.0, 2.0]], device=device, requires_grad=True)
    tokens, _ = select_tokens(x, 2, score=score)
    (tokens * torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=device)).sum().backward()
    assert x.grad.tolist() == [[[1, 2], [0, 0], [3, 4]]]
    assert score.grad is None


def test_select_refuses():
    x = torch.zeros(2, 5, 3)
    name = "select_tokens: "
    refuses(ValueError, name + "keep must be in [0, 5], got 6", select_tokens, x, 6)
    refuses(ValueError, name + "keep must be in [0, 5], got -1", select_tokens, x, -1)
    refuses(TypeError, name + "keep must be an int, got bool", select_tokens, x, True)
    refuses(ValueError, name + "x must have shape (B, N, C), got (5, 3)", select_tokens, x[0], 2)
    refuses(
        ValueError,
        name + "score must have the first two sizes of x, got torch.Size([2, 4]) and torch.Size([2, 5])",
        select_tokens,
        x,
        2,
        score=torch.zeros(2, 4),
    )
    refuses(
        TypeError,
        name + "score must be float32, bfloat16, float16 or float64, got int64",
        select_tokens,
        x,
        2,
        score=torch.zeros(2, 5, dtype=torch.int64),
    )


# --- topk_blocks ---


def topk_by_loops(q, k, block_q, block_k, topk):
    """Blocks in the order of (score, index), all sums in plain Python."""

    def means(x, block):
        blocks = [x[i : i + block] for i in range(0, len(x), block)]
        return [[sum(row[d] for row in rows) / len(rows) for d in range(len(rows[0]))] for rows in blocks]

    result = []
    for b in range(q.shape[0]):
        result.append([])
        for h in range(q.shape[2]):
            keys = means(k[b, :, h].tolist(), block_k)
            result[-1].append([])
            for query in means(q[b, :, h].tolist(), block_q):
                scores = [sum(x * y for x, y in zip(query, key, strict=True)) for key in keys]
                order = sorted(range(len(keys)), key=lambda i: (-scores[i], i))
                result[-1][-1].append(order[:topk])
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize(
    ("lq", "lk", "block", "topk"),
    [(8, 16, (4, 4), 4), (7, 18, (2, 4), 3), (4, 9, (8, 2), 5), (1, 1, (1, 1), 1), (5, 33, (1, 1), 12)],
)
def test_topk_blocks_by_loops(lq, lk, block, topk, dtype, device):
    # Small integers and blocks of 1, 2 or 4 rows, the last ones too: every mean and product is exact, ties are ties.
    q, k = torch.randint(-2, 3, (2, lq, 3, 4)).to(dtype), torch.randint(-2, 3, (2, lk, 3, 4)).to(dtype)
    got = topk_blocks(q.to(device), k.to(device), block_size=block, topk=topk)
    assert got.dtype == torch.int32
    assert got.tolist() == topk_by_loops(q, k, *block, topk)


def test_topk_blocks_by_hand(device):
    q = torch.tensor([1.0, 3.0, -1.0], device=device).view(1, 3, 1, 1)
    k = torch.tensor([1.0, 1.0, 4.0, 0.0, 9.0, -7.0, 5.0], device=device).view(1, 7, 1, 1)
    # Means of pairs: queries 2 and -1 (alone); keys 1, 2, 1 and 5 (alone). Blocks 0 and 2 are equal.
    assert topk_blocks(q, k, block_size=(2, 2), topk=4).tolist() == [[[[3, 1, 0, 2], [0, 2, 1, 3]]]]
    assert topk_blocks(q, k, block_size=(2, 2), topk=1).tolist() == [[[[3], [0]]]]
    k[0, 2] = nan
    assert topk_blocks(q, k, block_size=(2, 2), topk=4).tolist() == [[[[3, 0, 2, 1], [0, 2, 3, 1]]]]


def test_topk_blocks_takes_two_dtypes_and_ignores_autocast(device):
    q, k = torch.randn(1, 16, 2, 8, device=device), torch.randn(1, 512, 2, 8, device=device)
    expected = topk_blocks(q, k, block_size=(1, 1), topk=40)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(topk_blocks(q, k, block_size=(1, 1), topk=40), expected)
    low = k.to(torch.bfloat16)
    assert torch.equal(
        topk_blocks(q, low, block_size=(1, 1), topk=40), topk_blocks(q, low.float(), block_size=(1, 1), topk=40)
    )


def test_topk_blocks_reference_never_holds_the_scores(monkeypatch):
    q, k = torch.randint(-2, 3, (1, 96, 2, 4)).float(), torch.randint(-2, 3, (1, 160, 2, 4)).float()
    whole = reference.topk_blocks(q, k, 1, 1, 7)
    monkeypatch.setattr(reference, "_SCORES", 96 * 2 * 9)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                largest = max(largest, tensor.numel())
            return result

    with Largest():
        chunked = reference.topk_blocks(q, k, 1, 1, 7)
    assert torch.equal(chunked, whole)
    assert largest <= 96 * 2 * (9 + 7)


def test_topk_blocks_refuses():
    q, k = torch.zeros(2, 5, 3, 4), torch.zeros(2, 9, 3, 4)
    name = "topk_blocks: "
    blocks = {"block_size": (2, 4)}
    refuses(ValueError, name + "topk must be in [0, 3], got 4", topk_blocks, q, k, **blocks, topk=4)
    refuses(ValueError, name + "block_size[1] must be at least 1, got 0", topk_blocks, q, k, block_size=(2, 0), topk=1)
    refuses(TypeError, name + "block_size must be a pair (bq, bk), got 4", topk_blocks, q, k, block_size=4, topk=1)
    refuses(
        ValueError,
        name + "q and k must have the same D, got 4 and 3",
        topk_blocks,
        q,
        k[..., :3],
        **blocks,
        topk=1,
    )
    refuses(
        ValueError,
        name + "q must have shape (B, Lq, H, D), got (5, 3, 4)",
        topk_blocks,
        q[0],
        k,
        **blocks,
        topk=1,
    )
    assert topk_blocks(q, k[:, :0], **blocks, topk=0).shape == (2, 3, 3, 0)


# --- all together ---


def test_public_functions_compile_without_a_graph_break():
    def memory(x, keep):
        tokens, index = select_tokens(x, keep)
        rows, scale = quantize_rows(tokens)
        read = gather_tokens(rows, index.clamp(max=2), scale=scale)
        heads = x.unsqueeze(2)
        return read, topk_blocks(heads, heads, block_size=(4, 2), topk=2)

    compiled = torch.compile(memory, fullgraph=True, dynamic=True, backend="aot_eager")
    for count, keep in ((9, 4), (14, 6)):
        x = torch.randn(2, count, 8)
        torch.testing.assert_close(compiled(x, keep), memory(x, keep), rtol=0, atol=0)
