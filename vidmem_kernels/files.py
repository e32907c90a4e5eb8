"""Replaces files atomically: checks of the target, temporary names, and locks that mark their owner.

A lock (flock) ends with its process, however the process dies, and also works between containers. On file systems and
operating systems without locks, no temporary file is treated as a leftover.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_LEFTOVERS = ".vidmem-*.tmp"
_SPECIAL = (
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def found(path: str | os.PathLike[str]) -> os.stat_result | None:
    """The stat result of a path, with symbolic links followed, or None if nothing is there."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def target_of(path: str | os.PathLike[str]) -> Path:
    """The file that writing to `path` creates or replaces; symbolic links are followed.

    Raises:
        OSError: the folder is missing, or the path is a directory, device, pipe or socket, or a read-only file.
    """
    there = found(path)
    real = Path(os.path.realpath(path))
    if there is None:
        if not real.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "No such folder", str(real.parent))
        return real
    if stat.S_ISDIR(there.st_mode):
        raise IsADirectoryError(errno.EISDIR, "Is a directory", str(path))
    for is_kind, kind in _SPECIAL:
        if is_kind(there.st_mode):
            raise OSError(errno.EINVAL, f"Is {kind}, not a file", str(path))
    # The superuser may write to every file, but read-only files should still be refused.
    if not there.st_mode & 0o222 or not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, "Is read-only", str(path))
    return real


def lock(handle: int) -> bool:
    """Locks an open file or folder until it is closed; returns False if another process has the lock.

    Raises:
        OSError, ImportError: the file system, or the operating system, has no such locks.
    """
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder is still the one at a path."""
    there = found(path)
    return there is not None and os.path.samestat(os.fstat(handle), there)


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files and folders of killed processes."""
    for left in folder.glob(_LEFTOVERS):
        # OSError: renamed or removed meanwhile, owned by another user, or no locks.
        with contextlib.suppress(OSError, ImportError):
            is_folder = left.is_dir()
            handle = os.open(left, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if lock(handle) and is_at(handle, left):
                    shutil.rmtree(left) if is_folder else os.unlink(left)
            finally:
                os.close(handle)


def _temporary(folder: Path, mode: int | None, names: list[Path]) -> tuple[Path, int]:
    """Creates a uniquely named file with a mode, or a folder, locked so that other processes leave it alone.

    Each name is added to `names` before anything has it, because a signal may come at any moment.
    """
    while True:
        path = folder / f".vidmem-{secrets.token_hex(8)}.tmp"
        names.append(path)
        if mode is None:
            path.mkdir()
        try:
            handle = os.open(path, os.O_RDONLY if mode is None else os.O_RDWR | os.O_CREAT | os.O_EXCL, mode or 0)
        except FileNotFoundError:  # another process removed the folder before it was locked
            if folder.is_dir():
                continue
            raise
        try:
            if lock(handle) and is_at(handle, path):
                return path, handle
        except (OSError, ImportError):  # no locks, so nothing is treated as a leftover
            return path, handle
        os.close(handle)  # another process took it for a leftover before it was locked


@contextlib.contextmanager
def temporary_file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Yields a temporary file in the folder of `target`, to be written and then `put` there; otherwise it is removed.

    Leftovers of killed processes in that folder are removed first, to free their disk space.
    """
    remove_leftovers(target.parent)
    # Private until `put` gives it the mode of the file that it replaces.
    names: list[Path] = []
    try:
        path, handle = _temporary(target.parent, 0o666 if found(target) is None else 0o600, names)
        with os.fdopen(handle, "w+b") as file:
            yield path, file
    finally:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yields a temporary folder, which is removed at the end if it still has its name."""
    remove_leftovers(parent)
    names: list[Path] = []
    handle = -1
    try:
        path, handle = _temporary(parent, None, names)
        yield path
    finally:
        for name in names:
            shutil.rmtree(name, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def put(file: Path, target: Path) -> None:
    """Renames a file to `target`, with the mode and, if permitted, the owner of the file that was there."""
    there = found(target)
    if there is not None:
        for uid, gid in ((-1, there.st_gid), (there.st_uid, -1)):
            with contextlib.suppress(OSError):
                os.chown(file, uid, gid)
        os.chmod(file, stat.S_IMODE(there.st_mode))
    os.replace(file, target)


def sync(path: Path) -> None:
    """Flushes a file's content, or the names in a folder, to disk, so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
