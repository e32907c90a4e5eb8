"""Reference model of vidmem_kernels: compress a video's history to a short context and read it back.

The public names are imported on first use: `import vidmem_model` itself imports no torch.
"""

import importlib
from typing import TYPE_CHECKING

from . import _requirements

if TYPE_CHECKING:  # what type checkers and editors see; at run time `__getattr__` imports it
    from .errors import UserError
    from .generation.generator import GenerateConfig, generate
    from .generation.storyboard import read_storyboard
    from .memory.compressor import compress
    from .memory.config import CompressorConfig
    from .memory.file import read_memory, write_memory
    from .model.config import Compression
    from .model.encoder import History
    from .model.file import load_model
    from .model.memory_model import MemoryModel
    from .vae import load_vae
    from .video.clip import ClipSpec

__version__ = "0.1.0"
_requirements.check(__version__)

_EXPORTS = {
    "ClipSpec": "video.clip",
    "Compression": "model.config",
    "CompressorConfig": "memory.config",
    "GenerateConfig": "generation.generator",
    "History": "model.encoder",
    "MemoryModel": "model.memory_model",
    "UserError": "errors",
    "compress": "memory.compressor",
    "generate": "generation.generator",
    "load_model": "model.file",
    "load_vae": "vae",
    "read_memory": "memory.file",
    "read_storyboard": "generation.storyboard",
    "write_memory": "memory.file",
}
__all__ = [
    "ClipSpec",
    "Compression",
    "CompressorConfig",
    "GenerateConfig",
    "History",
    "MemoryModel",
    "UserError",
    "compress",
    "generate",
    "load_model",
    "load_vae",
    "read_memory",
    "read_storyboard",
    "write_memory",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
