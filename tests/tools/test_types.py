"""Both packages tell type checkers what they export, and mypy agrees with what they tell."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys

import pytest
from install_helpers import DISTRIBUTIONS, ROOT, tomllib

LAZY = {
    "vidmem_kernels.diffusers": (ROOT / "vidmem_kernels/diffusers/__init__.py", "_FILES"),
    "vidmem_model": (ROOT / "python/vidmem_model/__init__.py", "_EXPORTS"),
}


def checked_files():
    """The files that `make types` reports errors of."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    found = {pattern: set(ROOT.glob(pattern)) for pattern in patterns}
    assert all(found.values()), [pattern for pattern, files in found.items() if not files]
    return set().union(*found.values())


@pytest.mark.parametrize("package", DISTRIBUTIONS)
def test_packages_say_that_they_are_typed(package):
    place = ROOT / DISTRIBUTIONS[package]
    assert (place / package / "py.typed").exists()
    setuptools = tomllib.loads((place / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "py.typed" in setuptools["package-data"][package]


@pytest.mark.parametrize("package", LAZY)
def test_type_checkers_see_what_is_imported_lazily(package):
    """The imports under TYPE_CHECKING, the table that `__getattr__` reads and `__all__` are one."""
    path, table = LAZY[package]
    tree = ast.parse(path.read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {name.name: node.module for node in block.body for name in node.names}
    module = importlib.import_module(package)
    assert seen == getattr(module, table)
    assert sorted(seen) == sorted(module.__all__)


def test_every_public_name_is_in_a_checked_file():
    import vidmem_kernels

    modules = {f"{package}.{place}" for package in LAZY for place in lazy_table(package).values()}
    for name in vidmem_kernels.__all__:
        modules.add(getattr(vidmem_kernels, name).__module__)
    files = checked_files()
    for module in modules:
        path = ROOT / ("python" if module.startswith("vidmem_model") else "") / module.replace(".", "/")
        assert {path.with_suffix(".py"), path / "__init__.py"} & files, module


def lazy_table(package):
    return getattr(importlib.import_module(package), LAZY[package][1])


PROGRAM = """
import torch
import vidmem_kernels as vk
from typing_extensions import assert_type
from vidmem_kernels.diffusers import MemoryAttention, TokenMerging, add_memory_attention, apply_token_merging
from vidmem_kernels.linear_attn.api import LinearAttentionState
from vidmem_kernels.token_merge.api import MergePlan
from vidmem_model import MemoryModel, compress, load_model, read_memory
from vidmem_model.memory.compressor import CompressedMemory
from vidmem_model.memory.file import Memory

x = torch.ones(1, 64, 8)
q = x.view(1, 64, 2, 4)
plan = vk.match_tokens(x, 16)
assert_type(plan, MergePlan)
assert_type(vk.merge_tokens(x, plan).size, torch.Tensor)
assert_type(vk.cross_attention(q, q, q), torch.Tensor)
assert_type(vk.cross_attention(q, q, q, return_lse=True), tuple[torch.Tensor, torch.Tensor])
assert_type(vk.linear_attention(q, q, q, return_state=True), tuple[torch.Tensor, LinearAttentionState])
assert_type(vk.MemoryBank.load("bank.safetensors").gather(torch.tensor([0])), torch.Tensor)
assert_type(vk.explain(vk.gather_tokens, x, x), list[vk.Choice])
assert_type(apply_token_merging(torch.nn.Identity()), TokenMerging)
assert_type(add_memory_attention(torch.nn.Identity()), MemoryAttention)
assert_type(read_memory("memory.safetensors"), Memory)
assert_type(compress("film.mp4"), CompressedMemory)
assert_type(load_model("model.safetensors"), MemoryModel)
vk.merge_tokens(x, 16)  # error: no plan
vk.cross_attention(q, q)  # error: no values
vk.use_backend(7)  # error: no name
compress(8)  # error: no video
"""
# As `make types` does: what is large and optional is left out.
SETTINGS = """
[mypy]
follow_imports = silent
[mypy-diffusers.*,transformers.*,triton.*,yaml]
follow_imports = skip
ignore_missing_imports = True
"""


@pytest.mark.long
def test_a_program_that_uses_the_packages_is_checked(tmp_path):
    """As with installed packages, by their py.typed."""
    pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    env = {**os.environ, "MYPYPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    command = [sys.executable, "-m", "mypy", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    found = {int(number) for number in re.findall(r"^program\.py:(\d+): error", done.stdout, re.MULTILINE)}
    wanted = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if "# error" in line}
    assert found == wanted and len(wanted) == 4, done.stdout + done.stderr
