"""Imports between the rooms of vidmem_model go only upwards in the table of CONTRIBUTING.md, without cycles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from paths import ROOT

import vidmem_model

PACKAGE = Path(vidmem_model.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imports(name: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import from this package, those inside of functions and for type checkers too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package.split(".") if package else []
            target = ".".join([*parts[: len(parts) - node.level + 1], *(node.module or "").split(".")]).strip(".")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vidmem_model":
            target = node.module.partition(".")[2]
        else:
            continue
        for alias in node.names:
            if alias.name == "__version__":  # of the package itself
                continue
            inner = f"{target}.{alias.name}".lstrip(".")
            yield node.lineno, inner if inner in MODULES else target


def floors() -> list[str]:
    """Rooms in the order of the table in CONTRIBUTING, the ground floor first."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    table = text[text.index("| Room |") :].split("\n\n")[0]
    return [name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])]


def test_every_module_has_a_floor():
    rooms = {name.split(".")[0] for name in MODULES} - {""}
    assert sorted(floors()) == sorted(rooms)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_no_import_goes_up(name):
    """A module imports its own room and those on lower floors: the rows above its own."""
    order = floors()
    room = name.split(".")[0]
    for line, target in imports(name, MODULES[name]):
        other = target.split(".")[0]
        assert target != "", f"{MODULES[name]}:{line}: import from the module that has it, not from vidmem_model"
        assert order.index(other) <= order.index(room), (
            f"{MODULES[name]}:{line}: {room} imports {other}, which is above"
        )


def test_no_import_goes_in_a_circle():
    graph = {name: {target for _, target in imports(name, path)} - {name} for name, path in MODULES.items()}
    del graph[""]  # its exports are looked up when they are asked for
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"circle of imports: {' -> '.join(error.args[1])}") from None


def test_the_kernels_import_nothing_of_the_model_and_the_model_only_what_is_public():
    kernels = list((ROOT / "vidmem_kernels").rglob("*.py"))
    assert len(kernels) > 50
    for path in kernels:
        assert not re.search(r"^\s*(from|import) vidmem_model", path.read_text(), re.MULTILINE), path
    public = {"vidmem_kernels", *(f"vidmem_kernels.{name}" for name in ("diffusers", "files", "info", "peak_memory"))}
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("vidmem_kernels"):
                assert node.module in public, f"{path}:{node.lineno}"
