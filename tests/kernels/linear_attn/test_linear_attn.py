"""Linear attention against the recurrence written out token by token and against its quadratic form."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_kernels as vk
from vidmem_kernels import LinearAttentionState, linear_attention

MAPS = {
    "relu": torch.relu,
    "elu1": lambda x: torch.nn.functional.elu(x) + 1,
    "identity": lambda x: x,
}
F64 = torch.float64


def qkv(batch=2, length=9, heads=2, size=4, value_size=3, dtype=F64, grad=False, device="cpu"):
    shapes = [(batch, length, heads, n) for n in (size, size, value_size)]
    return [torch.randn(s).to(device, dtype).requires_grad_(grad) for s in shapes]


def recurrence(q, k, v, feature_map, block_size, normalize, S, z):
    """Tokens one by one: a block's keys go into the state first, then its queries read it."""
    phi = MAPS[feature_map]
    batch, length, heads, _ = q.shape
    S, z = S.clone(), z.clone()
    out = torch.zeros_like(v)
    for start in range(0, length, block_size):
        block = range(start, min(start + block_size, length))
        for b in range(batch):
            for h in range(heads):
                for j in block:
                    S[b, h] += torch.outer(phi(k[b, j, h]), v[b, j, h])
                    z[b, h] += phi(k[b, j, h])
                for i in block:
                    out[b, i, h] = phi(q[b, i, h]) @ S[b, h]
                    if normalize:
                        out[b, i, h] /= phi(q[b, i, h]) @ z[b, h] + 1e-10
    return out, S, z


def quadratic(q, k, v, feature_map, causal, block_size, normalize):
    phi = MAPS[feature_map]
    block = torch.arange(q.shape[1], device=q.device) // block_size
    weight = torch.einsum("blhd,bmhd->bhlm", phi(q), phi(k))
    if causal:
        weight = weight * (block[:, None] >= block)
    if normalize:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-10)
    return torch.einsum("bhlm,bmhd->blhd", weight, v)


def test_by_hand():
    """Two tokens, one channel: phi(q) = 1, 2; phi(k) = 3, 1; v = 10, 2."""
    q, k, v = (torch.tensor(x).view(1, 2, 1, 1) for x in ([1.0, 2.0], [3.0, 1.0], [10.0, 2.0]))
    out, state = linear_attention(q, k, v, return_state=True)
    assert out.flatten().tolist() == [8.0, 8.0]  # (3 * 10 + 1 * 2) / (3 + 1)
    assert (state.S.item(), state.z.item()) == (32.0, 4.0)
    assert linear_attention(q, k, v, causal=True).flatten().tolist() == [10.0, 8.0]
    plain = linear_attention(q, k, v, causal=True, normalize=False)
    assert plain.flatten().tolist() == [30.0, 64.0]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 9, 20])
def test_recurrence(feature_map, block_size, normalize):
    q, k, v = qkv()
    S, z = torch.randn(2, 2, 4, 3, dtype=F64), torch.rand(2, 2, 4, dtype=F64)
    expected = recurrence(q, k, v, feature_map, block_size, normalize, S, z)
    options = {"feature_map": feature_map, "normalize": normalize, "return_state": True}
    out, state = linear_attention(
        q, k, v, causal=True, block_size=block_size, state=LinearAttentionState(S, z), **options
    )
    torch.testing.assert_close((out, *state), expected)
    # Not causal: one block of everything.
    expected = recurrence(q, k, v, feature_map, 9, normalize, S, z)
    out, state = linear_attention(q, k, v, state=(S, z), **options)
    torch.testing.assert_close((out, *state), expected)


@settings(deadline=None, max_examples=25)
@given(
    length=st.integers(0, 600),
    block_size=st.integers(1, 300),
    causal=st.booleans(),
    feature_map=st.sampled_from(["relu", "elu1"]),
)
def test_quadratic_form_and_its_gradients(length, block_size, causal, feature_map):
    """Across the chunks that the computation is cut into."""
    q, k, v = qkv(1, length, 1, 3, 2, grad=True)
    grad = torch.randn(v.shape, dtype=F64)
    out = linear_attention(q, k, v, feature_map=feature_map, causal=causal, block_size=block_size)
    expected = quadratic(q, k, v, feature_map, causal, block_size, True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)
    )


