"""Builds and installs copies of this source tree, never the tree itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it along
    import tomli as tomllib

from paths import ROOT

FOLDERS = (".ci", "benchmarks", "csrc", "docs", "examples", "python", "tests", "vidmem_kernels")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# What a wheel is made from, without checkpoints: megabytes that take seconds to pack.
PACKAGES = ("csrc", "vidmem_kernels", "python")
# The packages of both distributions -> the folders that they are built from.
DISTRIBUTIONS = {"vidmem_kernels": "", "vidmem_model": "python"}

# As sitecustomize.py it is imported when Python starts, in every process of pip too.
SITE = """
import importlib, sys
class Fault:
    def find_spec(self, name, path=None, target=None):
        if name in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name in BROKEN:
            raise ImportError(f"lib{name}.so.1: cannot open shared object file")
sys.meta_path.insert(0, Fault())
for name, version in OLD.items():
    importlib.import_module(name).__version__ = version
"""


def environment(folder: Path, missing=(), broken=(), old=()) -> dict[str, str]:
    """Variables for processes in which these modules are not there, do not load, or have another version."""
    values = f"MISSING, BROKEN, OLD = {tuple(missing)!r}, {tuple(broken)!r}, {dict(old)!r}\n"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(values + SITE)
    return {"PYTHONPATH": str(folder)}


def declared(package: str) -> dict:
    """[project] of a distribution's pyproject.toml."""
    return tomllib.loads((ROOT / DISTRIBUTIONS[package] / "pyproject.toml").read_text())["project"]


def stated_version(package: str) -> str:
    """`__version__` in a package's source."""
    tree = ast.parse((ROOT / DISTRIBUTIONS[package] / package / "__init__.py").read_text())
    (version,) = (n.value.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__version__")
    return version


def copy_source(to: Path, folders: tuple[str, ...] = FOLDERS, without: tuple[str, ...] = ()) -> Path:
    """What a clone would hold, with changes that are not committed."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + list(without)
    to.mkdir()
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns(*ignored), symlinks=True)
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":  # a file in a worktree
            shutil.copy(file, to)
    return to


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fresh_environment(folder: Path, only: tuple[str, ...] = ()) -> tuple[Path, Path]:
    """(python, site-packages) of a venv that also finds packages of this environment, but none of this repository.

    Args:
        folder: where it is made.
        only: distributions that it finds, and what those need; all if this is empty.
    """
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    theirs = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    if only:
        lent = folder / "lent"
        lent.mkdir()
        for top in sorted(_top_levels(set(only))):
            (lent / top.name).symlink_to(top)
        theirs = {str(lent)}
    # Behind the venv's own packages. The .pth files in there, such as those of editable installs, are not read.
    (site / "theirs.pth").write_text("\n".join(theirs))
    return folder / "bin/python", site


def _top_levels(names: set[str]) -> set[Path]:
    """What lies in site-packages of these distributions and of all that they need."""
    found, known = set(), set()
    while names - known:
        name = (names - known).pop()
        known.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform or an extra
            continue
        tops = {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}
        found |= {Path(distribution.locate_file(top)) for top in tops}
        names |= {re.match(r"[\w.-]+", need).group() for need in distribution.requires or () if "extra ==" not in need}
    return found


def run(*command, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the PYTHONPATH of the tests, which would hide what is installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIDMEM_BUILD")}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=1200)
