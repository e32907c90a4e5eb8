"""Imports safetensors files from other programs into a MemoryBank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .._checks import names
from .memory_file import DTYPES, FORMAT, RESERVED, Entry, Header, MemoryFileError, bytes_of, read_into
from .memory_mapping import map_tensor, nameless_file, reserve
from .memory_rows import Held, check_metadata, check_parts, checked_values


def _entries(op: str, path: Path, header: Header) -> dict[str, Entry]:
    """Returns the header's entries for the tensors, after checking that they lie inside the file and do not overlap."""

    def refused(why: str) -> MemoryFileError:
        return MemoryFileError(f"{op}: {path} is not a valid safetensors file ({why}); write it again")

    if not isinstance(header.content.get("__metadata__", {}), dict):
        raise refused("its metadata is not a JSON object")
    if header.doubled:
        raise refused(f"its header has {header.doubled[0]!r} twice")
    entries = {}
    for name, described in header.tensors.items():
        try:
            entries[name] = header.entry(name)
        except (KeyError, TypeError, ValueError):
            dtype = described.get("dtype") if isinstance(described, dict) else None
            if isinstance(dtype, str) and not Header.knows(dtype):
                raise TypeError(f"{op}: tensor {name!r} must be {names(DTYPES)}, got {dtype!r}") from None
            raise refused(f"its header does not describe tensor {name!r}") from None
    expected = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin < expected:
            raise refused(f"tensor {entry.name!r} overlaps another")
        if entry.end > header.data_size:
            raise refused(f"tensor {entry.name!r} ends at byte {entry.end} of {header.data_size}")
        expected = entry.end
    return entries


def read(
    op: str, path: Path, parts: tuple[str, str, str], storage: str, folder: Path
) -> tuple[Held, dict[str, str], dict[str, Tensor]]:
    """Reads a safetensors file; see `MemoryBank.from_safetensors`.

    Args:
        op: prefix of error messages.
        path: the file.
        parts: names of the tensors for rows, positions and scale.
        storage: storage of the bank; with "mmap" the rows are copied to an unnamed file in `folder`.
        folder: folder for the unnamed file.

    Returns:
        (the rows, positions and scale, in host memory or in the unnamed file; metadata; extras).
    """
    with open(path, "rb") as file:
        header = Header(
            file,
            lambda why: MemoryFileError(f"{op}: {path} is not a safetensors file ({why}); give a safetensors file"),
        )
        if header.metadata.get(f"{RESERVED}format") == FORMAT:
            header.check_version(op, path)
        entries = _entries(op, path, header)
        for name in parts[:2]:
            if name not in entries:
                raise ValueError(f"{op}: {path} must have a tensor {name!r}, got {sorted(entries)}")
        extras: dict[str, str] = {}
        for name in sorted(entries.keys() - set(parts)):
            extra = name.removeprefix("extras.")
            if extra in extras:
                raise ValueError(
                    f"{op}: {path} must have one tensor per extra, got both {extra!r} and 'extras.{extra}'"
                )
            extras[extra] = name
        check_metadata(op, header.user_metadata)
        # Check tensors without memory first, because the sizes in a header may be arbitrary.
        check_parts(op, *(_empty(entries.get(name)) for name in parts))

        def load(entry: Entry, to: Tensor | None = None) -> Tensor:
            tensor = torch.empty(entry.shape, dtype=entry.dtype) if to is None else to
            file.seek(header.size + entry.begin)
            try:
                read_into(file, bytes_of(tensor), lambda piece: None)
            except EOFError:
                raise MemoryFileError(f"{op}: {path} became shorter while it was read; try again") from None
            return tensor

        backing, room, entry = None, None, entries[parts[0]]
        if storage == "mmap":
            backing = nameless_file(folder)
            reserve(backing, entry.end - entry.begin)
            room = map_tensor(backing, 0, entry.shape, entry.dtype, writable=True)
        with torch.inference_mode(False), torch.no_grad():
            rows = load(entry, room)
            positions, scale = (load(entries[name]) if name in entries else None for name in parts[1:])
            positions, scale = checked_values(op, rows, positions, scale)
            held = Held(rows.shape[0], rows, positions, scale, backing, own=backing is not None)
            loaded = {name: load(entries[stored]) for name, stored in sorted(extras.items())}
    return held, header.user_metadata, loaded


def _empty(entry: Entry | None) -> Tensor | None:
    return None if entry is None else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
