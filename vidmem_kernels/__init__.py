"""Fused kernels for video models with long memory: token merging, sparse gathering, linear and cross-attention."""

from ._dispatch import BackendError, Choice, explain, use_backend
from .linear_attn import ops as _linear_attn_ops  # noqa: F401  (registers its ops)
from .linear_attn.api import LinearAttentionState, linear_attention
from .sparse_gather import ops as _sparse_gather_ops  # noqa: F401  (registers its ops)
from .sparse_gather.api import QuantizedRows, gather_tokens, quantize_rows, scatter_add_tokens
from .sparse_gather.memory_bank import MemoryBank
from .sparse_gather.memory_file import MemoryFileError

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Choice",
    "MemoryBank",
    "MemoryFileError",
    "QuantizedRows",
    "LinearAttentionState",
    "explain",
    "gather_tokens",
    "quantize_rows",
    "linear_attention",
    "scatter_add_tokens",
    "use_backend",
]
