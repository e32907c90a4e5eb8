"""The CPU kernels of linear attention: every instruction set, sizes and strides, splits, special values, threads."""

import pytest
import torch
from backend_helpers import compiled

from vidmem_kernels import LinearAttentionState, linear_attention
from vidmem_kernels.linear_attn import reference
from vidmem_kernels.testing import Make, assert_within_budget, to_float64

pytestmark = compiled
NAN, INF = float("nan"), float("inf")
cpp = torch.ops.vidmem_cpp


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(make, length, heads=2, size=17, value_size=9, batch=1, with_state=False):
    """(q, k, v, S, z)"""
    shape = (batch, length, heads, size)
    state = (None, None)
    if with_state:
        sizes = (batch, heads, size)
        state = make.randn(*sizes, value_size, dtype=torch.float32), make.rand(*sizes, dtype=torch.float32)
    return make.randn(*shape), make.randn(*shape), make.randn(*shape[:3], value_size), *state


def gradients_of(make, q, k, v):
    batch, _, heads, size = q.shape
    sizes = (batch, heads, size)
    grad_S = make.randn(*sizes, v.shape[3], dtype=torch.float32)
    return make.randn(*v.shape), grad_S, make.randn(*sizes, dtype=torch.float32)


def check(name, args, what):
    run = getattr(reference, name)
    assert_within_budget(getattr(cpp, name)(*args), run(*args), run(*to_float64(args)), f"{name}: {what}")