@pytest.mark.parametrize("causal, block_size, cut", [(True, 3, 6), (True, 1, 5), (True, 150, 300)])
def test_split_and_resume(causal, block_size, cut):
    """Carrying the state over a block boundary equals one call, in results and in all gradients."""
    length = cut + block_size + 1
    q, k, v = qkv(length=length, grad=True)
    S = torch.randn(2, 2, 4, 3, dtype=F64, requires_grad=True)
    z = torch.rand(2, 2, 4, dtype=F64, requires_grad=True)
    options = {"feature_map": "elu1", "causal": causal, "block_size": block_size}
    weights = [torch.randn(2, length, 2, 3, dtype=F64), torch.randn_like(S), torch.randn_like(z)]

    def loss(out, state):
        return sum((w * t).sum() for w, t in zip(weights, (out, *state), strict=True))

    whole = linear_attention(q, k, v, state=LinearAttentionState(S, z), return_state=True, **options)
    first, state = linear_attention(*(t[:, :cut] for t in (q, k, v)), state=(S, z), return_state=True, **options)
    second, state = linear_attention(*(t[:, cut:] for t in (q, k, v)), state=state, return_state=True, **options)
    parts = torch.cat([first, second], dim=1), state
    torch.testing.assert_close(parts, (whole[0], tuple(whole[1])), check_dtype=True)
    leaves = (q, k, v, S, z)
    torch.testing.assert_close(torch.autograd.grad(loss(*parts), leaves), torch.autograd.grad(loss(*whole), leaves))


def test_queries_without_features_get_zero():
    """relu of negative queries, and of negative keys: a denominator of 0, out and gradients 0 rather than NaN."""
    q, k, v = qkv(dtype=torch.float32)
    for negative in (0, 1):
        args = [q, k, v]
        args[negative] = -args[negative].abs()
        args = [t.requires_grad_() for t in args]
        out = linear_attention(*args, causal=True, block_size=2)
        assert torch.equal(out, torch.zeros_like(out))
        for grad in torch.autograd.grad(out.sum(), args):
            assert torch.equal(grad, torch.zeros_like(grad))


