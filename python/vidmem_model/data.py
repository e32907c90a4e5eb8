"""Video in, under its first address: the public names of `vidmem_model.video`."""

from __future__ import annotations

from .video import (
    Clip,
    VideoInfo,
    cache_dir,
    fetch_sample_clip,
    iter_frames,
    probe,
    read_clip,
    remarks,
)

__all__ = ["Clip", "VideoInfo", "cache_dir", "fetch_sample_clip", "iter_frames", "probe", "read_clip", "remarks"]
