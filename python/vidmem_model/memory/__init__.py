"""Compressed memories of a clip: the methods that make them and read frames back, and the memory file.

    Clip --compress--> CompressedMemory --write_memory--> file --read_memory--> Memory --retrieve--> frame

A method is a module with the functions of `method.Implementation`, and an entry in METHODS, which commands, files, demo
and evaluation use. `compressor` compresses, `file` writes and opens, `header` describes a file, `config` is the
configuration, and `method` has what the methods share.
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
    """Facts about a method that are available without importing its module, so that `--help` needs no torch.

    Args:
        name: Name of the method in options, files and tables.
        takes: Fields of CompressorConfig that it uses ("compression", "channels", "budget"), and "steps" if
            `Memory.retrieve` has denoising steps.
        needs: Header entries of its files, besides those of every memory file.
        room: Bytes of memory for decoding and compressing, per byte of decoded video.
        model: Name of the shipped checkpoint that it runs; clips must have its frame size. None for any frame size.
        about: Name of the model in messages.
        module: Module of its functions; by default the module of its name in this package.
    """

    name: str
    takes: tuple[str, ...]
    needs: tuple[str, ...]
    room: int
    model: str | None = None
    about: str = ""
    module: str = ""

    def load(self) -> ModuleType:
        """Import and return its module, which has the functions of `method.Implementation`."""
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
    """Names of the methods with a trained model, which take clips of its frame size only."""
    return [name for name, method in METHODS.items() if method.model is not None]


def untrained() -> list[str]:
    """Names of the methods that take clips of any size."""
    return [name for name, method in METHODS.items() if method.model is None]


def takers(option: str) -> list[str]:
    """Names of the methods that use an option."""
    return [name for name, method in METHODS.items() if option in method.takes]


def listed(words: Iterable[str], last: str) -> str:
    """Join words to "a, b or c"; `last` is the word before the last, such as "or"."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


# Evaluated when a name is checked, because methods may be added to METHODS later.
MethodName = Annotated[str, OneOf(METHODS)]
