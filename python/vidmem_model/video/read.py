"""Read a part of a video as frames of a constant rate and size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter

from ..errors import MediaError
from .clip import Clip, ClipSpec, VideoInfo, remarks
from .decode import READ_THROUGH, Film, Picture, open_film, playing
from .picture import shown_size, to_raster


def probe(path: str | Path) -> VideoInfo:
    """Read the display size, frame rate and length of a video.

    The first frame is decoded. Packets are counted if the container does not state their number or contradicts itself;
    those of a file above 64 MiB only if it does not state a length either.

    Args:
        path: Video file.

    Returns:
        Metadata of the video.

    Raises:
        MediaError: The file is missing or unreadable, or no frame can be decoded.
    """
    path = Path(path)
    with open_film(path) as film:
        frame = next((picture.frame for _, picture in film.shown() if picture.frame and not picture.broken), None)
        if frame is None:
            raise MediaError(f"{path}: has no frame that can be decoded; give another video")
        height, width = shown_size(frame, film.aspect)
        frames, seconds = film.counted, film.stated_seconds()
        first, rate, estimated = film.first, film.rate, film.estimated_seconds()
    agree = frames and seconds and abs(frames - seconds * rate) <= 1 + 0.01 * frames
    if not agree:
        if estimated is None or path.stat().st_size <= READ_THROUGH:
            with open_film(path) as film:
                frames, seconds = film.count(first)
        else:
            frames, seconds = max(1, round(estimated * rate)), estimated
    return VideoInfo(width, height, rate, frames, round(seconds, 6), frame.interlaced_frame)


def _breaks(path: Path, seconds: float, reason: str) -> MediaError:
    return MediaError(f"{path}: is damaged at {seconds:.2f} s ({reason}); repair the file or take a part before that")


def _slack(fps: float, rate: float) -> float:
    """Tolerance for the time of a picture, in seconds.

    Containers round timestamps to 1 ms at worst. If the rates are nearly equal, a quarter of the interval prevents
    uneven timestamps from repeating one picture and dropping the next.
    """
    if 0.9 < fps / rate < 1.1:
        return 0.25 / fps
    return min(0.001, 0.25 / rate, 0.25 / fps)


def _frames_at_rate(path: Path, spec: ClipSpec) -> Iterator[np.ndarray]:
    """Yield the picture that is displayed at start + k / fps, for k = 0, 1, ..."""
    with playing(path, spec.start) as (film, pictures):
        fps = spec.fps or film.rate
        count = _asked(spec, fps)
        slack = _slack(fps, film.rate)
        size = (spec.height, spec.width) if spec.height and spec.width else None
        reformatter = VideoReformatter()
        emitted, begun, end = 0, 0.0, 0.0
        shown: Picture | None = None
        image: np.ndarray | None = None

        def due(until: float) -> bool:
            wanted = count is None or emitted < count
            return wanted and spec.start + emitted / fps < until - slack

        for now, picture in itertools.chain(pictures, [(math.inf, None)]):
            until = end if picture is None else now
            while shown is not None and due(until):
                if shown.broken:
                    raise _breaks(path, begun, shown.broken)
                if image is None:
                    size = size or shown_size(shown.frame, film.aspect)
                    image = _in_raster(path, film, shown, size, reformatter)
                yield image
                emitted += 1
            if count is not None and emitted >= count:
                return
            if picture is None:
                break
            end = now + film.length(picture)
            if picture.broken and now >= spec.start:
                raise _breaks(path, now, picture.broken)
            shown, image, begun = picture, None, now
        if film.failure:
            raise _breaks(path, end, film.failure)
        # A demuxer does not detect a missing tail; only the stated length does.
        stated = film.stated_seconds()
        read = max(end, film.reached) if film.stepped else end  # an AVI may hold chunks without a picture
        if stated is not None and read < stated - max(0.5, 5 * film.step):
            raise _breaks(path, end, f"{stated:.2f} s expected")
        if emitted == 0:
            raise MediaError(
                f"{path}: has no picture at {spec.start:g} s; "
                + (f"it ends at {end:.2f} s" if end else "give another video")
            )


def _in_raster(
    path: Path, film: Film, picture: Picture, size: tuple[int, int], reformatter: VideoReformatter
) -> np.ndarray:
    try:
        return to_raster(picture.frame, film.aspect, size, reformatter)
    except (ValueError, av.error.FFmpegError) as error:
        name = picture.frame.format.name
        raise MediaError(f"{path}: its pixel format {name} is not supported ({error}); convert it first") from error


def _asked(spec: ClipSpec, fps: float) -> int | None:
    return None if spec.seconds is None else max(1, round(spec.seconds * fps))


def iter_frames(path: str | Path, spec: ClipSpec, chunk: int = 16) -> Iterator[np.ndarray]:
    """Decode a video in chunks, resampled to a constant rate and scaled to one size.

    Each frame is the picture that is displayed at its time, where 0 is the time of the first picture. It is scaled to
    cover the frame size (with orientation and pixel aspect ratio applied) and centre-cropped. Transparent areas become
    black. Without a frame size, all pictures get the size of the first.

    Args:
        path: Video file.
        spec: Part, size and rate to take; a shorter video gives fewer frames.
        chunk: Maximum number of frames in an array.

    Returns:
        Iterator over uint8 arrays (t, H, W, 3), RGB, t <= chunk.

    Raises:
        MediaError: The file is missing, unreadable or damaged, or has no frame at `spec.start`.
        ValueError: `chunk` is not positive.
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
    """Decode a part of a video into memory.

    Args:
        path: Video file.
        spec: Part, size and rate to take.
        progress: Called after every chunk with (frames done, frames expected or None).

    Returns:
        The clip; its property `short` is true if the video has fewer frames than asked for.

    Raises:
        MediaError: As for `iter_frames`.
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
    return Clip(torch.cat(chunks), fps, path, asked, remarks(path, info, spec))
