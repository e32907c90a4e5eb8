"""Fused kernels for video models with long memory: token merging, sparse gathering, linear and cross-attention."""

from . import _requirements

_requirements.check()

from ._dispatch import BackendError, Choice, explain, recording, use_backend
from .cross_attn import ops as _cross_attn_ops  # noqa: F401  (registers its ops)
from .cross_attn.api import cross_attention, merge_attention_states
from .linear_attn import ops as _linear_attn_ops  # noqa: F401  (registers its ops)
from .linear_attn.api import LinearAttentionState, linear_attention
from .modules import LinearAttention, MemoryCrossAttention
from .sparse_gather import ops as _sparse_gather_ops  # noqa: F401  (registers its ops)
from .sparse_gather.api import (
    QuantizedRows,
    SelectResult,
    gather_tokens,
    quantize_rows,
    scatter_add_tokens,
    select_tokens,
    topk_blocks,
)
from .sparse_gather.memory_bank import MemoryBank
from .sparse_gather.memory_file import MemoryFileError
from .token_merge import ops as _token_merge_ops  # noqa: F401  (registers its ops)
from .token_merge.api import (
    MergePlan,
    MergeResult,
    match_neighbors,
    match_tokens,
    merge_tokens,
    unmerge_tokens,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Choice",
    "LinearAttention",
    "MemoryBank",
    "MemoryCrossAttention",
    "MemoryFileError",
    "MergePlan",
    "MergeResult",
    "QuantizedRows",
    "SelectResult",
    "LinearAttentionState",
    "cross_attention",
    "explain",
    "gather_tokens",
    "quantize_rows",
    "linear_attention",
    "merge_attention_states",
    "match_neighbors",
    "match_tokens",
    "merge_tokens",
    "recording",
    "scatter_add_tokens",
    "select_tokens",
    "topk_blocks",
    "unmerge_tokens",
    "use_backend",
]
