"""Attention of every CPU backend against float64 SDPA with the equivalent dense mask: results, lse and gradients.

Through the public function and autograd, within the budget of `vidmem_kernels.testing`.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_helpers import DEFAULTS, by_sdpa, op_of, results_and_gradients, visible
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vidmem_kernels import _dispatch, cross_attention, linear_attention, merge_attention_states, testing
from vidmem_kernels._op import OPS

INF, F64 = math.inf, torch.float64
HALF = (torch.bfloat16, torch.float16)


def backends(op="cross_attention"):
    return [b for b in ("cpu", "library", "reference") if _dispatch.unavailable(OPS[op], b, "cpu") is None]


def positional(q, options):
    """The options as the op takes them."""
    options = {**DEFAULTS, **options}
    options["window"] = options["window"] and list(map(float, options["window"]))
    options["block_size"] = list(options["block_size"])
    options["scale"] = options["scale"] or q.shape[3] ** -0.5
    return list(options.values())


def backends_for(q, k, v, options):
    """Those that run this very call."""
    args = (q, k, v, *positional(q, options))
    return [b for b in backends() if _dispatch.refusal(OPS["cross_attention"], b, q.device, args) is None]


def check(q, k, v, options, what="", derived=True):
    """Results and gradients of every backend that runs the call.

    The budget is that of the reference's ops, for a gradient pays for the rounding of lse and out wherever it is
    computed; test_reference_in_float64 keeps errors in their formulas out of it. Without `derived`, for shapes of too
    few numbers to derive it from, a fixed tolerance in float32.
    """
    exact, exact_grads = results_and_gradients(by_sdpa, q, k, v, options, F64)
    rough, rough_grads = results_and_gradients(op_of("reference"), q, k, v, options)
    there_are = backends_for(q, k, v, options)
    assert "reference" in there_are
    for backend in there_are:
        got, grads = results_and_gradients(op_of(backend), q, k, v, options)
        compared = {f"gradient of {n}": (grads[n], rough_grads[n], exact_grads[n]) for n in grads}
        for name, values in {"results": (got, rough, exact), **compared}.items():
            where = f"{name}, {what} on {backend}"
            if derived or q.dtype != torch.float32:
                testing.assert_within_budget(*values, where)
            else:
                close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
                torch.testing.assert_close(values[0], values[2], **close, msg=lambda m, w=where: f"{w}: {m}")
    return exact, exact_grads


def qkv(batch=4, queries=50, keys=90, heads=3, size=16, value_size=16, dtype=torch.float32):
    """Scores of about 0.5, so that no single row of sharp weights makes up the largest error."""
    q, k = torch.randn(batch, queries, heads, size) / 2, torch.randn(batch, keys, heads, size)
    return q.to(dtype), k.to(dtype), torch.randn(batch, keys, heads, value_size).to(dtype)


def features(batch=4, queries=50, keys=90, heads=3, block_size=(16, 12)):
    """Every feature alone, and all together."""
    rows, blocks = -(-queries // block_size[0]), -(-keys // block_size[1])
    times = {"q_time": torch.arange(queries) / 4, "k_time": torch.arange(keys) / 8}
    per_batch = {
        "q_time": torch.arange(queries).expand(batch, -1) // 10,
        "k_time": torch.arange(keys).expand(batch, -1) // 9,
    }
    shared = torch.randint(0, blocks, (batch, 1, rows, 3))
    by_head = torch.randint(-1, blocks, (batch, heads, rows, 4), dtype=torch.int32)
    by_head[0, 1], by_head[..., 1] = -1, by_head[..., 2]  # rows without a block; duplicates
    hidden = torch.randn(batch, heads, keys)
    hidden[:, :, ::7] = -INF
    blocked = {"block_index": by_head, "block_size": block_size}
    alone = {
        "plain": {},
        "scale": {"scale": 0.4},
        "bias of a batch": {"key_bias": torch.randn(batch, keys)},
        "bias of a head": {"key_bias": torch.randn(batch, heads, keys)},
        "merged sizes": {"key_bias": torch.randint(1, 9, (batch, keys)).float().log()},
        "infinite bias": {"key_bias": hidden},
        "sinks": {"num_sinks": 5},
        "window": {**times, "window": (2.5, 1.0)},
        "past only": {**times, "window": (INF, 0)},
        "future only": {**times, "window": (0, INF)},
        "unbounded": {**times, "window": (INF, INF)},
        "frames of a batch": {**per_batch, "window": (2, 0)},
        "blocks of all heads": {"block_index": shared, "block_size": block_size},
        "blocks of a head": blocked,
        "window, sinks": {**times, "window": (0.5, 0.1), "num_sinks": 3},
        "blocks, sinks": {**blocked, "num_sinks": 1},
    }
    return {**alone, "all": {**blocked, **times, "key_bias": hidden, "window": (4, 2), "num_sinks": 4, "scale": 0.3}}


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", features())
def test_every_feature(name, dtype):
    options = features()[name]
    check(*qkv(dtype=dtype), options, name)


@pytest.mark.parametrize("name", features())
def test_reference_in_float64(name):
    q, k, v = qkv(2, dtype=F64)
    options = features(2)[name]
    if options.get("key_bias") is not None:
        options["key_bias"] = options["key_bias"].double()
    exact = results_and_gradients(by_sdpa, q, k, v, options)
    got = results_and_gradients(op_of("reference"), q, k, v, options)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bias_may_have_another_dtype(dtype):
    q, k, v = qkv(dtype=dtype)
    check(q, k, v, {"key_bias": torch.randn(4, 90).half()}, "bias of float16")
    # Of one draw the reference's error is a matter of luck, of a dozen it is not.
    found = {}
    for _ in range(12):
        q, k, v = qkv(dtype=dtype)
        options = {"key_bias": torch.randn(4, 90, dtype=F64)}
        (out, _), grads = results_and_gradients(by_sdpa, q, k, v, options, F64)
        (rough, _), rough_grads = results_and_gradients(op_of("reference"), q, k, v, options)
        for backend in backends_for(q, k, v, options):
            (got, _), got_grads = results_and_gradients(op_of(backend), q, k, v, options)
            testing.assert_within_budget(got, rough, out, backend)
            assert got_grads["key_bias"].dtype == F64
            # A sum in float32, whatever it is returned as.
            narrow = (g["key_bias"].float() for g in (got_grads, rough_grads))
            found.setdefault(backend, []).append((*narrow, grads["key_bias"]))
    for backend, draws in found.items():
        triple = map(torch.stack, zip(*draws, strict=True))
        testing.assert_within_budget(*triple, f"gradient of a float64 bias on {backend}")


@settings(deadline=None, max_examples=15)
@given(
    queries=st.integers(8, 60),
    keys=st.integers(8, 110),
    heads=st.integers(1, 3),
    size=st.integers(16, 256),
    value_size=st.none() | st.integers(16, 256),
    window=st.none() | st.tuples(st.floats(0, 30) | st.just(INF), st.floats(0, 30) | st.just(INF)),
    num_sinks=st.integers(0, 6),
    block_size=st.none() | st.tuples(st.integers(1, 80), st.integers(1, 80)),
    topk=st.integers(1, 4),
    biased=st.sampled_from(["", "batch", "head"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_sizes(queries, keys, heads, size, value_size, window, num_sinks, block_size, topk, biased, dtype):
    q, k, v = qkv(2, queries, keys, heads, size, value_size or size, dtype)
    options = {"num_sinks": num_sinks}
    if window is not None:
        options |= {"window": window, "q_time": torch.arange(queries), "k_time": torch.arange(keys) * 0.5}
    if block_size is not None:
        rows, blocks = -(-queries // block_size[0]), -(-keys // block_size[1])
        options |= {"block_index": torch.randint(-1, blocks, (2, heads, rows, topk)), "block_size": block_size}
    if biased:
        options["key_bias"] = torch.randn(2, keys) if biased == "batch" else torch.randn(2, heads, keys)
    # Where each query sees one key, gradients of scores are 0 but for rounding: no budget to derive from.
    assume((visible(q, k, options).sum(-1) >= 4).float().mean() > 0.2)
    check(q, k, v, options, f"{options}", derived=False)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_scores_of_ten_thousand(sign, dtype):
    """Scores are integers, so that every order of sums gives the same; near the largest one they differ by a few."""
    q, k, v = qkv(dtype=dtype)
    q, k = torch.randint(-1, 2, q.shape).to(dtype), torch.randint(-1, 2, k.shape).to(dtype)
    q[..., 0], k[..., 0] = 100, sign * 100
    _, grads = check(q, k, v, {"scale": 1.0}, "in q and k")
    assert grads["q"].abs().max() > 0.1
    q, k = q[..., 1:], k[..., 1:]
    (_, lse), _ = check(q, k, v, {"key_bias": torch.full((4, 90), sign * 1e4), "scale": 1.0}, "bias")
    assert (lse.abs() > 9e3).all()
    far = torch.cat([torch.full((4, 40), 1e4), torch.full((4, 50), -1e4)], 1)
    check(q, k, v, {"key_bias": far, "scale": 1.0}, "some far below")


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("biased", [True, False])
def test_a_long_memory(queries, biased):
    """Sums over thousands of keys round no worse than the reference's, with few queries too."""
    q, k, v = qkv(1, queries, 4000, 2, 32, 32)
    check(q, k, v, {"key_bias": torch.randn(1, 4000)} if biased else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["bias", "window", "blocks", "all rows"])
