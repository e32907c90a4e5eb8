"""Check the packages that vidmem_model needs, without importing them, which would take seconds."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from importlib import metadata
from pathlib import Path

# Module -> name and minimum version of its distribution, as in python/pyproject.toml.
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
    """Check that everything that vidmem_model needs is installed.

    Args:
        version: Version of vidmem_model; vidmem_kernels must have the same.

    Raises:
        ImportError: Something is missing; the message is one line that says what to install. The command `vidmem`
            prints it and exits with 2.
    """
    faults = _faults(f"vidmem-kernels=={version}")
    if not faults:
        return
    needs = ", ".join(f"{requirement} ({why})" for requirement, why in faults.items())
    line = f"vidmem_model {version} needs {needs}; run: pip install {shlex.join(faults)}"
    if any(requirement.startswith("vidmem-kernels") for requirement in faults):
        line += "; or in the repository of both: pip install --no-build-isolation . ./python"
    program = sys.argv[0] if sys.argv else ""
    # Nothing catches the error in the script `vidmem`, nor while Python looks for the module of `-m`.
    if Path(program).name == "vidmem" or (program == "-m" and "vidmem_model" in sys.orig_argv):
        print(f"vidmem: error: {line}", file=sys.stderr)
        raise SystemExit(2)
    raise ImportError(line, name="vidmem_model")


def _faults(kernels: str) -> dict[str, str]:
    """Map each unmet requirement to the reason."""
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
    except (ImportError, ValueError):  # a module that cannot be loaded, or that was not imported from a file
        return True
    return spec is not None and spec.origin is not None  # no origin: an empty folder of that name


def _version(module: str, distribution: str) -> str | None:
    """Version that the module states, which may not be installed, else that of the installed distribution."""
    if version := getattr(sys.modules.get(module), "__version__", None):
        return str(version)
    if module == "vidmem_kernels":  # its first file is short; reading that of torch would be slow
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
