"""`block_sizes` of cross_attention: blocks of their own lengths, against dense attention over what each query sees."""

import functools
import inspect
import math
import random

import pytest
import torch
from bank_helpers import ids, refuses
from torch._dynamo.testing import CompileCounterWithBackend

from vidmem_kernels import _dispatch, cross_attention, quantize_rows, testing, tile_order, topk_blocks
from vidmem_kernels._op import OPS

F64, F32 = torch.float64, torch.float32
HALF = [torch.bfloat16, torch.float16]


def drawn_sizes(draw, length, most):
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(draw.randint(0, most), length - sum(sizes)))
    return torch.tensor(sizes + [0] * draw.randint(0, 1), dtype=draw.choice([torch.int32, torch.int64]))


def case(seed, dtype=F64):
    """(q, k, v, options) of a drawn call, with every option that there is now and then."""
    draw, make = random.Random(seed), testing.Make(dtype, seed=seed)
    block = draw.randint(1, 6), draw.randint(1, 6)
    batch, heads = draw.randint(1, 3), draw.choice([1, 2, 4])
    lq, lk = draw.randint(1, 15), draw.randint(1, 25)
    key_heads = draw.choice([heads, heads, 1]) if "key_mask" in OPTIONS else heads
    q = make.randn(batch, lq, heads, 4)
    k, v = make.randn(batch, lk, key_heads, 4), make.randn(batch, lk, key_heads, 3)
    sizes = drawn_sizes(draw, lq, block[0]), drawn_sizes(draw, lk, block[1])
    shape = batch, draw.choice([1, heads]), len(sizes[0]), draw.randint(0, len(sizes[1]) + 1)
    options = {"block_size": block, "block_sizes": sizes}
    options["block_index"] = make.randint(-1, len(sizes[1]), shape, draw.choice([torch.int32, torch.int64]))
    if draw.random() < 0.4:
        options["num_sinks"] = draw.randint(0, lk)
    if draw.random() < 0.4:
        options["key_bias"] = make.randn(*((batch, lk) if draw.random() < 0.5 else (batch, heads, lk)))
    if draw.random() < 0.4:
        kind = draw.choice([F32, F64, torch.int64])
        options["q_time"], options["k_time"] = (make.randint(0, 9, (batch, n)).to(kind) for n in (lq, lk))
        options["window"] = draw.choice([(2, 1), (3, math.inf), (0.5, 0)])
        if "causal_sinks" in OPTIONS and draw.random() < 0.4:
            options["causal_sinks"] = True
    if "key_mask" in OPTIONS and draw.random() < 0.3:
        options["key_mask"] = make.randint(0, 3, (draw.choice([1, batch]), lk)) > 0
    return q, k, v, options


OPTIONS = inspect.signature(cross_attention).parameters


def dense(q, k, v, block_index, block_size, block_sizes, key_bias=None, num_sinks=0, q_time=None, k_time=None,
          window=None, key_mask=None, causal_sinks=False):  # fmt: skip
    """(out, lse) of every pair in one matrix of scores."""
    batch, lq, heads, size = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    of_q, of_k = (torch.arange(len(s)).repeat_interleave(s.long()) for s in block_sizes)
    listed = (block_index.unsqueeze(-1) == of_k).any(3)  # (B, H|1, nq, Lk)
    sees = listed[:, :, of_q].expand(batch, heads, lq, -1)
    sink = (torch.arange(k.shape[1]) < num_sinks).expand_as(sees)
    if window is not None:
        apart = (k_time[:, None] - q_time[:, :, None]).unsqueeze(1)
        sees = sees & (apart >= -window[0]) & (apart <= window[1])
        sink = sink & (apart <= window[1]) if causal_sinks else sink
    sees = sees | sink
    if key_mask is not None:
        sees = sees & key_mask[:, None, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * size**-0.5
    if key_bias is not None:
        scores = scores + (key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)).unsqueeze(2)
    scores = scores.masked_fill(~sees, -torch.inf)
    lse = scores.logsumexp(3)
    weight = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(3)).exp()
    return torch.einsum("bhij,bjhd->bihd", weight, v), lse


