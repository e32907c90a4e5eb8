"""The API pages show every public name, and nothing else; docstrings name the arguments that there are."""

from __future__ import annotations

import importlib
import inspect
import re

import pytest
from docs_helpers import names
from paths import ROOT

import vidmem_kernels
import vidmem_kernels.diffusers
import vidmem_model

SHOWN = {page.stem: names(page.read_text()) for page in sorted((ROOT / "docs" / "api").glob("*.md"))}
PACKAGES = (vidmem_kernels, vidmem_kernels.diffusers, vidmem_model)
# Shown beside what the packages export.
OTHERS = ("vidmem_kernels.testing.", "vidmem_kernels.info.", "vidmem_kernels.vllm_omni.")


def found(path: str) -> object:
    """The object that has this path: of a module, or of what a package exports."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public(package) -> list[str]:
    if package is vidmem_kernels.diffusers:
        pytest.importorskip("diffusers")
    return [name for name in package.__all__ if name != "__version__"]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_shown_once(package):
    paths = [path for paths in SHOWN.values() for path in paths]
    by_name = {name: [path for path in paths if path.rpartition(".")[2] == name] for name in public(package)}
    for name, there in by_name.items():
        mine = [path for path in there if found(path) is getattr(package, name)]
        assert len(mine) == 1, f"docs/api must show {package.__name__}.{name} once, it shows {mine}"


def test_what_is_shown_is_public():
    for page, paths in SHOWN.items():
        for path in paths:
            if path.startswith("vidmem_kernels.diffusers"):
                pytest.importorskip("diffusers")
            name = path.rpartition(".")[2]
            exported = [package for package in PACKAGES if name in package.__all__]
            shown = found(path)
            assert path.startswith(OTHERS) or any(getattr(package, name) is shown for package in exported), path
            assert shown.__doc__, f"docs/api/{page}.md shows {path}, which has no docstring"
    assert len(SHOWN["index"]) == 0 and all(paths for page, paths in SHOWN.items() if page != "index")


def entries(docstring: str, title: str) -> list[str]:
    """The names that a section of a docstring describes: an entry may be for several, as `q_time, k_time`."""
    section = re.search(rf"^{title}:\n((?:    .*\n?|\n)+)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    lines = re.findall(r"^    (\S[^:\n]*):", section[1], re.MULTILINE) if section else []
    return [name.strip().lstrip("*") for line in lines for name in line.split(",")]


def test_docstrings_name_the_arguments_that_there_are():
    paths = [path for paths in SHOWN.values() for path in paths if not path.startswith("vidmem_kernels.diffusers")]
    looked_at = 0
    for path in paths:
        shown = found(path)
        methods = (
            [value for value in vars(shown).values() if inspect.isfunction(value)] if inspect.isclass(shown) else []
        )
        for each in (shown, *methods):
            described = entries(each.__doc__ or "", "Args")
            if described:
                looked_at += 1
                there = inspect.signature(each).parameters
                lost = [name for name in described if name not in there]
                assert not lost, f"{each.__qualname__} describes {lost}, its arguments are {list(there)}"
    assert looked_at > 30
