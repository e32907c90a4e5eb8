"""The CPU kernels of cross-attention: every instruction set, features, strides, special values, threads, own checks."""

import math
from itertools import product

import pytest
import torch
from attention_helpers import arguments, by_sdpa
from backend_helpers import compiled

from vidmem_kernels import testing
from vidmem_kernels.cross_attn import reference

pytestmark = compiled
INF, F64 = math.inf, torch.float64
FEATURES = ["", "bias", "window", "blocks", "sinks window", "sinks blocks", "bias sinks window blocks"]


def direct(q, k, v, options):
    return torch.ops.vidmem_cpp.cross_attention(q, k, v, *options.values())


def within_budget(got, args, options, what=""):
    exact = by_sdpa(*args, options)
    if args[0].dtype == F64:  # as exact as SDPA itself
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12, msg=what)
    else:
        testing.assert_within_budget(got, reference.cross_attention(*args, *options.values()), exact, what)


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


@pytest.mark.parametrize("which", FEATURES)
def test_few_queries(capability, which):
    """They have a path of their own, up to 24; strides change nothing there either."""
    make = testing.Make()
    for dtype, queries in product((torch.float32, torch.bfloat16, torch.float16, F64), (1, 2, 3, 7, 24, 25)):
        *args, options = arguments(which, 1, queries, 230, 2, 69, 150, dtype)
        got = direct(*args, options)
        within_budget(got, args, options, f"{which} {queries} {dtype}")
        assert all(map(torch.equal, direct(*map(make.strided, args), options), got))


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
    # Each query by itself: the same scores, in another order of sums.
    q, k, v = args
    for i in range(3):
        one, one_lse = direct(q[:, i : i + 1], k, v, options)
        torch.testing.assert_close(one_lse[..., 0], lse[..., i], rtol=1e-6, atol=0)
        assert torch.isfinite(one).all()


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
        out, _ = torch.ops.vidmem_cpp.cross_attention(q, k, v, bias, 0, None, None, None, None, [1, 1], 1.0)
        exact = difference.to(dtype).to(F64).exp()
        exact = exact / (1 + exact)
        smallest = torch.finfo(dtype).tiny
        error = (out.flatten().to(F64) - exact).abs()
        assert (error <= tolerance * exact + 2 * smallest).all()


@pytest.mark.parametrize("queries", [5, 40])
def test_not_a_number_and_infinity_as_in_the_reference(capability, queries):
    q, k, v, options = arguments("", 1, queries, 40)
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
        ((q, k[..., :5], v), "k must have shape"),
        ((q, k, v[:, 1:]), "v must have shape"),
        ((q, k.double(), v), "k must be float32, got float64"),
        ((q.char(), k.char(), v.char()), "q must have a float dtype"),
    ):
        with pytest.raises(ValueError, match=message):
            direct(*bad, options)


def backward_arguments(which, *shape, **more):
    *args, options = arguments(which, *shape, **more)
    out, lse = reference.cross_attention(*args, *options.values())
    grad_lse = None if which == "" else torch.randn_like(lse)
    return [torch.randn_like(out), grad_lse, *args, options["key_bias"], out, lse, *list(options.values())[1:]]


def backward(args):
    return torch.ops.vidmem_cpp.cross_attention_backward(*args)


def exact_gradients(args):
    """Autograd through SDPA and logsumexp in float64."""
    grad_out, grad_lse, q, k, v, bias, _, _, *rest = args
    wide = [None if t is None else t.to(F64).requires_grad_() for t in (q, k, v, bias)]
    names = ("num_sinks", "q_time", "k_time", "window", "block_index", "block_size", "scale")
    out, lse = by_sdpa(*wide[:3], {"key_bias": wide[3], **dict(zip(names, rest, strict=True))})
    loss = (out * grad_out.to(F64)).sum()
    if grad_lse is not None:  # -inf is a constant
        loss = loss + (lse.masked_fill(lse == -INF, 0) * grad_lse.masked_fill(lse == -INF, 0)).sum()
    leaves = [t for t in wide if t is not None]
    return torch.autograd.grad(loss, leaves)


