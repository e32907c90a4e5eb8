"""Copies of a MemoryBank: within the process, in a pickle, and in another process."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd, ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import memory_file
from .memory_file import MemoryFileError, Saved
from .memory_mapping import OpenFile, digest_rows, map_tensor
from .memory_rows import Held

if TYPE_CHECKING:
    from .memory_bank import MemoryBank

BANKS: weakref.WeakSet[MemoryBank] = weakref.WeakSet()
_OWN = {"channels", "dtype", "device", "storage", "metadata", "extras", "_held", "_folder", "_writing"}


def _packed(value: Any) -> Any:
    """Converts a float8 tensor, which `pickle` cannot load, to its bytes; returns anything else unchanged."""
    if isinstance(value, Tensor) and value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return _Float8(value.view(torch.uint8), value.dtype)
    return value


class _Float8(NamedTuple):
    bytes: Tensor
    dtype: torch.dtype


def _unpacked(value: Any) -> Any:
    return value.bytes.view(value.dtype) if isinstance(value, _Float8) else value


def _others(bank: MemoryBank) -> dict[str, Any]:
    """The attributes that a user or a subclass added to the bank."""
    return {name: value for name, value in vars(bank).items() if name not in _OWN}


def copied(bank: MemoryBank, copy: Callable[[Any], Any]) -> MemoryBank:
    """Makes an independent bank with the same content.

    Args:
        bank: the bank to copy.
        copy: copies the dicts (metadata, extras and added attributes).
    """
    held = bank._held
    mapped = held.file is not None
    held = held.remapped() if mapped else held.copied(held.count, bank.storage)
    made = type(bank)._holding(held, bank.device, bank.storage, bank._folder)
    made.metadata, made.extras = copy(bank.metadata), copy(bank.extras)
    vars(made).update(copy(_others(bank)))
    return made


def _state(bank: MemoryBank) -> dict[str, Any]:
    """The part of the pickle other than the rows; its tensor carries the device, for torch.load's map_location."""
    return {
        "where": torch.empty(0, device=bank._held.positions.device),
        "device": bank.device,
        "storage": bank.storage,
        "folder": bank._folder,
        "metadata": dict(bank.metadata),
        "extras": {name: _packed(tensor) for name, tensor in bank.extras.items()},
        "others": _others(bank),
    }


def _restored(cls: type[MemoryBank], held: Held, state: dict[str, Any]) -> MemoryBank:
    device, where = state["device"], state["where"].device
    device = device if device.type == where.type else where
    bank = cls._holding(held.placed(device, state["storage"]), device, state["storage"], state["folder"])
    bank.metadata = state["metadata"]
    bank.extras = {name: _unpacked(tensor) for name, tensor in state["extras"].items()}
    vars(bank).update(state["others"])
    return bank


def reduced(bank: MemoryBank) -> tuple[Any, ...]:
    """The pickle of a bank: the name of the file that has the rows, or the rows if there is no such file."""
    held, state, cls = bank._held, _state(bank), type(bank)
    if bank.storage == "mmap" and held.saved is not None:
        memory_file.check_saved(held.saved)
        return _from_saved, (cls, held.saved, state)
    whole = held.copied(held.count, "device", rows=held.working is None)
    if held.working is None:
        return _from_rows, (cls, _packed(whole.rows), whole.positions, whole.scale, state)
    size = held.count * bank.channels * bank.dtype.itemsize
    _check_working(held)
    digest = digest_rows(held.file, size)
    named = (held.working, digest, (held.count, bank.channels), bank.dtype)
    return _from_working, (cls, named, whole.positions, whole.scale, state)


def _check_working(held: Held) -> None:
    """Checks that the working file still exists."""
    try:
        same = os.path.samestat(os.stat(held.working), os.fstat(held.file.fileno()))
    except FileNotFoundError:
        raise memory_file.missing(held.working) from None
    if not same:
        raise MemoryFileError(memory_file.changed(held.working, "another file"))


def _from_saved(cls: type[MemoryBank], saved: Saved, state: dict[str, Any]) -> MemoryBank:
    try:
        content = memory_file.read(Path(saved.path), "rows", "mmap", saved)
    except FileNotFoundError:
        raise memory_file.missing(saved.path) from None
    tensors = content.tensors
    rows = tensors["rows"]
    held = Held(
        rows.shape[0],
        rows,
        tensors["positions"],
        tensors.get("scale"),
        content.file,
        content.offset,
        saved=content.saved,
    )
    return _restored(cls, held, state)


