"""Calls of cross_attention with its later options: wrong ones, compiled ones, transforms, and what is hidden."""

import math
import re

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.functional import scaled_dot_product_attention

from vidmem_kernels import BackendError, _extension, cross_attention, explain, quantize_rows

INF, NAN = math.inf, math.nan


def qkv(batch=2, queries=7, keys=11, heads=4, key_heads=2, size=4, dtype=torch.float32, served=None):
    served = batch if served is None else served
    k, v = (torch.randn(served, keys, key_heads, size, dtype=dtype) for _ in range(2))
    return torch.randn(batch, queries, heads, size, dtype=dtype), k, v


def in_8_bits(k, v, dtype=torch.int8):
    """k, v and their scales by name."""
    found = {}
    for name, x in (("k", k), ("v", v)):
        rows, scale = quantize_rows(x.float().flatten(2), dtype)
        found |= {name: rows.view(x.shape), f"{name}_scale": scale}
    return found


def rows_of(rows):
    return [rows[name] for name in ("k", "v", "k_scale", "v_scale")]


TIMES = {"q_time": torch.arange(7), "k_time": torch.arange(11) // 2, "window": (2, 0)}


def test_errors():
    q, k, v = qkv()
    rows = in_8_bits(k, v)
    scales = {"k_scale": rows["k_scale"], "v_scale": rows["v_scale"]}
    fp8 = in_8_bits(k, v, torch.float8_e4m3fn)
    index = torch.zeros(2, 4, 2, 1, dtype=torch.int64)
    cases = [
        ({"k": k[:, :, :0], "v": v[:, :, :0]}, ValueError, "the heads of k must divide those of q, got 0"),
        ({"q": q[:, :, :3]}, ValueError, "the heads of k must divide those of q, got 2 and 3"),
        ({"q": q[:, :, :1]}, ValueError, "the heads of k must divide those of q, got 2 and 1"),
        ({"q": torch.cat([q, q[:1]])}, ValueError, "must have the same B and D, got (3, 7, 4, 4) and (2, 11, 2"),
        ({"q": q[:1]}, ValueError, "must have the same B and D, got (1, 7, 4, 4) and (2, 11, 2, 4)"),
        ({"k": k[:1]}, ValueError, "k and v must have the same B, Lk and H, got (1, 11, 2) and (2, 11, 2)"),
        ({"key_mask": torch.ones(2, 11)}, TypeError, "key_mask must be bool, got float32"),
        ({"key_mask": torch.ones(11) > 0}, ValueError, "key_mask must have shape (B, Lk), got (11,)"),
        ({"key_mask": torch.ones(2, 10) > 0}, ValueError, "key_mask must have shape (B, Lk), got (2, 11) and (2, 10)"),
        ({"key_mask": torch.ones(3, 11) > 0}, ValueError, "key_mask must have shape (B, Lk), got (2, 11) and (3, 11)"),
        ({"key_mask": [True]}, TypeError, "key_mask must be a tensor, got list"),
        ({"key_bias": torch.ones(2, 3, 11)}, ValueError, "key_bias must have shape (B, Lk) or (B, H, Lk), got (2, 4"),
        ({"key_bias": torch.ones(3, 11)}, ValueError, "key_bias must have shape (B, Lk) or (B, H, Lk), got (2, 11) an"),
        ({"block_index": index[:, :3], "block_size": (4, 4)}, ValueError, "block_index must have shape (2, 4 or 1, 2,"),
        ({"causal_sinks": True}, ValueError, "causal_sinks requires window, got window=None"),
        ({"causal_sinks": 1, **TIMES}, TypeError, "causal_sinks must be a bool, got int"),
        ({"out_dtype": torch.bfloat16}, TypeError, "out_dtype must be float32, got torch.bfloat16"),
        ({"out_dtype": "float32"}, TypeError, "out_dtype must be float32, got float32"),
        ({**scales}, TypeError, "k_scale and v_scale are required for int8 or float8_e4m3fn k and v and"),
        ({"k": rows["k"], "v": rows["v"]}, TypeError, "got int8 and int8 with neither"),
        ({"k": rows["k"], "k_scale": scales["k_scale"]}, ValueError, "k and v must have the same dtype, got torch.i"),
        ({"k": rows["k"], "v": rows["v"], "k_scale": scales["k_scale"]}, TypeError, "got int8 and int8 with k_scale"),
        ({**rows, "v": fp8["v"]}, ValueError, "k and v must have the same dtype, got torch.int8 and torch.float8_e4"),
        ({**rows, "k_scale": scales["k_scale"].double()}, TypeError, "k_scale must be float32, got float64"),
        ({**rows, "v_scale": scales["v_scale"][:, :3]}, ValueError, "v_scale must have shape (B, Lk), got (2, 11) a"),
        ({**rows, "v_scale": 2.0}, TypeError, "v_scale must be a tensor, got float"),
        ({**fp8, "k": fp8["k"].clone().requires_grad_()}, ValueError, "k must not require a gradient, which float8"),
    ]  # fmt: skip
    for options, kind, message in cases:
        with pytest.raises(kind, match=re.escape(message)) as error:
            cross_attention(**{"q": q, "k": k, "v": v, **options})
        assert str(error.value).startswith("cross_attention: "), options


@pytest.mark.skipif(_extension.module is None, reason="built without C++")
def test_errors_of_cpp():
    """What could read outside memory is checked again."""
    q, k, v = qkv(heads=2)
    rows = in_8_bits(k, v)
    good = [q, *rows_of(rows), None, 0, None, None, None, None, [128, 64], 0.5, torch.float32]
    torch.ops.vidmem_cpp.cross_attention_mixed(*good)
    scale, wide = rows["k_scale"], k.double()
    cases = [
        ({3: scale[:, :5]}, "k_scale must have shape (2, 11), got (2, 5)"),
        ({4: scale[:1]}, "v_scale must have shape (2, 11), got (1, 11)"),
        ({3: scale.double()}, "k_scale must be float32, got float64"),
        ({3: None}, "k must be float32, got int8"),
        ({1: k}, "k must be int8 or float8_e4m3fn if it has a scale, got float32"),
        ({0: q.double()}, "q must be float32, bfloat16 or float16 if k has a scale, got float64"),
        ({13: torch.float16}, "out_dtype must be float32 or that of q, got float16"),
        ({1: wide, 3: None}, "k must be float32, got float64"),
    ]
    for changed, message in cases:
        args = [changed.get(i, value) for i, value in enumerate(good)]
        with pytest.raises(Exception, match=re.escape(f"cross_attention_mixed: {message}")):
            torch.ops.vidmem_cpp.cross_attention_mixed(*args)


def test_a_mask_is_a_bias_without_gradient():
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.float64))
    mask = torch.rand(2, 11) < 0.5
    out, lse = cross_attention(q, k, v, key_mask=mask, num_sinks=3, return_lse=True)
    bias = torch.zeros(2, 11, dtype=torch.float64).masked_fill(~mask, -INF)
    same = cross_attention(q, k, v, key_bias=bias, return_lse=True)
    assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (k, v))
    assert not any(g.masked_select(~mask[:, :, None, None]).any() for g in grads)
    # Of a bias that is given too, the hidden part has no gradient.
    bias = torch.randn(1, 11, dtype=torch.float64, requires_grad=True)
    out = cross_attention(q, k, v, key_mask=mask[:1], key_bias=bias)
    (of_bias,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), bias)
    assert torch.equal(of_bias != 0, mask[:1])


