"""Write and read memory files: a MemoryBank whose header describes how frames are read back."""

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
        bank: Memory tokens, their positions, and further tensors that reading frames back needs.
        method: Compression method: "dct", "merge" or "learned".
        frames: Number of frames of the clip.
        height: Rows of a frame, in pixels.
        width: Columns of a frame, in pixels.
        fps: Frames per second.
        source: Name of the video file it was made from.
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
            frame: Number of the frame, 0 to frames - 1.
            steps: Number of denoising steps, for method "learned" only; by default 8.

        Returns:
            uint8 (height, width, 3), RGB.

        Raises:
            UserError: There is no such frame, or `steps` is given and the method does not use it.
            TypeError: `frame` is not an integer.
            ValueError: `steps` is not an integer from 1 to 10,000.
        """
        if not hasattr(frame, "__index__"):
            raise TypeError(f"retrieve: frame must be an integer, got {show(frame)}")
        frame = operator.index(frame)
        if not 0 <= frame < self.frames:
            raise UserError(f"there is no frame {show(frame)}; give a frame from 0 to {self.frames - 1}")
        method = METHODS[self.method]
        if steps is not None and "steps" not in method.takes:
            raise UserError(
                f"steps requires a memory of method {listed(takers('steps'), 'or')}, this one is of method "
                f"{self.method}; leave steps out"
            )
        options = {} if steps is None else {"steps": conform(SamplerSteps, steps, "retrieve: steps")}
        return method.load().read(self.bank, frame, **options)


def write_memory(path: str | Path, compressed: CompressedMemory) -> None:
    """Write a compressed clip to a memory file, in the safetensors format.

    The file is written under a temporary name first: an error or interrupt leaves an existing file unchanged.

    Args:
        path: File to write; an existing one is replaced.
        compressed: Result of `compress`.

    Raises:
        UserError: The folder is missing or cannot be written.
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
        path: File that `write_memory` wrote.

    Returns:
        The opened memory; its tokens stay on disk until they are read.

    Raises:
        MemoryFormatError: The file is missing, damaged, not a memory file, or of another version.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a file" if path.exists() else "no such file"
        raise MemoryFormatError(f"{path}: {what}; make one with `vidmem compress`")
    try:
        bank = MemoryBank.load(path, storage="mmap")
    except MemoryFileError as error:  # its message names the file, the cause and the remedy
        raise MemoryFormatError(str(error).removeprefix("MemoryBank.load: ")) from error
    except OSError as error:
        raise MemoryFormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    header = bank.metadata
    if header.get("format") != FORMAT:
        raise MemoryFormatError(f"{path}: is not a memory file; make one with `vidmem compress`")
    if header.get("version") != str(VERSION):
        raise MemoryFormatError(
            f"{path}: has format version {shorten(header.get('version'), 40)}, this vidmem reads version {VERSION}; "
            "make the file again with `vidmem compress`"
        )
    try:
        about = MemoryHeader.read(header)
        METHODS[about.method].load().check(bank, about)
    except KeyError as error:
        raise MemoryFormatError(
            f"{path}: its header is damaged (it lacks {error}); make the file again with `vidmem compress`"
        ) from error
    except ValueError as error:
        raise MemoryFormatError(
            f"{path}: its header is damaged ({error}); make the file again with `vidmem compress`"
        ) from error
    except MemoryFormatError as error:
        raise MemoryFormatError(f"{path}: {error}") from error
    return Memory(bank, about.method, *about.size, about.fps, about.source)
