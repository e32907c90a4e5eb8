"""The libraries that compute the gradient of cross-attention: which one runs, and what it is called with."""

import warnings

import pytest
import torch
from library_helpers import (
    MODULES,
    attention,
    attention_gradients,
    chosen_gradient,
    flash_attn_4_gradients,
    flash_attn_functions,
)

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn import library, library_sdpa
from vidmem_kernels.cross_attn.samples import PLAIN
from vidmem_kernels.testing import FLAGS, determinism

BACKWARD = {one.name: one for one in library.BACKWARD}
FA3 = {MODULES["FA3"]: flash_attn_functions([], "FA3")}


def fa4(calls=None):
    calls = [] if calls is None else calls
    return {
        MODULES["FA4"]: flash_attn_functions(calls, "FA4"),
        "flash_attn.cute.interface": flash_attn_4_gradients(calls),
    }


def of_gradient(**options):
    choice = chosen_gradient(**options)
    assert choice.op == "cross_attention_backward"
    return choice.library or choice.backend


def test_order(machine):
    """cuDNN, which is not deterministic; then packages, then torch's flash where it is the faster one, else ours."""
    machine()
    assert of_gradient() == of_gradient(dtype=torch.float16) == "SDPA cuDNN"
    assert of_gradient(size=256) == of_gradient(queries=1) == "SDPA flash"
    machine(modules=fa4() | FA3)
    assert of_gradient() == "SDPA cuDNN"
    assert of_gradient(size=256) == "FA4"
    machine((8, 0))
    assert of_gradient() == "SDPA flash"


def test_order_where_runs_must_be_equal(machine):
    machine()
    with determinism("on"):
        choice = chosen_gradient()
        assert choice.backend == "triton"  # not flash made deterministic, which takes longer
        assert choice.refused["library"] == "its deterministic kernel is slower than ours"
        assert of_gradient(backend="library") == "SDPA flash"  # asked for, it runs
        reasons = chosen_gradient(backend="library").refused
        assert reasons["library SDPA cuDNN"].startswith(
            "is not deterministic, which torch.use_deterministic_algorithms"
        )
        machine(modules=FA3)
        assert of_gradient() == "FA3"
        machine(modules=fa4())
        assert of_gradient() == "FA4"
        machine((8, 0))
        assert of_gradient() == "triton"
    with determinism("warn only"):  # as torch's own attention has it
        assert of_gradient() == "SDPA flash"
        machine()
        assert of_gradient() == "SDPA cuDNN"


def test_order_with_a_gradient_of_lse(machine):
    """Only FA4 and our kernel take it along."""
    machine(modules=FA3)
    choice = chosen_gradient(with_lse=True)
    assert (choice.backend, choice.refused["library"]) == ("triton", "slower: the gradient of lse needs a second pass")
    assert of_gradient(with_lse=True, backend="library") == "SDPA cuDNN"
    machine(modules=fa4())
    assert of_gradient(with_lse=True) == "FA4"
    machine((8, 0))
    assert of_gradient(with_lse=True) == "triton"


def test_slow_libraries_are_faster_than_the_reference(machine, monkeypatch):
    machine()
    monkeypatch.setattr(_dispatch, "_triton_missing", lambda: "triton is not installed")
    choice = chosen_gradient(with_lse=True)
    assert (choice.backend, choice.library) == ("library", "SDPA cuDNN")
    assert "library" not in choice.refused and "library SDPA cuDNN" not in choice.refused


def test_explain_goes_on_to_the_gradient():
    q, k, v = (torch.randn(1, 9, 2, 8, requires_grad=True) for _ in range(3))
    forward, backward = vk.explain(vk.cross_attention, q, k, v, backend="library")
    assert str(forward) == "cross_attention on cpu: library (SDPA flash)"
    assert str(backward) == "cross_attention_backward on cpu: library (SDPA flash)"
    assert q.grad is None
    assert len(vk.explain(vk.cross_attention, *(t.detach() for t in (q, k, v)), backend="library")) == 1


def arguments(dtype, with_lse, seed=0):
    """Of cross_attention_backward, on the CPU."""
    make = testing.Make(dtype, seed=seed)
    q, k, v = make.randn(2, 37, 3, 16), make.randn(2, 53, 3, 16), make.randn(2, 53, 3, 16)
    options = list({**PLAIN, "scale": 0.3}.values())
    out, lse = attention(q, k, v, 0.3)
    grad_lse = make.randn(2, 3, 37, dtype=torch.float32) if with_lse else None
    return make.randn(2, 37, 3, 16), grad_lse, q, k, v, None, out.contiguous(), lse, *options[1:]


def assert_right(got, args, what):
    op = OPS["cross_attention_backward"]
    yardstick = testing.yardstick(op.name, args)(*args)
    testing.assert_within_budget(got, yardstick, op.reference(*testing.to_float64(args)), what)
    assert all(t.is_contiguous() for t in got)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["FA3", "FA4", "FA4 with lse"])
