"""The kernels of merge_attention_states: every instruction set and Triton; any strides, parts and special values."""

import math

import pytest
import torch
from backend_helpers import CAPABILITIES, backend_called, compiled

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, cross_attention, merge_attention_states, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn import reference
from vidmem_kernels.testing import Make

INF, F64 = math.inf, torch.float64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=[*CAPABILITIES, "triton"])
def backend(request, device):
    """Every instruction set of the C++ kernel, and Triton (under its interpreter on the CPU)."""
    name = "triton" if request.param == "triton" else "cpu"
    reason = _dispatch.unavailable(OPS["merge_attention_states"], name, device)
    if reason is not None:
        pytest.skip(reason=reason)
    with backend_called(request.param) as name:
        yield name


def states(count, batch=2, length=37, heads=3, size=20, dtype=torch.float32, device="cpu", wide=torch.float32):
    """Parts of which some rows, and some rows of all parts, have nothing visible."""
    make = Make(dtype, device)
    outs = [make.randn(batch, length, heads, size) for _ in range(count)]
    lses = [3 * make.randn(batch, heads, length, dtype=wide) for _ in range(count)]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for hidden in (slice(0, 1), slice(i + 2, None, 5)):
            lse[:, :, hidden], out[:, hidden] = -INF, 0
    return outs, lses


def gradient_arguments(outs, lses, with_grad_lse=True, seed=3):
    make = Make(outs[0].dtype, outs[0].device, seed)
    lse = reference.merge_attention_states(outs, lses)[1]
    grad_lse = make.randn(*lse.shape, dtype=lse.dtype) if with_grad_lse else None
    return make.randn(*outs[0].shape), grad_lse, outs, lses, lse


def run(name, args, backend):
    return getattr(torch.ops.vidmem, name)(*args, backend=backend)


def check(outs, lses, backend, what=""):
    """Both ops against the reference in float64, which knows no roundings of inputs."""
    for name, args in (
        ("merge_attention_states", (outs, lses)),
        ("merge_attention_states_backward", gradient_arguments(outs, lses)),
        ("merge_attention_states_backward", gradient_arguments(outs, lses, False)),
    ):
        with testing.poisoned_memory():
            got = run(name, args, backend)
        function = getattr(reference, name)
        testing.assert_within_budget(got, function(*args), function(*testing.to_float64(args)), f"{name} {what}")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_any_number_of_parts(backend, device, dtype):
    for count in (1, 2, 3, 4, 5, 9):
        check(*states(count, dtype=dtype, device=device), backend, f"{count} parts")


def test_any_shape(backend, device):
    for shape in ((1, 1, 1, 1), (3, 5, 1, 17), (1, 1, 4, 33), (1, 70, 2, 128), (2, 3, 2, 300), (1, 4, 3, 0)):
        check(*states(2, *shape, device=device), backend, str(shape))
    for shape in ((2, 0, 3, 4), (0, 5, 3, 4), (2, 5, 0, 4)):
        outs, lses = ([torch.zeros(s, device=device)] * 2 for s in (shape, (shape[0], shape[2], shape[1])))
        out, lse = merge_attention_states(outs, lses, backend=backend)
        assert out.shape == outs[0].shape and lse.shape == lses[0].shape


def test_any_strides(backend, device):
    for dtype in DTYPES:
        outs, lses = states(3, dtype=dtype, device=device)
        strided = Make().strided
        args = gradient_arguments(outs, lses)
        spread = torch.utils._pytree.tree_map_only(torch.Tensor, strided, args)
        for name, part in (("merge_attention_states", slice(2, 4)), ("merge_attention_states_backward", slice(0, 5))):
            got, expected = run(name, spread[part], backend), run(name, args[part], backend)
            assert all(t.is_contiguous() for t in got)
            # A sum over channels that do not lie side by side may be in another order.
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_nothing_visible(backend, device):
    outs, lses = states(3, device=device)
    out, lse = merge_attention_states(outs, lses, backend=backend)
    assert (lse[:, :, 0] == -INF).all() and (out[:, 0] == 0).all()
    args = gradient_arguments(outs, lses)
    grad_outs, grad_lses = run("merge_attention_states_backward", args, backend)
    assert (grad_outs[:, :, 0] == 0).all() and (grad_lses[:, :, :, 0] == 0).all()


