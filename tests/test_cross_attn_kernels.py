"""The CPU kernels of cross-attention: every instruction set, features, strides, special values, threads, own checks."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import vidmem_kernels as vk
from vidmem_kernels import _extension, testing
from vidmem_kernels.cross_attn import reference

pytestmark = pytest.mark.skipif(_extension.module is None, reason="vidmem_kernels._C is not built")
CAPABILITIES = _extension.module.available_cpu_capabilities() if _extension.module else []
INF, F64 = math.inf, torch.float64
FEATURES = ["", "bias", "window", "blocks", "sinks window", "sinks blocks", "bias sinks window blocks"]


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(request.param)
    yield request.param
    _extension.module.set_cpu_capability(before)


def arguments(which, batch=2, queries=70, keys=210, heads=2, size=12, value_size=20, dtype=torch.float32, factor=1.0):
    """(q, k, v, then the other arguments of the op by name)"""
    q, k = (factor * torch.randn(batch, n, heads, size) for n in (queries, keys))
    options = dict.fromkeys(("key_bias", "num_sinks", "q_time", "k_time", "window", "block_index"))
    options |= {"num_sinks": 0, "block_size": [32, 24], "scale": size**-0.5 if size else 1.0}
    if "bias" in which:
        options["key_bias"] = torch.randn(batch, heads, keys).to(dtype)
        options["key_bias"][:1, :, ::5] = -INF
    if "sinks" in which:
        options["num_sinks"] = min(3, keys)
    if "window" in which:
        options["q_time"] = torch.arange(queries) / 7
        options["k_time"] = (torch.arange(keys) // 10).expand(batch, keys).float()
        options["window"] = [3.5, 1.0]
    if "blocks" in which:
        shape = (batch, heads, -(-queries // 32), 5)
        options["block_index"] = torch.randint(-1, max(0, -(-keys // 24)), shape, dtype=torch.int32)
    value = torch.randn(batch, keys, heads, value_size)
    return q.to(dtype), k.to(dtype), value.to(dtype), options


def direct(q, k, v, options):
    return torch.ops.vidmem_cpp.cross_attention(q, k, v, *options.values())


def visible(q, k, options):
    """(B, H, Lq, Lk) bool"""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if options["window"] is not None:
        at, key_at = options["q_time"].expand(batch, queries), options["k_time"].expand(batch, keys)
        left, right = options["window"]
        at = at[:, :, None]
        seen &= ((at - left <= key_at[:, None]) & (key_at[:, None] <= at + right))[:, None]
    if options["block_index"] is not None:
        block_q, block_k = options["block_size"]
        row, column = torch.arange(queries) // block_q, torch.arange(keys) // block_k
        index = options["block_index"].expand(batch, heads, -1, -1)[:, :, row]
        seen &= (index[..., None, :] == column[:, None]).any(-1)
    seen[..., : options["num_sinks"]] = True
    return seen


def by_sdpa(q, k, v, options):
    """(out, lse) in float64, with the dense mask; 0 and -inf where nothing is visible."""
    seen = visible(q, k, options)
    q, k, v = (t.to(F64).transpose(1, 2) for t in (q, k, v))
    mask = torch.zeros(seen.shape, dtype=F64)
    if options["key_bias"] is not None:
        bias = options["key_bias"].to(F64)
        mask = mask + (bias if bias.dim() == 3 else bias[:, None])[:, :, None]
    mask = mask.masked_fill(~seen, -INF)
    some = (mask > -INF).any(-1)
    out = F.scaled_dot_product_attention(q, k, v, mask.masked_fill(~some[..., None], 0), scale=options["scale"])
    lse = torch.logsumexp(q @ k.mT * options["scale"] + mask, -1)
    return out.masked_fill(~some[..., None], 0).transpose(1, 2), lse


def within_budget(got, args, options, what=""):
    at_dtype = reference.cross_attention(*args, *options.values())
    testing.assert_within_budget(got, at_dtype, by_sdpa(*args, options), what)


@pytest.mark.parametrize("which", FEATURES)
def test_forward_against_sdpa(capability, which):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        *args, options = arguments(which, dtype=dtype)
        within_budget(direct(*args, options), args, options, f"{which} {dtype}")


@pytest.mark.parametrize("which", ["bias", "sinks window blocks"])
def test_forward_of_any_shape(capability, which):
    for queries, keys, size, value_size in product((1, 33), (1, 97), (1, 17), (1, 7)):
        *args, options = arguments(which, 1, queries, keys, 3, size, value_size)
        within_budget(direct(*args, options), args, options, f"{which} {queries} {keys} {size} {value_size}")
    *args, options = arguments(which, 1, 450, 130, 1, 200, 300)  # more than one group of queries
    within_budget(direct(*args, options), args, options, which)


def test_forward_strided(capability):
    make = testing.Make()
    *args, options = arguments("bias window blocks sinks")
    spread = {n: make.strided(t) if isinstance(t, torch.Tensor) else t for n, t in options.items()}
    got = direct(*map(make.strided, args), spread)
    assert all(map(torch.equal, got, direct(*args, options)))


def test_forward_empty(capability):
    for queries, keys, batch, size, value_size in ((0, 5, 2, 4, 4), (5, 0, 2, 4, 4), (5, 7, 0, 4, 4), (5, 7, 2, 0, 0)):
        *args, options = arguments("bias window blocks sinks", batch, queries, keys, 2, size, value_size)
        got, expected = direct(*args, options), reference.cross_attention(*args, *options.values())
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("which", ["bias", "window", "blocks"])
def test_nothing_visible(capability, which):
    """Some rows, then all rows, see nothing."""
    q, k, v, options = arguments(which)
    if which == "bias":
        options["key_bias"][1] = -INF
    elif which == "window":
        options["q_time"] = options["q_time"].clone()
        options["q_time"][5:50] = 1e6
        options["q_time"][66] = math.nan
    else:
        options["block_index"][0, 1] = -1
    out, lse = direct(q, k, v, options)
    within_budget((out, lse), (q, k, v), options)
    nothing = lse == -INF
    assert nothing.any() and not nothing.all()
    assert (out.transpose(1, 2)[nothing] == 0).all()


def test_large_scores(capability):
    """Scores of +-1e4 neither overflow nor lose the largest one; where it is far ahead, its value comes out."""
    *args, options = arguments("bias", factor=100.0)
    out, lse = direct(*args, options)
    within_budget((out, lse), args, options)
    assert lse.abs().amax() > 1e4 and torch.isfinite(out).all()


def test_exp(capability):
    """The weights of two keys are exp of their difference, to a rounding or two, down to the smallest numbers."""
    difference = -torch.cat([torch.linspace(0, 95, 4001), torch.tensor([1e3, 1e6, 1e30, INF])])
    for dtype, tolerance in ((torch.float32, 2.5e-7), (F64, 5e-16)):
        count = len(difference)
        q = torch.zeros(1, 1, count, 1, dtype=dtype)
        k, v = (torch.zeros(1, 2, count, 1, dtype=dtype) for _ in range(2))
        v[:, 1] = 1
        bias = torch.zeros(1, count, 2, dtype=dtype)
        bias[0, :, 1] = difference
        out, _ = vk.cross_attention(q, k, v, key_bias=bias, return_lse=True, backend="cpu")
        exact = difference.to(dtype).to(F64).exp()
        exact = exact / (1 + exact)
        smallest = torch.finfo(dtype).tiny
        error = (out.flatten().to(F64) - exact).abs()
        assert (error <= tolerance * exact + 2 * smallest).all()


def test_not_a_number_and_infinity_as_in_the_reference(capability):
    q, k, v, options = arguments("", 1, 5, 40)
    q[0, 1, 0, 0], k[0, 3, 1, 2], v[0, 9, 0, 4] = math.nan, INF, math.nan
    got, expected = direct(q, k, v, options), reference.cross_attention(q, k, v, *options.values())
    torch.testing.assert_close(got, expected, equal_nan=True)


def test_threads_do_not_change_bits():
    *args, options = arguments("bias window blocks sinks", queries=300, keys=500)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(direct(*args, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


def test_duplicate_blocks_count_once(capability):
    q, k, v, options = arguments("blocks sinks")
    once = direct(q, k, v, options)
    options["block_index"] = torch.cat([options["block_index"]] * 2, dim=3).long()
    assert all(map(torch.equal, direct(q, k, v, options), once))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"num_sinks": 211}, ValueError, "num_sinks must be in"),
        ({"num_sinks": -1}, ValueError, "num_sinks must be in"),
        ({"window": None}, ValueError, "given together"),
        ({"window": [1.0]}, ValueError, "window must be two numbers"),
        ({"q_time": torch.zeros(69)}, ValueError, "q_time must have shape"),
        ({"k_time": torch.zeros(3, 210)}, ValueError, "k_time must have shape"),
        ({"k_time": torch.zeros(210, dtype=torch.int16)}, ValueError, "k_time must be int32"),
        ({"key_bias": torch.zeros(2, 209)}, ValueError, "key_bias must have shape"),
        ({"key_bias": torch.zeros(2, 210, dtype=torch.int8)}, ValueError, "key_bias must have a float dtype"),
        ({"block_size": [0, 24]}, ValueError, "blocks must have at least one row"),
        ({"block_size": [32]}, ValueError, "block_size must be two ints"),
        ({"block_index": torch.zeros(2, 2, 2, 1).int()}, ValueError, "block_index must have shape"),
        ({"block_index": torch.zeros(2, 2, 3, 1)}, ValueError, "block_index must be int32 or int64"),
        ({"block_index": torch.full((2, 2, 3, 1), 9)}, IndexError, r"must be in \[-1, 8\], got 9"),
        ({"block_index": torch.full((2, 2, 3, 1), -2)}, IndexError, r"must be in \[-1, 8\], got -2"),
    ],
)
def test_direct_calls_are_checked(changes, error, message):
    q, k, v, options = arguments("bias window blocks sinks")
    with pytest.raises(error, match=f"cross_attention: .*{message}"):
        direct(q, k, v, options | changes)


def test_direct_calls_with_unfit_tensors():
    q, k, v, options = arguments("")
    for bad, message in (
        ((q[0], k, v), "q must have 4 dimensions"),
        ((q, k[..., :5], v), "q and k must have the same B, H and D"),
        ((q, k, v[:, 1:]), "k and v must have the same B, Lk and H"),
        ((q, k.double(), v), "q and k must have the same dtype"),
        ((q.char(), k.char(), v.char()), "q must have a float dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            direct(*bad, options)
