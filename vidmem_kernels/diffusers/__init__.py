"""Adapters that add this package to diffusers' video models and remove it again: the optional extra `diffusers`.

`import vidmem_kernels` imports nothing from here; the file of a name is imported when the name is first used.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what type checkers and editors see; at run time `__getattr__` imports it
    from .attention_dispatch import attention_backend, register_attention_backend
    from .families import Family, family_of, register_family
    from .memory_attention import MemoryAttention, add_memory_attention, load_memory_adapter
    from .memory_prefix import MemoryPrefix, patch_tokens
    from .token_merging import TokenMerging, TokenMergingConfig, apply_token_merging

_FILES = {
    "Family": "families",
    "MemoryAttention": "memory_attention",
    "MemoryPrefix": "memory_prefix",
    "family_of": "families",
    "register_attention_backend": "attention_dispatch",
    "register_family": "families",
    "TokenMerging": "token_merging",
    "TokenMergingConfig": "token_merging",
    "add_memory_attention": "memory_attention",
    "apply_token_merging": "token_merging",
    "attention_backend": "attention_dispatch",
    "load_memory_adapter": "memory_attention",
    "patch_tokens": "memory_prefix",
}

__all__ = [
    "Family",
    "MemoryAttention",
    "MemoryPrefix",
    "TokenMerging",
    "TokenMergingConfig",
    "add_memory_attention",
    "apply_token_merging",
    "attention_backend",
    "family_of",
    "load_memory_adapter",
    "patch_tokens",
    "register_attention_backend",
    "register_family",
]


def __getattr__(name: str) -> object:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if find_spec("diffusers") is None:
        raise ImportError(
            f'{__name__}.{name} needs diffusers (not installed); run: pip install "vidmem-kernels[diffusers]"'
        )
    return getattr(import_module(f".{_FILES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
