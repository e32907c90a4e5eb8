"""Splits files into pieces of a bounded size, each with its checksum, to move them to another machine."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidmem_model.errors import UserError
from vidmem_model.files import replacing

PIECE = 15 << 20
_NAME = "weights-"


def split(files: Mapping[str, Path], out: Path, size: int = PIECE) -> list[dict[str, Any]]:
    """Writes files as one archive in pieces. Earlier pieces stay until `remove_others`.

    Args:
        files: names in the archive -> paths.
        out: folder for the pieces.
        size: maximum bytes of a piece.

    Returns:
        JSON for `join`: name, bytes and sha256 of every piece.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, path in files.items():
            entry = tarfile.TarInfo(name)  # without times and owners, so that equal files give equal pieces
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    content = archive.getbuffer()
    whole = hashlib.sha256(content).hexdigest()[:8]
    pieces = []
    for number, start in enumerate(range(0, len(content), size)):
        piece = content[start : start + size]
        name = f"{_NAME}{whole}.{number}"
        with replacing(out / name, len(piece)) as part:
            part.write_bytes(piece)
        pieces.append({"name": name, "bytes": len(piece), "sha256": hashlib.sha256(piece).hexdigest()})
    return pieces


def remove_others(pieces: list[dict[str, Any]], out: Path) -> None:
    """Removes pieces that are not among these."""
    names = {piece["name"] for piece in pieces}
    for path in out.glob(f"{_NAME}*.*"):
        if path.name not in names:
            path.unlink()


def join(pieces: list[dict[str, Any]], out: Path, folder: Path) -> None:
    """Joins pieces and unpacks their content.

    Args:
        pieces: result of `split`.
        out: folder of the pieces.
        folder: folder to unpack to; created if missing.

    Raises:
        UserError: a piece is missing or has changed.
    """
    archive = io.BytesIO(b"".join(_checked(pieces, out)))
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=archive) as tar:
        tar.extractall(folder, filter="data")


def _checked(pieces: list[dict[str, Any]], out: Path) -> Iterator[bytes]:
    for piece in pieces:
        path = out / Path(piece["name"]).name
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{path}: a piece of the weights cannot be read ({error.strerror})") from error
        if hashlib.sha256(content).hexdigest() != piece["sha256"]:
            raise UserError(f"{path}: is not the piece that was written: its checksum is another")
        yield content