def _from_working(
    cls: type[MemoryBank],
    named: tuple[str, str, tuple[int, int], torch.dtype],
    positions: Tensor,
    scale: Tensor | None,
    state: dict[str, Any],
) -> MemoryBank:
    path, digest, shape, dtype = named
    try:
        file = OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except FileNotFoundError:
        raise memory_file.missing(path) from None
    try:
        same = digest_rows(file, shape[0] * shape[1] * dtype.itemsize) == digest
        rows = map_tensor(file, 0, shape, dtype, writable=False)
    except EOFError:
        same = False
    if not same:
        raise MemoryFileError(memory_file.changed(path, "another content"))
    return _restored(cls, Held(shape[0], rows, positions, scale, file, working=path), state)


def _from_rows(
    cls: type[MemoryBank], rows: Any, positions: Tensor, scale: Tensor | None, state: dict[str, Any]
) -> MemoryBank:
    rows = _unpacked(rows)
    held = Held(rows.shape[0], rows, positions, scale)
    if state["storage"] == "mmap":
        folder = state["folder"]  # may be missing on the machine that loads the pickle
        state["folder"] = folder if folder is not None and folder.is_dir() else None
        held = held._replace(rows=rows.cpu()).grown(held.count, "mmap", state["folder"])
    return _restored(cls, held, state)


def share_when_sent(cls: type[MemoryBank]) -> None:
    """Makes the pickler of multiprocessing, which copies between running processes, share memory where possible."""
    ForkingPickler.register(cls, _sent)


def _sent(bank: MemoryBank) -> tuple[Any, ...]:
    """The pickle of a bank for another running process."""
    held, state, cls = _shared(bank), _state(bank), type(bank)
    if held.file is None:
        return _from_rows, (cls, _packed(held.rows), held.positions, held.scale, state)
    # Sends the file descriptor, not a name: the file may have no name, or be replaced under its name.
    mapped = (held.offset, (held.count, bank.channels), bank.dtype, held.working, held.saved)
    return _from_descriptor, (cls, DupFd(held.file.fileno()), mapped, held.positions, held.scale, state)


def _from_descriptor(
    cls: type[MemoryBank],
    descriptor: Any,
    mapped: tuple[int, tuple[int, int], torch.dtype, str | None, Saved | None],
    positions: Tensor,
    scale: Tensor | None,
    state: dict[str, Any],
) -> MemoryBank:
    offset, shape, dtype, working, saved = mapped
    file = OpenFile(descriptor.detach())
    rows = map_tensor(file, offset, shape, dtype, writable=False)
    held = Held(shape[0], rows, positions, scale, file, offset, working=working, saved=saved)
    return _restored(cls, held, state)


def _shared(bank: MemoryBank) -> Held:
    """The content of the bank without spare capacity and, unless mapped or on a GPU, in shared memory.

    The bank itself switches to this copy, so that all processes it is sent to share it. Otherwise torch would move the
    rows to shared memory while other threads read them, and two banks would write to the same spare capacity.
    """
    with bank._writing:
        held = bank._held
        if held.rows.device.type != "cpu":  # sent by reference; later appends are behind these rows
            return held.trimmed()
        parts = [held.positions, held.scale, None if held.file is not None else held.rows]
        host = [part for part in parts if part is not None and part.device.type == "cpu" and part.numel()]
        if bank.storage == "pinned" or any(not part.is_shared() for part in host) or held.rows.shape[0] > held.count:
            own = held.own
            held = held.trimmed().copied(held.count, "device", rows=held.file is None)._replace(own=own)
            for part in (held.positions, held.scale, None if held.file is not None else held.rows):
                if part is not None and part.device.type == "cpu":
                    part.share_memory_()
            if bank.storage != "pinned":
                bank._held = held
        return held


def _leave_the_parent_alone() -> None:
    """Runs in a forked process: detaches all banks from files shared with the parent and from locks of its threads."""
    for bank in list(BANKS):
        bank._writing = threading.Lock()
        if bank._held.own:
            bank._held = bank._held.trimmed()


os.register_at_fork(after_in_child=_leave_the_parent_alone)
