"""The CPU kernel of select_tokens: the choice of the reference, ties and special scores included."""

import math

import pytest
import torch
from backend_helpers import CAPABILITIES, backend_called, compiled
from bank_helpers import ids

from vidmem_kernels.testing import Make

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
nan, inf = math.nan, math.inf


def select(x, keep, score=None):
    """The kernel's index, checked with its tokens against the reference."""
    tokens, index = torch.ops.vidmem.select_tokens(x, keep, score, "cpu")
    expected = torch.ops.vidmem.select_tokens(x, keep, score, "reference")
    assert index.dtype == torch.int32 and torch.equal(index, expected[1])
    assert tokens.is_contiguous() and tokens.dtype == x.dtype
    assert torch.equal(tokens.nan_to_num(7.0), expected[0].nan_to_num(7.0))
    return index.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_ties_and_special_scores(dtype, capability):
    """Scores of few values, so that every threshold is a tie; every number to keep."""
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, 1.0, -1.0, 2.0, torch.finfo(dtype).max, torch.finfo(dtype).tiny])
    x = Make(dtype).randn(3, 61, 5)
    score = values.to(dtype)[torch.randint(len(values), (3, 61))]
    for keep in range(62):
        select(x, keep, score)
    select(x, 20, Make(dtype).strided(score))
    select(Make(dtype).strided(x), 20, score.T.contiguous().T)
    assert select(x[:1, :4], 2, torch.tensor([[-0.0, 0.0, -1.0, 0.0]], dtype=dtype)) == [[0, 1]]
    assert select(x[:1, :4], 2, torch.tensor([[nan, -inf, nan, -1.0]], dtype=dtype)) == [[0, 3]]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_many_scores(dtype, capability):
    x, score = torch.arange(20_000.0).view(2, -1, 1), Make(dtype).randn(2, 10_000)
    for keep in (1, 2_500, 9_999, 10_000):
        select(x, keep, score)


def test_score_of_another_dtype(capability):
    """Scores of float64 that are equal in float32, the dtype of x."""
    score = 1 + torch.arange(50, dtype=torch.float64).flip(0).view(1, 50) * 1e-12
    assert select(torch.randn(1, 50, 3), 3, score) == [[0, 1, 2]]
    assert select(torch.randn(1, 50, 3), 3, score.flip(1)) == [[47, 48, 49]]
    assert select(torch.randn(1, 50, 3), 3, score.flip(1).float()) == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("width", [1, 7, 8, 31, 32, 33, 512, 1031])
def test_norms_are_exact(dtype, width, capability):
    """Small integers, whose squares and sums are exact in every order: the norms of many tokens tie."""
    x = torch.randint(-3, 4, (2, 97, width)).to(dtype)
    for keep in (1, 40, 96):
        select(x, keep)
        select(Make(dtype).strided(x), keep)
    order = torch.randperm(width)
    x = torch.randn(1, 1, width).to(dtype)
    if dtype != torch.float64:  # there a permutation rounds differently
        tokens = torch.stack([x[0, 0], x[0, 0, order], -x[0, 0]]).unsqueeze(0)
        assert torch.ops.vidmem_cpp.select_tokens(tokens, 1, None)[1].tolist() == [[0]]
        assert torch.ops.vidmem_cpp.select_tokens(tokens.flip(1), 2, None)[1].tolist() == [[0, 1]]


def test_norms_beyond_float32(capability):
    """Whose squares overflow or vanish in float32; infinity comes first, NaN last."""
    x = torch.tensor([[1e20], [inf], [3e20], [nan], [1.0], [1e-30], [2e-30], [0.0]]).expand(-1, 40).unsqueeze(0)
    for values in (x, x.double()):
        assert select(values, 2) == [[1, 2]]
        assert select(values, 4) == [[0, 1, 2, 4]]
        assert select(values, 5) == [[0, 1, 2, 4, 6]]
        assert select(values, 7) == [[0, 1, 2, 4, 5, 6, 7]]


def test_any_number_of_threads(capability):
    x = torch.randn(3, 5_000, 33)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.ops.vidmem_cpp.select_tokens(x, 1_111, None))
    finally:
        torch.set_num_threads(before)
    for tokens, index in found[1:]:
        assert torch.equal(tokens, found[0][0]) and torch.equal(index, found[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
def test_every_instruction_set_finds_the_same(dtype):
    """Permutations of one token differ by how their squares are rounded, if at all."""
    order = torch.rand(2, 3_000, 100).argsort(-1)
    x = torch.randn(2, 1, 100, dtype=dtype).expand(-1, 3_000, -1).gather(2, order)
    found = []
    for name in CAPABILITIES:
        with backend_called(name):
            found.append(torch.ops.vidmem_cpp.select_tokens(x, 700, None)[1])
    assert all(torch.equal(index, found[0]) for index in found[1:])


def test_transposed_and_empty(capability):
    x = torch.randint(-3, 4, (2, 40, 70)).float()
    select(x.transpose(1, 2), 13)
    select(x[:, ::3, 5:], 9, torch.randn(2, 40)[:, ::3])
    assert select(x[:0], 4) == []
    assert select(x[:, :0], 0) == [[], []]
    assert select(x[..., :0], 2) == [[0, 1], [0, 1]]
    assert select(x, 0) == [[], []]


@compiled
def test_compiled_kernel_checks_for_itself():
    op, x = torch.ops.vidmem_cpp.select_tokens, torch.zeros(2, 5, 3)
    for keep in (-1, 6):
        with pytest.raises(ValueError, match=rf"select_tokens: keep must be in \[0, 5\], got {keep}"):
            op(x, keep, None)
    with pytest.raises(ValueError, match="select_tokens: x must have 3 dimensions, got 2"):
        op(x[0], 1, None)
    with pytest.raises(ValueError, match="select_tokens: x must have a float dtype"):
        op(x.to(torch.int8), 1, None)
    with pytest.raises(ValueError, match=r"select_tokens: score must have shape \("):
        op(x, 1, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="select_tokens: score must have a float dtype"):
        op(x, 1, torch.zeros(2, 5, dtype=torch.int8))
    with pytest.raises(ValueError, match="select_tokens: score must have a dtype that kernels handle"):
        op(x, 1, torch.zeros(2, 5, dtype=torch.int64))
