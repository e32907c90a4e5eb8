"""The file of a MemoryBank: safetensors, written whole or not at all, with a checksum over every byte.

Any safetensors reader opens it. It is written here rather than by the safetensors package because that package needs
all tensors in memory at once, orders its header as it likes, which leaves no bytes to take a checksum of, and aligns
tensors for copying rather than for mapping.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import mmap
import os
import re
import secrets
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

FORMAT = "vidmem_kernels.MemoryBank"
VERSION = 1
RESERVED = "vidmem."  # prefix of the header entries that are ours; the others are the user's

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
DTYPES = tuple(_NAMES)
_CHUNK = 1 << 22  # bytes hashed, read and written at a time
_ALIGNMENT = 64  # of the first tensor in the file
_HEADER_LIMIT = 100_000_000  # bytes, that of the safetensors package
_NO_CHECKSUM = "0" * 64


class MemoryFileError(ValueError):
    """A file that is not a memory file, or is damaged; the message is one line that names it and says what to do."""


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def _bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied (unless it is a lazy negative, such as x.conj().imag)."""
    return memoryview(tensor.detach().resolve_neg().reshape(-1).view(torch.uint8).numpy())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """8 bytes of length and the JSON, in which the checksum, the first entry, is still zeros."""
    own = {f"{RESERVED}checksum": _NO_CHECKSUM, f"{RESERVED}format": FORMAT, f"{RESERVED}version": str(VERSION)}
    content: dict[str, Any] = {"__metadata__": {**own, **metadata}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        content[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    if len(text) > _HEADER_LIMIT:
        raise ValueError(
            f"MemoryBank.save: the header must be at most {_HEADER_LIMIT} bytes, got {len(text)}; "
            "put large data into extras"
        )
    return len(text).to_bytes(8, "little") + text


def _sync_folder(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock(file: BinaryIO) -> bool:
    """Locks a temporary file until it is closed; False if someone else has it or removed it.

    A lock ends with its process, whatever that dies of: what can be locked has no writer.

    Raises:
        OSError, ImportError: a file system, or an operating system, without such locks.
    """
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return os.fstat(file.fileno()).st_nlink > 0


def _remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of writers that were killed."""
    for left in folder.glob(".vidmem-*.tmp"):
        # OSError: renamed or removed meanwhile, another user's, or without locks.
        with contextlib.suppress(OSError, ImportError), open(left, "r+b") as file:
            if _lock(file):
                os.unlink(left)


def _temporary(folder: Path) -> tuple[Path, BinaryIO]:
    """A new file under a name of its own, locked so that other writers leave it alone."""
    while True:
        path = folder / f".vidmem-{secrets.token_hex(8)}.tmp"
        file = open(path, "xb")  # noqa: SIM115 (the caller closes it)
        try:
            if _lock(file):
                return path, file
        except (OSError, ImportError):  # no locks, so that nobody takes it for a leftover
            return path, file
        file.close()  # another writer came before the lock and removes it


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a memory file under a temporary name in the same folder, then renames it to `path`.

    Temporary files that killed writers left in that folder are removed first, so that their room is there.

    Args:
        path: file to create or replace; a reader sees the old content or the new, whatever happens on the way. A
            symbolic link stays, what it points to is replaced.
        tensors: of the dtypes in `DTYPES`, on any device; copied to the host in pieces.
        metadata: the user's header entries.

    Raises:
        OSError: the folder is missing, full or not writable. The temporary file is gone then, as after any exception.
    """
    path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder", str(path.parent))
    # Wide elements first: every tensor is then aligned to its element size.
    ordered = {name: tensors[name] for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))}
    header = _header(ordered, metadata)
    digest = hashlib.sha256(header)
    _remove_leftovers(path.parent)
    temporary, file = _temporary(path.parent)
    try:
        with file:
            file.write(header)
            for tensor in ordered.values():
                flat = tensor.detach().reshape(-1)
                step = max(1, _CHUNK // tensor.element_size())
                for start in range(0, flat.numel(), step):
                    piece = _bytes_of(flat[start : start + step].cpu().contiguous())
                    digest.update(piece)
                    file.write(piece)
            file.seek(header.index(_NO_CHECKSUM.encode()))
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)  # while it is locked: no other writer may take it for a leftover
    except BaseException:  # an interrupt too must not leave the temporary file behind
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def foreign(path: Path, why: str) -> MemoryFileError:
    """The error for a file that is something else."""
    return MemoryFileError(
        f"MemoryBank.load: {path} is not a memory file ({why}); give a file that MemoryBank.save wrote"
    )


def _damaged(path: Path, why: str) -> MemoryFileError:
    return MemoryFileError(f"MemoryBank.load: {path} is damaged ({why}); restore it from a copy or save the bank again")


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[bytes, dict[str, Any]]:
    if size < 8:
        raise foreign(path, f"{size} bytes are too few")
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise foreign(path, "no safetensors header, or cut inside it")
    head += file.read(length)
    try:
        content = json.loads(head[8:])
    except (ValueError, RecursionError):
        raise foreign(path, "its header is not JSON") from None
    own = content.get("__metadata__") if isinstance(content, dict) else None
    if not isinstance(own, dict) or own.get(f"{RESERVED}format") != FORMAT:
        raise foreign(path, f"its header does not name the format {FORMAT}")
    version = own.get(f"{RESERVED}version")
    if version != str(VERSION):
        raise MemoryFileError(
            f"MemoryBank.load: {path} is of version {version!r}, this vidmem_kernels reads version {str(VERSION)!r}; "
            "install the vidmem_kernels that wrote it"
        )
    return head, content


def _entries(path: Path, content: dict[str, Any], data_size: int) -> list[_Entry]:
    """What the header says of the tensors, if they fill the data from first byte to last."""
    entries = []
    expected = 0
    try:
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            fits = whole and math.prod(max(n, 1) for n in shape) < 1 << 60
            if not fits or begin != expected or end != begin + math.prod(shape) * dtype.itemsize:
                raise ValueError
            entries.append(_Entry(name, dtype, shape, begin, end))
            expected = end
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, "its header does not describe its tensors") from None
    if expected != data_size:
        raise _damaged(path, f"it should hold {expected} bytes of tensors, holds {data_size}")
    return entries


