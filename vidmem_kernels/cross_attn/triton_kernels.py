"""Launch functions of the family's Triton kernels, by the names that ops.py gives."""

from .triton_attention import launch_cross_attention_fwd
from .triton_attention_grad import launch_cross_attention_bwd
from .triton_merge import launch_merge_attention_states_bwd, launch_merge_attention_states_fwd

__all__ = [
    "launch_cross_attention_bwd",
    "launch_cross_attention_fwd",
    "launch_merge_attention_states_bwd",
    "launch_merge_attention_states_fwd",
]