def test_rows_that_see_nothing(how, dtype):
    """0, lse -inf and gradients of exactly 0; the other rows as ever."""
    batch = 12  # of a batch of 4 the largest error of the reference is a matter of luck
    q, k, v = qkv(batch, dtype=dtype)
    if how == "window":
        q_time = torch.arange(50.0)
        q_time[20:30] = 1e6
        options = {"q_time": q_time, "k_time": torch.arange(90.0), "window": (9, 9)}
    elif how == "blocks":
        index = torch.randint(0, 8, (batch, 3, 4, 4))
        index[:, :, 1] = -1
        options = {"block_index": index, "block_size": (16, 12)}
    else:
        bias = torch.randn(batch, 3, 90)
        bias[(1,) if how == "bias" else ()] = -INF
        options = {"key_bias": bias}
    for backend in backends_for(q, k, v, options):
        (out, lse), grads = results_and_gradients(op_of(backend), q, k, v, options)
        nothing = lse == -INF
        assert nothing.any() and nothing.all() == (how == "all rows")
        assert (out.transpose(1, 2)[nothing] == 0).all()
        assert (grads["q"].transpose(1, 2)[nothing] == 0).all()
        assert all(torch.isfinite(g).all() for g in grads.values())
    if how != "all rows":
        check(q, k, v, options, how)


