"""Reads and writes the file of a MemoryBank: safetensors, replaced atomically, with a checksum over every byte.

Any safetensors reader can open the file. It is not written by the safetensors package because that package needs all
tensors in memory at once, orders its header in a way that leaves no fixed bytes for a checksum, and aligns tensors for
copying rather than for mapping.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .. import files
from .memory_mapping import OpenFile, map_tensor

FORMAT = "vidmem_kernels.MemoryBank"
VERSION = 1
RESERVED = "vidmem."  # prefix of our own header entries; all others belong to the user

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
_ALIGNMENT = 64  # alignment of the first tensor in the file
_HEADER_LIMIT = 100_000_000  # bytes, the limit of the safetensors package
_NO_CHECKSUM = "0" * 64
_SETTLED = 2.0  # seconds after which a change surely gives a file another time stamp, on any file system
IMPORT = "MemoryBank.from_safetensors"


class MemoryFileError(ValueError):
    """A file is not a memory file, or is damaged; the one-line message names the file and says what to do."""


class MissingMemoryFileError(MemoryFileError, FileNotFoundError):
    """The file that a pickled bank refers to does not exist."""


class Saved(NamedTuple):
    """The identity of a memory file, by which another process finds it and checks that it is unchanged."""

    path: str
    checksum: str
    stamp: tuple[int, ...]
    settled: bool  # whether an equal stamp later implies equal bytes


class Content(NamedTuple):
    """The content of a memory file; for rows that stay in the file, the last three fields say where they are."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    file: OpenFile | None
    offset: int
    saved: Saved | None


class Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied (unless it is a lazy negative, such as x.conj().imag)."""
    return tensor.detach().resolve_neg().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Makes the header: 8 bytes of length and the JSON, whose first entry, the checksum, is still zeros."""
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


