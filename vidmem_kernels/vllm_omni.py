"""The attention that vLLM-Omni finds by the entry point "vidmem" of the group "vllm_omni.sparse_attn".

It is selected as the kernel of the backend SPARSE_ATTN: `extra={"backend": "vidmem", "params": {"topk": 0.25}}`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._checks import check_number
from .foreign_attention import attend
from .sparse_gather.api import topk_blocks

_OP = "vidmem_kernels.vllm_omni.attention"
_BLOCK_SIZE = (128, 64)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: Mapping[str, Any] | None = None,
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Computes dense or sparse attention by `cross_attention`, as `params` specify.

    Args:
        query: (B, L, H, D).
        key: (B, L, Hk, D); Hk must divide H.
        value: (B, L, Hk, D).
        params: `topk`, the number of key blocks that a query block sees, or their share in (0, 1); `block_size`,
            (queries, keys) per block, default (128, 64); `window`, (left, right) in frames, which requires
            `patches_per_frame`; `num_sinks`, the first keys, which all queries see; `attn_mask` (B or 1, H or 1, 1, L)
            over keys. Other entries, which hold vLLM-Omni's state of the forward pass, are ignored.
        is_causal: must be False.
        softmax_scale: factor of the scores; default D**-0.5.

    Returns:
        (B, L, H, D).

    Raises:
        ValueError, TypeError: an argument is not supported, or has a wrong shape or dtype.

    Source: the plugin interface of vLLM-Omni's sparse attention dispatcher, pull request 4493 and RFC 4661.
    """
    params = params or {}
    gqa = key.dim() == 4 and query.dim() == 4 and key.shape[2] != query.shape[2]
    if gqa and key.shape[2] and query.shape[2] % key.shape[2] == 0:
        key, value = (x.repeat_interleave(query.shape[2] // x.shape[2], 2) for x in (key, value))
    features = {name: params[name] for name in ("num_sinks",) if name in params}
    if params.get("topk") is not None:
        block_size = tuple(params.get("block_size") or _BLOCK_SIZE)
        topk = _count(params["topk"], -(-key.shape[1] // block_size[1]))
        features |= {
            "block_index": topk_blocks(query, key, block_size=block_size, topk=topk),
            "block_size": block_size,
        }
    if params.get("window") is not None:
        frame = params.get("patches_per_frame")
        if frame is None:
            raise ValueError(f"{_OP}: params must have patches_per_frame if they have window, got none")
        frame = int(frame if not isinstance(frame, Tensor) else frame.reshape(-1)[0])
        times = [torch.arange(x.shape[1], device=x.device) // frame for x in (query, key)]
        features |= {"window": tuple(params["window"]), "q_time": times[0], "k_time": times[1]}
    return attend(
        _OP, query, key, value, params.get("attn_mask"), is_causal=is_causal, scale=softmax_scale, features=features
    )


def _count(topk: float, blocks: int) -> int:
    check_number(_OP, "topk", topk)
    if isinstance(topk, float):
        if not 0 < topk < 1:
            raise ValueError(f"{_OP}: topk must be a count or a share in (0, 1), got {topk}")
        return max(1, math.ceil(topk * blocks))
    return min(int(topk), blocks)


attention.capabilities = {"supports_attention_mask": True}
