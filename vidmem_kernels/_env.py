"""The environment variables of the package; no other module reads os.environ.

VIDMEM_BACKEND         default backend of every op (see `vidmem_kernels.use_backend`)
VIDMEM_CPU_CAPABILITY  instruction set of the CPU kernels: baseline, avx2 or avx512 (default: the best available)
TRITON_INTERPRET       Triton's variable: runs Triton kernels on CPU tensors, slowly, for debugging
"""

from __future__ import annotations

import os


def backend() -> str:
    """Default backend as the user wrote it; "auto" if unset."""
    return os.environ.get("VIDMEM_BACKEND", "") or "auto"


def cpu_capability() -> str | None:
    """The requested instruction set, or None."""
    return os.environ.get("VIDMEM_CPU_CAPABILITY") or None


def triton_interpret() -> bool:
    """Whether Triton kernels run in the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def dispatch_state() -> tuple[object, ...]:
    """The environment that the choice of a backend depends on, as a key; avoids a copy, as every call reads it."""
    raw = getattr(os.environ, "_data", os.environ)  # CPython keeps it encoded, and decodes at every get
    return raw.get(_BACKEND), raw.get(_INTERPRET)


_BACKEND, _INTERPRET = (
    os.environ.encodekey(name) if hasattr(os.environ, "_data") else name
    for name in ("VIDMEM_BACKEND", "TRITON_INTERPRET")
)
