"""What the contract's samples miss of linear attention's Triton kernels: several pieces, tiles and splits of heads."""

import ast
import inspect
import random

import pytest
import torch

from vidmem_kernels import _dispatch, _tuned, linear_attention, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.linear_attn import reference
from vidmem_kernels.testing import Make

pytest.importorskip("triton")

from vidmem_kernels.linear_attn import triton_gradients, triton_outputs, triton_pairs, triton_parts, triton_states

MODULES = (triton_parts, triton_states, triton_outputs, triton_gradients, triton_pairs)
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


@pytest.mark.sample(5)
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


def test_plans_cover_every_token_once(monkeypatch):
    rng = random.Random(1)
    for _ in range(200):
        slots = rng.choice((1, 16, 132))
        monkeypatch.setattr(triton_parts, "slots_of", lambda device, count, slots=slots: slots * count)
        length, lanes = rng.choice((0, 1, 63, 64, 1023, 1025, 5000, 20000)), rng.choice((0, 1, 3, 12, 200))
        block, causal = rng.choice((1, 3, 26, 33, 64, 390, 512, 513, 1560)), rng.random() < 0.7
        plan = triton_parts.make_plan(length, causal, block, lanes, "cpu")
        covered, spans = [], set()
        for piece in range(plan.pieces):
            first = piece // plan.per_span * plan.span
            begin = first + piece % plan.per_span * plan.piece
            end = min(begin + plan.piece, first + plan.span, length)
            covered += range(begin, end)
            spans.add(first)
        assert covered == list(range(length))
        assert not causal or all(first % block == 0 for first in spans)
        assert plan.is_scan == (causal and block <= triton_parts.SCANNED)
        assert not plan.is_scan or plan.piece % block == 0
        assert lanes * plan.pieces <= max(lanes * len(spans), 4 * slots + 2 * lanes)
        for chunk in (16, 64):
            group, inside, masked = triton_parts.steps_of(plan, block, chunk)
            assert masked == (plan.is_scan and block <= chunk)
            assert (
                group <= chunk and group % inside == 0 if masked else group == (block if plan.is_scan else plan.piece)
            )


@pytest.mark.parametrize("causal, pieces", [(True, 11), (False, 22)])
def test_pieces_fill_a_gpu(causal, pieces, monkeypatch):
    """12 heads of 32,760 tokens on 132 multiprocessors: a program each that walks, two each that do not."""
    monkeypatch.setattr(triton_parts, "slots_of", lambda device, count: 132 * count)
    assert triton_parts.make_plan(32760, causal, 1, 12, "cuda").pieces == pieces


FIELDS = {"dtype": "bf16", "size": 32, "value_size": 32, "features": ""}
CANDIDATES = [
    (name, walk, direction, i)
    for name, tunable in sorted(_tuned.TUNABLES.items())
    if name.startswith("_linear_")
    for walk, direction in (("", ""), ("scan", ""), ("scan", "reverse"))
    for i in range(len(tunable.candidates(80, **FIELDS, walk=walk, direction=direction)))
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("name, walk, direction, index", CANDIDATES, ids=lambda value: str(value))
def test_tiles_that_tuning_tries(name, walk, direction, index, short_pieces, device):
    tunable = _tuned.TUNABLES[name]
    make = Make(BF16, device)
    args = arguments(make, 150, 20, 32, heads=1)
    feature_map, block = random.Random(f"{name} {index}").choice([("relu", 1), ("elu1", 3), ("relu", 40), ("elu1", 70)])
    with tunable.forced(tunable.candidates(80, **FIELDS, walk=walk, direction=direction)[index]):
        check_both(make, args, (feature_map, walk == "scan", block, True))


@pytest.mark.parametrize("seed", range(8))
def test_tiles_that_explain_tells_are_those_of_the_launches(seed, short_pieces, device, monkeypatch):
    rng = random.Random(seed)
    make, taken, tile = Make(rng.choice((F32, BF16, F16)), device), [], _tuned.Tunable.tile

    def noted(tunable, device, **fields):
        taken.append(tunable.chosen(device, **fields))
        return tile(tunable, device, **fields)

    monkeypatch.setattr(_tuned.Tunable, "tile", noted)
    args = arguments(make, 40, *rng.choice(((16, 20), (40, 16), (130, 16))), heads=1)
    grads = arguments(make, 40, *args[3].shape[2:], heads=1)[2:]
    options = rng.choice(("relu", "elu1")), rng.random() < 0.5, rng.choice((1, 30, 600)), rng.random() < 0.7, 1.0
    for name, module, given in (
        ("linear_attention", triton_outputs, (*args, *options)),
        (
            "linear_attention_backward",
            triton_gradients,
            (*grads, *args, *options),
        ),
    ):
        taken.clear()
        testing.run(OPS[name], given, "triton")
        tiles = getattr(module, f"tiles_{name.replace('_backward', '')}_{'bwd' if 'backward' in name else 'fwd'}")
        assert tiles(*given) == taken


def test_no_transposed_product_is_a_factor():
    """What Triton 3.4 to 3.7.0 compiles wrongly for Hopper, see triton_parts.product: here nothing is transposed."""
    for module in MODULES:
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            assert not (isinstance(node, ast.Attribute) and node.attr in ("trans", "T", "permute")), module.__name__


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("block", [0, 1, 30, 100])
def test_mean_of_ones(dtype, block, short_pieces, device):
    """One, to a rounding: numerator and denominator are sums of the same rounded factors."""
    make = Make(dtype, device)
    q, k = make.randn(1, 200, 1, 20).exp(), make.randn(1, 200, 1, 20).exp()
    ones = torch.ones(1, 200, 1, 24, dtype=dtype, device=device)
    out = linear_attention(q, k, ones, feature_map="elu1", causal=block > 0, block_size=block or 1, backend="triton")
    assert (out - ones).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.sample(2)
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
    with pytest.raises(_dispatch.BackendError, match="does not support float64: it sums in float32"):
        linear_attention(q.double(), q.double(), q.double(), backend="triton")
    with pytest.raises(_dispatch.BackendError, match=r"needs head sizes of 1 to 256, got \(4, 257\)"):
        linear_attention(q, q, wide, backend="triton")


def test_reference_is_what_refused_calls_run(device):
    q, k, v = (torch.randn(1, 9, 1, n, device=device) for n in (257, 257, 4))
    out = linear_attention(q, k, v, causal=True)
    expected = reference.linear_attention(q, k, v, None, None, "relu", True, 1, True)[0]
    torch.testing.assert_close(out, expected)
