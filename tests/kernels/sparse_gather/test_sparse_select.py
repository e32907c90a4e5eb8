"""select_tokens and topk_blocks against values worked out by hand and by plain loops."""

import math

import pytest
import torch
from bank_helpers import ids, refuses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vidmem_kernels import gather_tokens, quantize_rows, select_tokens, topk_blocks
from vidmem_kernels.sparse_gather import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
nan, inf = math.nan, math.inf


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


def test_a_score_of_batch_1_serves_the_batch(device):
    x, score = torch.randn(3, 9, 5, device=device), torch.randn(1, 9, device=device)
    shared, own = select_tokens(x, 4, score=score), select_tokens(x, 4, score=score.expand(3, -1))
    assert torch.equal(shared.tokens, own.tokens) and torch.equal(shared.index, own.index)
    assert select_tokens(x[:0], 4, score=score).tokens.shape == (0, 4, 5)


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
