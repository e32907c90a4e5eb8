"""Read a clip for work that takes many times its size in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..machine import available_bytes
from .clip import Clip, ClipSpec
from .read import probe, read_clip


def load_clip(video: Path, spec: ClipSpec, room: int, progress: Callable[[int, int | None], None] | None) -> Clip:
    """Decode a clip, after a look at whether there is the memory to work on it.

    Args:
        video: a video file.
        spec: the part to take.
        room: bytes of memory that decoding it and the work to follow take for each byte of decoded video.
        progress: as for `read_clip`.

    Returns:
        Clip.

    Raises:
        UserError: more memory is needed than there is.
        MediaError: as `read_clip`.
    """
    info = probe(video)
    seconds = max(0.0, info.duration - spec.start) if info.duration else spec.seconds or 0.0
    seconds = min(seconds, spec.seconds or seconds)
    pixels = (spec.height or info.height) * (spec.width or info.width)
    need = room * 3 * pixels * seconds * (spec.fps or info.fps)
    free = available_bytes()
    if need > free:
        raise UserError(
            f"{video}: {seconds:g} s at this size take about {need / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free; take fewer --seconds or a smaller --size"
        )
    return read_clip(video, spec, progress)
