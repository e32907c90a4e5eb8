"""The benchmarks, one file per family; importing this package registers them."""

from . import cross_attn, linear_attn, sparse_gather, token_merge

__all__ = ["cross_attn", "linear_attn", "sparse_gather", "token_merge"]
