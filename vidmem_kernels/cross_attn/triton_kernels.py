"""Launch functions of the family's Triton kernels, by the names that ops.py gives."""

from .triton_merge import launch_merge_attention_states_bwd, launch_merge_attention_states_fwd

__all__ = [
    "launch_merge_attention_states_bwd",
    "launch_merge_attention_states_fwd",
]
