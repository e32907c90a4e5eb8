"""Stand-ins for attention libraries, in PyTorch, and backend choices for a GPU that need not exist."""

from __future__ import annotations

import sys
import types
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vidmem_kernels import _dispatch, cross_attention
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn import library, library_packages, library_sdpa
from vidmem_kernels.cross_attn.samples import PLAIN

MODULES = {
    "FA3": "flash_attn_interface",
    "fa3-fwd": "fa3_fwd_interface",
    "FA4": "flash_attn.cute",
    "flash-attn": "flash_attn.flash_attn_interface",
}


@contextmanager
def pretending(monkeypatch):
    """Pretends to a GPU of a compute capability, and to have exactly the packages named so far."""
    installed = set()
    monkeypatch.setattr(library_packages, "_installed", installed.__contains__)
    library_packages._load.cache_clear()

    def pretend(capability=(9, 0), cudnn=91900, modules=()):
        """`modules`: name -> its functions by name."""
        for module in (library, library_packages, library_sdpa):
            monkeypatch.setattr(module, "capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        for name, functions in dict(modules).items():
            installed.add(name)
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            vars(sys.modules[name]).update(functions)

    yield pretend
    library_packages._load.cache_clear()


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out (B, Lq, H, Dv), not contiguous, and lse (B, H, Lq): sums in float32, weights rounded to be multiplied."""
    dtype = q.dtype
    q, k, v = (t.transpose(1, 2).float() for t in (q, k, v))
    scores = q @ k.mT * scale
    largest = scores.amax(-1, keepdim=True)
    weight = (scores - largest).exp()
    total = weight.sum(-1, keepdim=True)
    out = weight.to(dtype).float() @ v / total
    return out.transpose(1, 2).to(dtype), (largest + total.log()).squeeze(-1)


def attention_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v as FlashAttention computes them."""
    dtype = q.dtype
    grad, q, k, v, out = (t.transpose(1, 2).float() for t in (grad, q, k, v, out))
    weight = (q @ k.mT * scale - lse.unsqueeze(3)).exp()
    shared = (grad * out).sum(3) - (0 if grad_lse is None else grad_lse)
    grad_scores = weight * (grad @ v.mT - shared.unsqueeze(3))
    rounded = grad_scores.to(dtype).float()
    grads = rounded @ k * scale, rounded.mT @ q * scale, weight.to(dtype).float().mT @ grad
    return tuple(g.transpose(1, 2).to(dtype) for g in grads)


def flash_attn_functions(calls: list, name: str) -> dict:
    """The functions of a module of MODULES, as FlashAttention documents them; they note what they are called with."""

    def attend(q, k, v, softmax_scale, causal, with_lse, options):
        calls.append((causal, with_lse, softmax_scale, options))
        out, lse = attention(q, k, v, softmax_scale)
        returned = 3 if name == "flash-attn" else 2
        return (out, lse, None)[:returned] if with_lse else out

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, return_attn_probs=False, **options):
        return attend(q, k, v, softmax_scale, causal, return_attn_probs, options)

    def flash_attn_4_func(q, k, v, softmax_scale=None, causal=False, return_lse=False, **options):
        return attend(q, k, v, softmax_scale, causal, return_lse, options)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq=None, dk=None, dv=None, softmax_scale=None, deterministic=False
    ):
        calls.append(deterministic)
        grads = attention_gradients(dout, q, k, v, out, softmax_lse, softmax_scale)
        for into, grad in zip((dq, dk, dv), grads, strict=True):
            into.copy_(grad)

    return {
        "flash_attn_func": flash_attn_4_func if name == "FA4" else flash_attn_func,
        "_flash_attn_backward": _flash_attn_backward,
    }


def flash_attn_4_gradients(calls: list) -> dict:
    """The function of flash_attn.cute.interface that we call."""

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, deterministic=False, dlse=None, **options
    ):
        calls.append((deterministic, dlse is not None, q.shape[3], v.shape[3], options))
        return attention_gradients(dout, q, k, v, out, lse, softmax_scale, dlse)

    return {"_flash_attn_bwd": _flash_attn_bwd}


def chosen(size=128, dtype=torch.bfloat16, queries=64, keys=256, biased=False, **options) -> _dispatch.Choice:
    """The choice for a call on a GPU that need not be there; `heads` and `options` are the call's."""
    with FakeTensorMode(), _dispatch.recording() as choices:
        q, k, bias = _fakes(size, dtype, queries, keys, options.pop("heads", 2), biased)
        cross_attention(q, k, k, key_bias=bias, **options)
    return choices[-1]


def chosen_gradient(
    size=128,
    dtype=torch.bfloat16,
    queries=64,
    keys=256,
    biased=False,
    heads=2,
    with_lse=False,
    bias_dtype=torch.float32,
    backend="auto",
) -> _dispatch.Choice:
    """The choice for the gradient of a call, likewise. Not by autograd, which needs the GPU of a tensor."""
    with FakeTensorMode(), _dispatch.recording() as choices:
        q, k, bias = _fakes(size, dtype, queries, keys, heads, biased)
        bias = bias.to(bias_dtype) if biased else None
        lse = torch.empty(1, heads, queries, device="cuda")
        options = list({**PLAIN, "scale": 0.1}.values())
        args = torch.empty_like(q), lse if with_lse else None, q, k, k, bias, q, lse, *options[1:]
        OPS["cross_attention_backward"].overload(*args, backend)
    return choices[-1]


def _fakes(size, dtype, queries, keys, heads, biased) -> tuple[Tensor, Tensor, Tensor | None]:
    q, k = (torch.empty(1, n, heads, size, dtype=dtype, device="cuda") for n in (queries, keys))
    return q, k, torch.empty(1, keys, device="cuda") if biased else None
