"""`scale` of linear attention: against the plain composition, in every backend, dtype and transform."""

import inspect
import math
import random

import pytest
import torch

from vidmem_kernels import LinearAttention, LinearAttentionState, _dispatch, linear_attention, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.linear_attn import reference

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
MAPS = {"relu": torch.relu, "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "identity": lambda x: x}
SCALES = (1.0, 0.3, -0.7, 0.0, 1e-6, -3e4, 8**-0.5)


def composition(q, k, v, S, z, feature_map, causal, block_size, normalize, scale):
    """Of features with a factor; all scores at once."""
    phi = MAPS[feature_map]
    block = torch.arange(q.shape[1]) // block_size
    see = (block[:, None] >= block).to(q.dtype) if causal else q.new_ones(q.shape[1], q.shape[1])
    queries, keys = scale * phi(q), phi(k)
    weight = torch.einsum("blhd,bmhd->bhlm", queries, keys) * see
    out = torch.einsum("bhlm,bmhd->blhd", weight, v)
    total = weight.sum(3).mT.unsqueeze(3)
    if S is not None:
        out = out + torch.einsum("blhd,bhde->blhe", queries, S)
        total = total + torch.einsum("blhd,bhd->blh", queries, z).unsqueeze(3)
    last_S, last_z = torch.einsum("blhd,blhe->bhde", keys, v), keys.sum(1)
    if S is not None:
        last_S, last_z = last_S + S, last_z + z
    return out / (total + 1e-10) if normalize else out, last_S, last_z


def draw(seed, dtype):
    """(tensors, options) of a small call. Signed features are not normalised: near a denominator of 0 nothing holds."""
    rng, make = random.Random(seed), testing.Make(dtype, seed=seed)
    feature_map = rng.choice(list(MAPS))
    batch, length, heads = rng.choice((1, 2)), rng.choice((1, 3, 17, 70)), rng.choice((1, 3))
    size, value_size = rng.choice((2, 5, 16)), rng.choice((1, 4, 17))
    tokens, wide = (batch, length, heads), F64 if dtype == F64 else F32
    q, k, v = make.randn(*tokens, size), make.randn(*tokens, size), make.randn(*tokens, value_size)
    if feature_map == "relu":
        q, k = q.abs() + 0.125, k.abs() + 0.125
    S = z = None
    if rng.random() < 0.5:
        S = make.randn(batch, heads, size, value_size, dtype=wide)
        z = make.rand(batch, heads, size, dtype=wide)
    normalize = feature_map != "identity" and rng.random() < 0.6
    options = feature_map, rng.random() < 0.6, rng.choice((1, 2, 5, 40, 100)), normalize, rng.choice(SCALES)
    return (q, k, v, S, z), options


@pytest.mark.sample(12)
@pytest.mark.parametrize("seed", range(40))
def test_composition_and_its_gradients(seed):
    args, options = draw(seed, F64)
    args = [t if t is None else t.requires_grad_() for t in args]
    leaves = [t for t in args if t is not None]
    got = reference.linear_attention(*args, *options)
    expected = composition(*args, *options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    weights = [torch.randn_like(t) for t in got]
    grads = [
        torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, x, strict=True)), leaves, allow_unused=True)
        for x in (torch.ops.vidmem.linear_attention(*args, *options), expected)
    ]
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-8)


@pytest.mark.sample(28)
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("seed", range(100, 114))
def test_backends(seed, backend, dtype):
    args, options = draw(seed, dtype)
    op = OPS["linear_attention"]
    if reason := _dispatch.refusal(op, backend, args[0].device, (*args, *options)):
        pytest.skip(f"{backend}: {reason}")
    make = testing.Make(dtype, seed=seed)
    q, v, wide = args[0], args[2], F32
    grads = (
        make.randn(*v.shape),
        make.randn(q.shape[0], *q.shape[2:], v.shape[3], dtype=wide),
        make.randn(q.shape[0], *q.shape[2:], dtype=wide),
    )
    for name, given in (("linear_attention", args), ("linear_attention_backward", (*grads, *args))):
        op = OPS[name]
        with testing.poisoned_memory():
            got = testing.run(op, (*given, *options), backend)
        yardstick = testing.yardstick(name, given) if backend == "triton" else op.reference
        exact = op.reference(*testing.to_float64(given), *options)
        testing.assert_within_budget(got, yardstick(*given, *options), exact, f"{name} {options}")