def _read_into(file: BinaryIO, view: memoryview, update: Callable[[memoryview], None]) -> None:
    """Fills `view` from the file, in pieces that `update` then sees."""
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        if file.readinto(piece) != len(piece):
            raise EOFError
        update(piece)


def map_tensor(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: torch.dtype, writable: bool) -> Tensor:
    """A tensor that is the content of an open file from `offset` on; it keeps the mapping alive."""
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    length = offset + math.prod(shape) * dtype.itemsize
    access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
    mapping = mmap.mmap(file.fileno(), length, access=access)
    with warnings.catch_warnings():
        # torch warns of read-only memory; it is private to the bank, which never writes to it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def read(path: Path, rows: str, rows_storage: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a memory file after checking every byte of it.

    Args:
        path: the file.
        rows: name of the tensor that `rows_storage` is about; the others are read into host memory.
        rows_storage: "device" (host memory), "pinned" or "mmap" (mapped, read-only).

    Returns:
        (tensors on the CPU, the user's header entries).

    Raises:
        MemoryFileError: a foreign, damaged or cut file, or one of another version.
        OSError: the file is missing (FileNotFoundError) or cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head, content = _read_header(path, file, size)
        entries = _entries(path, content, size - len(head))
        own = content["__metadata__"]
        checksum = own.get(f"{RESERVED}checksum")
        if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
            raise _damaged(path, "its checksum is no checksum")
        digest = hashlib.sha256(head.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1))
        tensors = {}
        scratch = memoryview(bytearray(min(_CHUNK, size)))
        try:
            for name, dtype, shape, begin, end in entries:
                if name == rows and rows_storage == "mmap":
                    for start in range(begin, end, _CHUNK):
                        _read_into(file, scratch[: min(_CHUNK, end - start)], digest.update)
                    tensors[name] = map_tensor(file, len(head) + begin, shape, dtype, writable=False)
                else:
                    pinned = name == rows and rows_storage == "pinned"
                    tensors[name] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
                    _read_into(file, _bytes_of(tensors[name]), digest.update)
        except EOFError:
            raise _damaged(path, "it became shorter while it was read") from None
    if digest.hexdigest() != checksum:
        raise _damaged(path, "its checksum does not match its content")
    return tensors, {key: value for key, value in own.items() if not key.startswith(RESERVED)}
