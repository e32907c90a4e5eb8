"""Records on which GPU a kernel passed its tests, and checks whether its sources are unchanged since.

Each file verified/*.json is the record of one run of the test suite on one GPU: the fingerprint of the kernel's sources
for every op and backend that passed. A kernel whose fingerprint differs counts as changed since that run.

`setup.py` loads this file on its own to store the fingerprints of the CUDA kernels that it compiles, so it may import
only the standard library.
"""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_INDENT = {tokenize.INDENT: "\1", tokenize.DEDENT: "\2", tokenize.NEWLINE: "\n"}


@dataclass(frozen=True)
class Verified:
    """A test run that a kernel passed.

    Attributes:
        device: name of the GPU.
        commit: short hash of the tested commit.
        date: date of the run, YYYY-MM-DD.
        suite: what ran, with its outcome.
        current: whether the kernel's sources are unchanged, comments aside.
    """

    device: str
    commit: str
    date: str
    suite: str
    current: bool

    def __str__(self) -> str:
        passed = f"{self.device}, {self.date} ({self.commit})"
        return passed if self.current else f"compiled, not run; changed since {passed}"


def verified_on(op: str, backend: str, fingerprint: str | None) -> Verified | None:
    """The last run that the current kernel passed, else the last run that any version of it passed, or None.

    Args:
        op: name of the op.
        backend: "triton" or "cuda".
        fingerprint: fingerprint of the kernel's current sources; None if unknown.

    Returns:
        The run, or None.
    """
    found = None
    for record in _records():
        passed = record["kernels"].get(op, {}).get(backend)
        if passed and (passed == fingerprint or found is None or not found.current):
            found = Verified(*(record[key] for key in ("device", "commit", "date", "suite")), passed == fingerprint)
    return found


@cache
def _records() -> list[dict]:
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (PACKAGE / "verified").glob("*.json")]
    return sorted(records, key=lambda record: record["date"])


def triton_fingerprint(family: str, module: str, package: Path = PACKAGE) -> str:
    """Fingerprint of a module of Triton kernels and of the Triton modules that it imports.

    Args:
        family: folder of the package, e.g. "sparse_gather".
        module: e.g. "triton_gather".
        package: folder of vidmem_kernels.

    Returns:
        16 hexadecimal digits.
    """
    return _fingerprint(_closure([package / family / f"{module}.py"], _imports), _python_code)


def cuda_fingerprints(csrc: Path) -> dict[str, str]:
    """Fingerprint of every op that a file in csrc/cuda registers, from the file and all that it includes."""
    return _registered(sorted((csrc / "cuda").glob("*.cu")), lambda path: _includes(path, csrc))


def cpu_fingerprints(csrc: Path) -> dict[str, str]:
    """The same of csrc/cpu; a header brings the source of its name along, where the loops are."""

    def neighbours(path: Path) -> Iterable[Path]:
        source = path.with_suffix(".cpp")
        return [*_includes(path, csrc), *([source] if source.is_file() else [])]

    return _registered(sorted((csrc / "cpu").rglob("*.cpp")), neighbours)


def _registered(sources: list[Path], neighbours: Callable[[Path], Iterable[Path]]) -> dict[str, str]:
    found = {}
    for source in sources:
        if ops := re.findall(r'm\.impl\("(\w+)"', source.read_text(encoding="utf-8")):
            found |= dict.fromkeys(ops, _fingerprint(_closure([source], neighbours), _cpp_code))
    return found


def _includes(path: Path, csrc: Path) -> list[Path]:
    return [csrc / name for name in re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)]


def _imports(path: Path) -> list[Path]:
    """The Triton modules of this package that a module imports from."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level and node.module:
            module = path.parents[node.level - 1].joinpath(*node.module.split(".")).with_suffix(".py")
            if module.stem.lstrip("_").startswith("triton_") and module.is_file():
                found.append(module)
    return found


def _closure(paths: list[Path], neighbours: Callable[[Path], Iterable[Path]]) -> list[Path]:
    found: list[Path] = []
    while paths:
        path = paths.pop()
        if path not in found:
            found.append(path)
            paths.extend(neighbours(path))
    return sorted(found, key=lambda path: path.name)


def _fingerprint(paths: list[Path], code: Callable[[str], str]) -> str:
    text = "\n".join(code(path.read_text(encoding="utf-8")) for path in paths)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _python_code(text: str) -> str:
    """A module's code without comments, docstrings and spaces between tokens; equal for every Python version."""
    pieces: list[str] = []
    at_start = True  # of a statement: a string there says nothing to the program
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL) or (at_start and token.type == tokenize.STRING):
            continue
        at_start = token.type in _INDENT
        pieces.append(_INDENT.get(token.type) or re.sub(r"\s", "", token.string))
    # Python 3.12 reads an f-string in pieces, and its doubled braces as one.
    return " ".join(pieces).replace(" ", "").replace("{{", "{").replace("}}", "}")


def _cpp_code(text: str) -> str:
    """A source without comments and spaces."""
    return re.sub(r"\s", "", re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL))
