"""Loads the compiled kernels, `vidmem_kernels._C`, once, and keeps the reason if that fails."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from pathlib import Path
from types import ModuleType

import torch  # its shared libraries must be loaded before _C's

from . import _env

logger = logging.getLogger("vidmem_kernels")


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("vidmem_kernels._C")
    except ModuleNotFoundError:
        note = Path(__file__).with_name("_C_not_built.txt")  # setup.py leaves it
        why = note.read_text().strip() if note.exists() else "installed with VIDMEM_BUILD=0, or not installed at all"
        return None, f"vidmem_kernels._C is not built ({why})"
    except ImportError as error:
        return None, f"vidmem_kernels._C does not load: {str(error).splitlines()[0]}"
    if _env.cpu_capability() is not None:
        try:
            module.set_cpu_capability(_env.cpu_capability())
        except ValueError as error:
            raise ValueError(f"VIDMEM_CPU_CAPABILITY: {error}") from None
    return module, None


module, reason = _load()
if reason is not None:
    logger.warning("%s; every op runs its PyTorch reference, which is correct but slower", reason)


@cache
def has_kernel(op: str, device_type: str) -> bool:
    """Whether _C has a kernel of `op` for tensors on `device_type`."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"vidmem_cpp::{op}", key)


@cache
def cuda_fingerprint(op: str) -> str | None:
    """Fingerprint (see `_verified`) of the CUDA sources of `op` in the build of _C, or None."""
    noted = getattr(module, "cuda_fingerprints", "")
    return dict(entry.split("=") for entry in noted.split()).get(op)