def gradients(out, lse, leaves):
    lse = lse.masked_fill(lse == -torch.inf, 0)
    given = [torch.linspace(-1, 1, t.numel(), dtype=F64).to(t.dtype).view(t.shape) for t in (out, lse)]
    return torch.autograd.grad((out, lse), leaves, given)


def test_dense_and_its_gradients():
    for seed in range(40):
        *qkv, options = case(seed)
        leaves = [t.requires_grad_() for t in (*qkv, *([options["key_bias"]] if "key_bias" in options else []))]
        got = cross_attention(*qkv, return_lse=True, **options)
        wanted = dense(*qkv, **options)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(*got, leaves), gradients(*wanted, leaves), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["auto", "reference", pytest.param("triton", marks=pytest.mark.long)])
@pytest.mark.parametrize("dtype", [F32, *HALF], ids=ids)
def test_precision(dtype, backend, device):
    if backend == "triton" and (why := _dispatch.unavailable(OPS["cross_attention"], backend, device)):
        pytest.skip(reason=why)
    for seed in range(50, 62) if backend != "triton" else (50, 54, 57):
        q, k, v, options = case(seed, dtype)
        options["backend"] = backend
        moved = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), options)
        got = cross_attention(q.to(device), k.to(device), v.to(device), return_lse=True, **moved)
        wide = {n: x.double() if n == "key_bias" else x for n, x in options.items() if n != "backend"}
        exact, _ = dense(q.double(), k.double(), v.double(), **wide)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(got[0].cpu().double(), exact, rtol=4 * unit, atol=8 * unit)


def test_gradcheck():
    for seed in (3, 11):
        q, k, v, options = case(seed)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        assert torch.autograd.gradcheck(
            lambda q, k, v, o=options: cross_attention(q, k, v, **o), leaves, fast_mode=True
        )


@pytest.mark.skipif("k_scale" not in OPTIONS, reason="no 8-bit keys")
@pytest.mark.parametrize("rows", [torch.int8, torch.float8_e4m3fn], ids=ids)
def test_rows_of_8_bits(rows):
    for seed in range(70, 80):
        q, k, v, options = case(seed, F32)
        (k, k_scale), (v, v_scale) = (quantize_rows(x.flatten(2), rows) for x in (k, v))
        k, v = k.unflatten(2, (-1, 4)), v.unflatten(2, (-1, 3))
        got = cross_attention(q, k, v, k_scale=k_scale, v_scale=v_scale, **options)
        k, v = (x.float() * s[:, :, None, None] for x, s in ((k, k_scale), (v, v_scale)))
        torch.testing.assert_close(got, dense(q, k, v, **options)[0], rtol=1e-5, atol=1e-5)


def test_tiles_of_a_video():
    """The whole way, on grids that no tile divides: with all blocks it is dense attention."""
    draw = random.Random(1)
    for _ in range(6):
        grid, tile = [draw.randint(1, 7) for _ in range(3)], [draw.randint(2, 4) for _ in range(3)]
        tokens, most = math.prod(grid), math.prod(tile)
        q, k, v = (torch.randn(2, tokens, 2, 8, dtype=F64) for _ in range(3))
        order, inverse, sizes = tile_order(grid, tile)
        blocks = {"block_size": (most, most), "block_sizes": sizes}
        tiled = [x[:, order] for x in (q, k, v)]
        index = topk_blocks(*tiled[:2], topk=len(sizes), **blocks)
        out = cross_attention(*tiled, block_index=index, **blocks)[:, inverse]
        torch.testing.assert_close(out, cross_attention(q, k, v))
        own = torch.eye(len(sizes), dtype=torch.bool)
        index = topk_blocks(*tiled[:2], topk=min(2, len(sizes)), always=own, **blocks)
        out = cross_attention(*tiled, block_index=index, **blocks)
        torch.testing.assert_close(
            out, dense(*tiled, block_index=index, block_size=None, block_sizes=(sizes, sizes))[0]
        )


def test_what_is_hidden_touches_nothing():
    for seed in range(80, 95):
        q, k, v, options = case(seed)
        plain = cross_attention(q, k, v, **options)
        of_k = torch.arange(len(options["block_sizes"][1])).repeat_interleave(options["block_sizes"][1].long())
        seen = torch.isin(of_k, options["block_index"]) | (torch.arange(k.shape[1]) < options.get("num_sinks", 0))
        k, v = (x.masked_fill(~seen.view(1, -1, 1, 1), torch.nan) for x in (k, v))
        assert torch.equal(cross_attention(q, k, v, **options), plain)