def test_packages_are_called_as_documented(machine, name, dtype, flag):
    name, with_lse = name.split()[0], "lse" in name
    calls = []
    machine(modules={MODULES["FA3"]: flash_attn_functions(calls, "FA3"), **fa4(calls)})
    args = arguments(dtype, with_lse)
    with determinism(flag), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert BACKWARD[name].refuse(*args) is None
        got = BACKWARD[name].call(*args)
    assert calls == [flag == "on"] if name == "FA3" else calls == [(flag == "on", with_lse, 16, 16, {})]
    assert [str(w.message)[:30] for w in told] == [f"{name}'s gradient is not determin"[:30]] * (flag == "warn only")
    assert_right(got, args, name)


def test_what_packages_refuse(machine):
    machine((9, 0), modules=FA3)
    args = arguments(torch.bfloat16, True)
    assert BACKWARD["FA3"].refuse(*args) == "does not support a gradient of lse"
    assert BACKWARD["FA4"].refuse(*args) == "flash_attn.cute is not installed"
    machine(modules=fa4() | {"flash_attn.cute.interface": {"_flash_attn_bwd": lambda q, k, v: None}})
    assert BACKWARD["FA4"].refuse(*args) == "flash_attn.cute.interface is too old: _flash_attn_bwd has no dlse"


@pytest.fixture(params=[3, 4], ids=["lse (B, H, Lq)", "lse (B, H, Lq, 1)"])
def cudnn_calls(request):
    """cuDNN's operators of torch on the CPU, with both forms of lse that versions of torch have; what backward got."""
    calls = []
    column = slice(None) if request.param == 3 else None

    def forward(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
        assert bias is None and with_lse
        out, lse = attention(*(t.transpose(1, 2) for t in (q, k, v)), scale)
        nothing = [torch.empty(0) for _ in range(2)]
        lse = lse if column == slice(None) else lse.unsqueeze(3)
        return out.transpose(1, 2), lse, *nothing, q.shape[2], k.shape[2], *nothing, torch.empty(0)

    def backward(
        grad,
        q,
        k,
        v,
        out,
        lse,
        seed,
        offset,
        bias,
        ends_q,
        ends_k,
        longest_q,
        longest_k,
        dropout,
        causal,
        *,
        scale=None,
    ):
        assert lse.dim() == request.param and lse.is_contiguous() and lse.dtype == torch.float32
        assert (longest_q, longest_k, dropout, causal) == (q.shape[2], k.shape[2], 0.0, False)
        assert 0 not in grad.stride() and all(t.stride(3) == 1 for t in (grad, q, k, v, out))
        calls.append(scale)
        lse = lse.reshape(lse.shape[:3])
        grads = attention_gradients(*(t.transpose(1, 2) for t in (grad, q, k, v, out)), lse, scale)
        return tuple(g.transpose(1, 2) for g in grads)

    implementation = torch.library.Library("aten", "IMPL")
    implementation.impl("_scaled_dot_product_cudnn_attention", forward, "CPU")
    implementation.impl("_scaled_dot_product_cudnn_attention_backward", backward, "CPU")
    library_sdpa._cudnn_lse_dim.cache_clear()
    yield calls
    library_sdpa._cudnn_lse_dim.cache_clear()
    implementation._destroy()


@pytest.mark.parametrize("with_lse", [False, True])
def test_cudnn_is_called_with_what_it_takes(machine, cudnn_calls, with_lse):
    """After whichever library ran forward: its lse is the natural logarithm of the sums."""
    machine()
    args = arguments(torch.float32, with_lse)
    q, k, v = args[2:5]
    got = library_sdpa.cudnn(q, k, v, None, *args[8:])
    torch.testing.assert_close(got, attention(q, k, v, 0.3))
    assert all(t.is_contiguous() for t in got)
    assert_right(BACKWARD["SDPA cuDNN"].call(*args), args, "cuDNN")
    assert cudnn_calls == [0.3] * (1 + with_lse)
    expanded = args[0][:1, :1, :1, :1].expand(2, 37, 3, 16)
    both = (BACKWARD["SDPA cuDNN"].call(grad, *args[1:]) for grad in (expanded, expanded.contiguous()))
    assert all(map(torch.equal, *both))


def test_flash_leaves_the_flag_alone(monkeypatch):
    """torch's kernel reads it: off it is the fast one, on the deterministic one."""
    args, seen = arguments(torch.float32, False), []
    gradients = library_sdpa._flash_gradients

    def noting(*args):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return gradients(*args)

    monkeypatch.setattr(library_sdpa, "_flash_gradients", noting)
    for flag in FLAGS:
        with determinism(flag):
            assert_right(BACKWARD["SDPA flash"].call(*args), args, "flash")
    assert seen == [False, True, True]
