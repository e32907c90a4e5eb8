"""Video in: the sample clip, probing, and streaming decode to a constant rate and size."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from vidmem_kernels.files import temporary_folder

from .config import ClipSpec
from .errors import MediaError, UserError

# Big Buck Bunny (c) Blender Foundation, CC-BY 3.0: the whole film lies in moviepy's source release.
SAMPLE_RELEASE = "moviepy==2.2.1"
SAMPLE_RELEASE_BYTES = 58_431_438
SAMPLE_ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
SAMPLE_MEMBER = "moviepy_10_minutes/resources/bbb.mp4"
SAMPLE_BYTES = 50_195_281
SAMPLE_SHA256 = "475fbbf34c4c367998f80c29ea03b15a743941179b12da3373fc6706e68621d0"


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        width, height: size as displayed (pixel aspect and rotation applied), in pixels.
        fps: mean rate in frames per second.
        frames: number of frames, estimated where the container does not count them.
        duration: seconds; 0.0 where the container does not say.
    """

    width: int
    height: int
    fps: float
    frames: int
    duration: float


@dataclass(frozen=True)
class Clip:
    """Decoded frames at a constant rate.

    Attributes:
        frames: uint8 (T, H, W, 3) RGB.
        fps: frames per second.
        source: the file they came from.
        asked: how many frames the spec asked for; None where it asked for all.
    """

    frames: torch.Tensor
    fps: float
    source: Path
    asked: int | None

    @property
    def short(self) -> bool:
        """Whether the video held fewer frames than were asked for."""
        return self.asked is not None and len(self.frames) < self.asked


def cache_dir() -> Path:
    """Return the folder for fetched files: $VIDMEM_CACHE, else $XDG_CACHE_HOME/vidmem, else ~/.cache/vidmem.

    Raises:
        UserError: its ~ names no user.
    """
    own, base = os.environ.get("VIDMEM_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    named = Path(own) if own else Path(base) / "vidmem"
    try:
        return named.expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{named}: the folder for fetched files has no such user; set VIDMEM_CACHE to a path"
        ) from error


def fetch_sample_clip(progress: bool = True) -> Path:
    """Return the path of the sample film, fetching it into the cache the first time.

    Args:
        progress: whether to draw a progress bar on stderr.

    Returns:
        Path of a checked bbb.mp4 (596 s, 1280x720, 24 fps).

    Raises:
        MediaError: it cannot be fetched or is not the expected file; nothing is left half-written.
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
    # On stderr, so that a command's standard output stays clean.
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
    # pip spools a download below TMPDIR: the size of that folder is the progress, for any pip.
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
                continue  # pip moved it away between the listing and the look
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


@contextlib.contextmanager
def _open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Open a file and its first real video stream (cover art of a song is none)."""
    if not path.exists():
        raise MediaError(f"{path}: no such file; give the path of a video")
    if path.is_dir():
        raise MediaError(f"{path}: is a directory; give the path of a video")
    if path.is_file() and path.stat().st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); give the path of a video")
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.error.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"{path}: cannot be opened as a video ({reason}); it is damaged, cut short or not a video"
        ) from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            raise MediaError(f"{path}: holds no video stream; give a file with pictures")
        streams[0].thread_type = "AUTO"
        yield container, streams[0]


def _rate(stream: av.VideoStream) -> float:
    rate = stream.average_rate or stream.guessed_rate or stream.base_rate
    return float(rate) if rate else 25.0