def test_nothing_is_seen():
    q, k, v = qkv()
    nobody = torch.zeros(1, 11, dtype=torch.bool)
    for options in ({}, in_8_bits(k, v), {"num_sinks": 2, "causal_sinks": True, **TIMES}):
        out, lse = cross_attention(**{"q": q, "k": k, "v": v, **options}, key_mask=nobody, return_lse=True)
        assert not out.any() and (lse == -INF).all()


def test_what_is_hidden_touches_nothing():
    q, k, v = qkv()
    mask = torch.rand(2, 11) < 0.5
    for options in ({}, {"num_sinks": 4, "causal_sinks": True, **TIMES}):
        rows = in_8_bits(k, v)
        clean, spoilt = dict(rows), dict(rows)
        for name in ("k_scale", "v_scale"):
            clean[name] = rows[name].clone().requires_grad_()
            spoilt[name] = rows[name].masked_fill(~mask, NAN).requires_grad_()
        results = []
        for memory in (clean, spoilt):
            out = cross_attention(q, **memory, key_mask=mask, **options)
            grads = torch.autograd.grad(out.square().sum(), (memory["k_scale"], memory["v_scale"]))
            results.append((out, *grads))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    # By a window, pair by pair: a late key's scale is no number, early queries do not see it.
    late = {name: x.clone() for name, x in rows.items()}
    for name in ("k_scale", "v_scale"):
        late[name][:, 10] = NAN
    near, spoilt = (cross_attention(q, **m, **TIMES) for m in (rows, late))
    assert torch.equal(near[:, :5], spoilt[:, :5]) and spoilt[:, 5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_are_not_rounded(dtype):
    q, k, v = qkv(1, 30, 200, 2, 2, 16, dtype)
    wide = cross_attention(q, k, v, out_dtype=torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), cross_attention(q, k, v))
    exact = scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert (wide - exact).abs().max() < 1e-3 * torch.finfo(dtype).eps * 128  # far below a rounding to dtype
    assert torch.equal(cross_attention(q, k, v, out_dtype=dtype), cross_attention(q, k, v))


