"""Attention with zeros among its sizes: every op on every backend, any strides, as the reference has it."""

import itertools
import random

import pytest
import torch

from vidmem_kernels import _dispatch, cross_attention, merge_attention_states
from vidmem_kernels._op import OPS

AXES = ("batch", "queries", "keys", "heads", "size", "value_size")
HUGE = 2**62


def backends(op, args, device):
    """Those that run the call."""
    there = [b for b in _dispatch.BACKENDS if _dispatch.unavailable(OPS[op], b, device) is None]
    return [b for b in there if _dispatch.refusal(OPS[op], b, torch.device(device), args) is None]


def spread(rng, x):
    """The same tensor with other strides: huge ones where it is empty, 0 where it has one value."""
    if x.numel() == 0:
        strides = [rng.choice([0, 1, 7, HUGE, HUGE + 3]) for _ in x.shape]
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device)
    if rng.random() < 0.5:
        return x.new_tensor(0.5).to(x.dtype).expand(x.shape)
    return x


def cases(seed, count):
    """Every set of at most two axes of size 0, then some of more, each with drawn sizes elsewhere."""
    rng = random.Random(seed)
    chosen = [set(c) for n in (1, 2) for c in itertools.combinations(AXES, n)]
    chosen += [set(rng.sample(AXES, rng.randint(3, 6))) for _ in range(10)]
    rng.shuffle(chosen)
    for zeros in chosen[:count]:
        yield rng, {axis: 0 if axis in zeros else rng.randint(1, 5) for axis in AXES}


def arguments(rng, sizes, device):
    batch, queries, keys, heads, size, value_size = sizes.values()
    make = {"device": device, "dtype": rng.choice([torch.float32, torch.bfloat16])}
    q, k = torch.randn(batch, queries, heads, size, **make), torch.randn(batch, keys, heads, size, **make)
    v = torch.randn(batch, keys, heads, value_size, **make)
    bias = q_time = k_time = window = index = None
    if rng.random() < 0.5:
        bias = torch.randn(rng.choice([(batch, keys), (batch, heads, keys)]), device=device)
    if rng.random() < 0.5:
        dtype = rng.choice([torch.int32, torch.int64, torch.float32, torch.float64])
        q_time = torch.zeros(rng.choice([(queries,), (batch, queries)]), dtype=dtype, device=device)
        k_time = torch.zeros(rng.choice([(keys,), (batch, keys)]), dtype=dtype, device=device)
        window = [0.0, 1.0]
    block_size = [rng.randint(1, 4), rng.randint(1, 4)]
    if rng.random() < 0.5:
        rows, topk = -(-queries // block_size[0]), rng.choice([0, 1, 2])
        low, high = -1, max(0, -(-keys // block_size[1]))
        shape = (batch, rng.choice([1, heads]), rows, topk)
        index = torch.randint(low, high, shape, dtype=torch.int32, device=device)
        if keys == 0:
            index.fill_(-1)
    tensors = [None if t is None else spread(rng, t) if t.is_floating_point() else t for t in (q, k, v, bias)]
    sinks = rng.randint(0, keys)
    return (*tensors, sinks, q_time, k_time, window, index, block_size, 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_cross_attention_of_empty_axes(seed, device):
    for rng, sizes in cases(seed, 30):
        args = arguments(rng, sizes, device)
        q, k, v, bias = args[:4]
        out, lse = torch.ops.vidmem.cross_attention(*args, "reference")
        assert out.shape == (*q.shape[:3], v.shape[3]) and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        grads = torch.randn_like(out), rng.choice([None, torch.randn_like(lse)])
        back_args = (*grads, *args[:4], out, lse, *args[4:])
        expected = torch.ops.vidmem.cross_attention_backward(*back_args, "reference")
        shapes = [t.shape for t in (q, k, v)] + [(0,) if bias is None else bias.shape]
        assert [t.shape for t in expected] == shapes
        if k.shape[1] == 0:
            assert (out == 0).all() and (lse == -torch.inf).all()
        for backend in backends("cross_attention", args, device):
            got = torch.ops.vidmem.cross_attention(*args, backend)
            torch.testing.assert_close(got, (out, lse), rtol=2e-2, atol=2e-2, msg=f"{backend} {sizes}")
        for backend in backends("cross_attention_backward", back_args, device):
            got = torch.ops.vidmem.cross_attention_backward(*back_args, backend)
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2, msg=f"{backend} {sizes}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autograd_through_empty_axes(backend, device):
    for rng, sizes in cases(7, 20):
        *tensors, sinks, q_time, k_time, window, index, block_size, scale = arguments(rng, sizes, device)
        q, k, v, bias = (None if t is None else t.detach().clone().requires_grad_() for t in tensors)
        out, lse = cross_attention(
            q, k, v, key_bias=bias, num_sinks=sinks, q_time=q_time, k_time=k_time, window=window, block_index=index,
            block_size=tuple(block_size), scale=scale, return_lse=True, backend=backend,
        )  # fmt: skip
        (out.sum() + lse.masked_fill(lse == -torch.inf, 0).sum()).backward()
        assert all(t is None or (t.grad.shape == t.shape and t.grad.isfinite().all()) for t in (q, k, v, bias)), sizes


def test_no_channels_need_a_scale(device):
    q = torch.zeros(1, 3, 2, 0, device=device)
    v = torch.randn(1, 4, 2, 5, device=device)
    k = torch.zeros(1, 4, 2, 0, device=device)
    with pytest.raises(ValueError, match="scale must be given if D is 0"):
        cross_attention(q, k, v)
    out = cross_attention(q, k, v, scale=1.0)  # equal scores: the mean
    torch.testing.assert_close(out, v.mean(1, keepdim=True).expand(1, 3, 2, 5))


@pytest.mark.parametrize("seed", range(2))
def test_merge_attention_states_of_empty_axes(seed, device):
    rng = random.Random(seed)
    for shape in itertools.product((0, 3), (0, 2), (0, 2), (0, 5)):
        parts = rng.randint(1, 6)
        batch, length, heads, _ = shape
        outs = [spread(rng, torch.randn(shape, device=device)) for _ in range(parts)]
        lses = [spread(rng, torch.randn(batch, heads, length, device=device)) for _ in range(parts)]
        out, lse = torch.ops.vidmem.merge_attention_states(outs, lses, "reference")
        assert out.shape == shape and lse.shape == (batch, heads, length)
        args = (torch.randn_like(out), rng.choice([None, torch.randn_like(lse)]), outs, lses, lse)
        expected = torch.ops.vidmem.merge_attention_states_backward(*args, "reference")
        for backend in backends("merge_attention_states", (outs, lses), device):
            got = torch.ops.vidmem.merge_attention_states(outs, lses, backend)
            torch.testing.assert_close(got, (out, lse), msg=f"{backend} {shape}")
            got = torch.ops.vidmem.merge_attention_states_backward(*args, backend)
            torch.testing.assert_close(got, expected, msg=f"{backend} {shape}")


def test_merging_needs_a_part():
    with pytest.raises(ValueError, match="the same length of at least 1"):
        merge_attention_states([], [])
    with pytest.raises(ValueError, match="the same length of at least 1, got 1 and 0"):
        merge_attention_states([torch.zeros(1, 1, 1, 1)], [])