def _declared_seconds(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """Length of the picture as the container states it; None where it does not."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    if match := re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = match.groups()  # Matroska keeps a stream's own length in this tag
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    # A container's length is that of its longest stream: it tells of the picture only when alone.
    if container.duration is not None and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _display_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int, int]:
    """Width and height as shown, and quarter turns counterclockwise that bring them about."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
    width, height = frame.width, frame.height
    if aspect and aspect > 0:
        width = max(1, round(width * aspect))
    turns = round(frame.rotation / 90) % 4
    return (height, width, turns) if turns % 2 else (width, height, turns)


def probe(path: str | Path) -> VideoInfo:
    """Read a video's displayed size, rate and length, decoding one frame.

    Args:
        path: a video file.

    Returns:
        VideoInfo.

    Raises:
        MediaError: missing, unreadable, without pictures, or without a frame that decodes.
    """
    path = Path(path)
    with _open_video(path) as (container, stream):
        first = next((frame for _, frame in _decode(path, container, stream)), None)
        if first is None:
            raise MediaError(f"{path}: holds no frame that can be decoded; give another video")
        width, height, _ = _display_size(first, stream)
        fps = _rate(stream)
        seconds = _declared_seconds(container, stream)
        if seconds is None:
            seconds = (container.duration or 0) / av.time_base
        frames = stream.frames or max(1, round(seconds * fps))
        return VideoInfo(width, height, fps, frames, seconds)


def _decode(
    path: Path, container: av.container.InputContainer, stream: av.VideoStream, start: float = 0.0
) -> Iterator[tuple[float, av.VideoFrame]]:
    """Yield (seconds since the stream's first picture, frame), from the key frame before `start`.

    FFmpeg conceals damage by default; from `start` on it is raised here instead.
    """
    unit = stream.time_base
    origin = stream.start_time or 0
    step = 1.0 / _rate(stream)
    now = -step
    try:
        # A bare stream has no time stamps to jump to: its frames are counted from the beginning.
        if start > 0 and stream.start_time is not None:
            # A second early, because MPEG program streams date the first frames after a jump wrongly.
            container.seek(origin + int(max(0.0, start - 1.0) / unit), stream=stream)
        damaged_at = None
        for packet in container.demux(stream):
            if packet.is_corrupt and packet.size and damaged_at is None:
                stamp = packet.pts if packet.pts is not None else packet.dts
                damaged_at = max(0.0, now) if stamp is None else float((stamp - origin) * unit)
            for frame in packet.decode():
                now = now + step if frame.pts is None else float((frame.pts - origin) * unit)
                broken = frame.is_corrupt or (damaged_at is not None and now >= damaged_at)
                if broken and now >= start:
                    raise _breaks(path, now)
                yield now, frame
        if damaged_at is not None and damaged_at >= start:
            raise _breaks(path, damaged_at)
    except av.error.FFmpegError as error:
        raise _breaks(path, max(0.0, now), error.strerror) from error


def _breaks(path: Path, seconds: float, reason: str = "damaged data") -> MediaError:
    return MediaError(f"{path}: breaks at {seconds:.2f} s ({reason}); repair the file or take a part before that")


def _to_raster(
    frame: av.VideoFrame,
    stream: av.VideoStream,
    size: tuple[int, int] | None,
    reformatter: VideoReformatter,
) -> np.ndarray:
    """Scale a frame to cover (height, width), turn it upright and crop its centre: uint8 RGB."""
    shown_width, shown_height, turns = _display_size(frame, stream)
    height, width = size or (shown_height, shown_width)
    scale = max(height / shown_height, width / shown_width)
    tall, wide = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    # Players take untagged high definition as BT.709; swscale would take it as BT.601.
    untagged_hd = frame.colorspace == 2 and frame.height >= 720 and not frame.format.is_rgb
    image = reformatter.reformat(
        frame,
        width=tall if turns % 2 else wide,
        height=wide if turns % 2 else tall,
        format="rgb24",
        interpolation="BICUBIC",
        src_colorspace="ITU709" if untagged_hd else None,
    ).to_ndarray()
    image = np.rot90(image, turns)
    top, left = (tall - height) // 2, (wide - width) // 2
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def _frames_at_rate(path: Path, spec: ClipSpec) -> Iterator[np.ndarray]:
    """Yield the picture on screen at start + k / fps, for k = 0, 1, ..."""
    with _open_video(path) as (container, stream):
        source_step = 1.0 / _rate(stream)
        fps = spec.fps or _rate(stream)
        count = _asked(spec, fps)
        declared = _declared_seconds(container, stream)
        size = (spec.height, spec.width) if spec.height and spec.width else None
        reformatter = VideoReformatter()
        # Containers round time stamps (Matroska to 1 ms): allow a quarter of the interval.
        slack = 0.25 / fps
        emitted, shown, image, end = 0, None, None, 0.0

        def due(until: float) -> bool:
            wanted = count is None or emitted < count
            return wanted and spec.start + emitted / fps < until - slack

        for now, frame in _decode(path, container, stream, spec.start):
            end = now + (float(frame.duration * stream.time_base) if frame.duration else source_step)
            while shown is not None and due(now):
                image = _to_raster(shown, stream, size, reformatter) if image is None else image
                yield image
                emitted += 1
            if count is not None and emitted >= count:
                return
            shown, image = frame, None
        while shown is not None and due(end):
            image = _to_raster(shown, stream, size, reformatter) if image is None else image
            yield image
            emitted += 1
        if count is not None and emitted >= count:
            return
        # A demuxer takes a missing tail for the end: only the stated length gives it away.
        if declared is not None and end < declared - max(0.5, 5 * source_step):
            raise _breaks(path, end, f"{declared:.2f} s expected")
        if emitted == 0:
            raise MediaError(
                f"{path}: has no picture at {spec.start:g} s; "
                + (f"it ends at {declared:.2f} s" if declared else "take an earlier start")
            )


def _asked(spec: ClipSpec, fps: float) -> int | None:
    return None if spec.seconds is None else max(1, round(spec.seconds * fps))


def iter_frames(path: str | Path, spec: ClipSpec, chunk: int = 16) -> Iterator[np.ndarray]:
    """Decode a video in chunks, resampled to a constant rate and brought to one size.

    Each output frame is the picture on screen at its time; it is scaled to cover the raster (aspect
    kept, rotation and pixel aspect applied) and its centre is cropped.

    Args:
        path: a video file.
        spec: the part to take; a video that ends earlier gives what there is.
        chunk: most frames in one array.

    Returns:
        Iterator over uint8 arrays (t, H, W, 3), RGB, t <= chunk.

    Raises:
        MediaError: missing, unreadable, without pictures, damaged on the way, or without a frame at
            `spec.start`.
        ValueError: chunk is not positive.
    """
    if chunk < 1:
        raise ValueError(f"iter_frames: chunk must be positive, got {chunk}")
    held: list[np.ndarray] = []
    for image in _frames_at_rate(Path(path), spec):
        held.append(image)
        if len(held) == chunk:
            yield np.stack(held)
            held = []
    if held:
        yield np.stack(held)


def read_clip(path: str | Path, spec: ClipSpec, progress: Callable[[int, int | None], None] | None = None) -> Clip:
    """Decode the part of a video that `spec` names into memory.

    Args:
        path: a video file.
        spec: the part to take.
        progress: called after every chunk with (frames done, frames expected or None).

    Returns:
        Clip; its `short` tells that the video held fewer frames than asked.

    Raises:
        MediaError: as iter_frames.
    """
    path = Path(path)
    info = probe(path)
    fps = spec.fps or info.fps
    asked = _asked(spec, fps)
    available = math.ceil((info.duration - spec.start) * fps) if info.duration else None
    expected = available if asked is None else asked if available is None else min(asked, available)
    chunks, done = [], 0
    for images in iter_frames(path, spec):
        chunks.append(torch.from_numpy(images))
        done += len(images)
        if progress:
            progress(done, None if expected is None else max(done, expected))
    return Clip(torch.cat(chunks), fps, path, asked)
