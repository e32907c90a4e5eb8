"""Builds and installs copies of this source tree, never the tree itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (".ci", "benchmarks", "csrc", "docs", "examples", "python", "tests", "vidmem_kernels")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
# What a wheel is made from, without checkpoints: megabytes that take seconds to pack.
PACKAGES = ("csrc", "vidmem_kernels", "python")


def copy_source(to: Path, folders: tuple[str, ...] = FOLDERS, without: tuple[str, ...] = ()) -> Path:
    """What a clone would hold, with changes that are not committed."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()] + list(without)
    to.mkdir()
    for folder in folders:
        shutil.copytree(ROOT / folder, to / folder, ignore=shutil.ignore_patterns(*ignored))
    for file in ROOT.iterdir():
        if file.is_file() and file.name != ".git":  # a file in a worktree
            shutil.copy(file, to)
    return to


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def fresh_environment(folder: Path) -> tuple[Path, Path]:
    """(python, site-packages) of a venv that also finds the packages of this environment, this one's excepted."""
    made = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    assert made.returncode == 0, made.stderr
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    # Behind the venv's own packages. The .pth files in there, such as those of editable installs, are not read.
    (site / "theirs.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder / "bin/python", site


def run(*command, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the PYTHONPATH of the tests, which would hide what is installed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIDMEM_BUILD")}
    command = [str(part) for part in command]
    return subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True, timeout=1200)
