"""Checks what vidmem_kernels needs before anything else is imported, and reports what is missing in one line.

`setup.py` loads this file on its own to check the build's requirements, so it may import only the standard library.
"""

from __future__ import annotations

import importlib.util
import re
import shlex

MINIMUM = {"numpy": "", "torch": "2.11"}


def numbers(version: str) -> tuple[int, ...]:
    """2.11.0a0+git → (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version).group())))


def absent(package: str) -> bool:
    """Whether there is no such package to import."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        return True
    except (ImportError, ValueError):  # it does not load; it was imported without a file
        return False
    return spec is None or spec.origin is None  # no origin: an empty folder of that name


def fault(package: str, minimum: str) -> str | None:
    """What is wrong with a package that must have at least this version, or None."""
    if absent(package):
        return "not installed"
    try:
        version = getattr(importlib.import_module(package), "__version__", "")
    except (ImportError, OSError) as error:  # a dependency of it is missing; the first line says which
        return f"does not load: {(str(error) or type(error).__name__).splitlines()[0]}"
    return None if numbers(version) >= numbers(minimum) else f"{version or 'one without a version'} is installed"


def missing(minimum: dict[str, str]) -> str | None:
    """One line that says which packages are missing, too old or broken, and what to run; None if all are present.

    Args:
        minimum: package -> lowest version, "" for any.

    Returns:
        The line, or None.
    """
    faults = {f"{p}>={least}" if least else p: why for p, least in minimum.items() if (why := fault(p, least))}
    needs = ", ".join(f"{wanted} ({why})" for wanted, why in faults.items())
    return f"needs {needs}; run: pip install {shlex.join(faults)}" if faults else None


def check() -> None:
    """Raises ImportError unless everything that vidmem_kernels imports is present."""
    # Imports nothing while a package is absent: torch without numpy warns or fails with its own message.
    if line := missing({p: least for p, least in MINIMUM.items() if absent(p)}) or missing(MINIMUM):
        # With this name, `python -m vidmem_kernels.info` also prints only the line, without a traceback.
        raise ImportError(f"vidmem_kernels {line}", name="vidmem_kernels")