def test_only_lse_or_only_out_has_a_gradient():
    """The gradient of logsumexp alone, and of out alone, by each backend."""
    q, k, v = (t.requires_grad_() for t in qkv())
    exact = [t.detach().to(F64).requires_grad_() for t in (q, k, v)]
    weights = testing.Make(seed=3).randn(4, 50, 3, 16), testing.Make(seed=3).randn(4, 3, 50)
    for i, weight in enumerate(weights):
        true = torch.autograd.grad((by_sdpa(*exact, {})[i] * weight).sum(), exact, allow_unused=True)
        at_dtype = torch.autograd.grad((op_of("reference")(q, k, v, {})[i] * weight).sum(), (q, k, v))
        for backend in backends_for(q, k, v, {}):
            got = torch.autograd.grad((op_of(backend)(q, k, v, {})[i] * weight).sum(), (q, k, v))
            used = 2 if i == 1 else 3  # lse does not depend on v
            testing.assert_within_budget(got[:used], at_dtype[:used], true[:used], backend)
            assert used == 3 or (got[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_sources_against_sdpa_over_all(dtype):
    """Three sources, one of them hidden from some queries: attention over all keys, in results and gradients."""
    q, k, v = qkv(dtype=dtype)
    cuts = [0, 30, 55, 90]
    near = {"q_time": torch.arange(50.0), "k_time": torch.zeros(25), "window": (20, 0)}
    seen = torch.ones(50, 90, dtype=torch.bool)
    seen[21:, 30:55] = False

    def merged(q, k, v, _):
        parts = []
        for i, (a, b) in enumerate(zip(cuts, cuts[1:], strict=False)):
            some = near if i == 1 else {}
            parts.append(cross_attention(q, k[:, a:b], v[:, a:b], **some, return_lse=True, backend=backend))
        return merge_attention_states(*zip(*parts, strict=True), backend=merge_backend)

    def exact_of(q, k, v, _):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = torch.zeros(50, 90, dtype=F64).masked_fill(~seen, -INF)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        return out.transpose(1, 2), torch.logsumexp(q @ k.mT * q.shape[3] ** -0.5 + mask, -1)

    exact, exact_grads = results_and_gradients(exact_of, q, k, v, {}, F64)
    backend = merge_backend = "reference"
    rough, rough_grads = results_and_gradients(merged, q, k, v, {})
    for backend in backends():
        if backend == "library":
            continue
        for merge_backend in backends("merge_attention_states"):
            got, grads = results_and_gradients(merged, q, k, v, {})
            testing.assert_within_budget(got, rough, exact, f"{backend}, {merge_backend}")
            for name in grads:
                testing.assert_within_budget(grads[name], rough_grads[name], exact_grads[name], f"{name}, {backend}")


def assert_deterministic(function, *leaves, runs=10):
    """Results and gradients are the same bits each time, on the CPU whatever torch's flag."""
    for flag in ("off", "on"):
        with testing.determinism(flag):
            assert_same_bits(function, *leaves, runs=runs)


def assert_same_bits(function, *leaves, runs):
    first = None
    for _ in range(runs):
        results = function(*leaves)
        make = testing.Make(seed=5)
        loss = sum((t * make.randn(*t.shape, dtype=t.dtype)).sum() for t in results)
        tensors = [*results, *torch.autograd.grad(loss, leaves)]
        first = first or tensors
        assert all(map(torch.equal, tensors, first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "all"])
def test_cross_attention_is_deterministic(name, dtype):
    q, k, v = (t.requires_grad_() for t in qkv(2, 120, 300, size=32, value_size=32, dtype=dtype))
    options = features(2, 120, 300)[name]
    if name == "all":
        options["num_sinks"] = 16  # no row of -inf, whose product with a weight is NaN
        options["key_bias"][:, :, :16] = 0.5
    for backend in backends_for(q, k, v, options):
        assert_deterministic(lambda *t, b=backend: op_of(b)(*t, options), q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 48])
def test_linear_attention_is_deterministic(block_size, dtype):
    leaves = [t.requires_grad_() for t in qkv(2, 300, 300, size=32, value_size=32, dtype=dtype)]

    def call(*qkv, backend):
        options = {"causal": True, "block_size": block_size, "return_state": True, "backend": backend}
        out, state = linear_attention(*qkv, feature_map="elu1", **options)
        return out, *state

    for backend in backends("linear_attention"):
        assert_deterministic(lambda *t, b=backend: call(*t, backend=b), *leaves)


def test_merge_attention_states_is_deterministic():
    outs = [torch.randn(2, 70, 3, 16, requires_grad=True) for _ in range(4)]
    lses = [torch.randn(2, 3, 70, requires_grad=True) for _ in range(4)]
    for backend in backends("merge_attention_states"):
        assert_deterministic(lambda *t, b=backend: merge_attention_states(t[:4], t[4:], backend=b), *outs, *lses)