def gradients_within_budget(args, what=""):
    got, exact = backward(args), exact_gradients(args)
    got = got[: len(exact)]
    if args[0].dtype == F64:
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11, msg=what)
    else:
        at_dtype = reference.cross_attention_backward(*args)[: len(exact)]
        # out and lse were rounded: what that costs is the reference's error too.
        testing.assert_within_budget(got, at_dtype, exact, what)


@pytest.mark.parametrize("which", FEATURES)
def test_backward_against_sdpa(capability, which):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, F64):
        gradients_within_budget(backward_arguments(which, dtype=dtype), f"{which} {dtype}")


@pytest.mark.parametrize("which", ["bias", "sinks window blocks"])
def test_backward_of_any_shape(capability, which):
    for queries, keys, size, value_size in product((1, 33), (1, 97), (1, 17), (1, 7)):
        args = backward_arguments(which, 1, queries, keys, 3, size, value_size)
        # A single key has a weight of 1 and gradients of 0 but for rounding: no budget to derive from.
        torch.testing.assert_close(
            backward(args)[:3], exact_gradients(args)[:3], check_dtype=False, rtol=1e-4, atol=1e-5
        )
    gradients_within_budget(backward_arguments(which, 1, 250, 450, 1, 200, 300), which)


def test_backward_strided_and_shared_bias(capability):
    args = backward_arguments("bias window blocks sinks")
    args[5] = args[5][:, 0].clone()  # one bias for all heads
    args[6:8] = reference.cross_attention(*args[2:6], *args[8:])
    gradients_within_budget(args)
    make = testing.Make()
    spread = [make.strided(t) if isinstance(t, torch.Tensor) else t for t in args]
    assert all(map(torch.equal, backward(spread), backward(args)))


def test_backward_empty(capability):
    for queries, keys, batch, size, value_size in ((0, 5, 2, 4, 4), (5, 0, 2, 4, 4), (5, 7, 0, 4, 4), (5, 7, 2, 0, 0)):
        args = backward_arguments("bias window blocks sinks", batch, queries, keys, 2, size, value_size)
        with testing.poisoned_memory():
            got = backward(args)
        torch.testing.assert_close(got, reference.cross_attention_backward(*args))


@pytest.mark.parametrize("which", ["bias", "window", "blocks"])
def test_gradients_where_nothing_is_visible(capability, which):
    """Rows that see nothing give gradients of zero, never NaN."""
    q, k, v, options = arguments(which)
    if which == "bias":
        options["key_bias"][1] = -INF
    elif which == "window":
        options["q_time"] = options["q_time"].clone()
        options["q_time"][5:50] = 1e6
    else:
        options["block_index"][0, 1] = -1
    out, lse = direct(q, k, v, options)
    rest = list(options.values())
    args = [torch.randn_like(out), torch.randn_like(lse), q, k, v, rest[0], out, lse, *rest[1:]]
    gradients_within_budget(args)
    assert (backward(args)[0].transpose(1, 2)[lse == -INF] == 0).all()


def test_backward_of_large_scores(capability):
    """As sharp as weights can be: no overflow, and padding of packs stays out of the sums."""
    args = backward_arguments("bias", 1, 37, 101, 2, factor=100.0)
    got, expected = backward(args), reference.cross_attention_backward(*args)
    assert all(torch.isfinite(t).all() for t in got)
    # Weights of lse = 1e4 are as rough as a rounding of it, in any implementation.
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1.0)


def test_threads_do_not_change_gradients():
    args = backward_arguments("bias window blocks sinks", 1, 300, 2500)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(backward(args))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize(
    "at, bad, message",
    [
        (0, torch.zeros(2, 70, 2, 19), "grad_out must have shape"),
        (1, torch.zeros(2, 2, 69), "grad_lse must have shape"),
        (6, torch.zeros(2, 70, 2, 20).double(), "out must be float32, got float64"),
        (7, torch.zeros(2, 2, 70).double(), "lse must be float32"),
        (8, 211, "num_sinks must be in"),
    ],
)
def test_direct_backward_calls_are_checked(at, bad, message):
    args = backward_arguments("bias window blocks sinks")
    args[at] = bad
    with pytest.raises(ValueError, match=f"cross_attention_backward: .*{message}"):
        backward(args)
