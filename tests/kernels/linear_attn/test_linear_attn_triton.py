"""What the contract's samples miss of linear attention's Triton kernels: several pieces, tiles and splits of heads."""

import itertools

import pytest
import torch

from vidmem_kernels import _dispatch, linear_attention, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.linear_attn import reference
from vidmem_kernels.testing import Make

pytest.importorskip("triton")

from vidmem_kernels.linear_attn import triton_parts

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def available(device):
    reason = _dispatch.unavailable(OPS["linear_attention"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)


@pytest.fixture
def short_pieces(monkeypatch):
    """What takes several pieces takes few tokens, of which the interpreter is slow."""
    monkeypatch.setattr(triton_parts, "PIECE", 128)


def arguments(make, length, size, value_size, heads=2, batch=1, state=True):
    shape = (batch, length, heads)
    qkv = make.randn(*shape, size), make.randn(*shape, size), make.randn(*shape, value_size)
    if not state:
        return *qkv, None, None
    S = make.randn(batch, heads, size, value_size, dtype=F32)
    return *qkv, S, make.rand(batch, heads, size, dtype=F32)


def check(op, args):
    """A backend's results against those of the reference in float64, within the budget of the yardstick."""
    op = OPS[op]
    with testing.poisoned_memory():
        actual = testing.run(op, args, "triton")
    exact = op.reference(*testing.to_float64(args))
    testing.assert_within_budget(actual, testing.yardstick(op.name, args)(*args), exact, op.name)
    return actual


def check_both(make, args, options):
    check("linear_attention", (*args, *options))
    q, _, v = args[:3]
    grads = arguments(make, q.shape[1], q.shape[3], v.shape[3], q.shape[2], q.shape[0])[2:]
    check("linear_attention_backward", (*grads, *args, *options))


# dtype, length, (D, Dv), block (None: not causal), feature map, normalize, with a state
CASES = [
    (F32, 300, (16, 24), 1, "elu1", True, True),
    (BF16, 300, (20, 33), 3, "relu", True, True),
    (F16, 261, (33, 20), 26, "elu1", True, False),
    (BF16, 200, (16, 16), 33, "identity", False, True),  # a group larger than a masked tile
    (BF16, 300, (24, 40), 50, "elu1", True, True),
    (F32, 400, (16, 16), 150, "relu", True, True),  # a block of two pieces, the last one partial
    (F16, 200, (16, 16), 1000, "identity", False, False),
    (BF16, 333, (40, 24), None, "elu1", True, True),
    (F32, 130, (3, 1), None, "relu", False, True),
    (F32, 20, (256, 256), 1, "elu1", True, True),  # both sides of the state are split
    (BF16, 20, (256, 130), 7, "relu", True, False),
    (F16, 40, (100, 256), 40, "relu", False, True),
]


@pytest.mark.parametrize("dtype, length, sizes, block, feature_map, normalize, state", CASES)
def test_values_and_gradients(dtype, length, sizes, block, feature_map, normalize, state, short_pieces, device):
    make = Make(dtype, device)
    args = arguments(make, length, *sizes, heads=1 if max(sizes) > 64 else 2, state=state)
    check_both(make, args, (feature_map, block is not None, block or 1, normalize))


def test_whole_pieces(device):
    """Of the length that they have outside of these tests: frames in two pieces each, and small blocks."""
    make = Make(BF16, device)
    args = arguments(make, 2100, 16, 16, heads=1)
    check("linear_attention", (*args, "relu", True, 1560, True))
    check("linear_attention", (*args, "relu", True, 390, True))


def test_plans_cover_every_token_once():
    for length, block in itertools.product((0, 1, 63, 64, 1023, 1025, 5000), (1, 3, 26, 33, 64, 390, 512, 513, 1560)):
        for causal in (True, False):
            plan = triton_parts.make_plan(length, causal, block, 32)
            covered, spans = [], set()
            for piece in range(plan.pieces):
                first = piece // plan.per_span * plan.span
                begin = first + piece % plan.per_span * plan.piece
                end = min(begin + plan.piece, first + plan.span, length)
                covered += range(begin, end)
                spans.add(first)
            assert covered == list(range(length))
            assert not causal or all(first % block == 0 for first in spans)
            assert not plan.is_scan or (plan.piece % plan.group == 0 and plan.group % block == 0)
            assert plan.piece <= triton_parts.PIECE


@pytest.mark.parametrize("block, cut", [(1, 70), (3, 150), (50, 100), (150, 150)])
def test_split_and_resume(block, cut, short_pieces, device):
    make = Make(F32, device)
    q, k, v, S, z = arguments(make, 311, 16, 16)
    options = {"feature_map": "elu1", "causal": True, "block_size": block, "return_state": True, "backend": "triton"}
    whole, last = linear_attention(q, k, v, state=(S, z), **options)
    first, middle = linear_attention(q[:, :cut], k[:, :cut], v[:, :cut], state=(S, z), **options)
    second, end = linear_attention(q[:, cut:], k[:, cut:], v[:, cut:], state=middle, **options)
    torch.testing.assert_close((torch.cat([first, second], 1), *end), (whole, *last))


def test_strided(short_pieces, device):
    make = Make(BF16, device)
    args = tuple(make.strided(t) for t in arguments(make, 150, 12, 20))
    check_both(make, args, ("relu", True, 3, True))


@pytest.mark.parametrize("negative", [0, 1])
def test_denominators_of_zero(negative, device):
    args = [t.to(device) for t in arguments(Make(F32), 70, 16, 16, state=False)[:3]]
    args[negative] = -args[negative].abs()
    args = [t.requires_grad_() for t in args]
    for causal in (True, False):
        out = linear_attention(*args, causal=causal, block_size=2, backend="triton")
        assert torch.equal(out, torch.zeros_like(out))
        for grad in torch.autograd.grad(out.sum(), args):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_not_finite(dtype, short_pieces, device):
    """NaN reaches the tokens that see it, an infinite value those with a weight for it; of others only those of the
    same tile of scores, whose weight of 0 for it makes NaN as in the reference."""
    make = Make(dtype, device)
    q, k, v = (t.abs() + 0.5 for t in arguments(make, 300, 16, 16, heads=1, state=False)[:3])
    k[0, 200, 0, 3] = torch.nan
    v[0, 150, 0, 5] = torch.inf
    out = linear_attention(q, k, v, causal=True, block_size=4, backend="triton")[0, :, 0]
    assert out[:128].isfinite().all()
    assert (out[160:192, 5] == torch.inf).all()
    assert out[160:192, :5].isfinite().all()
    assert out[200:].isnan().all()


def test_large_sums_of_float16(device):
    """Sums exceed 65,504, what is divided by them does not."""
    x = torch.full((1, 300, 1, 16), 60.0, dtype=F16, device=device)
    for causal in (True, False):
        out, state = linear_attention(x, x, x, causal=causal, return_state=True, backend="triton")
        torch.testing.assert_close(out, x)
        assert (state.S == 300 * 3600).all()


def test_deterministic(short_pieces, device):
    make = Make(BF16, device)
    args = arguments(make, 150, 32, 32)
    grads = arguments(make, 150, 32, 32)[2:]
    options = ("elu1", True, 3, True)
    for op, given in (("linear_attention", args), ("linear_attention_backward", (*grads, *args))):
        first, second = (testing.run(OPS[op], (*given, *options), "triton") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_it_refuses(device):
    q = torch.ones(1, 2, 1, 4, device=device)
    wide = torch.ones(1, 2, 1, 257, device=device)
    with pytest.raises(_dispatch.BackendError, match="sums in float32, the tensors are float64"):
        linear_attention(q.double(), q.double(), q.double(), backend="triton")
    with pytest.raises(_dispatch.BackendError, match=r"takes heads of 1 to 256 channels, got \(4, 257\)"):
        linear_attention(q, q, wide, backend="triton")


def test_reference_is_what_refused_calls_run(device):
    q, k, v = (torch.randn(1, 9, 1, n, device=device) for n in (257, 257, 4))
    out = linear_attention(q, k, v, causal=True)
    expected = reference.linear_attention(q, k, v, None, None, "relu", True, 1, True)[0]
    torch.testing.assert_close(out, expected)