@pytest.mark.parametrize("normalize", [True, False])
def test_finite_differences(normalize):
    q, k, v = (torch.rand(1, 5, 2, n, dtype=F64, requires_grad=True) for n in (3, 3, 2))
    S, z = (torch.rand(s, dtype=F64, requires_grad=True) for s in ((1, 2, 3, 2), (1, 2, 3)))

    def call(q, k, v, S, z):
        out, state = linear_attention(
            q, k, v, feature_map="elu1", causal=True, block_size=2, normalize=normalize, state=(S, z),
            return_state=True, scale=-0.4,
        )  # fmt: skip
        return out, *state

    assert torch.autograd.gradcheck(call, (q, k, v, S, z))


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
@pytest.mark.parametrize("seed", range(200, 206))
def test_one_and_none_change_nothing(seed, dtype):
    (q, k, v, S, z), (feature_map, causal, block, normalize, _) = draw(seed, dtype)
    state = None if S is None else LinearAttentionState(S, z)
    options = {"feature_map": feature_map, "causal": causal, "block_size": block, "normalize": normalize}
    results = [
        linear_attention(q, k, v, state=state, return_state=True, **options, **scale)
        for scale in ({}, {"scale": None}, {"scale": 1.0}, {"scale": 1})
    ]
    for out, state in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(map(torch.equal, state, results[0][1]))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_queries_are_not_rounded(dtype):
    """Signed features all but cancel: what rounding q * scale leaves is far from the result, `scale` is not."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, 400, 2, 32).to(dtype) for _ in range(3))
    scale = 32**-0.5
    options = {"feature_map": "identity", "causal": True, "normalize": True}
    exact = linear_attention(*(t.double() for t in (q, k, v)), scale=scale, **options)

    def error(out):
        return ((out.double() - exact).norm() / exact.norm()).item()

    assert error(linear_attention(q, k, v, scale=scale, **options)) < 2 * torch.finfo(dtype).eps
    assert error(linear_attention(q * scale, k, v, **options)) > 20 * torch.finfo(dtype).eps


def test_scale_leaves_the_state_alone():
    q, k, v = (torch.randn(1, 30, 2, 4) for _ in range(3))
    states = [linear_attention(q, k, v, normalize=False, causal=True, return_state=True, scale=s)[1] for s in (None, 7)]
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_zero(causal, normalize):
    q, k, v = (torch.randn(1, 30, 2, 4, requires_grad=True) for _ in range(3))
    out = linear_attention(q, k, v, causal=causal, normalize=normalize, scale=0)
    assert torch.equal(out, torch.zeros_like(out))
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert torch.equal(grad, torch.zeros_like(grad))


BAD = [
    (math.nan, ValueError, "scale must be finite, got nan"),
    (math.inf, ValueError, "scale must be finite, got inf"),
    (-math.inf, ValueError, "scale must be finite, got -inf"),
    (True, TypeError, "scale must be a number, got bool"),
    ("1", TypeError, "scale must be a number, got str"),
    (torch.tensor(1.0), TypeError, "scale must be a number, got Tensor"),
    ((1.0,), TypeError, "scale must be a number, got tuple"),
]


@pytest.mark.parametrize("scale, error, message", BAD, ids=str)
def test_bad_scales(scale, error, message):
    q = torch.ones(1, 2, 1, 4)
    with pytest.raises(error) as raised:
        linear_attention(q, q, q, scale=scale)
    assert str(raised.value) == f"linear_attention: {message}"
    with pytest.raises(error) as raised:
        LinearAttention(8, 2, scale=scale)
    assert str(raised.value) == f"LinearAttention: {message}"


def test_one_graph_for_every_scale():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def call(q, k, v, scale):
        return linear_attention(q, k, v, feature_map="elu1", normalize=False, causal=True, scale=scale)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=backend)
    q, k, v = (torch.randn(1, 9, 2, 4) for _ in range(3))
    for scale in (0.5, 0.25, -3.0, 17.5, 0.3, 1e-4, 0.7, 0.9, 11.0, -0.2, 5e3, 2.5):
        args = [t.requires_grad_() for t in (q, k, v)]
        got, expected = compiled(*args, scale), call(*args, scale)
        assert torch.equal(got, expected)
        grads = (torch.autograd.grad(out.square().sum(), args) for out in (got, expected))
        assert all(map(torch.equal, *grads))
    assert len(graphs) == 1


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return linear_attention(q, k, v, causal=True, scale=q.shape[3] ** -0.5)

    args = tuple(torch.randn(1, 9, 2, 4) for _ in range(3))
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Model(), args, dynamic_shapes=({1: length},) * 3)
    longer = tuple(torch.randn(1, 21, 2, 4) for _ in range(3))
    torch.testing.assert_close(exported.module()(*longer), Model()(*longer))


def test_module():
    torch.manual_seed(2)
    module = LinearAttention(24, 3, feature_map="elu1", causal=True, block_size=2, normalize=False, scale=0.25)
    plain = LinearAttention(24, 3, feature_map="elu1", causal=True, block_size=2, normalize=False)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(2, 11, 24)
    q, k, v = (p(x).unflatten(2, (3, -1)) for p in (module.q, module.k, module.v))
    out = linear_attention(q, k, v, feature_map="elu1", causal=True, block_size=2, normalize=False, scale=0.25)
    torch.testing.assert_close(module(x), module.o(out.flatten(2)))
    assert not torch.allclose(module(x), plain(x))
    assert "scale=0.25" in repr(module) and "scale" not in repr(plain)


def test_signature():
    parameters = inspect.signature(linear_attention).parameters
    assert parameters["scale"].default is None and parameters["scale"].kind is inspect.Parameter.KEYWORD_ONLY
