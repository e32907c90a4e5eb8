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


def cross_attention(
    q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale
) -> tuple[Tensor, Tensor]:
    """The forward pass: flash on the CPU, on CUDA cuDNN where torch itself prefers it, else flash."""
    q, k, v = map(_heads_first, (q, k, v))
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif torch._fused_sdp_choice(q, k, v, scale=scale) == _CUDNN:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
        lse = lse.view(q.shape[:3])  # (B, H, Lq, 1)
    else:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def refuse_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index,
    block_size, scale,
) -> str | None:  # fmt: skip
    """Why torch's SDPA cannot compute these gradients, or None."""
    if grad_lse is not None:
        return "lse has a gradient"
    return refuse(q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale)


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


def cross_attention_backward(
    grad_out, grad_lse, q, k, v, key_bias, out, lse, num_sinks, q_time, k_time, window, block_index,
    block_size, scale,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The backward pass by flash, whichever kernel ran forward."""
    q, k, v, out, grad = map(_heads_first, (q, k, v, out, grad_out))
    aten = torch.ops.aten
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, False, scale=scale
        )
    else:
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)  # of dropout: never read
        with _deterministic():
            grads = aten._scaled_dot_product_flash_attention_backward(
                grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, seed, seed[:0],
                scale=scale,
            )  # fmt: skip
    return *(g.transpose(1, 2).contiguous() for g in grads), lse.new_empty(0)
