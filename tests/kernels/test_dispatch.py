"""How a backend is chosen, refused and explained."""

import os
import shutil
import threading

import pytest
import torch
from backend_helpers import compiled

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _extension

BANK = torch.randn(1, 4, 3)
INDEX = torch.tensor([[0, 3]])


def chosen(*args, **kwargs):
    return [choice.backend for choice in vk.explain(vk.gather_tokens, BANK, INDEX, *args, **kwargs)]


@compiled
def test_auto_takes_the_compiled_kernel():
    assert chosen() == ["cpu"]


def test_argument_beats_context_beats_environment(monkeypatch):
    monkeypatch.setenv("VIDMEM_BACKEND", "reference")
    assert chosen() == ["reference"]
    if _extension.module is not None:
        with vk.use_backend("cpu"):
            assert chosen() == ["cpu"]
            assert chosen(backend="reference") == ["reference"]
    with vk.use_backend("auto"):
        assert chosen() == [_dispatch.LADDERS["cpu"][0] if _extension.module else "reference"]


def test_context_is_restored_and_belongs_to_its_thread():
    seen = []
    with pytest.raises(KeyError), vk.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_dispatch.requested()))
        thread.start()
        thread.join()
        assert _dispatch.requested() == "reference"
        raise KeyError
    assert seen == ["auto"] and _dispatch.requested() == "auto"


@pytest.mark.parametrize("name", ["tritn", "CPU", ""])
def test_unknown_backend_fails_at_once(name):
    with pytest.raises(ValueError, match="use_backend: name must be one of auto, cpu, triton, cuda, library, ref"):
        vk.use_backend(name).__enter__()
    with pytest.raises(ValueError, match=f"backend must be one of .*, got {name!r}"):
        vk.gather_tokens(BANK, INDEX, backend=name)


def test_unknown_backend_in_environment(monkeypatch):
    monkeypatch.setenv("VIDMEM_BACKEND", "refrence")
    with pytest.raises(ValueError, match="VIDMEM_BACKEND must be .* got 'refrence' .did you mean 'reference'"):
        vk.gather_tokens(BANK, INDEX)


def test_explicit_backend_never_falls_back():
    with pytest.raises(vk.BackendError, match="gather_tokens: backend 'cuda' cannot run this call: needs cuda tensors"):
        vk.gather_tokens(BANK, INDEX, backend="cuda")


@compiled
def test_backward_uses_the_backend_of_the_forward():
    bank = BANK.clone().requires_grad_()
    out = vk.gather_tokens(bank, INDEX, backend="reference")
    with _dispatch.recording() as choices:
        out.sum().backward()
    assert [(c.op, c.backend) for c in choices] == [("scatter_add_tokens", "reference")]


@compiled
def test_context_is_compiled_in_and_guarded():
    function = torch.compile(lambda b, i: vk.gather_tokens(b, i), fullgraph=True, backend="aot_eager")
    for name in ("reference", "cpu", "reference"):
        with vk.use_backend(name), _dispatch.recording() as choices:
            function(BANK, INDEX)
        assert choices[-1].backend == name


@compiled
def test_explain_computes_nothing_and_says_why_not():
    huge = torch.empty(1, 1, 1).expand(1, 1 << 40, 1 << 10)  # nobody could gather from a copy of this
    (choice,) = vk.explain(vk.gather_tokens, huge, INDEX, backend="reference")
    assert (choice.op, choice.device, choice.backend) == ("gather_tokens", "cpu", "reference")
    (choice,) = vk.explain(vk.gather_tokens, BANK, INDEX)
    assert str(choice).splitlines()[0] == "gather_tokens on cpu: cpu"


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler")
def test_inductor_compiles_the_op_whole():
    """One run through the real compiler; the contract tests trace all ops."""

    def loss(bank):
        return (vk.gather_tokens(bank * 2, INDEX) ** 2).sum()

    eager, traced = BANK.clone().requires_grad_(), BANK.clone().requires_grad_()
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, dynamic=True)(traced).backward()
    torch.testing.assert_close(traced.grad, eager.grad)