def test_not_a_number_and_infinity_as_in_the_reference(backend, device):
    for count in (2, 6):
        outs, lses = states(count, device=device)
        special = torch.tensor([math.nan, INF, -INF, 1e30, -1e30, 0.0], device=device)
        for i, value in enumerate(special):
            lses[i % count][0, 0, 20 + i] = value
            outs[-1 - i % count][0, 28 + i, 1, i] = value
        lses[0][1, 1, 9] = lses[1][1, 1, 9] = INF
        for name, args in (
            ("merge_attention_states", (outs, lses)),
            ("merge_attention_states_backward", gradient_arguments(outs, lses)),
        ):
            expected = getattr(reference, name)(*args)
            torch.testing.assert_close(run(name, args, backend), expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_part_without_a_visible_key_counts_for_nothing(backend, device):
    """Its lse is -inf, or +inf as some attentions have it; what it holds, be it NaN, reaches nothing."""
    make = Make(device=device)
    for seed, count in enumerate((1, 2, 3, 5, 9)):
        generator = torch.Generator().manual_seed(seed)
        outs, lses = states(count, device=device)
        clean = [t.clone() for t in outs], [t.clone() for t in lses]
        for out, lse, zero, minus in zip(outs, lses, *clean, strict=True):
            hidden = (torch.rand(lse.shape, generator=generator) < 0.4).to(device) | (lse == -INF)
            plus = (torch.rand(lse.shape, generator=generator) < 0.5).to(device)
            lse[hidden], minus[hidden] = -INF, -INF
            lse[hidden & plus] = INF
            out.transpose(1, 2)[hidden], zero.transpose(1, 2)[hidden] = [math.nan, INF][seed % 2], 0
        args = gradient_arguments(*clean)
        nothing = torch.stack(clean[1]).amax(0) == -INF
        assert nothing.any()
        grads = [make.randn(*args[0].shape), make.randn(*args[1].shape)]
        grads[0].transpose(1, 2)[nothing], grads[1][nothing] = math.nan, math.nan  # of rows that no part sees
        got = run("merge_attention_states", (outs, lses), backend)
        expected = run("merge_attention_states", clean, backend)
        assert all(map(torch.equal, got, expected))
        assert (got[0].transpose(1, 2)[nothing] == 0).all() and (got[1][nothing] == -INF).all()
        got, expected = (run("merge_attention_states_backward", (*grads, *a, args[4]), backend)
                         for a in ((outs, lses), clean))  # fmt: skip
        assert all(map(torch.equal, got, expected))
        for out, lse, minus in zip(*got, clean[1], strict=True):
            assert (out.transpose(1, 2)[minus == -INF] == 0).all() and (lse[minus == -INF] == 0).all()
        leaves = [t.clone().requires_grad_() for t in (*outs, *lses)]
        merged = reference.merge_attention_states(leaves[:count], leaves[count:])
        found = torch.autograd.grad(merged, leaves, [grads[0].nan_to_num(), grads[1].nan_to_num()])
        for grad, minus in zip(found, (*clean[1], *clean[1]), strict=True):
            assert ((grad.transpose(1, 2) if grad.dim() == 4 else grad)[minus == -INF] == 0).all()


def test_an_lse_that_is_no_number_makes_its_row_none(backend, device):
    outs, lses = states(3, device=device)
    lses[1][0, 1, 20], lses[0][0, 1, 20], lses[2][0, 1, 20] = math.nan, 0.5, INF
    out, lse = run("merge_attention_states", (outs, lses), backend)
    assert out[0, 20, 1].isnan().all() and lse[0, 1, 20].isnan()
    assert out.isnan().sum() == out.shape[3] and lse.isnan().sum() == 1


def test_merged_attention_is_that_to_all_keys(backend, device):
    q, k, v = (torch.randn(1, n, 2, 32, device=device).requires_grad_() for n in (40, 96, 96))
    whole = cross_attention(q, k, v, return_lse=True)
    pieces = zip(k.split(32, 1), v.split(32, 1), strict=True)
    parts = [cross_attention(q, a, b, return_lse=True) for a, b in pieces]
    with vk.use_backend(backend):
        merged = merge_attention_states(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole)
    weights = [torch.randn_like(t) for t in whole]
    grads = [torch.autograd.grad(r, (q, k, v), weights) for r in (merged, whole)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


def test_float64_runs_the_reference(backend, device):
    outs, lses = states(2, dtype=F64, wide=F64, device=device)
    with pytest.raises(vk.BackendError, match="float64 is only run by the reference"):
        merge_attention_states(outs, lses, backend=backend)


@compiled
def test_direct_calls_in_float64():
    outs, lses = states(3, dtype=F64, wide=F64)
    kernels = torch.ops.vidmem_cpp
    torch.testing.assert_close(
        kernels.merge_attention_states(outs, lses), reference.merge_attention_states(outs, lses), rtol=1e-13, atol=1e-13
    )
    args = gradient_arguments(outs, lses)
    got = kernels.merge_attention_states_backward(*args)
    torch.testing.assert_close(got, reference.merge_attention_states_backward(*args), rtol=1e-12, atol=1e-12)


@compiled
def test_large_results_and_threads():
    """Results past the caches are written past them; threads change nothing."""
    outs, lses = states(2, 1, 2500, 8, 128, torch.float32)  # 10 MB
    args = gradient_arguments(outs, lses)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (*run("merge_attention_states", args[2:4], "cpu"), *run("merge_attention_states_backward", args, "cpu"))
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))
    torch.testing.assert_close(results[0][0], reference.merge_attention_states(outs, lses)[0])


