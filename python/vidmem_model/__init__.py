"""Reference model of vidmem_kernels: compress a video's history to a short context and read it back.

What people call is here, and imported when it is first asked for: `import vidmem_model` imports no torch.
"""

import importlib

from . import _requirements

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
__all__ = list(_EXPORTS)


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
