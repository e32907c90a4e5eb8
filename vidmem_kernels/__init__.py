"""Fused kernels for video models with long memory: token merging, sparse gathering, linear and cross-attention."""

from ._dispatch import BackendError, Choice, explain, use_backend
from .sparse_gather import ops as _sparse_gather_ops  # noqa: F401  (registers its ops)
from .sparse_gather.api import gather_tokens, scatter_add_tokens

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Choice",
    "explain",
    "gather_tokens",
    "scatter_add_tokens",
    "use_backend",
]
