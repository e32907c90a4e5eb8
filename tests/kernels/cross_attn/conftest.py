"""Fixtures of the tests of cross-attention."""

import sys
import types

import pytest
import torch

from vidmem_kernels.cross_attn import library, library_packages, library_sdpa


@pytest.fixture
def machine(monkeypatch):
    """Pretends to a GPU of a compute capability, and to have exactly the packages named so far."""
    installed = set()
    monkeypatch.setattr(library_packages, "_installed", installed.__contains__)
    library_packages._load.cache_clear()

    def pretend(capability=(9, 0), cudnn=91900, modules=()):
        """`modules`: name -> its functions by name."""
        for module in (library, library_packages, library_sdpa):
            monkeypatch.setattr(module, "capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        for name, functions in dict(modules).items():
            installed.add(name)
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
            vars(sys.modules[name]).update(functions)

    yield pretend
    library_packages._load.cache_clear()
