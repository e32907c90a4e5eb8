"""Download the sample film to the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vidmem_kernels.files import temporary_folder

from ..checks import show
from ..errors import MediaError, UserError

# Big Buck Bunny (c) Blender Foundation, CC-BY 3.0: the whole film is part of moviepy's source release.
SAMPLE_RELEASE = "moviepy==2.2.1"
SAMPLE_RELEASE_BYTES = 58_431_438
SAMPLE_ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
SAMPLE_MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
SAMPLE_BYTES = 50_195_281
SAMPLE_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"


def cache_dir() -> Path:
    """Return the folder for downloads: $VIDMEM_CACHE, else $XDG_CACHE_HOME/vidmem, else ~/.cache/vidmem.

    Raises:
        UserError: The path starts with ~ and an unknown user.
    """
    named = next((name for name in ("VIDMEM_CACHE", "XDG_CACHE_HOME") if os.environ.get(name)), None)
    try:
        base = Path(os.environ[named]).expanduser() if named else Path.home() / ".cache"
    except RuntimeError as error:
        what = f"{named}={show(os.environ[named])}" if named else "HOME"
        raise UserError(f"{what}: there is no such home folder; set VIDMEM_CACHE to a folder's full path") from error
    return base if named == "VIDMEM_CACHE" else base / "vidmem"


def fetch_sample_clip(progress: bool = True) -> Path:
    """Return the path of the sample film; download it to the cache on first use.

    Args:
        progress: Whether to show a progress bar on stderr.

    Returns:
        Path of the verified bbb.mp4 (596 s, 720x1280 height x width, 24 fps).

    Raises:
        MediaError: The film cannot be downloaded or has another hash; no partial file is left.
    """
    target = cache_dir() / "bbb.mp4"
    if target.is_file() and target.stat().st_size == SAMPLE_BYTES and _sha256(target) == SAMPLE_SHA256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            temporary_folder(target.parent) as scratch,
            _progress_bar(progress) as bar,
        ):
            release = _download_release(scratch, bar)
            part = scratch / "bbb.mp4"
            _extract_sample(release, part, bar)
            if part.stat().st_size != SAMPLE_BYTES or _sha256(part) != SAMPLE_SHA256:
                raise _sample_error("the downloaded film is not the expected file")
            os.replace(part, target)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise _sample_error(str(error) or type(error).__name__) from error
    return target


def _sample_error(reason: str) -> MediaError:
    reason = " ".join(reason.split())
    return MediaError(f"cannot fetch the sample clip ({reason}); give a VIDEO argument instead")


@contextlib.contextmanager
def _progress_bar(visible: bool) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    # On stderr, so that stdout has results only.
    with Progress(*columns, console=Console(stderr=True), disable=not visible) as bar:
        yield bar


def _download_release(scratch: Path, bar: Progress) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--no-deps", "--no-binary", "moviepy", "--no-build-isolation"]
    command += ["--progress-bar", "off", "-d", str(scratch / "release"), SAMPLE_RELEASE]
    spool = scratch / "spool"
    spool.mkdir()
    log = scratch / "pip.log"
    task = bar.add_task("downloading the sample clip", total=SAMPLE_RELEASE_BYTES)
    # pip downloads below TMPDIR: the size of that folder is the progress, for any version of pip.
    with log.open("wb") as sink:
        pip = subprocess.Popen(command, stdout=sink, stderr=sink, env={**os.environ, "TMPDIR": str(spool)})
        try:
            while pip.poll() is None:
                bar.update(task, completed=min(_largest_file(spool), SAMPLE_RELEASE_BYTES))
                time.sleep(0.1)
        finally:
            if pip.poll() is None:
                pip.kill()
            pip.wait()
    found = sorted((scratch / "release").glob("moviepy-*.tar.gz"))
    if pip.returncode != 0 or not found:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
        said = next((x for x in reversed(lines) if "error" in x.lower()), lines[-1])
        raise _sample_error(f"pip download {SAMPLE_RELEASE}: {said}")
    bar.update(task, completed=SAMPLE_RELEASE_BYTES)
    return found[0]


def _largest_file(folder: Path) -> int:
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue  # pip has moved it since the folder was listed
    return largest


def _extract_sample(release: Path, part: Path, bar: Progress) -> None:
    task = bar.add_task("unpacking", total=SAMPLE_BYTES)
    with tarfile.open(release, "r:gz") as outer:
        member = next((m for m in outer if m.name.endswith("/" + SAMPLE_ARCHIVE)), None)
        stream = outer.extractfile(member) if member else None
        if stream is None:
            raise _sample_error(f"{release.name} holds no {SAMPLE_ARCHIVE}")
        with zipfile.ZipFile(stream) as inner, part.open("wb") as out:
            if SAMPLE_MEMBER not in inner.namelist():
                raise _sample_error(f"{SAMPLE_ARCHIVE} holds no {SAMPLE_MEMBER}")
            with inner.open(SAMPLE_MEMBER) as film:
                while block := film.read(1 << 20):
                    out.write(block)
                    bar.update(task, advance=len(block))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
