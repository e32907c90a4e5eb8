"""Backends to run a test on: the reference, the compiled kernels per instruction set, Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from vidmem_kernels import _dispatch, _extension
from vidmem_kernels._op import OPS

CAPABILITIES = _extension.module.available_cpu_capabilities() if _extension.module else []
BACKENDS = ["reference", *CAPABILITIES, "triton"]
compiled = pytest.mark.skipif(_extension.module is None, reason="vidmem_kernels._C is not built")


@contextmanager
def backend_called(name: str) -> Iterator[str]:
    """Yields the backend argument for one of `BACKENDS`; selects its instruction set meanwhile."""
    if name not in CAPABILITIES:
        yield name
        return
    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(name)
    try:
        yield "cpu"
    finally:
        _extension.module.set_cpu_capability(before)


def skip_without(backend: str, op: str) -> None:
    """Skips a test where Triton cannot run on the CPU."""
    if backend == "triton" and _dispatch.unavailable(OPS[op], "triton", "cpu") is not None:
        pytest.skip(reason="Triton's interpreter is not on")
