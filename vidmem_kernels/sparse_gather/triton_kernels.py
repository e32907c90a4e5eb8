"""Launch functions of the family's Triton kernels, by the names that ops.py gives."""

from .triton_gather import launch_gather_tokens_fwd, launch_scatter_add_tokens_fwd
from .triton_quantize import launch_quantize_rows_bwd, launch_quantize_rows_fwd
from .triton_select import launch_select_tokens_fwd
from .triton_topk import launch_topk_blocks_fwd

__all__ = [
    "launch_gather_tokens_fwd",
    "launch_quantize_rows_bwd",
    "launch_quantize_rows_fwd",
    "launch_scatter_add_tokens_fwd",
    "launch_select_tokens_fwd",
    "launch_topk_blocks_fwd",
]
