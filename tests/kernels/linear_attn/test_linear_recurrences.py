"""Linear attention against published recurrences, token by token, with their gradients by autograd.

"Transformers are RNNs" (arXiv:2006.16236), eqs. 18 to 20: s_i = s_{i-1} + phi(k_i) v_i^T, z_i = z_{i-1} + phi(k_i),
y_i = phi(q_i)^T s_i / phi(q_i)^T z_i, phi = elu + 1.

flash-linear-attention's `chunk_linear_attn`, `fused_recurrent_linear_attn` and their naive forms take (B, T, H, K) as
here, but features rather than queries and keys, and multiply the queries by `scale`, by default K**-0.5:
o_t = scale q_t^T S_t, with S_t = S_{t-1} + k_t v_t^T. With `normalize`, o_t / (scale q_t^T z_t + 1e-10), z_t the sum of
the keys. What `initial_state` adds to S, older versions leave out of z; newer ones have a `z_state` (B, 1, H, K) too.

    theirs                              ours
    q, k after their feature map        feature_map="identity", or q, k before it and feature_map="relu" / "elu1"
    scale                               scale (default 1); it cancels in a normalised result but for the epsilon
    initial_state                       state=(initial_state, 0), or (initial_state, z_state[:, 0])
    output_final_state                  return_state=True: S is theirs, z is their z_state
    normalize (default differs)         normalize (default True)
    one token sees itself and earlier   causal=True, block_size=1
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_kernels import LinearAttentionState, _dispatch, linear_attention, testing
from vidmem_kernels._op import OPS

F64 = torch.float64
MAPS = {"relu": torch.relu, "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "identity": lambda x: x}


def backends(dtype):
    """What runs linear_attention and its gradient on CPU tensors of this dtype."""
    q, S, z = torch.zeros(1, 2, 1, 4, dtype=dtype), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4)
    wide = [t.to(F64 if dtype == F64 else torch.float32) for t in (S, z)]
    options = ("relu", True, 1, True)
    calls = {
        "linear_attention": (q, q, q, *wide, *options),
        "linear_attention_backward": (q, *wide, q, q, q, *wide, *options),
    }
    return [
        b
        for b in ("cpu", "library", "reference")
        if all(_dispatch.refusal(OPS[op], b, q.device, args) is None for op, args in calls.items())
    ]


def rnn(q, k, v, s, z, block_size=1, epsilon=0.0):
    """Transformers are RNNs, of features; a block's keys all enter before its queries read."""
    outs = []
    for start in range(0, q.shape[1], block_size):
        block = range(start, min(start + block_size, q.shape[1]))
        for j in block:
            s = s + k[:, j, :, :, None] * v[:, j, :, None, :]
            z = z + k[:, j]
        for i in block:
            numerator = (q[:, i, :, :, None] * s).sum(2)
            outs.append(numerator / ((q[:, i] * z).sum(-1, keepdim=True) + epsilon))
    return torch.stack(outs, 1), s, z


