"""What kernels are held to in half precision: the compositions compute the op, round factors only, and once."""

import random

import pytest
import torch
from torch.utils import _pytree as pytree

from vidmem_kernels import testing
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import HALF, Make, float_leaves, gradients, samples, to_float64, with_grad, yardstick

COMPOSED = [
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_mixed",
    "linear_attention",
    "linear_attention_backward",
]
NAN, INF = float("nan"), float("inf")
some_half = torch.zeros(1, dtype=torch.bfloat16)


def composition(name):
    return yardstick(name, (some_half,))


def test_those_with_a_matrix_product_have_one():
    assert sorted(name for name in OPS if composition(name) is not OPS[name].reference) == COMPOSED
    for name in OPS:
        assert yardstick(name, (torch.zeros(1), None, [torch.zeros(1)])) is OPS[name].reference
        assert yardstick(name, ([some_half.half()],)) is composition(name)


# --- the compositions compute the op ---


def same_in_float64(name, args):
    args, reference_args = with_grad(to_float64(args)), with_grad(to_float64(args))
    got, expected = composition(name)(*args), OPS[name].reference(*reference_args)
    compared = list(zip(got, expected, strict=True))
    if not name.endswith("_backward"):
        grads = gradients(args, got), gradients(reference_args, expected)
        compared += zip(*grads, strict=True)
    for a, b in compared:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-9, check_layout=False)


