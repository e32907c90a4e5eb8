"""What the contract's samples miss of the GPU kernels of sparse gathering: several tiles, ties across them."""

import math

import pytest
import torch

from vidmem_kernels import _dispatch, explain, quantize_rows, scatter_add_tokens, select_tokens, topk_blocks
from vidmem_kernels._op import OPS
from vidmem_kernels.sparse_gather import reference

pytest.importorskip("triton")

from vidmem_kernels.sparse_gather import triton_scatter, triton_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROWS = [torch.int8, torch.float8_e4m3fn]
nan, inf = math.nan, math.inf


def ids(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.fixture(params=["triton", "cuda"])
def backend(request, device):
    """Of the ops that have kernels in both."""
    reason = _dispatch.unavailable(OPS["select_tokens"], request.param, device)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


@pytest.fixture(autouse=True)
def available(request, device):
    reason = _dispatch.unavailable(OPS["topk_blocks"], "triton", device)
    if reason is not None and "backend" not in request.fixturenames:
        pytest.skip(reason=reason)


def same(got, expected):
    """Equal to the bit but for the bits of a NaN."""
    got = got.cpu()
    assert got.dtype == expected.dtype
    if got.dtype == torch.float8_e4m3fn:
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
    elif got.is_floating_point():
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(torch.signbit(got) & ~got.isnan(), torch.signbit(expected) & ~expected.isnan())
    else:
        assert torch.equal(got, expected)


def hard_rows(dtype):
    """(1, rows, 259): random ones, zeros of both signs, subnormals, the largest floats, what is not finite."""
    limits = torch.finfo(dtype)
    x = torch.randn(1, 12, 259, dtype=torch.float64)
    x[0, 1] = 0
    x[0, 2] = -0.0
    x[0, 3] *= limits.tiny
    x[0, 4] *= limits.smallest_normal / 64
    x[0, 5] = x[0, 5].clamp(-1, 1) * limits.max
    x[0, 6, 200] = nan
    x[0, 7, 3] = -inf
    x[0, 8, 3], x[0, 8, 100] = inf, nan
    x[0, 9] = torch.arange(259.0) - 129.5  # halves, if not quite: 129.5 / 127 a step
    x[0, 10] = (torch.arange(259.0) % 255 - 127) / 2  # ties of int8
    x[0, 11] = -0.0
    x[0, 11, 77] = 127.0
    return x.to(dtype)


@pytest.mark.parametrize("rows", ROWS, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_quantized_rows_are_those_of_the_reference(dtype, rows, device):
    x = hard_rows(dtype)
    if dtype == torch.bfloat16 and device == "cpu":
        x[0, 3:5] = 1  # Triton's interpreter widens subnormals of bfloat16 wrongly
    got = quantize_rows(x.to(device), rows, backend="triton")
    expected = reference.quantize_rows(x, rows)
    same(got.rows, expected[0])
    same(got.scale, expected[1])


@pytest.mark.parametrize("rows", ROWS, ids=ids)
def test_a_row_of_several_tiles_is_quantized(rows, device):
    x = torch.randn(1, 2, 2 * 8192 + 5)
    x[0, 0, -1] = -100  # the largest one in the last tile
    x[0, 1, 3] = 100
    got = quantize_rows(x.to(device), rows, backend="triton")
    expected = reference.quantize_rows(x, rows)
    same(got.rows, expected[0])
    same(got.scale, expected[1])


def test_every_float8_comes_back(device):
    """Under a scale of 1 a row holds the codes themselves, and their midpoints round to even."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    values = codes.view(torch.float8_e4m3fn).float().view(1, 1, -1)
    got = quantize_rows(values.to(device), torch.float8_e4m3fn, backend="triton")
    assert got.scale.item() == 1
    assert torch.equal(got.rows.view(torch.uint8).cpu().flatten(), codes)
    positive = values.flatten()[:127]
    middle = (positive[1:] + positive[:-1]) / 2
    beside = [middle.nextafter(torch.tensor(x)) for x in (0.0, inf)]
    values = torch.cat([middle, *beside, torch.tensor([448.0, 1e-30, 2.0**-10])])
    values = torch.cat([values, -values]).view(1, 1, -1)
    got = quantize_rows(values.to(device), torch.float8_e4m3fn, backend="triton")
    same(got.rows, values.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
def test_gradient_of_scale_goes_to_the_first_largest(dtype, device):
    """Also across tiles, where the scale is limited, and where rows hold what is not finite."""
    x = torch.cat([hard_rows(dtype), torch.zeros(1, 12, 2 * 2048)], dim=2).to(dtype)
    x[0, 0, [5, 2048 + 7, -1]] = torch.tensor([7.0, -7.0, 7.0], dtype=dtype)
    x[0, 9, 2048], x[0, 9, -1] = -500, 500
    x[0, 7, -1] = nan
    slope = torch.randn(1, 12, dtype=dtype)
    slope[0, 9] = inf
    for rows in ROWS:
        args = slope.to(device), x.to(device), rows
        got = torch.ops.vidmem.quantize_rows_backward(*args, "triton")
        same(got, reference.quantize_rows_backward(slope, x, rows))


TILE = 4096


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("keep", [1, TILE + 100, 2 * TILE + 70, 2 * TILE + 77])
def test_select_across_tiles(keep, dtype, backend, device):
    """Few distinct scores, so that the last one kept has equals in every tile; zeros of both signs are equal."""
    count = 2 * TILE + 77
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, inf, -inf, nan, 6e4, 1e-7, -1e-7], dtype=torch.float64)
    score = values[torch.randint(len(values), (2, count))].to(dtype)
    x = torch.arange(2 * count, dtype=torch.int32).view(2, count, 1).float()
    got = select_tokens(x.to(device), keep, score=score.to(device), backend=backend)
    tokens, index = reference.select_tokens(x, keep, score)
    same(got.index, index)
    same(got.tokens, tokens)


def test_select_tells_neighbours_apart(backend, device):
    """Scores that differ in their last bit, in the order of no position; float64 ones agree in their first 40 bits."""
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        one = torch.ones((), dtype=dtype).view(bits)
        score = (one + torch.randperm(3000)).to(bits).view(dtype).view(1, -1)
        score = torch.cat([score, -score], dim=0)
        x = torch.zeros(2, 3000, 1, device=device)
        index = select_tokens(x, 1234, score=score.to(device), backend=backend).index
        same(index, reference.select_tokens(x.cpu(), 1234, score)[1])


def test_select_by_norm_of_wide_rows(backend, device):
    x = torch.randint(-3, 4, (2, 70, 2 * 2048 + 9)).to(torch.bfloat16)  # sums of squares are exact
    x[:, 60] = x[:, 10]
    got = select_tokens(x.to(device), 33, backend=backend)
    tokens, index = reference.select_tokens(x, 33, None)
    same(got.index, index)
    same(got.tokens, tokens)


def blocks_of_one(scores):
    """q and k of blocks of one row and one channel, whose scores are the rows of an outer product with q = 1."""
    return torch.ones(1, 2, 1, 1, dtype=scores.dtype), scores.view(1, -1, 1, 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # infinities times the zeros of padding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize(("count", "topk"), [(256, 256), (257, 1), (4097, 300), (9000, 64), (9000, 3000)])
def test_topk_across_chunks(count, topk, dtype, device):
    """Few distinct scores: ties within and across chunks go to the lower block, NaN and -inf are equal."""
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, inf, -inf, nan, 1e30], dtype=dtype)
    q, k = blocks_of_one(values[torch.randint(len(values), (count,))])
    got = topk_blocks(q.to(device), k.to(device), block_size=(1, 1), topk=topk, backend="triton")
    same(got, reference.topk_blocks(q, k, 1, 1, topk).contiguous())


def test_topk_of_distinct_scores(device):
    """None equal: the bisection ends early or at the last bit."""
    for scores in (torch.randperm(5000) - 2500.0, (torch.ones(1).view(torch.int32) + torch.randperm(5000)).int()):
        scores = scores.view(torch.float32) if scores.dtype == torch.int32 else scores
        q, k = blocks_of_one(scores)
        got = topk_blocks(q.to(device), k.to(device), block_size=(1, 1), topk=100, backend="triton")
        expected = scores.argsort(descending=True)[:100].int()
        same(got, expected.expand(1, 1, 2, -1).contiguous())


def test_topk_goes_through_the_queries_in_steps(device, monkeypatch):
    q, k = torch.randint(-3, 4, (1, 150, 2, 70)).float(), torch.randint(-3, 4, (1, 200, 2, 70)).float()
    expected = reference.topk_blocks(q, k, 1, 2, 11).contiguous()
    for scores, queries in ((2 * 100 * 70, 150), (2 * 100 * 9, 20), (1, 3)):  # 64, 9 and 1 query blocks a step
        monkeypatch.setattr(triton_topk, "_SCORES", scores)
        q, expected = q[:, :queries], expected[:, :, :queries]
        got = topk_blocks(q.to(device), k.to(device), block_size=(1, 2), topk=11, backend="triton")
        same(got, expected)


def test_topk_limit_is_told(device):
    q, k = torch.ones(1, 1, 1, 1, device=device), torch.ones(1, 4097, 1, 1, device=device)
    with pytest.raises(_dispatch.BackendError, match="needs topk of at most 4,096, got 4,097"):
        topk_blocks(q, k, block_size=(1, 1), topk=4097, backend="triton")
    index = topk_blocks(q, k, block_size=(1, 1), topk=4096, backend="triton")
    assert torch.equal(index.flatten(), torch.arange(4096, dtype=torch.int32, device=device))


def test_explain_tells_triton(device):
    x = torch.zeros(1, 8, 4, device=device)

    def call(x):
        quantize_rows(x, backend="triton")
        select_tokens(x, 2, backend="triton")
        topk_blocks(x.unsqueeze(2), x.unsqueeze(2), block_size=(2, 2), topk=2, backend="triton")

    choices = [(c.op, c.backend) for c in explain(call, x)]
    assert choices == [(op, "triton") for op in ("quantize_rows", "select_tokens", "topk_blocks")]


@pytest.mark.parametrize("count", [256, 257, 512, 1300])
def test_scatter_sums_long_groups_in_pieces(count, backend, device):
    """A hot row among others, two hot rows beside each other, a batch of dropped sources only."""
    index = torch.randint(-1, 6, (4, count))
    index[1, torch.rand(count) < 0.9] = 3
    index[2] = 2 + torch.arange(count) % 2
    index[3] = -1
    src = torch.randint(-8, 9, (4, count, 7)).float()  # sums are exact in any order
    got = scatter_add_tokens(src.to(device), index.to(device), 6, backend=backend)
    same(got, reference.scatter_add_tokens(src, index, 6))


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        (5, torch.int16),
        (2**15 - 1, torch.int16),
        (2**15, torch.int32),
        (2**31 - 1, torch.int32),
        (2**31, torch.int64),
        (2**33, torch.int64),
    ],
)
def test_scatter_keys_hold_the_number_of_rows(rows, dtype, device):
    """In the narrowest dtype that also holds the key of what is dropped, the number of rows: it sorts fastest."""
    index = torch.tensor([[3, -1, 2**31 - 1, -7]], dtype=torch.int32, device=device)
    keys = triton_scatter._group_keys(index, rows)
    assert keys.dtype == dtype
    assert keys.tolist() == [[3, rows, min(rows, 2**31 - 1), rows]]


@pytest.mark.gpu
def test_cuda_refuses_pageable_memory(device):
    reason = _dispatch.unavailable(OPS["gather_tokens"], "cuda", device)
    if reason is not None:
        pytest.skip(reason=reason)
    gather = torch.ops.vidmem_cpp.gather_tokens
    bank, scale = torch.ones(1, 3, 4, dtype=torch.int8), torch.ones(1, 3)
    index = torch.ones(1, 2, dtype=torch.int32, device=device)
    assert gather(bank.pin_memory(), index, scale.pin_memory(), None).tolist() == [[[1.0] * 4] * 2]
    with pytest.raises(
        ValueError, match="gather_tokens: bank must be on the GPU or in pinned host memory, got pageable"
    ):
        gather(bank, index, scale.pin_memory(), None)
    with pytest.raises(ValueError, match="gather_tokens: scale must be on the GPU or in pinned host memory, got page"):
        gather(bank.pin_memory(), index, scale, None)
    assert gather(bank[:, :0], index - 2, scale[:, :0], None).tolist() == [[[0.0] * 4] * 2]  # nothing to read
