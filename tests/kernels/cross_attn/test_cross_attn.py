"""Cross-attention against SDPA with the equivalent dense mask and bias, in float64."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_kernels import cross_attention, merge_attention_states
from vidmem_kernels.cross_attn import reference

F64 = torch.float64
INF = math.inf


def qkv(batch=2, queries=7, keys=11, heads=2, size=4, value_size=3, dtype=F64, grad=False, device="cpu"):
    shapes = [(batch, queries, heads, size), (batch, keys, heads, size), (batch, keys, heads, value_size)]
    return [torch.randn(s).to(device, dtype).requires_grad_(grad) for s in shapes]


def visible(q, k, num_sinks=0, q_time=None, k_time=None, window=None, block_index=None, block_size=(128, 64)):
    """The rule of visibility, pair by pair: (B, H, Lq, Lk)."""
    batch, queries, heads, _ = q.shape
    seen = torch.ones(batch, heads, queries, k.shape[1], dtype=torch.bool)
    for b, h, i, j in torch.cartesian_prod(*map(torch.arange, seen.shape)).tolist():
        ok = True
        if window is not None:
            at = (q_time if q_time.dim() == 1 else q_time[b])[i].item()
            key_at = (k_time if k_time.dim() == 1 else k_time[b])[j].item()
            ok = at - window[0] <= key_at <= at + window[1]
        if block_index is not None:
            row = block_index[b, h if block_index.shape[1] > 1 else 0, i // block_size[0]]
            ok = ok and j // block_size[1] in row.tolist()
        seen[b, h, i, j] = ok or j < num_sinks
    return seen


def dense(q, k, v, key_bias=None, scale=None, **features):
    """(out, lse) by SDPA and logsumexp over the whole score matrix; rows that see nothing are 0 and -inf."""
    seen = visible(q, k, **features).to(q.device)
    bias = q.new_zeros(())
    if key_bias is not None:
        bias = key_bias.unsqueeze(1) if key_bias.dim() == 2 else key_bias
        bias = bias.unsqueeze(2).to(q.dtype)
    bias = bias.expand(seen.shape)
    some = (seen & (bias > -INF)).any(-1)
    mask = bias.masked_fill(~seen, -INF).masked_fill(~some.unsqueeze(-1), 0)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    lse = torch.logsumexp(q @ k.mT * scale + mask, -1)
    out = out.masked_fill(~some.unsqueeze(-1), 0)
    return out.transpose(1, 2), lse.masked_fill(~some, -INF)


def check(args, leaves=None, **options):
    """Values, and gradients through both results."""
    got = cross_attention(*args, **options, return_lse=True)
    expected = dense(*args, **options)
    torch.testing.assert_close(got, expected)
    leaves = leaves or args
    weights = [torch.randn_like(t) for t in got]

    def loss(out, lse):
        # -inf rows are constants.
        return (out * weights[0]).sum() + (lse.masked_fill(lse == -INF, 0) * weights[1]).sum()

    torch.testing.assert_close(
        torch.autograd.grad(loss(*got), leaves),
        torch.autograd.grad(loss(*expected), leaves),
    )


def make_features(which, keys=11, blocks=(3, 4)):
    """The features named in `which`, for qkv() of 7 queries."""
    features = {}
    if "bias" in which:
        features["key_bias"] = torch.randn(2, 2, keys, dtype=F64)
        features["key_bias"][1, 0, 3] = -INF
    if "window" in which:
        features["q_time"] = torch.tensor([0.0, 0.5, 1, 2, 3, 4, 40])
        features["k_time"] = torch.stack([torch.arange(keys) / 2, torch.arange(keys).float()])
        features["window"] = (1.5, 0.5)
    if "blocks" in which:
        nq, nk = -(-7 // blocks[0]), -(-keys // blocks[1])
        features["block_index"] = torch.randint(-1, nk, (2, 2, nq, 2), dtype=torch.int32)
        features["block_size"] = blocks
    if "sinks" in which:
        features["num_sinks"] = 2
    return features


@pytest.mark.parametrize(
    "which",
    ["", "bias", "window", "blocks", "sinks", "bias window", "bias blocks", "window blocks",
     "window sinks", "blocks sinks", "bias window blocks sinks"],
)  # fmt: skip
def test_features_alone_and_combined(which):
    args = qkv(grad=True)
    features = make_features(which.split())
    leaves = list(args)
    if "key_bias" in features:
        leaves.append(features["key_bias"].requires_grad_())
    check(args, leaves, **features)
    check(args, leaves, **features, scale=2.0)


def test_by_hand():
    """Two keys with scores 0 and log 3: weights 1/4 and 3/4."""
    q, k, v = torch.ones(1, 1, 1, 1), torch.tensor([0, math.log(3)]).view(1, 2, 1, 1), torch.eye(2).view(1, 2, 1, 2)
    out, lse = cross_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.25, 0.75]))
    assert lse.item() == pytest.approx(math.log(4))
    # A merged token of size 2 counts as two equal tokens (proportional attention).
    once = cross_attention(q, k, v, key_bias=torch.tensor([[math.log(2), 0.0]]))
    torch.testing.assert_close(once.flatten(), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("shared", [True, False])
def test_shape_of_bias_and_blocks(shared):
    """(B, Lk) biases and block indices for all heads equal those repeated for each head."""
    q, k, v = qkv()
    bias, index = torch.randn(2, 11, dtype=F64), torch.randint(-1, 3, (2, 1, 3, 2))
    if not shared:
        bias, index = bias.unsqueeze(1).expand(2, 2, 11), index.expand(2, 2, 3, 2).int()
    bias = bias.clone().requires_grad_()
    check([q, k, v], [bias], key_bias=bias, block_index=index, block_size=(3, 4))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_times_of_frames(dtype):
    """Frame-causal attention: a query sees its own and all earlier frames."""
    q, k, v = qkv(queries=6, keys=6, grad=True)
    frame = (torch.arange(6) // 2).to(dtype)
    options = {"q_time": frame, "k_time": frame, "window": (INF, 0)}
    check([q, k, v], **options)
    block = torch.arange(6) // 2
    mask = block[:, None] >= block
    expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), mask)
    torch.testing.assert_close(cross_attention(q, k, v, **options), expected.transpose(1, 2))


def test_large_integer_times_are_compared_exactly():
    """2**24 + 1 does not fit float32: the window must still tell it from 2**24."""
    q, k, v = qkv(1, 1, 2, 1)
    far = 2**24
    out = cross_attention(q, k, v, q_time=torch.tensor([far]), k_time=torch.tensor([far + 1, far]), window=(0, 0))
    torch.testing.assert_close(out[0, 0], v[0, 1])


def test_duplicate_blocks_count_once():
    q, k, v = qkv(1, 4, 8)
    once = torch.tensor([[[[1, -1, -1]]]])
    twice = torch.tensor([[[[1, 1, -1]]]])
    options = {"block_size": (4, 4), "return_lse": True}
    expected = cross_attention(q, k[:, 4:], v[:, 4:], return_lse=True)
    for index in (once, twice):
        got = cross_attention(q, k, v, block_index=index, **options)
        torch.testing.assert_close(got, expected)


def test_rows_that_see_nothing():
    """out 0, lse -inf, gradients 0 rather than NaN; their neighbours are as ever."""
    q, k, v = qkv(queries=2, grad=True, dtype=torch.float32)
    bias = torch.zeros(2, 11, requires_grad=True)
    options = {"q_time": torch.tensor([0, 99]), "k_time": torch.zeros(11), "window": (1, 1)}
    out, lse = cross_attention(q, k, v, key_bias=bias, return_lse=True, **options)
    assert torch.equal(out[:, 1], torch.zeros_like(out[:, 1]))
    assert torch.equal(lse[:, :, 1], torch.full((2, 2), -INF))
    grads = torch.autograd.grad(out.sum() + lse[:, :, 0].sum() + lse[:, :, 1].sum(), (q, k, v, bias))
    assert all(torch.isfinite(g).all() for g in grads)
    assert torch.equal(grads[0][:, 1], torch.zeros_like(grads[0][:, 1]))
    alone = cross_attention(q[:, :1], k, v, key_bias=bias, return_lse=True)
    expected = torch.autograd.grad(sum(t.sum() for t in alone), (k, v, bias))
    torch.testing.assert_close(grads[1:], expected)
    # Hidden by the bias alone, for all queries.
    hidden = torch.full((2, 11), -INF)
    out, lse = cross_attention(q, k, v, key_bias=hidden, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out)) and (lse == -INF).all()
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_nan_is_not_hidden():
    q, k, v = qkv(dtype=torch.float32)
    q[0, 3, 1, 0] = math.nan
    for options in ({}, {"key_bias": torch.zeros(2, 11)}):
        out, lse = cross_attention(q, k, v, return_lse=True, **options)
        assert out[0, 3, 1].isnan().all() and lse[0, 1, 3].isnan()
        assert out.isnan().sum() == 3 and lse.isnan().sum() == 1


@pytest.mark.parametrize("sign", [-1, 1])
def test_large_scores(sign):
    """Scores of 1e4 overflow exp, their softmax does not."""
    q, k, v = qkv(dtype=torch.float32)
    bias = torch.full((2, 11), sign * 1e4)
    out, lse = cross_attention(q, k, v, key_bias=bias, return_lse=True)
    plain, plain_lse = cross_attention(q, k, v, return_lse=True)
    torch.testing.assert_close(out, plain, rtol=2e-3, atol=2e-3)  # 1e4 has a spacing of 1e-3
    torch.testing.assert_close(lse, plain_lse + sign * 1e4)
    peaked = cross_attention(q * 1e4, k, v, scale=1.0)
    best = (q.transpose(1, 2) @ k.transpose(1, 2).mT).argmax(-1)  # (B, H, Lq)
    expected = v.transpose(1, 2).gather(2, best.unsqueeze(3).expand(-1, -1, -1, 3))
    torch.testing.assert_close(peaked, expected.transpose(1, 2), rtol=0, atol=0.05)


@settings(deadline=None, max_examples=25)
@given(
    queries=st.integers(0, 9),
    keys=st.integers(0, 13),
    window=st.none() | st.tuples(st.floats(0, 8), st.floats(0, 8) | st.just(INF)),
    num_sinks=st.integers(0, 3),
    block_size=st.none() | st.tuples(st.integers(1, 5), st.integers(1, 20)),
    topk=st.integers(0, 3),
    step=st.integers(1, 5),
)
def test_any_lengths_windows_and_chunks(queries, keys, window, num_sinks, block_size, topk, step):
    args = qkv(2, queries, keys, grad=True)
    features = {"num_sinks": min(num_sinks, keys), "key_bias": torch.randn(2, keys).requires_grad_()}
    if window is not None:
        features |= {"window": window, "q_time": torch.arange(queries), "k_time": torch.arange(keys) * 0.5}
    if block_size is not None:
        rows, blocks = -(-queries // block_size[0]), -(-keys // block_size[1])
        index = torch.randint(-1, max(blocks, 1), (2, 2, rows, topk))
        features |= {"block_index": index.clamp(max=blocks - 1), "block_size": block_size}
    row_bytes = 2 * 2 * keys * 8
    with pytest.MonkeyPatch.context() as patch:  # `step` queries at a time
        patch.setattr(reference, "SCORE_BYTES", step * row_bytes)
        check(args, [*args, features["key_bias"]], **features)


@pytest.mark.parametrize("batch, queries, keys", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(batch, queries, keys):
    args = qkv(batch, queries, keys, grad=True)
    out, lse = cross_attention(*args, return_lse=True)
    assert torch.equal(out, out.new_zeros(batch, queries, 2, 3))
    assert torch.equal(lse, lse.new_full((batch, 2, queries), -INF))
    grads = torch.autograd.grad(out.sum(), args)
    assert all(torch.equal(g, torch.zeros_like(t)) for g, t in zip(grads, args, strict=True))


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype, plain, device):
    args = qkv(1, 40, 300, 2, 16, 16, dtype=dtype, device=device)
    options = {} if plain else {"key_bias": torch.randn(1, 300, device=device)}
    out, lse = cross_attention(*args, return_lse=True, backend="reference", **options)
    exact, exact_lse = cross_attention(*(t.double() for t in args), return_lse=True, **options)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert (out.double() - exact).abs().max() <= 0.51 * torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)
    assert exact_lse.dtype == F64


def test_autocast_casts_q_k_v_only():
    q, k, v = qkv(dtype=torch.float32)
    bias = torch.randn(2, 11) / 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = cross_attention(q.bfloat16(), k, v, key_bias=bias, return_lse=True)
    expected = cross_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), key_bias=bias, return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_compiles_whole(device):
    """The public functions with every feature: no graph break, any lengths."""

    def call(q, k, v, bias, q_time, k_time, index):
        near, lse = cross_attention(
            q, k, v, key_bias=bias, q_time=q_time, k_time=k_time, window=(2, INF), block_index=index,
            block_size=(4, 8), num_sinks=1, return_lse=True,
        )  # fmt: skip
        plain, plain_lse = cross_attention(q, k, v, return_lse=True)
        return merge_attention_states([near, plain], [lse, plain_lse])

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for queries, keys in ((8, 24), (13, 37)):
        args = qkv(2, queries, keys, grad=True, dtype=torch.float32, device=device, value_size=4)
        bias = torch.randn(2, keys, device=device, requires_grad=True)
        times = torch.arange(queries, device=device), torch.arange(keys, device=device)
        index = torch.randint(-1, 3, (2, 2, -(-queries // 4), 2), device=device)
        got = compiled(*args, bias, *times, index)
        expected = call(*args, bias, *times, index)
        torch.testing.assert_close(got, expected)
        leaves = (*args, bias)
        torch.testing.assert_close(
            torch.autograd.grad(got[0].sum() + got[1].sum(), leaves),
            torch.autograd.grad(expected[0].sum() + expected[1].sum(), leaves),
        )


@pytest.mark.parametrize("cuts", [(11,), (4,), (3, 4, 9)])
def test_merged_states_equal_all_keys(cuts):
    """Attention over pieces of the keys, merged, is attention over all of them: values and gradients."""
    q, k, v = qkv(grad=True)
    whole = cross_attention(q, k, v, return_lse=True)
    pieces = zip(k.tensor_split(cuts, 1), v.tensor_split(cuts, 1), strict=True)  # the last may be empty
    parts = [cross_attention(q, a, b, return_lse=True) for a, b in pieces]
    merged = merge_attention_states([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(merged, whole)
    weights = [torch.randn_like(t) for t in whole]
    grads = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, r, strict=True)), (q, k, v))
        for r in (merged, whole)
    ]
    torch.testing.assert_close(*grads)


def test_merge_by_hand_and_of_nothing():
    outs = [torch.full((1, 2, 1, 1), x, requires_grad=True) for x in (1.0, 5.0)]
    lses = [torch.tensor([[[x, -INF]]], requires_grad=True) for x in (0.0, math.log(3))]
    out, lse = merge_attention_states(outs, lses)
    torch.testing.assert_close(out.flatten(), torch.tensor([4.0, 0.0]))  # (1 * 1 + 3 * 5) / 4
    torch.testing.assert_close(lse.flatten(), torch.tensor([math.log(4), -INF]))
    grads = torch.autograd.grad(out.sum(), outs + lses)
    expected = [[0.25, 0], [0.75, 0], [0.25 * (1 - 4), 0], [0.75 * (5 - 4), 0]]
    for grad, values in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.flatten(), torch.tensor(values, dtype=torch.float32))


def test_merge_of_half_precision_keeps_lse_in_float32():
    q, k, v = qkv(1, 5, 64, 2, 8, 8, dtype=torch.bfloat16)
    parts = [cross_attention(q, a, b, return_lse=True) for a, b in zip(k.split(32, 1), v.split(32, 1), strict=True)]
    out, lse = merge_attention_states(*zip(*parts, strict=True))
    exact, exact_lse = cross_attention(q.double(), k.double(), v.double(), return_lse=True)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


SHAPES = "q (B, Lq, H, D) and k (B, Lk, H, D) must have the same B and D, "


def test_errors():
    q, k, v = qkv(dtype=torch.float32)
    time = {"q_time": torch.zeros(7), "k_time": torch.zeros(11)}
    index = torch.zeros(2, 2, 3, 1, dtype=torch.int32)
    blocks = {"block_index": index, "block_size": (3, 4)}
    cases = [
        ({"q": q[0]}, ValueError, "q must have shape (B, Lq, H, D), got (7, 2, 4)"),
        ({"k": k[..., :2]}, ValueError, SHAPES + "got (2, 7, 2, 4) and (2, 11, 2, 2)"),
        ({"k": torch.cat([k, k[:, :, :1]], 2)}, ValueError, "in (B, L, H, D) the heads of k must divide"),
        ({"v": v[:, :3]}, ValueError, "k and v must have the same B, Lk and H, got (2, 11, 2) and (2, 3, 2)"),
        ({"v": v.half()}, ValueError, "q and v must have the same dtype, got torch.float32 and torch.float16"),
        ({"q": q.long()}, TypeError, "q must be float32, bfloat16, float16 or float64, got int64"),
        ({"k": None}, TypeError, "k must be a tensor, got NoneType"),
        ({"key_bias": torch.zeros(11)}, ValueError, "key_bias must have shape (B, Lk), got (11,)"),
        ({"key_bias": torch.zeros(2, 10)}, ValueError,
         "key_bias must have shape (B, Lk) or (B, H, Lk), got (2, 11) and (2, 10)"),
        ({"key_bias": torch.zeros(2, 11).bool()}, TypeError,
         "key_bias must be float32, bfloat16, float16 or float64, got bool"),
        ({"num_sinks": 12}, ValueError, "num_sinks must be in [0, 11], got 12"),
        ({"window": (1, 1)}, ValueError, "q_time, k_time and window must be given together, got window"),
        (time, ValueError, "q_time, k_time and window must be given together, got q_time and k_time"),
        ({**time, "window": (-1, 0)}, ValueError, "window must hold two numbers of at least 0, got (-1, 0)"),
        ({**time, "window": (0, math.nan)}, ValueError, "window must hold two numbers of at least 0, got (0, nan)"),
        ({**time, "window": 3}, TypeError, "window must be a pair, got 3"),
        ({**time, "window": ("a", 3)}, TypeError, "window must hold two numbers, got ('a', 3)"),
        ({**time, "window": (1, 1), "k_time": torch.zeros(10)}, ValueError,
         "k_time must have shape (Lk), got (11,) and (10,)"),
        ({**time, "window": (1, 1), "k_time": torch.zeros(11).half()}, TypeError,
         "k_time must be int32, int64, float32 or float64, got float16"),
        ({**blocks, "block_index": index[:, :, :2]}, ValueError,
         "block_index must have shape (2, 2 or 1, 3, topk), got (2, 2, 2, 1)"),
        ({**blocks, "block_index": index.float()}, TypeError, "block_index must be int32 or int64, got float32"),
        ({**blocks, "block_index": index + 3}, IndexError, "block_index must be in [-1, 2], got 3"),
        ({**blocks, "block_index": index - 2}, IndexError, "block_index must be in [-1, 2], got -2"),
        ({"block_size": (0, 4)}, ValueError, "block_size[0] must be at least 1, got 0"),
        ({"block_size": (4, 2.0)}, TypeError, "block_size[1] must be an int, got float"),
        ({"block_size": 64}, TypeError, "block_size must be a pair, got 64"),
        ({"scale": "big"}, TypeError, "scale must be a number, got str"),
    ]  # fmt: skip
    for options, kind, message in cases:
        with pytest.raises(kind) as error:
            cross_attention(**{"q": q, "k": k, "v": v, **options})
        assert str(error.value).startswith(f"cross_attention: {message}")


def test_merge_errors():
    out, lse = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 2)
    cases = [
        ([], [], ValueError, "outs and lses must have the same length of at least 1, got 0 and 0"),
        ([out], [lse, lse], ValueError, "outs and lses must have the same length of at least 1, got 1 and 2"),
        ([out, out[:, :1]], [lse, lse[..., :1]], ValueError, "outs[0] and outs[1] must have the same shape, got"),
        ([out], [lse.mT], ValueError, "lses[0] must have shape (B, H, L), got (1, 3, 2) and (1, 2, 3)"),
        ([out], [lse.half()], TypeError, "lses[0] must be float32, got float16"),
        ([out, out.half()], [lse, lse], ValueError, "outs[0] and outs[1] must have the same dtype, got"),
    ]  # fmt: skip
    for outs, lses, kind, message in cases:
        with pytest.raises(kind) as error:
            merge_attention_states(outs, lses)
        assert str(error.value).startswith(f"merge_attention_states: {message}")


MEMORY = """
import resource, torch
from vidmem_kernels import cross_attention
q = torch.randn(1, 2000, 1, 16)
k, v = torch.randn(1, 50_000, 1, 16), torch.randn(1, 50_000, 1, 16)
bias = torch.randn(1, 50_000)
small = [t[:, :64].clone().requires_grad_() for t in (q, k, v, bias)]
cross_attention(*small[:3], key_bias=small[3]).sum().backward()  # loads what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q, k, v, bias = (t.requires_grad_() for t in (q, k, v, bias))
time = torch.arange(2000) * 25, torch.arange(50_000)
cross_attention(
    q, k, v, key_bias=bias, q_time=time[0], k_time=time[1], window=(9000, 9000), num_sinks=16
).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_bounded():
    """2,000 queries, 50,000 keys, forward and backward: scores, weights and their gradients would take 1.6 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 500