CASES = {
    # length, heads, size, value size, causal, block
    "all": (2100, 1, 20, 33, False, 1),
    "tokens": (2100, 2, 17, 9, True, 1),
    "small blocks": (333, 3, 64, 80, True, 7),
    "blocks of a chunk": (200, 1, 33, 64, True, 33),
    "frames": (700, 2, 16, 5, True, 150),
    "long frames": (2600, 1, 5, 16, True, 2300),
    "one channel": (130, 1, 1, 1, True, 3),
    "many channels": (150, 1, 256, 100, True, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_reference(case, dtype, capability, threads):
    threads(1)  # the reference's many small products gain nothing from more
    length, heads, size, value_size, causal, block = CASES[case]
    make = Make(dtype, seed=3)
    for feature_map in ("relu", "elu1", "identity"):
        options = (feature_map, causal, block, feature_map != "identity")
        args = inputs(make, length, heads, size, value_size, with_state=True)
        check("linear_attention", (*args, *options), f"{case}, {feature_map}")
        if feature_map == "elu1" or size != 1:  # one channel cancels out of its own gradient
            grads = gradients_of(make, *args[:3])
            check("linear_attention_backward", (*grads, *args, *options), f"{case}, {feature_map}")


@pytest.mark.parametrize("causal, block", [(False, 1), (True, 3), (True, 40)])
def test_strides_do_not_matter(causal, block, capability):
    make = Make(seed=4)
    args = inputs(make, 90, with_state=True)
    options = ("relu", causal, block, True)
    grads = gradients_of(make, *args[:3])
    strided, strided_grads = map(make.strided, args), map(make.strided, grads)
    strided = tuple(strided)
    for got, expected in zip(
        (*cpp.linear_attention(*strided, *options), *cpp.linear_attention_backward(*strided_grads, *strided, *options)),
        (*cpp.linear_attention(*args, *options), *cpp.linear_attention_backward(*grads, *args, *options)),
        strict=True,
    ):
        assert torch.equal(got, expected) and got.is_contiguous()


@pytest.mark.parametrize("block", [1, 6, 100, 1500])
def test_a_split_at_a_block_equals_one_call(block):
    length = max(4 * block, 300)
    q, k, v, _, _ = inputs(Make(seed=5), length)
    q, k = q.abs() + 0.1, k.abs() + 0.1  # well conditioned, so that tolerances mean something
    whole, end = linear_attention(q, k, v, causal=True, block_size=block, return_state=True, backend="cpu")
    cut = length // 2 // block * block
    parts, state = [], None
    for span in (slice(0, cut), slice(cut, None)):
        out, state = linear_attention(
            q[:, span], k[:, span], v[:, span], causal=True, block_size=block, state=state, return_state=True,
            backend="cpu",
        )  # fmt: skip
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("causal, block", [(False, 1), (True, 1), (True, 300), (True, 2500)])
def test_results_do_not_depend_on_threads(causal, block, threads):
    """One sequence is shared among threads, of many each takes some: sums are the same."""
    make = Make(seed=6)
    for heads in (1, 3):
        args = inputs(make, 5000, heads, 8, 8, with_state=True)
        grads = gradients_of(make, *args[:3])
        options = ("elu1", causal, block, True)
        results = []
        for count in (1, 2, 3, 7):
            threads(count)
            backward = cpp.linear_attention_backward(*grads, *args, *options)
            results.append((*cpp.linear_attention(*args, *options), *backward))
        for other in results[1:]:
            assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize("field", [0, 1, 2])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("causal, block", [(False, 1), (True, 1), (True, 50)])
@pytest.mark.parametrize("feature_map", ["relu", "elu1", "identity"])
def test_special_values(field, value, causal, block, feature_map, capability):
    """A token leaves those that do not see it alone; all others are finite exactly where the reference is.

    Whether infinity or NaN comes of 0 * infinity depends on what is multiplied first.
    """
    clean = inputs(Make(seed=7), 200, 1, 16, 8)
    args = [t if t is None else t.clone() for t in clean]
    at, options = 100, (feature_map, causal, block, True)
    args[field][0, at, 0, 3] = value
    out, S, z = cpp.linear_attention(*args, *options)
    expected, expected_S, expected_z = reference.linear_attention(*args, *options)
    seen_from = (at // block * block if field else at) if causal else 0
    untouched = cpp.linear_attention(*clean, *options)[0]
    assert torch.equal(out[:, :seen_from], untouched[:, :seen_from])
    for got, wanted in ((out[:, seen_from:], expected[:, seen_from:]), (S, expected_S), (z, expected_z)):
        finite = wanted.isfinite()
        assert torch.equal(got.isfinite(), finite)
        if value != value:
            assert got[~finite].isnan().all()


@pytest.mark.parametrize("block", [1, 50])
@pytest.mark.parametrize("field", ["grad_out", "q", "k", "v"])
def test_gradients_of_special_values(field, block, capability):
    """NaN reaches exactly the gradients of the tokens that it has part in."""
    make = Make(seed=8)
    q, k, v, S, z = inputs(make, 200, 1, 16, 8)
    tensors = dict(zip(("grad_out", "grad_S", "grad_z"), gradients_of(make, q, k, v), strict=True))
    tensors |= {"q": q, "k": k, "v": v}
    options = (S, z, "identity", True, block, True)
    clean = cpp.linear_attention_backward(*tensors.values(), *options)
    at = 100
    tensors[field][0, at, 0] = NAN
    grad_q, grad_k, grad_v, _, _ = cpp.linear_attention_backward(*tensors.values(), *options)
    start, end = at // block * block, (at // block + 1) * block
    is_query = field in ("grad_out", "q")
    # A query's NaN reaches its own gradient and the keys up to its block; a key's the queries from its block on and,
    # through them, all keys.
    queries = slice(at, at + 1) if is_query else slice(start, None)
    touched = torch.zeros(200, dtype=torch.bool)
    touched[queries] = True
    assert grad_q[0, touched].isnan().all()
    assert torch.equal(grad_q[0, ~touched], clean[0][0, ~touched])
    keys_end = end if is_query else 200
    assert grad_k[0, :keys_end].isnan().all()
    assert torch.equal(grad_k[:, keys_end:], clean[1][:, keys_end:])
    assert torch.equal(grad_v[:, keys_end:], clean[2][:, keys_end:])
    if field != "v":
        assert grad_v[0, :keys_end].isnan().all()


def test_exp_is_exact_to_a_rounding(capability):
    """elu1 of the keys is the state z of a single token."""
    values = torch.cat([-torch.logspace(-8, 2.05, 4000), torch.tensor([0.0, -87.4, -103.9, -104.5, -INF])])
    k = values.view(1, 1, 1, -1)
    z = cpp.linear_attention(k, k, torch.ones(1, 1, 1, 1), None, None, "elu1", False, 1, False)[2].flatten().double()
    exact = values.double().exp()
    assert ((z - exact).abs() <= torch.maximum(exact * 2**-23, torch.tensor(2.0**-149).double())).all()


def test_empty():
    for batch, length in ((0, 5), (2, 0)):
        args = inputs(Make(seed=9), length, batch=batch, with_state=True)
        out, S, z = cpp.linear_attention(*args, "relu", True, 2, True)
        assert out.shape == args[2].shape
        assert torch.equal(S, args[3]) and torch.equal(z, args[4])
        grads = gradients_of(Make(seed=9), *args[:3])
        results = cpp.linear_attention_backward(*grads, *args, "relu", True, 2, True)
        assert [r.shape for r in results] == [t.shape for t in args]
        assert torch.equal(results[3], grads[1]) and torch.equal(results[4], grads[2])


def test_direct_calls_are_checked():
    make = Make(seed=10)
    q, k, v, S, z = inputs(make, 5, with_state=True)
    options = ("relu", True, 1, True)
    wrong = [
        ((q[0], k, v, S, z, *options), "q must have 4 dimensions"),
        ((q, k[:, :4], v, S, z, *options), "k must have shape (1, 5, 2, 17), got (1, 4, 2, 17)"),
        ((q, k[..., :3], v, S, z, *options), "k must have shape (1, 5, 2, 17), got (1, 5, 2, 3)"),
        ((q, k, v.half(), S, z, *options), "v must be float32, got float16"),
        ((q.double(), k.double(), v.double(), S, z, *options), "q must be float32, bfloat16 or float16"),
        ((q, k, v, S, None, *options), "S and z must be given together"),
        ((q, k, v, S.double(), z, *options), "S must be float32"),
        ((q, k, v, S[..., :3], z, *options), "S must have shape (1, 2, 17, 9), got (1, 2, 17, 3)"),
        ((q, k, v, S, z[:, :1], *options), "z must have shape (1, 2, 17), got (1, 1, 17)"),
        ((q, k, v, S, z, "elu", True, 1, True), "feature_map must be one of relu, elu1, identity, got 'elu'"),
        ((q, k, v, S, z, "relu", True, 0, True), "block_size must be at least 1, got 0"),
    ]
    grads = gradients_of(make, q, k, v)
    for args, message in wrong:
        for call in (cpp.linear_attention, lambda *a: cpp.linear_attention_backward(*grads, *a)):
            with pytest.raises((RuntimeError, ValueError)) as error:
                call(*args)
            assert message in str(error.value)
    for place, name in enumerate(("grad_out", "grad_S", "grad_z")):
        bad = list(grads)
        bad[place] = bad[place][:, :1]
        with pytest.raises((RuntimeError, ValueError), match=name):
            cpp.linear_attention_backward(*bad, q, k, v, S, z, *options)


def test_float64_runs_the_reference():
    q, k, v, _, _ = (t if t is None else t.double() for t in inputs(Make(seed=11), 5))
    state = LinearAttentionState(torch.zeros(1, 2, 17, 9).double(), torch.zeros(1, 2, 17).double())
    with pytest.raises(RuntimeError, match="float64 is only run by the reference, for checks"):
        linear_attention(q, k, v, state=state, backend="cpu")
    expected = linear_attention(q, k, v, backend="reference")
    assert torch.equal(linear_attention(q, k, v, state=state), expected)
