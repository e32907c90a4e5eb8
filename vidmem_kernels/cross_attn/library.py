"""Plain dense attention by the kernels of torch's SDPA, called below SDPA since that drops lse.

They take (B, H, L, D) views of our (B, L, H, D), without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_CUDNN = int(torch.nn.attention.SDPBackend.CUDNN_ATTENTION)


def _heads_first(x: Tensor) -> Tensor:
    x = x.transpose(1, 2)
    if x.device.type == "cpu":
        # In half precision this kernel of torch approximates exp: lse is off by 1e-5.
        x = x.to(torch.float32)
    return x if x.stride(3) == 1 else x.contiguous()


def refuse(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale) -> str | None:
    """Why torch's SDPA cannot compute these results, or None."""
    given = {"key_bias": key_bias, "window": window, "block_index": block_index}
    for name, value in given.items():
        if value is not None:
            return f"{name} is given"
    size, value_size = q.shape[3], v.shape[3]
    if size != value_size:
        return f"D={size} and Dv={value_size} differ"
    if 0 in q.shape or k.shape[1] == 0:
        return "an input is empty"
    if q.dtype == torch.float64:
        return "float64 is for checks and runs the reference"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"needs cpu or cuda tensors, got {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"needs float16 or bfloat16 on cuda, got {str(q.dtype).removeprefix('torch.')}"
    if size % 8 or size > 256:
        return f"D={size} is not a multiple of 8 up to 256"
    if torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs compute capability 8.0 or later"
    return None


def _flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    else:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
    return kernel(q, k, v, scale=scale)[:2]


def cross_attention(
    q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> tuple[Tensor, Tensor]:
    """The forward pass: flash, or on CUDA cuDNN where torch itself prefers it."""
    dtype = q.dtype
    q, k, v = map(_heads_first, (q, k, v))
    if q.device.type == "cuda" and torch._fused_sdp_choice(q, k, v, scale=scale) == _CUDNN:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
        lse = lse.reshape(q.shape[:3])  # (B, H, Lq, 1)
    else:
        out, lse = _flash(q, k, v, scale)
    return out.transpose(1, 2).to(dtype).contiguous(), lse.contiguous()


def refuse_backward(grad_out, grad_lse, q, k, v, key_bias, out, lse, *options) -> str | None:
    """Why torch's SDPA cannot compute these gradients, or None."""
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


def cross_attention_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index,
    block_size, scale,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward pass by flash, whichever kernel ran forward."""
    dtype = q.dtype
    q, k, v, out, grad = map(_heads_first, (q, k, v, out, grad_out))
    grad_q, grad_k, grad_v = _flash_backward(grad, q, k, v, out, lse, scale)
    if grad_lse is not None:
        # SDPA has no gradient of lse. With weights P it adds scale * grad_lse * (P k) to the gradient of q, and
        # P^T (scale * grad_lse * q) to that of k: the result, and the gradient of v, of an attention to k.
        factor = grad_lse.unsqueeze(3) * scale
        seen, _ = _flash(q, k, k, scale)
        grad_q = grad_q + factor * seen
        grad_k = grad_k + _flash_backward((factor * q).to(q.dtype), q, k, k, seen, lse, scale)[2]
    grads = (g.transpose(1, 2).to(dtype).contiguous() for g in (grad_q, grad_k, grad_v))
    return *grads, lse.new_empty(0)
