"""Replaces PyAV on a machine that lacks it, for scripts that read no video."""

from __future__ import annotations

import sys
from types import ModuleType


class _Absent(ModuleType):
    """A module with a class under any name, of which no object can be made."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": _refuse})


def _refuse(*_: object, **__: object) -> None:
    raise ModuleNotFoundError("PyAV is missing here: pip install av", name="av")


def stand_in() -> bool:
    """Allows importing vidmem_model without PyAV; returns whether that was needed."""
    try:
        import av  # noqa: F401
    except ModuleNotFoundError:
        pass
    else:
        return False
    names = ("av", "av.video", "av.video.reformatter", "av.codec", "av.codec.codec", "av.format")
    modules = {name: _Absent(name) for name in names}
    modules["av"].__version__ = "15.0"  # the minimum version that vidmem_model requires
    modules["av"].open = _refuse
    sys.modules.update(modules)
    return True
