"""Plain dense attention by libraries that return lse too: FlashAttention's packages, and the kernels of torch's SDPA,
called below SDPA since that drops lse. The latter take (B, H, L, D) views of our (B, L, H, D), without a copy.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .._checks import names
from .._op import Library
from .._refusals import refuse_float64

_HALF = (torch.bfloat16, torch.float16)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def refuse(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale) -> str | None:
    """Why none of the libraries can compute these results, or None."""
    given = {"key_bias": key_bias, "window": window, "block_index": block_index}
    for name, value in given.items():
        if value is not None:
            return f"{name} is given"
    size, value_size = q.shape[3], v.shape[3]
    if size != value_size:
        return f"D={size} and Dv={value_size} differ"
    if 0 in q.shape or k.shape[1] == 0:
        return "an input is empty"
    if why := refuse_float64(q):
        return why
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs cpu or cuda tensors, got {q.device.type}"
    if q.dtype not in _HALF:
        return f"needs {names(_HALF)} on cuda, got {names([q.dtype])}"
    if size % 8 or size > 256:
        return f"D={size} is not a multiple of 8 up to 256"
    if _capability(q.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None


# --- FlashAttention's packages ---


@cache
def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@cache
def _load(module: str) -> tuple[Callable[..., tuple[Tensor, ...]] | None, str | None]:
    """(flash_attn_func, None), or (None, why not): a package that does not load must not break the other libraries."""
    try:
        function = importlib.import_module(module).flash_attn_func
    except Exception as error:
        return None, f"{module} does not load: {str(error).split(chr(10))[0]}"
    if "return_attn_probs" not in inspect.signature(function).parameters:
        return None, f"{module} is too old: flash_attn_func has no return_attn_probs"
    return function, None


def _package(
    name: str, module: str, dtypes: tuple[torch.dtype, ...] = _HALF, only: tuple[int, int] | None = None
) -> Library:
    """The library whose `module` has flash_attn_func; for GPUs of compute capability `only`, if given."""

    def refuse_call(q, *rest) -> str | None:
        if not _installed(module):
            return f"{module} is not installed"
        if q.dtype not in dtypes:
            return f"needs {names(dtypes)}, got {names([q.dtype])}"
        if only is not None and _capability(q.device) != only:
            return f"needs compute capability {only[0]}.{only[1]}"
        return _load(module)[1]

    def call(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
        out, lse = _load(module)[0](q, k, v, softmax_scale=scale, return_attn_probs=True)[:2]
        return out.contiguous(), lse.contiguous()

    return Library(name, ("cuda",), call, refuse_call)


# --- torch's SDPA ---


def _heads_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if x.device.type == "cpu":
        # In half precision this kernel of torch approximates exp: lse is off by 1e-5.
        x = x.to(torch.float32)
    return x if x.stride(3) == 1 else x.contiguous()


def _heads_second(out: Tensor, dtype: torch.dtype) -> Tensor:
    return out.transpose(1, 2).to(dtype).contiguous()


def _refuse_cudnn(q, k, *rest) -> str | None:
    """Where torch itself prefers cuDNN to flash, and that is right."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "torch.backends.cuda.enable_cudnn_sdp(False) was called"
    if _capability(q.device) not in ((9, 0), (10, 0), (10, 3)):
        return "needs compute capability 9.0, 10.0 or 10.3"
    version = torch.backends.cudnn.version() or 0
    if version <= 91500:  # until then wrong for some lengths that 128 does not divide (pytorch/pytorch 169849)
        return f"needs cuDNN 9.15.1, got {version}"
    if q.shape[3] > 128:
        return f"D={q.shape[3]} is over 128"
    return "a length is 1" if 1 in (q.shape[1], k.shape[1]) else None


def _cudnn(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
    dtype = q.dtype
    q, k, v = map(_heads_first, (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    return _heads_second(out, dtype), lse.reshape(q.shape[:3]).contiguous()  # from (B, H, Lq, 1)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q, k, v, scale=scale)[:2]


def _flash(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
    dtype = q.dtype
    out, lse = _flash_forward(*map(_heads_first, (q, k, v)), scale)
    return _heads_second(out, dtype), lse.contiguous()


FORWARD = (
    _package("FA3", "flash_attn_interface", only=(9, 0)),
    _package("fa3-fwd", "fa3_fwd_interface", (torch.bfloat16,), only=(9, 0)),
    Library("SDPA cuDNN", ("cuda",), _cudnn, _refuse_cudnn),
    _package("flash-attn", "flash_attn"),
    Library("SDPA flash", ("cpu", "cuda"), _flash, lambda *args: None),
)

# --- the gradient: by flash, whichever library ran forward ---


def refuse_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> str | None:
    """Why no library can compute these gradients, or None."""
    return refuse(q, k, v, key_bias, *options)


@contextmanager
def _deterministic() -> Iterator[None]:
    """Without this, flash sums the gradient of q by atomics, in any order."""
    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill and was
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _flash_backward(grad, q, k, v, out, lse, scale) -> tuple[Tensor, ...]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: never read
    with _deterministic():
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed,
            scale=scale,
        )  # fmt: skip


def _cross_attention_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index,
    block_size, scale,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = q.dtype
    q, k, v, out, grad = map(_heads_first, (q, k, v, out, grad_out))
    grad_q, grad_k, grad_v = _flash_backward(grad, q, k, v, out, lse, scale)
    if grad_lse is not None:
        # SDPA has no gradient of lse. With weights P it adds scale * grad_lse * (P k) to the gradient of q, and
        # P^T (scale * grad_lse * q) to that of k: the result, and the gradient of v, of an attention to k.
        factor = grad_lse.unsqueeze(3) * scale
        seen, _ = _flash_forward(q, k, k, scale)
        grad_q = grad_q + factor * seen
        grad_k = grad_k + _flash_backward((factor * q).to(q.dtype), q, k, k, seen, lse, scale)[2]
    return *(_heads_second(g, dtype) for g in (grad_q, grad_k, grad_v)), lse.new_empty(0)


BACKWARD = (Library("SDPA flash", ("cpu", "cuda"), _cross_attention_backward, lambda *args: None),)
