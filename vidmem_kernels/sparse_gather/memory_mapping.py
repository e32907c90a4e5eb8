"""Opens, creates, maps and identifies files whose content is a tensor."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 22  # bytes hashed at a time


class OpenFile:
    """A file descriptor that is closed when the object is garbage-collected."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def fileno(self) -> int:
        return self._descriptor


class _Mapped:
    """Memory of a bank that never writes to it, shown to numpy as writable so that torch does not warn.

    Silencing the warning instead would silence it for other threads too.
    """

    def __init__(self, mapping: mmap.mmap, offset: int, size: int):
        self._mapping = mapping
        address = np.frombuffer(mapping, np.uint8).__array_interface__["data"][0]
        self.__array_interface__ = {"data": (address + offset, False), "shape": (size,), "typestr": "|u1", "version": 3}


def map_tensor(file: OpenFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> Tensor:
    """Maps the content of an open file, from `offset` on, as a tensor; the tensor keeps the mapping alive.

    Raises:
        EOFError: the file is too short.
    """
    size = math.prod(shape) * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    if os.fstat(file.fileno()).st_size < offset + size:
        raise EOFError(f"the mapped file must have at least {offset + size} bytes")
    mapping = mmap.mmap(file.fileno(), offset + size, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
    return torch.from_numpy(np.asarray(_Mapped(mapping, offset, size))).view(dtype).view(shape)


def reserve(file: OpenFile, size: int) -> None:
    """Makes a file `size` bytes long, or leaves it unchanged on an error.

    The blocks are allocated now: with a sparse file on a full disk, a later write to memory would kill the process.
    """
    before = os.fstat(file.fileno()).st_size
    if size > before:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError:
            os.truncate(file.fileno(), before)  # frees the blocks allocated before the disk was full
            raise


def nameless_file(folder: Path | None) -> OpenFile:
    """Creates a file in `folder` that disappears when it is closed."""
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        return OpenFile(os.dup(file.fileno()))


def digest_rows(file: OpenFile, size: int) -> str:
    """SHA-256 of the first `size` bytes of a working file.

    Raises:
        EOFError: the file is too short.
    """
    digest = hashlib.sha256()
    for start in range(0, size, _CHUNK):
        piece = os.pread(file.fileno(), min(_CHUNK, size - start), start)
        if len(piece) != min(_CHUNK, size - start):
            raise EOFError
        digest.update(piece)
    return digest.hexdigest()
