"""Memories of a clip: the methods that make them and read frames back, and their file.

    Clip --compress--> CompressedMemory --write_memory--> file --read_memory--> Memory --retrieve--> frame

A method is a module with the functions of `method.Implementation`, and a line in METHODS; commands, files, demo
and evaluation ask METHODS. `compressor` compresses, `file` writes and opens, `header` is what a file says of itself,
`config` what can be asked for, and `method` what the methods share.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated

from ..checks import OneOf
from ..shipped import DEFAULT_MODEL


@dataclass(frozen=True)
class Method:
    """What is known of a method without importing it: help needs no torch, and dct no networks.

    Args:
        name: what options, files and tables call it.
        takes: what it looks at of CompressorConfig ("compression", "channels", "budget"), and "steps" of
            `Memory.retrieve`.
        needs: header entries of its files beside those of every file.
        room: bytes of memory that decoding and compressing take for each byte of decoded video.
        model: the shipped checkpoint that it runs, whose frame size its clips must have; others take any size.
        about: what messages call the model.
        module: where its functions are; by default the module of its name in this package.
    """

    name: str
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    room: int
    model: str | None = None
    about: str = ""
    module: str = ""

    def load(self) -> ModuleType:
        """Import its module, which has the functions of `method.Implementation`."""
        return importlib.import_module(self.module or f"{__name__}.{self.name}")


METHODS: dict[str, Method] = {
    each.name: each
    for each in (
        Method("dct", takes=("compression", "channels"), needs=("grid", "box"), room=4),
        Method("merge", takes=("compression", "budget"), needs=("grid",), room=6),
        Method(
            "learned",
            takes=("steps",),
            needs=("model", "model_sha256", "vae_sha256"),
            room=12,
            model=DEFAULT_MODEL,
            about="the trained model",
        ),
    )
}


def trained() -> list[str]:
    """Names of the methods that run a trained model, and take clips of its frame size."""
    return [name for name, method in METHODS.items() if method.model is not None]


def untrained() -> list[str]:
    """Names of the methods that take clips of any size."""
    return [name for name, method in METHODS.items() if method.model is None]


def takers(option: str) -> list[str]:
    """Names of the methods that look at an option."""
    return [name for name, method in METHODS.items() if option in method.takes]


def listed(words: Iterable[str], last: str) -> str:
    """Join words to "a, b or c", `last` being the "or"."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


# Looked up when a name is checked: METHODS may have got another one since.
MethodName = Annotated[str, OneOf(METHODS)]