@pytest.mark.parametrize("dtype", [torch.float64, *HALF], ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_samples_in_float64(name, dtype):
    for sample in samples(name, Make(dtype)):
        same_in_float64(name, sample.args)


def drawn_attention(rng, make):
    """Arguments of cross_attention of any sizes and options."""
    batch, queries, keys, heads = rng.randint(1, 3), rng.randint(0, 40), rng.randint(0, 50), rng.randint(1, 3)
    size, value_size = rng.randint(1, 20), rng.randint(1, 20)
    bias = times = window = index = None
    block = rng.randint(1, 12), rng.randint(1, 12)
    if rng.random() < 0.5:
        bias = make.randn(batch, *[heads] * rng.randint(0, 1), keys)
    if rng.random() < 0.5:
        times = make.randint(0, 9, (queries,)), make.randint(0, 9, (batch, keys))
        window = [rng.choice([0.0, 2.5, INF]), rng.choice([0.0, 1.0, INF])]
    if rng.random() < 0.5:
        blocks = -(-keys // block[1])
        index = make.randint(-1, max(1, blocks), (batch, rng.choice([1, heads]), -(-queries // block[0]), 3))
        index = index.clamp(max=blocks - 1)
    q, k = make.randn(batch, queries, heads, size), make.randn(batch, keys, heads, size)
    options = rng.randint(0, 3), *(times or (None, None)), window, index, block, rng.choice([0.2, 1.0])
    return q, k, make.randn(batch, keys, heads, value_size), bias, *options


def drawn_linear(rng, make):
    """Arguments of linear_attention; of more tokens than a chunk has, in blocks smaller and larger than it."""
    batch, length, heads = rng.randint(1, 2), rng.choice([0, 1, 9, 130, 300]), rng.randint(1, 2)
    size, value_size = rng.randint(2, 9), rng.randint(1, 9)
    q, k = (make.randn(batch, length, heads, size).abs() + 0.1 for _ in range(2))
    state = None, None
    if rng.random() < 0.5:
        wide = torch.float64 if make.dtype == torch.float64 else torch.float32
        state = make.rand(batch, heads, size, value_size, dtype=wide), make.rand(batch, heads, size, dtype=wide)
    feature_map, causal = rng.choice(["relu", "elu1", "identity"]), rng.random() < 0.7
    options = feature_map, causal, rng.choice([1, 3, 50, 127, 128, 129, 200]), rng.random() < 0.7
    return q, k, make.randn(batch, length, heads, value_size), *state, *options


def backward_of(name, args, make):
    """The arguments of the op's gradient."""
    results = OPS[name].reference(*args)
    grads = [make.randn(*t.shape, dtype=t.dtype) for t in results]
    if name == "linear_attention":
        return *grads, *args
    return *grads, *args[:4], *results, *args[4:]


@pytest.mark.parametrize("seed", range(40))
def test_drawn_in_float64(seed):
    rng, make = random.Random(seed), Make(torch.float64, seed=seed)
    for name, draw in (("cross_attention", drawn_attention), ("linear_attention", drawn_linear)):
        args = draw(rng, make)
        same_in_float64(name, args)
        same_in_float64(f"{name}_backward", backward_of(name, args, make))


# --- they round factors, and once ---


def errors(got, exact):
    """Largest error of each result, in units of its largest number."""
    found = []
    for a, e in zip(float_leaves(got), float_leaves(exact), strict=True):
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite)
        if finite.any() and e[finite].abs().max() > 1e-6:
            found.append(((a.double() - e)[finite].abs().max() / e[finite].abs().max()).item())
    return found


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", sorted(OPS))
def test_finite_on_all_samples(name, dtype):
    """Results and gradients, wherever those of the reference in float64 are."""
    for sample in samples(name, Make(dtype)):
        args, wide = with_grad(sample.args), with_grad(to_float64(sample.args))
        got, exact = pytree.tree_leaves(composition(name)(*args)), pytree.tree_leaves(OPS[name].reference(*wide))
        assert [(t.shape, t.dtype == dtype) for t in got if t.is_floating_point()] == [
            (t.shape, t.dtype == dtype) for t in pytree.tree_leaves(OPS[name].reference(*sample.args))
            if t.is_floating_point()
        ]  # fmt: skip
        errors(got, exact)
        if OPS[name].backward is not None:
            errors(gradients(args, got), gradients(wide, exact, like=got))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", COMPOSED)
def test_errors_are_of_a_few_roundings(name, dtype):
    """More than the reference's, which rounds results only, and no more than some roundings of factors make, where
    the terms of a normalised gradient cancel too."""
    eps, more = torch.finfo(dtype).eps, 0
    for sample in samples(name, Make(dtype)):
        if sample.label == "one channel" and name.startswith("linear"):
            continue  # its gradient is 0 but for rounding
        exact = OPS[name].reference(*to_float64(sample.args))
        got, rough = (errors(f(*sample.args), exact) for f in (composition(name), OPS[name].reference))
        assert max(got, default=0) < 8 * eps, sample.label
        more += sum(a > b for a, b in zip(got, rough, strict=True))
    assert more > 5


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_sum_is_rounded(dtype):
    """lse, and the state where factors are exact, are as exact as the reference's: a rounded one is over the budget."""
    cases = [
        ("cross_attention", 1, "plain"),
        ("linear_attention", 1, "relu"),
        ("linear_attention", 2, "relu"),
        ("linear_attention", 1, "identity, causal, state"),
        ("cross_attention_backward", 3, "key_bias a head, infinite"),
    ]
    for name, i, label in cases:
        args = next(s.args for s in samples(name, Make(dtype)) if s.label == label)
        results, exact = composition(name)(*args)[i], OPS[name].reference(*to_float64(args))[i]
        testing.assert_within_budget(OPS[name].reference(*args)[i], results, exact)
        with pytest.raises(AssertionError, match="over the budget"):
            testing.assert_within_budget(results.to(dtype).to(results.dtype), results, exact)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_kernel_may_round_its_own_factors_once(dtype):
    """Attention as FlashAttention computes it: weights are rounded before they are divided by their sum."""
    for sample in samples("cross_attention", Make(dtype)):
        if sample.label not in ("plain", "long", "other Dv, one query", "strided, plain"):
            continue
        q, k, v, *_, scale = sample.args
        scores = (q.transpose(1, 2).float() @ k.transpose(1, 2).float().mT) * scale
        weight = (scores - scores.amax(3, keepdim=True)).exp()
        out = weight.to(dtype).float() @ v.transpose(1, 2).float() / weight.sum(3, keepdim=True)
        got = out.transpose(1, 2).to(dtype), scores.logsumexp(3)
        exact = OPS["cross_attention"].reference(*to_float64(sample.args))
        testing.assert_within_budget(got, composition("cross_attention")(*sample.args), exact, sample.label)


# --- their parts ---


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rounded_is_the_cast(dtype):
    limits = torch.finfo(dtype)
    x = torch.cat([torch.randn(2000), torch.randn(2000) * 1e3, torch.tensor([0.0, -0.0, INF, -INF, 1.0])])
    ties = torch.ones(50) + torch.arange(50) * limits.eps / 2  # to even
    for values in (x, -ties, ties * limits.smallest_normal):
        assert torch.equal(testing._rounded(values, dtype), values.to(dtype).float())
        assert torch.equal(testing._rounded(values, dtype).signbit(), values.signbit())
    assert testing._rounded(torch.tensor(NAN), dtype).isnan()
    # Not beyond its range: as scaled, neither infinite nor 0.
    for far in (1e30, 1e-30):
        got = testing._rounded(x[:4000] * far, dtype)
        assert (got - x[:4000] * far).abs().max() <= limits.eps * (x[:4000] * far).abs().max()
        assert got.isfinite().all() and (got != 0).all()
    assert testing._rounded(x, torch.float32) is x


def test_product_sums_in_float32():
    make = Make(torch.bfloat16)
    a, b = make.randn(2, 5, 700, dtype=torch.float32), make.randn(2, 700, 3, dtype=torch.float32)
    narrow = [t.to(torch.bfloat16).double() for t in (a, b)]
    a.requires_grad_(), b.requires_grad_()
    got = testing.product(a, b, torch.bfloat16)
    torch.testing.assert_close(got.double(), narrow[0] @ narrow[1], rtol=1e-5, atol=1e-5)
    grad = make.randn(2, 5, 3, dtype=torch.float32)
    grads = torch.autograd.grad(got, (a, b), grad)
    grad = grad.to(torch.bfloat16).double()
    for g, exact in zip(grads, (grad @ narrow[1].mT, narrow[0].mT @ grad), strict=True):
        assert torch.equal(g, g.to(torch.bfloat16).float())
        torch.testing.assert_close(g.double(), exact, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("value", [INF, NAN])
def test_a_yardstick_without_a_number_sets_no_budget(value):
    exact = torch.ones(3, dtype=torch.float64)
    at_dtype = torch.ones(3)
    at_dtype[1] = value
    with pytest.raises(AssertionError, match="the yardstick is not finite"):
        testing.assert_within_budget(torch.ones(3), at_dtype, exact)


def test_the_projection_is_the_same_at_every_dtype():
    narrow = torch.randn(50).to(torch.bfloat16).requires_grad_()
    wide = narrow.detach().double().requires_grad_()
    (got,), (exact,) = gradients((narrow,), narrow * 2), gradients((wide,), wide * 2, like=narrow * 2)
    assert torch.equal(got.double(), exact)
