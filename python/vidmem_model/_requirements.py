"""What vidmem_model needs, looked at before anything else, without importing it: that would take seconds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

# Module -> the distribution's name and lowest version; python/pyproject.toml declares the same.
NEEDED = {
    "torch": "torch>=2.11",
    "numpy": "numpy",
    "safetensors": "safetensors>=0.4.3",
    "av": "av>=15",
    "typer": "typer>=0.12",
    "rich": "rich>=13",
    "yaml": "pyyaml>=6",
}


def check(version: str) -> None:
    """Ends the import unless all is there that vidmem_model needs.

    Args:
        version: of vidmem_model, which that of vidmem_kernels must equal.

    Raises:
        ImportError: with the one line that says what to install; the command `vidmem` prints it and exits with 2.
    """
    faults = _faults(f"vidmem-kernels=={version}")
    if not faults:
        return
    needs = ", ".join(f"{requirement} ({why})" for requirement, why in faults.items())
    line = f"vidmem_model {version} needs {needs}; run: pip install {shlex.join(faults)}"
    if any(requirement.startswith("vidmem-kernels") for requirement in faults):
        line += "; or in the repository of both: pip install --no-build-isolation . ./python"
    program = sys.argv[0] if sys.argv else ""
    # An import that nobody catches: by the script `vidmem`, or while Python still looks for what `-m` shall run.
    if Path(program).name == "vidmem" or (program == "-m" and "vidmem_model" in sys.orig_argv):
        print(f"vidmem: error: {line}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(line, name="vidmem_model")


def _faults(kernels: str) -> dict[str, str]:
    """Requirement -> what is wrong with it."""
    faults = {}
    for module, requirement in {"vidmem_kernels": kernels, **NEEDED}.items():
        distribution, comparison, wanted = re.fullmatch(r"([\w-]+)(>=|==|)(.*)", requirement).groups()
        if not _importable(module):
            faults[requirement] = "not installed"
        elif comparison and (found := _version(module, distribution)):
            fits = found == wanted if comparison == "==" else _numbers(found) >= _numbers(wanted)
            if not fits:
                faults[requirement] = f"{found} is installed"
    return faults


def _importable(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return False
    except (ImportError, ValueError):  # what does not load; what was imported from no file
        return True
    return spec is not None and spec.origin is not None  # without an origin: an empty folder of that name


def _version(module: str, distribution: str) -> str | None:
    """What the module itself states, which need not be installed to be imported; else what its installer noted."""
    if version := getattr(sys.modules.get(module), "__version__", None):
        return str(version)
    if module == "vidmem_kernels":  # in plain sight in its first file; that of torch is long, and others import it
        source = importlib.util.find_spec(module).loader.get_source(module) or ""
        if stated := re.search(r"^__version__ *= *[\"'](.*)[\"']", source, re.MULTILINE):
            return stated[1]
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, KeyError):
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """2.11.0a0+git → (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version).group())))