def test_elu1_keeps_small_features():
    """phi(-30) is exp(-30), which elu(x) + 1 rounds to 0 in float32."""
    k = torch.full((1, 1, 1, 1), -30.0)
    one = torch.ones_like(k)
    _, state = linear_attention(one, k, one, feature_map="elu1", return_state=True)
    assert state.z.item() == pytest.approx(9.357622968840175e-14, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype, device):
    """Sums are float32: the result differs from float64's by the rounding of the result alone, even of 5,000 tokens."""
    q, k, v = qkv(1, 5000, 2, 16, 16, dtype=dtype, device=device)
    out, state = linear_attention(q, k, v + 2, causal=True, block_size=100, return_state=True)
    exact = linear_attention(q.double(), k.double(), (v + 2).double(), causal=True, block_size=100)
    assert out.dtype == dtype
    assert state.S.dtype == state.z.dtype == torch.float32
    error = ((out.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()
    assert error <= 0.51 * torch.finfo(dtype).eps


def test_long_rows_do_not_lose_tokens():
    """Constant features count the tokens exactly."""
    ones = torch.ones(1, 20_000, 1, 1)
    _, state = linear_attention(ones, ones, ones, causal=True, block_size=7, return_state=True)
    assert state.S.item() == state.z.item() == 20_000


@pytest.mark.parametrize("batch, length", [(0, 4), (2, 0)])
def test_empty(batch, length):
    q, k, v = qkv(batch, length, grad=True)
    S = torch.randn(batch, 2, 4, 3, dtype=F64)
    z = torch.rand(batch, 2, 4, dtype=F64)
    out, state = linear_attention(q, k, v, state=(S, z), return_state=True, causal=True)
    assert out.shape == (batch, length, 2, 3)
    if length == 0:
        assert torch.equal(state.S, S) and torch.equal(state.z, z)
        assert state.S.data_ptr() != S.data_ptr()
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_autocast_casts_tokens_not_the_state():
    q, k, v = qkv(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = linear_attention(q.bfloat16(), k, v, return_state=True)
        again, _ = linear_attention(q, k, v, state=state, return_state=True)
    assert out.dtype == again.dtype == torch.bfloat16
    assert state.S.dtype == torch.float32
    assert torch.equal(out, linear_attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_compiles_whole(device):
    """The public function, its state and gradients: no graph break, any length."""

    def call(q, k, v, state):
        return linear_attention(q, k, v, causal=True, block_size=4, state=state, return_state=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (8, 13):
        args = qkv(length=length, dtype=torch.float32, grad=True, device=device)
        state = LinearAttentionState(torch.randn(2, 2, 4, 3, device=device), torch.rand(2, 2, 4, device=device))
        got, expected = compiled(*args, state), call(*args, state)
        assert isinstance(got[1], LinearAttentionState)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(
            torch.autograd.grad(got[0].sum(), args), torch.autograd.grad(expected[0].sum(), args)
        )


def test_errors():
    q, k, v = qkv(dtype=torch.float32)
    S, z = torch.zeros(2, 2, 4, 3), torch.zeros(2, 2, 4)
    cases = [
        ((q, k[:, :8], v), {}, ValueError, "q and k must have the same shape, got (2, 9, 2, 4) and (2, 8, 2, 4)"),
        ((q, k, v[:, :, :1]), {}, ValueError, "q and v must have the same first three sizes, got (2, 9, 2) and"),
        ((q, k.half(), v), {}, ValueError, "q and k must have the same dtype, got torch.float32 and torch.float16"),
        ((q[0], k, v), {}, ValueError, "q must have shape (B, L, H, D), got (9, 2, 4)"),
        ((q.int(), k, v), {}, TypeError, "q must be float32, bfloat16, float16 or float64, got int32"),
        ((q, k, v), {"feature_map": "elu"}, ValueError,
         "feature_map must be one of relu, elu1, identity, got 'elu'"),
        ((q, k, v), {"block_size": 0}, ValueError, "block_size must be at least 1, got 0"),
        ((q, k, v), {"block_size": 1.5}, TypeError, "block_size must be an int, got float"),
        ((q, k, v), {"state": S}, TypeError, "state must be a LinearAttentionState (S, z), got Tensor"),
        ((q, k, v), {"state": (S.half(), z)}, TypeError, "state.S must be float32, got float16"),
        ((q, k, v), {"state": (S[:1], z)}, ValueError,
         "state.S must have shape (B, H, D, Dv) of q and v, got (2, 2, 4, 3) and (1, 2, 4, 3)"),
        ((q, k, v), {"state": (S, z[..., :3])}, ValueError, "state.z must have shape (B, H, D) of q, got (2, 2, 4)"),
        ((q, k, v), {"backend": "tritn"}, ValueError, "(did you mean 'triton'?)"),
    ]  # fmt: skip
    for args, options, kind, message in cases:
        with pytest.raises(kind) as error:
            linear_attention(*args, **options)
        assert message in str(error.value)
        if "backend" not in options:
            assert str(error.value).startswith("linear_attention: ")


def test_explain_names_the_backend():
    q, k, v = qkv(dtype=torch.float32)
    (choice,) = vk.explain(linear_attention, q, k, v)
    assert choice.op == "linear_attention"
    assert choice.backend in ("cpu", "reference")


MEMORY = """
import resource, torch
from vidmem_kernels import linear_attention
frames, tokens = 120, 1560
q, k, v = (torch.randn(1, frames * tokens, 1, 32) for _ in range(3))
small = [t[:, :tokens].clone().requires_grad_() for t in (q, k, v)]
linear_attention(*small, causal=True, block_size=tokens).sum().backward()  # loads what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
q, k, v = (t.requires_grad_() for t in (q, k, v))
linear_attention(q, k, v, causal=True, block_size=tokens).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_is_linear_in_length():
    """187,200 tokens (120 frames of 30 x 52), causal between frames, forward and backward: results and gradients
    take 4 x 24 MB here, the score matrix would take 140 GB."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 400
