"""`normalizer` of linear attention: a denominator with queries and keys of its own, against all weights written out."""

import random

import pytest
import torch
from bank_helpers import ids, refuses
from torch._dynamo.testing import CompileCounterWithBackend

from vidmem_kernels import LinearAttentionState, apply_rotary, linear_attention, rotary, testing

F64, F32 = torch.float64, torch.float32
HALF = [torch.bfloat16, torch.float16]
MAPS = {"relu": torch.relu, "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "identity": lambda x: x}


def weights(q, k, feature_map, causal, block_size, scale):
    """(B, H, L, L) of every pair of tokens."""
    phi = MAPS[feature_map]
    block = torch.arange(q.shape[1]) // block_size
    see = (block[:, None] >= block).to(q.dtype) if causal else q.new_ones(q.shape[1], q.shape[1])
    return torch.einsum("blhd,bmhd->bhlm", scale * phi(q), phi(k)) * see


def plain(q, k, v, q2, k2, S, z, feature_map, causal, block_size, scale):
    """(out, S, z), all scores at once."""
    phi, options = MAPS[feature_map], (feature_map, causal, block_size, scale)
    out = torch.einsum("bhlm,bmhd->blhd", weights(q, k, *options), v)
    total = weights(q2, k2, *options).sum(3).mT.unsqueeze(3)
    last_S, last_z = torch.einsum("blhd,blhe->bhde", phi(k), v), phi(k2).sum(1)
    if S is not None:
        out = out + scale * torch.einsum("blhd,bhde->blhe", phi(q), S)
        total = total + scale * torch.einsum("blhd,bhd->blh", phi(q2), z).unsqueeze(3)
        last_S, last_z = last_S + S, last_z + z
    return out / (total + 1e-10), last_S, last_z


def draw(seed, dtype):
    """(tensors, options) of a small call with positive denominators: near 0 nothing holds."""
    rng, make = random.Random(seed), testing.Make(dtype, seed=seed)
    feature_map = rng.choice(list(MAPS))
    tokens = rng.choice((1, 2)), rng.choice((1, 3, 17, 70)), rng.choice((1, 3))
    size, value_size = rng.choice((2, 5, 16)), rng.choice((1, 4, 17))
    q, k, v = make.randn(*tokens, size), make.randn(*tokens, size), make.randn(*tokens, value_size)
    q2, k2 = make.rand(*tokens, size), make.rand(*tokens, size)
    S = z = None
    if rng.random() < 0.5:
        wide = F64 if dtype == F64 else F32
        S = make.randn(tokens[0], tokens[2], size, value_size, dtype=wide)
        z = make.rand(tokens[0], tokens[2], size, dtype=wide)
    options = feature_map, rng.random() < 0.6, rng.choice((1, 2, 5, 40, 100)), rng.choice((1.0, 0.3, 16**-0.5))
    return (q, k, v, q2, k2, S, z), options


def attend(q, k, v, q2, k2, S, z, feature_map, causal, block_size, scale, **more):
    state = None if S is None else LinearAttentionState(S, z)
    options = {"feature_map": feature_map, "causal": causal, "block_size": block_size, "scale": scale}
    out, state = linear_attention(q, k, v, normalizer=(q2, k2), state=state, return_state=True, **options, **more)
    return out, *state


def gradients(results, leaves):
    given = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view(t.shape) for t in results]
    return torch.autograd.grad(results, leaves, given)


def test_all_weights_and_their_gradients():
    for seed in range(25):
        args, options = draw(seed, F64)
        args = [t if t is None else t.requires_grad_() for t in args]
        leaves = [t for t in args if t is not None]
        got, wanted = attend(*args, *options), plain(*args, *options)
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gradients(got, leaves), gradients(wanted, leaves), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("seed", range(2))
def test_gradcheck(seed):
    args, options = draw(seed, F64)
    args = [t if t is None else t[:, :5].requires_grad_() for t in args]
    assert torch.autograd.gradcheck(lambda *args: attend(*args, *options), args, fast_mode=True)


@pytest.mark.parametrize("backend", ["cpu", "reference", "auto"])
@pytest.mark.parametrize("dtype", [F32, *HALF], ids=ids)
def test_precision(dtype, backend):
    """No sum is rounded: as good as all weights in float32, and one rounding."""
    for seed in range(100, 112):
        args, options = draw(seed, dtype)
        with testing.poisoned_memory():
            got = attend(*args, *options, backend=backend)
        exact = plain(*(t if t is None else t.double() for t in args), *options)
        at_dtype = plain(*(t if t is None else t.float() for t in args), *options)
        at_dtype = at_dtype[0].to(dtype), *at_dtype[1:]
        testing.assert_within_budget(got, at_dtype, exact, f"seed {seed}")


