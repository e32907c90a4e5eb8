"""Read a clip after a check that there is enough memory to process it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..errors import UserError
from ..machine import available_bytes
from .clip import Clip, ClipSpec
from .read import probe, read_clip


def load_clip(video: Path, spec: ClipSpec, room: int, progress: Callable[[int, int | None], None] | None) -> Clip:
    """Decode a clip, after a check that there is enough memory to process it.

    Args:
        video: Video file.
        spec: Part, size and rate to take.
        room: Bytes of memory that decoding and further processing take, per byte of decoded video.
        progress: As for `read_clip`.

    Returns:
        The clip.

    Raises:
        UserError: There is not enough memory.
        MediaError: As for `read_clip`.
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
