"""Launch functions of the family's Triton kernels, by the names that ops.py gives."""

from .triton_gradients import launch_linear_attention_bwd
from .triton_outputs import launch_linear_attention_fwd

__all__ = ["launch_linear_attention_bwd", "launch_linear_attention_fwd"]