def test_one_graph_for_all_sizes():
    def call(q, k, v, sizes, index):
        options = {"block_size": (4, 4), "block_sizes": sizes, "num_sinks": 2}
        return cross_attention(q, k, v, block_index=index, return_lse=True, **options)

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, heads, sizes in ((2, 5, [4, 3, 4, 2, 1, 4]), (3, 2, [1, 4, 3, 3, 2]), (5, 7, [2, 2, 2, 4, 4, 1, 3, 2])):
        index = torch.randint(-1, len(sizes), (batch, heads, len(sizes), 3))
        given = [torch.randn(batch, sum(sizes), heads, 8) for _ in range(3)]
        leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
        results = [f(*some, torch.tensor(sizes), index) for f, some in zip((compiled, call), leaves, strict=True)]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*(gradients(*r, x) for r, x in zip(results, leaves, strict=True)), rtol=0, atol=0)
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_empty():
    for batch, lq, lk, q_sizes, k_sizes in (
        (0, 3, 4, [3], [2, 2]), (2, 0, 4, [], [4]), (2, 0, 4, [0], [4]), (2, 3, 0, [2, 1], []), (2, 3, 0, [3], [0]),
    ):  # fmt: skip
        q, k = torch.randn(batch, lq, 2, 4, requires_grad=True), torch.randn(batch, lk, 2, 4)
        index = torch.zeros(batch, 1, len(q_sizes), min(1, len(k_sizes)), dtype=torch.int32)
        sizes = tuple(torch.tensor(s, dtype=torch.int32) for s in (q_sizes, k_sizes))
        out, lse = cross_attention(q, k, k, block_index=index, block_size=(4, 4), block_sizes=sizes, return_lse=True)
        assert out.shape == (batch, lq, 2, 4) and lse.shape == (batch, 2, lq)
        if lk == 0:
            assert (out == 0).all() and (lse == -torch.inf).all()
        out.sum().backward()


def test_refuses():
    q, k, name = torch.zeros(2, 7, 3, 4), torch.zeros(2, 10, 3, 4), "cross_attention: "
    sizes, index = (torch.tensor([4, 3]), torch.tensor([4, 4, 2])), torch.zeros(2, 1, 2, 1, dtype=torch.int32)

    def call(error, message, **options):
        options = {"block_size": (4, 4), "block_sizes": sizes, "block_index": index, **options}
        refuses(error, name + message, cross_attention, q, k, k, **options)

    call(ValueError, "block_sizes requires block_index, got block_index=None", block_index=None)
    call(TypeError, "block_sizes must be a tensor or a pair of tensors, got int", block_sizes=4)
    message = "block_sizes of k must cover all 10 rows by blocks of at most 4 rows, got 2 blocks"
    call(ValueError, message, block_sizes=(sizes[0], sizes[0]))
    message = "the sum of block_sizes of q must be in [7, 7], got 8"
    call(IndexError, message, block_sizes=(torch.tensor([4, 4]), sizes[1]))
    call(IndexError, "block_sizes of k must be in [0, 4], got 5", block_sizes=(sizes[0], torch.tensor([5, 4, 1])))
    message = "block_index must have shape (2, 3 or 1, 2, topk), got (2, 1, 3, 1)"
    call(ValueError, message, block_index=torch.zeros(2, 1, 3, 1, dtype=torch.int32))
    call(TypeError, "block_size must be a pair, got 4", block_size=4)


def test_transforms():
    q, k, v, options = case(2)
    tangents = [torch.randn_like(x) for x in (q, k, v)]
    call = functools.partial(cross_attention, **options)
    plain = functools.partial(lambda *qkv, **options: dense(*qkv, **options)[0], **options)
    got, wanted = (torch.func.jvp(f, (q, k, v), tuple(tangents)) for f in (call, plain))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    stacked = [torch.stack([x, y]) for x, y in zip((q, k, v), tangents, strict=True)]
    mapped = torch.vmap(call)(*stacked)
    torch.testing.assert_close(mapped, torch.stack([call(*each) for each in zip(*stacked, strict=True)]))
