"""Fused kernels for video models with long memory: token merging, sparse gathering, linear and cross-attention.

`load_families` finds and registers the ops of every family. The public functions of a family are those in `__all__` of
its api.py; each api.py is imported by name here because editors and type checkers do not follow a loop.
"""

from . import _requirements

_requirements.check()

from ._dispatch import BackendError, Choice, explain, recording, use_backend
from ._registry import load_families
from .cross_attn import api as _cross_attn
from .cross_attn.api import *  # noqa: F403
from .linear_attn import api as _linear_attn
from .linear_attn.api import *  # noqa: F403
from .modules import LinearAttention, MemoryCrossAttention
from .rotary import Rotary, apply_rotary, rotary
from .sparse_gather import api as _sparse_gather
from .sparse_gather.api import *  # noqa: F403
from .sparse_gather.memory_bank import MemoryBank
from .sparse_gather.memory_file import MemoryFileError
from .token_merge import api as _token_merge
from .token_merge.api import *  # noqa: F403

load_families()

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Choice",
    "LinearAttention",
    "MemoryBank",
    "MemoryCrossAttention",
    "MemoryFileError",
    "Rotary",
    "apply_rotary",
    "explain",
    "recording",
    "rotary",
    "use_backend",
]
__all__ += _cross_attn.__all__
__all__ += _linear_attn.__all__
__all__ += _sparse_gather.__all__
__all__ += _token_merge.__all__