def _stamp(path: str, checksum: str, file: BinaryIO) -> Saved:
    """Takes the identity of an open memory file."""
    now, stat = time.time(), os.fstat(file.fileno())
    stamp = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return Saved(path, checksum, stamp, now - max(stat.st_mtime, stat.st_ctime) > _SETTLED)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Saved:
    """Writes a memory file under a temporary name in the same folder, then renames it to `path`.

    Temporary files that killed processes left in the folder are removed first, to free their disk space.

    Args:
        path: file to create or replace; a reader sees either the old content or the new. A symbolic link is followed.
            The new file gets the mode and, if permitted, the owner of the old one.
        tensors: of the dtypes in `DTYPES`, on any device; copied to the host in pieces.
        metadata: the user's header entries.

    Returns:
        The identity of the file written.

    Raises:
        OSError: the folder is missing, full or not writable, or the path is a directory, device, pipe, socket or
            read-only file. The temporary file is removed, as after any exception.
    """
    path = files.target_of(path)
    # Wide elements first, so that every tensor is aligned to its element size.
    ordered = {name: tensors[name] for name in sorted(tensors, key=lambda n: (-tensors[n].element_size(), n))}
    header = _header(ordered, metadata)
    digest = hashlib.sha256(header)
    with files.temporary_file(path) as (temporary, file):
        file.write(header)
        for tensor in ordered.values():
            flat = tensor.detach().reshape(-1)
            step = max(1, _CHUNK // tensor.element_size())
            for start in range(0, flat.numel(), step):
                piece = bytes_of(flat[start : start + step].cpu().contiguous())
                digest.update(piece)
                file.write(piece)
        file.seek(header.index(_NO_CHECKSUM.encode()))
        file.write(digest.hexdigest().encode())
        file.flush()
        os.fsync(file.fileno())
        files.put(temporary, path)  # while it is locked, so that no other writer takes it for a leftover
        saved = _stamp(str(path), digest.hexdigest(), file)
    files.sync(path.parent)
    return saved


class Header:
    """The header of a safetensors file: `size` bytes in all, of which the first 8 are the length of the JSON."""

    def __init__(self, file: BinaryIO, refused: Callable[[str], MemoryFileError]):
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise refused(f"it has only {size} bytes")
        self.bytes = file.read(8)
        length = int.from_bytes(self.bytes, "little")
        if length > min(size - 8, _HEADER_LIMIT):
            raise refused("it has no safetensors header, or ends inside it")
        self.bytes += file.read(length)
        self.doubled: list[str] = []  # duplicate keys, of which JSON keeps the last
        try:
            content = json.loads(self.bytes[8:], object_pairs_hook=self._object)
        except (ValueError, RecursionError):
            raise refused("its header is not JSON") from None
        self.content: dict[str, Any] = content if isinstance(content, dict) else {}
        metadata = self.content.get("__metadata__", {})
        self.metadata: dict[str, Any] = metadata if isinstance(metadata, dict) else {}
        self.tensors = {name: entry for name, entry in self.content.items() if name != "__metadata__"}
        self.size = len(self.bytes)
        self.data_size = size - self.size

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                self.doubled.append(key)
            content[key] = value
        return content

    @property
    def is_ours(self) -> bool:
        """Whether the header has the form that `write` gives it; damage keeps the form, another program changes it."""
        text = json.dumps(self.content, separators=(",", ":")).encode()
        first = [f"{RESERVED}format", f"{RESERVED}version"]  # after the checksum
        if list(self.metadata)[1:3] != first or self.bytes[8:] != text + b" " * (-(8 + len(text)) % _ALIGNMENT):
            return False
        try:
            entries = [self.entry(name) for name in self.tensors]
        except (KeyError, TypeError, ValueError):
            return True
        by_name = {entry.name: (-entry.dtype.itemsize, entry.name) for entry in entries}
        # A damaged name may also be out of order, but no program renames these two.
        return list(by_name.values()) == sorted(by_name.values()) or not {"rows", "positions"} <= by_name.keys()

    @staticmethod
    def knows(dtype: str) -> bool:
        return dtype in _DTYPES

    @property
    def user_metadata(self) -> dict[str, Any]:
        return {key: value for key, value in self.metadata.items() if not key.startswith(RESERVED)}

    def check_version(self, op: str, path: Path) -> None:
        version = self.metadata.get(f"{RESERVED}version")
        if version != str(VERSION):
            raise MemoryFileError(
                f"{op}: {path} is of version {version!r}, this vidmem_kernels reads version {str(VERSION)!r}; "
                "install the vidmem_kernels that wrote it"
            )

    def entry(self, name: str) -> Entry:
        """Returns the header's entry for a tensor.

        Raises:
            KeyError, TypeError, ValueError: there is no valid entry.
        """
        entry = self.tensors[name]
        begin, end = entry["data_offsets"]
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        fits = whole and math.prod(max(n, 1) for n in shape) < 1 << 60
        if not fits or end != begin + math.prod(shape) * dtype.itemsize:
            raise ValueError
        return Entry(name, dtype, shape, begin, end)


def foreign(path: Path, why: str) -> MemoryFileError:
    """Makes the error for a file that is not a memory file."""
    return MemoryFileError(
        f"MemoryBank.load: {path} is not a memory file ({why}); "
        "give a file that MemoryBank.save or vidmem compress wrote"
    )


def _damaged(path: Path, header: Header, why: str) -> MemoryFileError:
    """Makes the error for a file that changed since it was written."""
    if header.is_ours:
        what, remedy = f"damaged ({why})", "restore it from a copy or save the bank again"
    else:
        what = f"rewritten by another program ({why}, and its header is not formatted as MemoryBank.save does)"
        remedy = f"import it with {IMPORT}"
    return MemoryFileError(f"MemoryBank.load: {path} is {what}; {remedy}")


def _read_header(path: Path, file: BinaryIO) -> Header:
    header = Header(file, lambda why: foreign(path, why))
    if header.metadata.get(f"{RESERVED}format") != FORMAT:
        why = f"its header does not name the format {FORMAT}"
        if {"rows", "positions"} <= header.tensors.keys():
            raise MemoryFileError(
                f"{foreign(path, why)}, or, if it was rewritten by another program, import it with {IMPORT}"
            )
        raise foreign(path, why)
    header.check_version("MemoryBank.load", path)
    return header


def _entries(path: Path, header: Header) -> list[Entry]:
    """Returns the header's entries for the tensors, after checking that they cover the data without gaps."""
    entries = []
    expected = 0
    try:
        for name in header.tensors:
            entry = header.entry(name)
            if entry.begin != expected:
                raise ValueError
            entries.append(entry)
            expected = entry.end
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, header, "its header does not describe its tensors") from None
    if expected != header.data_size:
        raise _damaged(path, header, f"it should hold {expected} bytes of tensors, holds {header.data_size}")
    return entries