@compiled
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda o, s: (o, s[:1]), "the same length of at least 1, got 2 and 1"),
        (lambda o, s: ([o[0], o[1][:, 1:]], s), r"every one of outs must have shape \("),
        (lambda o, s: ([o[0], o[1].half()], s), "every one of outs must be float32, got float16"),
        (lambda o, s: (o, [s[0], s[1].double()]), "every one of lses must be float32, got float64"),
        (lambda o, s: (o, [s[0], s[1][..., 1:]]), "every one of lses must have shape"),
        (lambda o, s: ([t[0] for t in o], s), r"outs\[0\] must have 4 dimensions"),
        (lambda o, s: ([t.char() for t in o], s), r"outs\[0\] must have a float dtype"),
    ],
)
def test_direct_calls_are_checked(change, message):
    outs, lses = states(2)
    args = gradient_arguments(outs, lses)
    bad = change(outs, lses)
    with pytest.raises(ValueError, match=f"merge_attention_states: {message}|merge_attention_states: .*{message}"):
        torch.ops.vidmem_cpp.merge_attention_states(*bad)
    with pytest.raises(ValueError, match=f"merge_attention_states_backward: .*{message}|backward: {message}"):
        torch.ops.vidmem_cpp.merge_attention_states_backward(*args[:2], *bad, args[4])


@compiled
@pytest.mark.parametrize("at, name", [(0, "grad_out"), (1, "grad_lse"), (4, "lse")])
def test_direct_gradient_calls_are_checked(at, name):
    args = list(gradient_arguments(*states(2)))
    for bad in (args[at][:, :1], args[at].double(), args[at][0]):
        with pytest.raises(ValueError, match=f"backward: {name} must"):
            torch.ops.vidmem_cpp.merge_attention_states_backward(*args[:at], bad, *args[at + 1 :])
