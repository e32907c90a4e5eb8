"""Attention by the kernels of PyTorch's SDPA, called directly because SDPA does not return lse.

They take (B, H, L, D) views of our (B, L, H, D) tensors, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .._determinism import must_be_deterministic
from . import library_bias as bias

HALF = (torch.bfloat16, torch.float16)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a GPU."""
    return torch.cuda.get_device_capability(device)


def _heads_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if x.device.type == "cpu":
        # In half precision this kernel approximates exp, with an error of 1e-5 in lse.
        x = x.to(torch.float32)
    return x if x.stride(3) == 1 else x.contiguous()


def _heads_second(out: Tensor, dtype: torch.dtype) -> Tensor:
    return out.transpose(1, 2).to(dtype).contiguous()


# --- cuDNN ---


def _refuse_cudnn(q: Tensor, k: Tensor) -> str | None:
    """Why cuDNN cannot run a call, or None; the limits are those within which PyTorch prefers it to flash."""
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return "is disabled by torch.backends.cuda.enable_cudnn_sdp(False)"
    if capability(q.device) not in ((9, 0), (10, 0), (10, 3)):
        return "needs compute capability 9.0, 10.0 or 10.3"
    version = torch.backends.cudnn.version() or 0
    if version <= 91500:  # earlier versions are wrong for some lengths not divisible by 128 (pytorch/pytorch 169849)
        return f"needs cuDNN 9.15.1, got {version}"
    if q.shape[3] > 128:
        return f"needs D of at most 128, got {q.shape[3]}"
    if k.shape[0] > 1 and k.stride(0) == 0:
        return "does not support keys shared by the batch, which have stride 0"  # which its graph does not accept
    return "needs sequences longer than 1" if 1 in (q.shape[1], k.shape[1]) else None


def refuse_cudnn(q, k, v, key_bias, *options) -> str | None:
    """Why cuDNN cannot run a call, or None."""
    why = _refuse_cudnn(q, k)
    if why is None and key_bias is not None:
        if capability(q.device) != (9, 0):  # the only one measured
            return "a key bias needs compute capability 9.0"
        why = bias.refuse(q, options[-1], (128,))
    return why


def avoid_cudnn(q, k, v, key_bias, *options) -> str | None:
    """Why other backends are faster than cuDNN, or None."""
    return None if key_bias is None else bias.avoid(q, k)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Results for (B, L, H, D) tensors; the shape of lse depends on the version of PyTorch."""
    heads_first = map(_heads_first, (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, True, scale=scale)[:2]
    return _heads_second(out, q.dtype), lse


def cudnn(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
    """(out, lse) by cuDNN."""

    def forward(q, k, v):
        out, lse = _cudnn_forward(q, k, v, scale)
        return out, lse.reshape(q.shape[0], q.shape[2], q.shape[1]).contiguous()

    return forward(q, k, v) if key_bias is None else bias.forward(forward, q, k, v, key_bias, scale, 192)


@cache
def _cudnn_lse_dim(device: torch.device, dtype: torch.dtype) -> int:
    """Whether cuDNN's forward returns, and its backward takes, lse as (B, H, Lq) or (B, H, Lq, 1): versions differ."""
    x = torch.zeros(1, 128, 1, 64, dtype=dtype, device=device)
    return _cudnn_forward(x, x, x, 1.0)[1].dim()


def refuse_cudnn_backward(grad_out, grad_lse, q, k, v, key_bias, *rest) -> str | None:
    """Why cuDNN cannot compute these gradients, or None."""
    if key_bias is not None:
        return "does not support key_bias"
    if must_be_deterministic():
        return "is not deterministic, which torch.use_deterministic_algorithms(True) requires"
    return _refuse_cudnn(q, k)


def avoid_second_pass(grad_out, grad_lse, *rest) -> str | None:
    """Why our kernel is faster: these libraries need a second forward and backward for a gradient of lse."""
    if grad_lse is not None:
        return "slower: the gradient of lse needs a second pass"
    return None


def _cudnn_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float):
    """Gradients of (B, H, L, D) tensors; `out` and `lse` (natural logarithm) may come from another library."""
    if _cudnn_lse_dim(q.device, q.dtype) == 4:
        lse = lse.unsqueeze(3)
    unused = torch.empty((), dtype=torch.int64, device=q.device)  # seed and offset of dropout: never read
    return torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.contiguous(), unused, unused, None, None, None, q.shape[2], k.shape[2], 0.0, False,
        scale=scale,
    )  # fmt: skip


def cudnn_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> Gradients:
    """Gradients by cuDNN."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[0]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        return _cudnn_gradients(grad, q, k, v, out, lse, scale)

    # The gradient of an expanded tensor has strides of 0, which cuDNN's graph does not accept.
    return _gradients(forward, backward, grad_out.contiguous(), grad_lse, q, k, v, out.contiguous(), lse, scale)


# --- flash ---


def refuse_flash(q, k, v, key_bias, *options) -> str | None:
    """Why PyTorch's flash cannot run a call, or None."""
    return None if key_bias is None else "does not support key_bias"


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q, k, v, scale=scale)[:2]


def flash(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
    """(out, lse) by PyTorch's flash."""
    dtype = q.dtype
    out, lse = _flash_forward(*map(_heads_first, (q, k, v)), scale)
    return _heads_second(out, dtype), lse.contiguous()


def refuse_flash_backward(grad_out, grad_lse, q, k, v, key_bias, *rest) -> str | None:
    """Why PyTorch's flash cannot compute these gradients, or None."""
    return refuse_flash(q, k, v, key_bias)


def avoid_flash_backward(grad_out, grad_lse, q, *rest) -> str | None:
    """Why other backends are faster than PyTorch's flash, or None."""
    if q.device.type == "cuda" and must_be_deterministic():
        return "its deterministic kernel is slower than ours"
    return avoid_second_pass(grad_out, grad_lse) if q.device.type == "cuda" else None


def _flash_gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float):
    """Gradients by flash; on a GPU the kernel itself follows PyTorch's determinism flag (unless warn_only)."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: never read
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed,
        scale=scale,
    )  # fmt: skip


def flash_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> Gradients:
    """Gradients by PyTorch's flash."""

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _flash_forward(q, k, v, scale)[0]

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        return _flash_gradients(grad, q, k, v, out, lse, scale)

    return _gradients(forward, backward, grad_out, grad_lse, q, k, v, out, lse, scale)


def _gradients(
    forward: Callable[..., Tensor],
    backward: Callable[..., tuple[Tensor, ...]],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> Gradients:
    """Gradients by functions of (B, H, L, D) tensors that do not know lse."""
    dtype = q.dtype
    q, k, v, out, grad = map(_heads_first, (q, k, v, out, grad_out))
    grad_q, grad_k, grad_v = backward(grad, q, k, v, out)
    if grad_lse is not None:
        # With weights P, lse adds scale * grad_lse * (P k) to the gradient of q, and P^T (scale * grad_lse * q) to
        # that of k: the result, and the gradient of v, of an attention to k.
        factor = grad_lse.unsqueeze(3) * scale
        seen = forward(q, k, k)
        grad_q = grad_q + factor * seen
        grad_k = grad_k + backward((factor * q).to(q.dtype), q, k, k, seen)[2]
    return *(_heads_second(g, dtype) for g in (grad_q, grad_k, grad_v)), lse.new_empty(0)