def fla(q, k, v, scale=None, initial_state=None, z_state=None, normalize=False):
    """flash-linear-attention: (o, final state, z state), of features."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    state = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]) if initial_state is None else initial_state
    z = torch.zeros_like(k[:, 0]) if z_state is None else z_state[:, 0]
    outs = []
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        z = z + k[:, t]
        out = torch.einsum("bhk,bhkv->bhv", scale * q[:, t], state)
        if normalize:
            out = out / ((scale * q[:, t] * z).sum(-1, keepdim=True) + 1e-10)
        outs.append(out)
    return torch.stack(outs, 1), state, z.unsqueeze(1)


def inputs(length=23, batch=8, size=8, value_size=6, dtype=F64, positive=False):
    """q, k, v and a state of positive keys; `positive`: so that no denominator without a bound comes near 0."""
    wide = F64 if dtype == F64 else torch.float32
    q, k = (torch.randn(batch, length, 3, size, dtype=F64) for _ in range(2))
    if positive:
        q, k = q.abs() + 0.1, k.abs() + 0.1
    v = torch.randn(batch, length, 3, value_size, dtype=F64)
    S, z = torch.randn(batch, 3, size, value_size, dtype=F64), torch.rand(batch, 3, size, dtype=F64) + 0.5
    return [t.to(dtype).requires_grad_() for t in (q, k, v)] + [t.to(wide).requires_grad_() for t in (S, z)]


def gradients(results, leaves):
    """Of a fixed projection of all results; 0 for what they do not depend on."""
    make = testing.Make(seed=7)
    loss = sum((t * make.randn(*t.shape, dtype=F64)).sum() for t in results)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def check(recurrence, ours, args, dtype):
    """Results and gradients of every backend: to rounding in float64, else within the budget.

    `recurrence(*args)` and `ours(*args, backend)` return results in the same order.
    """
    wide = [t.detach().to(F64).requires_grad_() for t in args]
    exact = recurrence(*wide)
    exact_grads = gradients(exact, wide)
    at_dtype = ours(*args, "reference")
    for backend in backends(dtype):
        got = ours(*args, backend)
        grads = gradients(got, args)
        if dtype == F64:
            torch.testing.assert_close(tuple(got), tuple(exact), rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(grads, exact_grads, rtol=1e-8, atol=1e-10)
        else:
            testing.assert_within_budget(tuple(got), tuple(at_dtype), tuple(exact), backend)
            testing.assert_within_budget(grads, gradients(ours(*args, "reference"), args), exact_grads, backend)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("block_size", [1, 5, 30])
def test_transformers_are_rnns(feature_map, block_size, dtype):
    """With a state of earlier tokens. The formula has no epsilon, which 1e-10 of ours does not show."""
    phi = MAPS[feature_map]
    args = inputs(dtype=dtype, positive=feature_map != "elu1")

    def recurrence(q, k, v, S, z):
        return rnn(phi(q), phi(k), v, S, z, block_size)

    def ours(q, k, v, S, z, backend):
        options = {"feature_map": feature_map, "causal": True, "block_size": block_size, "return_state": True}
        out, state = linear_attention(q, k, v, state=LinearAttentionState(S, z), backend=backend, **options)
        return out, *state

    check(recurrence, ours, args, dtype)


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 1.0, 0.3])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_flash_linear_attention(feature_map, normalize, scale, dtype):
    """Their features are our feature map; a scale is on the features of the queries, hence "identity" for ours."""
    phi = MAPS[feature_map]
    q, k, v, S, z = inputs(dtype=dtype, positive=feature_map != "elu1")
    # Rounded features are what both get.
    args = [phi(t).detach().requires_grad_() for t in (q, k)] + [v, S, z]
    factor = args[0].shape[3] ** -0.5 if scale is None else scale

    def recurrence(q, k, v, S, z):
        out, state, z = fla(q, k, v, scale, S, z.unsqueeze(1), normalize)
        return out, state, z[:, 0]

    def ours(q, k, v, S, z, backend):
        options = {"feature_map": "identity", "normalize": normalize, "causal": True, "return_state": True}
        out, state = linear_attention(q, k, v, scale=factor, state=(S, z), backend=backend, **options)
        return out, *state

    check(recurrence, ours, args, dtype)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_flash_linear_attention_with_our_feature_map(feature_map, normalize):
    """The raw queries and keys, scale=1, no state: our map is theirs, gradients through it too."""
    phi = MAPS[feature_map]
    args = inputs(positive=feature_map == "identity")[:3]

    def recurrence(q, k, v):
        return fla(phi(q), phi(k), v, 1.0, normalize=normalize)[:2]

    def ours(q, k, v, backend):
        options = {"feature_map": feature_map, "normalize": normalize, "causal": True, "return_state": True}
        out, state = linear_attention(q, k, v, backend=backend, **options)
        return out, state.S

    check(recurrence, ours, args, F64)


def test_their_older_state_without_z():
    """`initial_state` alone: in the numerator, not in the denominator, which is our z = 0."""
    *args, _ = inputs(positive=True)

    def recurrence(q, k, v, S):
        return fla(q, k, v, 1.0, S, normalize=True)[:2]

    def ours(q, k, v, S, backend):
        state = LinearAttentionState(S, S.new_zeros(S.shape[:3]))
        options = {"feature_map": "identity", "causal": True, "return_state": True, "backend": backend}
        out, state = linear_attention(q, k, v, state=state, **options)
        return out, state.S

    check(recurrence, ours, args, F64)


def test_their_epsilon():
    """1e-10 is added to the denominator: features of 1e-6 show it, and 0 / 0 is 0."""
    q = torch.full((1, 3, 1, 2), 1e-6, dtype=F64)
    q[:, 0] = 0
    v = torch.randn(1, 3, 1, 4, dtype=F64)
    expected, _, _ = fla(q, q, v, 1.0, normalize=True)
    for backend in backends(F64):
        got = linear_attention(q, q, v, feature_map="identity", causal=True, backend=backend)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        assert (got[:, 0] == 0).all()
        assert (got[:, 1].abs() < 0.05 * v[:, 1].abs()).all()  # 2e-12 / (2e-12 + 1e-10)


@settings(deadline=None, max_examples=20)
@given(
    length=st.integers(1, 40),
    block_size=st.integers(1, 12),
    size=st.integers(1, 12),
    value_size=st.integers(1, 12),
    feature_map=st.sampled_from(["relu", "elu1"]),
    cuts=st.sets(st.integers(1, 39), max_size=4),
    with_state=st.booleans(),
)
def test_split_anywhere_on_a_block_boundary(length, block_size, size, value_size, feature_map, cuts, with_state):
    """Any number of calls that end on block boundaries: the recurrence over all tokens, results and gradients."""
    phi = MAPS[feature_map]
    *args, S, z = inputs(length, 2, size, value_size, positive=feature_map == "relu")
    args += [S, z] if with_state else []
    cuts = sorted({c * block_size for c in cuts if c * block_size < length})

    def recurrence(q, k, v, S=None, z=None):
        if S is None:
            S, z = q.new_zeros(2, 3, size, value_size), q.new_zeros(2, 3, size)
        return rnn(phi(q), phi(k), v, S, z, block_size, epsilon=1e-10)

    def ours(q, k, v, *rest):
        *state, backend = rest
        state, outs = LinearAttentionState(*state) if state else None, []
        for part in zip(*(t.tensor_split(cuts, 1) for t in (q, k, v)), strict=True):
            options = {"feature_map": feature_map, "causal": True, "block_size": block_size, "backend": backend}
            out, state = linear_attention(*part, state=state, return_state=True, **options)
            outs.append(out)
        return torch.cat(outs, 1), *state

    check(recurrence, ours, args, F64)
