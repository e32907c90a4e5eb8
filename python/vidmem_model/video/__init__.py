"""Read video files as frames of a constant rate and size, and write MP4 and PNG files.

`decode` yields the pictures of a file in display order, `stamps` computes their times, `picture` rotates, scales and
composes them, `read` selects what a ClipSpec asks for, and `sample` downloads the sample film.
"""

from __future__ import annotations

from .clip import Clip, VideoInfo, remarks
from .load import load_clip
from .read import iter_frames, probe, read_clip
from .sample import cache_dir, fetch_sample_clip

__all__ = [
    "Clip",
    "VideoInfo",
    "cache_dir",
    "fetch_sample_clip",
    "iter_frames",
    "load_clip",
    "probe",
    "read_clip",
    "remarks",
]