def test_autocast():
    q, k, v = qkv()
    rows = in_8_bits(k, v, torch.float8_e4m3fn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert cross_attention(q, k, v, out_dtype=torch.float32).dtype == torch.float32
        out, sums = cross_attention(q, **rows), cross_attention(q, **rows, out_dtype=torch.float32)
        assert torch.equal(cross_attention(q, k, v), cross_attention(*(x.bfloat16() for x in (q, k, v))))
    assert torch.equal(out, cross_attention(q.bfloat16(), **rows)) and torch.equal(out, sums.bfloat16())


def test_a_library_takes_neither_scales_nor_sums():
    q, k, v = qkv()
    rows = in_8_bits(k, v)
    halves = {"k": k.bfloat16(), "v": v.bfloat16(), "out_dtype": torch.float32}
    for options in (rows, halves):
        with pytest.raises(BackendError, match="cross_attention_mixed"):
            cross_attention(q.bfloat16(), **options, backend="library")
    (choice,) = explain(lambda: cross_attention(q, **rows))
    assert choice.op == "cross_attention_mixed"


def combined(q, k, v, mask, side, scale, q_time, k_time, k_scale, v_scale, index, causal_sinks):
    return cross_attention(
        q, k, v, key_mask=mask, window=(side, 1.5), scale=scale, q_time=q_time, k_time=k_time, num_sinks=2,
        causal_sinks=causal_sinks, k_scale=k_scale, v_scale=v_scale, block_index=index, block_size=(4, 8),
        out_dtype=torch.float32, return_lse=True,
    )  # fmt: skip


@pytest.mark.parametrize("causal_sinks", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", [None, pytest.param(torch.int8, marks=pytest.mark.long)])
def test_compiles_whole(kind, causal_sinks):
    """One graph for all sizes, windows and scales, with rows of 8 bits and without."""
    count = 0

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        nonlocal count
        count += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(combined, fullgraph=True, dynamic=True, backend=backend)
    for queries, keys, side, scale in ((6, 17, 2.25, 0.5), (13, 30, 3.75, 0.7)):
        q, k, v = qkv(3, queries, keys, served=1)
        mask = torch.rand(3, keys) < 0.8
        times = torch.arange(queries) / 2, torch.arange(keys) / 3
        index = torch.randint(-1, 3, (1, 4, -(-queries // 4), 2))
        rows = {"k": k, "v": v} if kind is None else in_8_bits(k, v, kind)
        leaves = [q, *([rows["k"], rows["v"]] if kind is None else [rows["k_scale"], rows["v_scale"]])]
        leaves = [x.requires_grad_() for x in leaves]
        args = q, rows["k"], rows["v"], mask, side, scale, *times, rows.get("k_scale"), rows.get("v_scale"), index
        args = *args, causal_sinks
        got, expected = compiled(*args), combined(*args)
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(r[0].sum() + r[1][r[1] > -INF].sum(), leaves) for r in (got, expected)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
    assert count <= 2, "compiled anew"


def test_transforms():
    q, k, v = qkv(1, dtype=torch.float64)
    mask = torch.rand(1, 11) < 0.7

    def loss(q, k, v):
        return cross_attention(q, k, v, key_mask=mask, num_sinks=3, causal_sinks=True, **TIMES).square().sum()

    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(grad(loss, (0, 1, 2))(q, k, v), expected)
    # vmap: one memory for all, in 8 bits.
    rows = in_8_bits(k, v)
    many = torch.randn(3, 1, 7, 4, 4)
    mapped = vmap(lambda q: cross_attention(q, **rows))(many)
    assert torch.equal(mapped, torch.stack([cross_attention(q, **rows) for q in many]))
    of_scale = grad(lambda s: cross_attention(many[0], **{**rows, "k_scale": s}).square().sum())(rows["k_scale"])
    scale = rows["k_scale"].clone().requires_grad_()
    cross_attention(many[0], **{**rows, "k_scale": scale}).square().sum().backward()
    torch.testing.assert_close(of_scale, scale.grad, rtol=1e-4, atol=1e-4)


def test_a_group_reads_its_head_without_a_copy():
    """Of keys and values that are far larger than the queries, nothing of their size is made."""
    q, k, v = qkv(1, 3, 4096, 8, 2, 32)
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_attention(q, k, v)
        cross_attention(q, k, v, key_bias=torch.zeros(1, 8, 4096))
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest < k.numel() * 4