def read_into(file: BinaryIO, view: memoryview, update: Callable[[memoryview], None]) -> None:
    """Fills `view` from the file in pieces and passes each piece to `update`."""
    for start in range(0, len(view), _CHUNK):
        piece = view[start : start + _CHUNK]
        if file.readinto(piece) != len(piece):  # type: ignore[attr-defined]  # BinaryIO lacks it, open() has it
            raise EOFError
        update(piece)


def read(path: Path, rows: str, rows_storage: str, expected: Saved | None = None) -> Content:
    """Reads a memory file after verifying the checksum of every byte.

    Args:
        path: the file.
        rows: name of the tensor that `rows_storage` applies to; the others are read into host memory.
        rows_storage: "device" (host memory), "pinned" or "mmap" (mapped, read-only).
        expected: the identity that the file must have; if it shows that the file is unchanged, the checksum is skipped.

    Returns:
        Content, with tensors on the CPU.

    Raises:
        MemoryFileError: the file is not a memory file, is damaged, rewritten or truncated, or has another version.
        OSError: the file is missing (FileNotFoundError) or cannot be read.
    """
    with open(path, "rb") as file:
        header = _read_header(path, file)
        entries = _entries(path, header)
        checksum = header.metadata.get(f"{RESERVED}checksum")
        if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
            raise _damaged(path, header, "its checksum is no checksum")
        saved = _stamp(os.path.realpath(path), checksum, file)
        checked = True
        if expected is not None:
            _check_same(expected, saved)
            checked = not expected.settled or saved.stamp != expected.stamp
        digest = hashlib.sha256(header.bytes.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1))
        tensors, kept, offset = {}, None, 0
        scratch = memoryview(bytearray(min(_CHUNK, header.data_size)))
        try:
            for name, dtype, shape, begin, end in entries:
                if name == rows and rows_storage == "mmap":
                    for start in range(begin, end, _CHUNK) if checked else ():
                        read_into(file, scratch[: min(_CHUNK, end - start)], digest.update)
                    kept, offset = OpenFile(os.dup(file.fileno())), header.size + begin
                    tensors[name] = map_tensor(kept, offset, shape, dtype, writable=False)
                    file.seek(header.size + end)
                else:
                    pinned = name == rows and rows_storage == "pinned"
                    tensors[name] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
                    read_into(file, bytes_of(tensors[name]), digest.update)
        except EOFError:
            raise _damaged(path, header, "it became shorter while it was read") from None
    if checked and digest.hexdigest() != checksum:
        raise _damaged(path, header, "its checksum does not match its content")
    return Content(tensors, header.user_metadata, kept, offset, saved)


def changed(path: str, got: str) -> str:
    return (
        f"MemoryBank: {path} must still be the file with the rows of the pickled bank, got {got}; "
        "restore it, or save the bank and pickle it again"
    )


def _check_same(expected: Saved, found: Saved) -> None:
    if found.checksum != expected.checksum:
        raise MemoryFileError(changed(expected.path, "another content"))


def check_saved(saved: Saved) -> None:
    """Checks, without reading the whole file, that a memory file still exists unchanged.

    Raises:
        MemoryFileError: the file is missing (MissingMemoryFileError) or has changed.
    """
    try:
        with open(saved.path, "rb") as file:
            if _stamp(saved.path, saved.checksum, file).stamp != saved.stamp:
                header = _read_header(Path(saved.path), file)
                checksum = str(header.metadata.get(f"{RESERVED}checksum"))
                _check_same(saved, _stamp(saved.path, checksum, file))
    except FileNotFoundError:
        raise missing(saved.path) from None


def is_untouched(saved: Saved | None) -> bool:
    """Whether the file still exists unchanged."""
    if saved is None:
        return False
    try:
        with open(saved.path, "rb") as file:
            return _stamp(saved.path, saved.checksum, file).stamp == saved.stamp
    except OSError:
        return False


def missing(path: str) -> MissingMemoryFileError:
    """Makes the error for a missing file of a pickled bank."""
    return MissingMemoryFileError(changed(path, "no file"))
