"""What commands write: outputs looked at before any work, files whole or not at all, one process an output.

`outputs` is the one declaration of what a command reads and writes; it refuses what would destroy something.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vidmem_kernels.files import (
    found,
    is_at,
    lock,
    put,
    remove_leftovers,
    sync,
    target_of,
    temporary_file,
    temporary_folder,
)

from .errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLL_SECONDS = 0.2


def outputs(
    inputs: Iterable[Path | None] = (),
    files: Iterable[Path | None] = (),
    folders: Mapping[Path, Sequence[str]] | None = None,
) -> None:
    """Look at everything that a command is to write, before it works.

    Args:
        inputs: files and folders that it reads; None are left out here and below. Of a folder all that is in it counts.
        files: it writes.
        folders: it fills, each with patterns of the names it writes there.

    Raises:
        UserError: an output is an input, by any name, or another output; it is a device, a pipe, a socket, read-only,
            a folder in place of a file or the other way round; or it cannot be written.
    """
    read = [path for path in inputs if path is not None]
    taken: list[Path] = []
    for path in files:
        if path is not None:
            real = check_file(path)
            _check_apart(path, real, read)
            # Two names that differ in case alone are one file on some systems.
            if any(str(real).casefold() == str(other).casefold() or _same(real, other) for other in taken):
                raise UserError(f"{path}: is given for two outputs; choose another path for one of them")
            taken.append(real)
    for folder, patterns in (folders or {}).items():
        check_folder(folder)
        real = Path(os.path.realpath(folder))
        for path in sorted({path for pattern in patterns for path in real.glob(pattern)}):
            _check_apart(path, check_file(path), read)
        if any(_same(real, path) or real in path.parents for path in taken):
            raise UserError(f"{folder}: another output lies in it; choose another path for one of them")


def _check_apart(path: Path, real: Path, read: Sequence[Path]) -> None:
    """Raise UserError if what is to be written is among what is read."""
    for given in read:
        every = given.rglob("*") if given.is_dir() and real.exists() else ()
        if any(_same(real, each) for each in (given, *every)):
            raise UserError(f"{path}: is the input {given}, which would be lost; choose another output")


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(path) == os.path.realpath(other)


def check_file(path: Path) -> Path:
    """Return the file that is made or replaced where `path` is written: symbolic links stay.

    Raises:
        UserError: no file can be written there; long work asks before it starts.
    """
    there = _found(path)
    for stream in (1, 2):
        with suppress(OSError):  # it is closed
            if there is not None and os.path.samestat(there, os.fstat(stream)):
                raise UserError(f"{path}: is where this command's own messages go; give the path of a file")
    try:
        target = target_of(path)
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give the path of a file") from None
    except FileNotFoundError:
        _check_parent(path)
        raise UserError(f"{path}: cannot be written (a broken link); choose another path") from None
    except OSError as error:
        remedy = "give the path of a file" if error.errno == errno.EINVAL else "choose another path"
        raise UserError(f"{path}: {error.strerror[0].lower()}{error.strerror[1:]}; {remedy}") from None
    _check_writable(path, target.parent)
    return target


def check_folder(path: Path) -> None:
    """Raise UserError unless a folder is at `path` or can be made there."""
    there = _found(path)
    if there is None:
        _check_parent(path)
        _check_writable(path, path.parent)
    elif path.is_dir():
        _check_writable(path, path)
    elif path.is_file():
        raise UserError(f"{path}: is a file; give the path of a folder")
    else:
        raise UserError(f"{path}: is a device, pipe or socket; give the path of a folder")


def make_folder(path: Path) -> bool:
    """Make a folder, and those it lies in, unless it is there; whether it was not.

    Raises:
        UserError: it cannot be made, or is no folder.
    """
    if _found(path) is not None:
        check_folder(path)
        return False
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    return True


def _found(path: Path) -> os.stat_result | None:
    try:
        return found(path)
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a zero byte
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({why}); choose another path") from error


def _check_parent(path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise UserError(f"{path}: the folder {folder} {what}; create it or choose another path")


def _check_writable(path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError, need: int | None = None) -> UserError:
    """The error for a file or folder that could not be written; `need` is its size in bytes."""
    remedy = "make room or choose another path" if error.errno in _FULL else "choose another path"
    return UserError(f"{path}: cannot be written ({reason(error, path, need)}); {remedy}")


def reason(error: OSError, path: Path, need: int | None = None) -> str:
    """Why `path` cannot be written; of a full disk also the bytes that are needed, if that is known, and free."""
    said = str(error.strerror or error)
    if error.errno not in _FULL:
        return said
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    needed = f"{need:,} bytes are needed and " if need is not None else ""
    return f"{said}: {needed}{shutil.disk_usage(folder).free:,} bytes are free in {folder}"


@contextmanager
def replacing(path: Path, need: int | None = None) -> Iterator[Path]:
    """Give a temporary file beside `path` to write to; it takes its place only when the work has succeeded.

    A file that is replaced gives it its mode and, as far as that is allowed, its owner.

    Args:
        path: file to write.
        need: bytes, for the message if they do not fit.

    Raises:
        UserError: the folder is missing, cannot be written or is full, or at `path` is no file.
    """
    target = check_file(path)
    try:
        with written(target) as part:
            yield part
    except OSError as error:
        raise cannot_write(path, error, need) from error


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """`replacing` for a path that is checked, with the system's own errors.

    Raises:
        OSError: it cannot be written.
    """
    with temporary_file(target) as (part, _):
        yield part
        sync(part)
        put(part, target)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill beside `path`; its files move into `path` when all is done.

    Files of the same name from an earlier run are replaced, others stay. No other process may fill it meanwhile.

    Raises:
        UserError: `path` is a file, its parent is missing or cannot be written, or another process fills it.
    """
    check_folder(path)
    real = Path(os.path.realpath(path))
    try:
        with locked(beside(real), path), temporary_folder(real.parent) as staging:
            yield staging
            if real.is_dir():
                for file in sorted(staging.iterdir()):
                    put(file, check_file(real / file.name))
            else:
                staging.rename(real)
    except OSError as error:
        raise cannot_write(path, error) from error


def remove_parts(folder: Path, patterns: Sequence[str]) -> None:
    """Remove files of these names from a folder that kept parts of a work, and the folder if nothing else is in it."""
    for file in [file for pattern in patterns for file in folder.glob(pattern)]:
        file.unlink()
    remove_leftovers(folder)
    with suppress(OSError):
        folder.rmdir()


def beside(output: Path) -> Path:
    """The lock of an output."""
    real = Path(os.path.realpath(output))
    return real.parent / f".{real.name}.lock"


@contextmanager
def locked(file: Path, what: Path, waiting: bool = False) -> Iterator[None]:
    """Hold a lock, which is gone with its process, whatever that dies of.

    Args:
        file: of the lock, in a folder that exists; removed in the end.
        what: is written under it.
        waiting: wait for another process in place of raising UserError.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    told = False
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(what, error) from error
        try:
            held = lock(handle)
        except (OSError, ImportError):  # no locks here: nothing keeps two processes apart
            break
        if held and is_at(handle, file):
            break
        owner = "" if held else os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if held:  # it was removed by the process that held it before
            continue
        message = f"{what}: another process writes here ({owner or 'it does not say which'})"
        if not waiting:
            raise UserError(f"{message}; wait for it or choose another output")
        if not told:
            print(f"{message}; waiting for it", file=sys.stderr, flush=True)
        told = True
        time.sleep(_POLL_SECONDS)
    try:
        with suppress(OSError):  # the disk is full: the lock holds all the same
            os.truncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()}, host {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
