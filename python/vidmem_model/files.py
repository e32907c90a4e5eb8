"""Write the outputs of commands: checked before any work, written atomically, by one process at a time.

Every command declares all that it reads and writes by a call of `outputs`, which refuses to overwrite an input.
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
    """Check everything that a command will write, before it starts to work.

    Args:
        inputs: Files and folders that it reads, a folder with all its contents. None entries are ignored here and
            below.
        files: Files that it writes.
        folders: Folders that it fills, each with patterns of the file names.

    Raises:
        UserError: An output is an input, even under another name, or another output; it is a device, a pipe, a socket
            or read-only; it is a folder instead of a file or the reverse; or it cannot be written.
    """
    read = [path for path in inputs if path is not None]
    taken: list[Path] = []
    for path in files:
        if path is not None:
            real = check_file(path)
            _check_apart(path, real, read)
            # Two names that differ only in case are one file on some systems.
            if any(str(real).casefold() == str(other).casefold() or _same(real, other) for other in taken):
                raise UserError(f"{path}: is given for two outputs; choose another path for one of them")
            taken.append(real)
    for folder, patterns in (folders or {}).items():
        check_folder(folder)
        real = Path(os.path.realpath(folder))
        for path in sorted({path for pattern in patterns for path in real.glob(pattern)}):
            _check_apart(path, check_file(path), read)
        if any(_same(real, path) or real in path.parents for path in taken):
            raise UserError(f"{folder}: contains another output; choose another path for one of them")


def _check_apart(path: Path, real: Path, read: Sequence[Path]) -> None:
    """Raise UserError if an output is also an input."""
    for given in read:
        every = given.rglob("*") if given.is_dir() and real.exists() else ()
        if any(_same(real, each) for each in (given, *every)):
            raise UserError(f"{path}: is the input {given}, which would be overwritten; choose another output")


def _same(path: Path, other: Path) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:  # one of them does not exist
        return os.path.realpath(path) == os.path.realpath(other)


def check_file(path: Path) -> Path:
    """Check that a file can be written, and resolve symbolic links, which are kept.

    Args:
        path: File to write.

    Returns:
        The file that is created or replaced.

    Raises:
        UserError: No file can be written there.
    """
    there = _found(path)
    for stream in (1, 2):
        with suppress(OSError):  # it is closed
            if there is not None and os.path.samestat(there, os.fstat(stream)):
                raise UserError(f"{path}: is stdout or stderr of this command; give the path of a file")
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
    """Make a folder and its parents, if they do not exist.

    Args:
        path: The folder.

    Returns:
        Whether the folder was made.

    Raises:
        UserError: It cannot be made, or is not a folder.
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
    except (OSError, ValueError) as error:  # the name is too long, links form a loop, or it contains a zero byte
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
    """Make the error for a file or folder that cannot be written; `need` is its size in bytes."""
    remedy = "make room or choose another path" if error.errno in _FULL else "choose another path"
    return UserError(f"{path}: cannot be written ({reason(error, path, need)}); {remedy}")


def reason(error: OSError, path: Path, need: int | None = None) -> str:
    """Say why `path` cannot be written; for a full disk with the bytes that are needed (if known) and free."""
    said = str(error.strerror or error)
    if error.errno not in _FULL:
        return said
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    needed = f"{need:,} bytes are needed and " if need is not None else ""
    return f"{said}: {needed}{shutil.disk_usage(folder).free:,} bytes are free in {folder}"


@contextmanager
def replacing(path: Path, need: int | None = None) -> Iterator[Path]:
    """Yield a temporary file beside `path` to write to; it replaces `path` only after the work has succeeded.

    It gets the mode and, if possible, the owner of a file that it replaces.

    Args:
        path: File to write.
        need: Size in bytes, for the message about a full disk.

    Raises:
        UserError: The folder is missing, not writable or full, or `path` is not a file.
    """
    target = check_file(path)
    try:
        with written(target) as part:
            yield part
    except OSError as error:
        raise cannot_write(path, error, need) from error


@contextmanager
def written(target: Path) -> Iterator[Path]:
    """Like `replacing`, for a path that is already checked, with errors of the system.

    Raises:
        OSError: The file cannot be written.
    """
    with temporary_file(target) as (part, _):
        yield part
        sync(part)
        put(part, target)


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path`; its files move into `path` after the work has succeeded.

    Files of the same name in `path` are replaced, others stay. A lock keeps other processes from filling it.

    Raises:
        UserError: `path` is a file, its parent is missing or not writable, or another process is filling it.
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
    """Remove intermediate files of these names from a folder, and the folder if it is then empty."""
    for file in [file for pattern in patterns for file in folder.glob(pattern)]:
        file.unlink()
    remove_leftovers(folder)
    with suppress(OSError):
        folder.rmdir()


def beside(output: Path) -> Path:
    """Path of the lock file of an output."""
    real = Path(os.path.realpath(output))
    return real.parent / f".{real.name}.lock"


@contextmanager
def locked(file: Path, what: Path, waiting: bool = False) -> Iterator[None]:
    """Hold a file lock; the system releases it when the process ends for any reason.

    Args:
        file: The lock file, in an existing folder; removed at the end.
        what: The output that the lock protects, for messages.
        waiting: Whether to wait for another process instead of raising UserError.

    Raises:
        UserError: Another process holds the lock, or the file cannot be written.
    """
    told = False
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise cannot_write(what, error) from error
        try:
            held = lock(handle)
        except (OSError, ImportError):  # the file system has no locks
            break
        if held and is_at(handle, file):
            break
        owner = "" if held else os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if held:  # the process that held it before has removed the file
            continue
        message = f"{what}: another process is writing here ({owner or 'unknown'})"
        if not waiting:
            raise UserError(f"{message}; wait for it or choose another output")
        if not told:
            print(f"{message}; waiting for it", file=sys.stderr, flush=True)
        told = True
        time.sleep(_POLL_SECONDS)
    try:
        with suppress(OSError):  # the disk is full; the lock works without the text
            os.truncate(handle, 0)
            os.pwrite(handle, f"pid {os.getpid()}, host {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.unlink(file)
        os.close(handle)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
