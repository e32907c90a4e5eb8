"""The memory file: a MemoryBank with a header that says how to read frames back."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path

import torch

from vidmem_kernels import MemoryBank, MemoryFileError

from ..checks import SamplerSteps, conform, shorten, show
from ..errors import MemoryFormatError, UserError
from ..files import cannot_write
from . import METHODS, listed, takers
from .compressor import CompressedMemory
from .header import ROW_TORCH_DTYPES, MemoryHeader

FORMAT = "vidmem.memory"
VERSION = 1


@dataclass(frozen=True)
class Memory:
    """A memory file opened for reading.

    Attributes:
        bank: the rows, their positions and what reading back needs.
        method: one of memory.METHODS.
        frames, height, width: size of the clip, in frames and pixels.
        fps: frames per second.
        source: name of the video it was made from.
    """

    bank: MemoryBank
    method: str
    frames: int
    height: int
    width: int
    fps: float
    source: str

    def retrieve(self, frame: int, steps: int | None = None) -> torch.Tensor:
        """Read one frame back.

        Args:
            frame: in [0, frames).
            steps: of the sampler, for a learned memory; by default 8.

        Returns:
            uint8 (height, width, 3), RGB.

        Raises:
            UserError: no such frame, or the memory is not a learned one and has no steps.
            TypeError, ValueError: frame is no integer; steps are none or out of range.
        """
        if not hasattr(frame, "__index__"):
            raise TypeError(f"retrieve: frame must be an integer, got {show(frame)}")
        frame = operator.index(frame)
        if not 0 <= frame < self.frames:
            raise UserError(f"there is no frame {show(frame)}: this memory holds frames 0 to {self.frames - 1}")
        method = METHODS[self.method]
        if steps is not None and "steps" not in method.takes:
            raise UserError(
                f"steps belong to a {listed(takers('steps'), 'or')} memory; this one is of the method {self.method}"
            )
        options = {} if steps is None else {"steps": conform(SamplerSteps, steps, "retrieve: steps")}
        return method.load().read(self.bank, frame, **options)


def write_memory(path: str | Path, compressed: CompressedMemory) -> None:
    """Write a compressed clip to a file, whole or not at all.

    Args:
        path: file to write; an existing one is replaced.
        compressed: what `compress` gave.

    Raises:
        UserError: the folder is missing or cannot be written.
    """
    rows = len(compressed.tokens)
    dtype = ROW_TORCH_DTYPES[compressed.meta["dtype"]]
    bank = MemoryBank(compressed.tokens.shape[1], dtype=dtype, capacity=rows)
    bank.append(compressed.tokens, compressed.positions)
    header = {
        **compressed.meta,
        "format": FORMAT,
        "version": str(VERSION),
        "fps": repr(float(compressed.fps)),
        "source": compressed.source,
    }
    try:
        bank.save(path, metadata=header, extras=compressed.extras)
    except OSError as error:
        raise cannot_write(Path(path), error, rows * bank.channels * dtype.itemsize) from error


def read_memory(path: str | Path) -> Memory:
    """Open a memory file.

    Args:
        path: a file that write_memory wrote.

    Returns:
        Memory.

    Raises:
        MemoryFormatError: missing, damaged, not a vidmem memory, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise MemoryFormatError(f"{path}: {what}; make one with `vidmem compress`")
    try:
        bank = MemoryBank.load(path, storage="mmap")
    except MemoryFileError as error:  # names the file, what is wrong and what to do
        raise MemoryFormatError(str(error).removeprefix("MemoryBank.load: ")) from error
    except OSError as error:
        raise MemoryFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    header = bank.metadata
    if header.get("format") != FORMAT:
        raise MemoryFormatError(f"{path}: not a vidmem memory; make one with `vidmem compress`")
    if header.get("version") != str(VERSION):
        raise MemoryFormatError(
            f"{path}: is of version {shorten(header.get('version'), 40)}, this vidmem reads version {VERSION}; "
            "make it anew with `vidmem compress`"
        )
    try:
        about = MemoryHeader.read(header)
        METHODS[about.method].load().check(bank, about)
    except KeyError as error:
        raise MemoryFormatError(f"{path}: its header is damaged (no {error})") from error
    except ValueError as error:
        raise MemoryFormatError(f"{path}: its header is damaged ({error})") from error
    except MemoryFormatError as error:
        raise MemoryFormatError(f"{path}: {error}") from error
    return Memory(bank, about.method, *about.size, about.fps, about.source)
