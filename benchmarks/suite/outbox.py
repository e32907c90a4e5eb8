"""Limits a folder to a few files of a few megabytes: the rest goes into an archive, which is split into pieces."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import tarfile
import tempfile
import zlib
from pathlib import Path

MOST_FILES, MOST_BYTES = 8, 16 * 2**20
ARCHIVE = "more.tar.gz"


def _worth(path: Path) -> tuple[int, str]:
    """Order of the files to keep outside the archive: the summary, weights to continue from, results; logs last."""
    kinds = {"summary.json": 0, ".json": 2, ".log": 4}
    is_weights = path.suffix not in kinds and path.name != ARCHIVE
    return 1 if is_weights else kinds.get(path.name, kinds.get(path.suffix, 3)), str(path)


def unpack(folder: Path) -> None:
    """Restores what an earlier `pack` archived; files outside the archive are newer and stay."""
    pieces = sorted(folder.glob(f"{ARCHIVE}*"))
    if not pieces:
        return
    whole = io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))
    # An unfinished archive contains nothing that is not also in the folder.
    with (
        contextlib.suppress(tarfile.TarError, EOFError, zlib.error),
        tarfile.open(fileobj=whole, mode="r:gz") as archive,
    ):
        members = [m for m in archive.getmembers() if m.isfile() and not (folder / m.name).exists()]
        archive.extractall(folder, members=members, filter="data")
    for piece in pieces:
        piece.unlink()


def pack(folder: Path, spare: int = 0) -> list[str]:
    """Leaves at most MOST_FILES - spare files of at most MOST_BYTES in a folder.

    Args:
        folder: the folder; an earlier archive in it is opened first.
        spare: number of files to leave room for.

    Returns:
        Names of the files for which there was no room; they are deleted.
    """
    unpack(folder)
    for path in folder.glob(".*"):  # partial files of killed processes
        if path.is_file():
            path.unlink()
    files = sorted((p.relative_to(folder) for p in folder.rglob("*") if p.is_file()), key=_worth)
    size = {path: (folder / path).stat().st_size for path in files}
    room = MOST_FILES - spare
    if len(files) <= room and all(n <= MOST_BYTES for n in size.values()) and all(p.parent == Path() for p in files):
        return []
    plain = [path for path in files if path.parent == Path() and size[path] <= MOST_BYTES][: room - 1]
    rest = [path for path in files if path not in plain]
    while len(plain) > 1 and len(plain) + _pieces(rest, size) > room:
        rest.append(plain.pop())
    lost = []
    while rest and len(plain) + _pieces(rest, size) > room:
        lost.append(max(rest, key=size.__getitem__))
        rest.remove(lost[-1])
    with tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for path in rest:
                archive.add(folder / path, arcname=str(path))
        total = file.tell()
        file.seek(0)
        count = math.ceil(total / MOST_BYTES)
        for number in range(count):
            name = ARCHIVE if count == 1 else f"{ARCHIVE}.{number:02d}"
            (folder / name).write_bytes(file.read(MOST_BYTES))
    for path in [*rest, *lost]:
        (folder / path).unlink()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return [str(path) for path in lost]


def _pieces(rest: list[Path], size: dict[Path, int]) -> int:
    """The maximum number of pieces of an archive; a file adds its header, and compression adds nothing more."""
    return math.ceil(sum(1.001 * size[path] + 2048 for path in rest) / MOST_BYTES)
