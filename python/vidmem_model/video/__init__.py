"""Video in: the frames that any film shows at given times, at a constant rate and in one size.

`decode` gives the pictures of a file in the order they are shown, `stamps` the time of each, `picture` turns,
scales and composes them, `read` takes what a ClipSpec asks for; `sample` fetches the sample film.
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