def test_sums_beyond_float16():
    shape = (1, 4000, 1, 4)
    q = k = torch.full(shape, 8.0, dtype=torch.float16)
    out = linear_attention(q, k, torch.ones(shape, dtype=torch.float16), normalizer=(q, k))
    assert torch.equal(out, torch.ones_like(out))


def test_the_same_factors_change_nothing():
    for dtype in (F64, F32):
        for seed in range(200, 206):
            (q, _, v, q2, k2, S, z), options = draw(seed, dtype)
            state = None if S is None else LinearAttentionState(S, z)
            named = dict(zip(("feature_map", "causal", "block_size", "scale"), options, strict=True), state=state)
            tolerance = {F64: 1e-12, F32: 2e-5}[dtype]
            one, two = linear_attention(q2, k2, v, **named), linear_attention(q2, k2, v, normalizer=(q2, k2), **named)
            torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


def test_a_sequence_in_parts_with_rotary_in_the_numerator():
    """As SANA-Video has it: features before and after rotation; the state carries both."""
    features = [torch.relu(torch.randn(2, 12, 2, 8, dtype=F64)) for _ in range(2)]
    v, table = torch.randn(2, 12, 2, 5, dtype=F64), rotary(torch.arange(12).unsqueeze(1), (8,))
    q, k = (apply_rotary(x, table) for x in features)
    options = {"feature_map": "identity", "causal": True, "block_size": 3}
    whole = linear_attention(q, k, v, normalizer=features, **options)
    first, state = linear_attention(
        *(x[:, :6] for x in (q, k, v)), normalizer=[x[:, :6] for x in features], return_state=True, **options
    )
    last = linear_attention(
        *(x[:, 6:] for x in (q, k, v)), normalizer=[x[:, 6:] for x in features], state=state, **options
    )
    torch.testing.assert_close(torch.cat([first, last], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(whole, plain(q, k, v, *features, None, None, "identity", True, 3, 1.0)[0])


def test_autocast_strides_and_empty():
    args, options = draw(7, F32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = attend(*args, *options)
    half = [t if t is None or i > 4 else t.bfloat16() for i, t in enumerate(args)]
    assert got[0].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(got, attend(*half, *options), strict=True))
    make = testing.Make()
    strided = [t if t is None else make.strided(t) for t in args]
    assert all(torch.equal(a, b) for a, b in zip(attend(*strided, *options), attend(*args, *options), strict=True))
    for shape in ((0, 3, 2, 4), (2, 0, 2, 4), (2, 3, 0, 4), (2, 3, 2, 0)):
        q = torch.randn(shape, requires_grad=True)
        out = linear_attention(q, q, torch.ones(*shape[:3], 5), normalizer=(q, q), feature_map="elu1")
        assert out.shape == (*shape[:3], 5)
        out.sum().backward()


def test_one_graph_for_all_sizes():
    def call(q, k, v, q2, k2):
        return linear_attention(q, k, v, normalizer=(q2, k2), causal=True, block_size=3, return_state=True)

    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, length, heads, dtype in ((2, 6, 3, F32), (3, 15, 2, F32), (4, 9, 5, F32)):
        given = [torch.randn(batch, length, heads, n).abs().to(dtype) for n in (8, 8, 7, 8, 8)]
        leaves = [[t.clone().requires_grad_() for t in given] for _ in range(2)]
        results = [(out, *state) for out, state in (f(*some) for f, some in zip((compiled, call), leaves, strict=True))]
        torch.testing.assert_close(*results, rtol=0, atol=0)
        torch.testing.assert_close(*map(gradients, results, leaves), rtol=0, atol=0)
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_refuses():
    q, name = torch.zeros(2, 5, 3, 4), "linear_attention: "

    def call(error, message, **options):
        refuses(error, name + message, linear_attention, q, q, q, **options)

    call(TypeError, "normalizer must be a pair (q2, k2), got Tensor", normalizer=q)
    call(TypeError, "normalizer must be a pair (q2, k2), got tuple", normalizer=(q,))
    call(TypeError, "normalizer[1] must be a tensor, got NoneType", normalizer=(q, None))
    message = "q and normalizer[0] must have the same shape, got (2, 5, 3, 4) and (1, 5, 3, 4)"
    call(ValueError, message, normalizer=(q[:1], q))
    message = "q and normalizer[1] must have the same dtype, got torch.float32 and torch.float16"
    call(ValueError, message, normalizer=(q, q.half()))
    call(ValueError, "normalizer requires normalize=True, got normalize=False", normalizer=(q, q), normalize=False)
