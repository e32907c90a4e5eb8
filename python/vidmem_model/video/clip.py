"""What is known of a video, and the frames that were taken of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..config import ClipSpec
from .picture import cropped_share

# A film of 4:3 in a raster of 16:9 loses 25 %; what loses more was hardly meant to.
_MUCH_CROPPED = 0.255


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of itself.

    Attributes:
        width, height: size as displayed (pixel aspect and orientation applied), in pixels.
        fps: mean rate in frames per second.
        frames: number of frames, estimated for a large file whose container does not count them.
        duration: seconds from the first frame's beginning to the last one's end.
        interlaced: whether its first frame holds two fields of different moments.
    """

    width: int
    height: int
    fps: float
    frames: int
    duration: float
    interlaced: bool = False


@dataclass(frozen=True)
class Clip:
    """Decoded frames at a constant rate.

    Attributes:
        frames: uint8 (T, H, W, 3) RGB.
        fps: frames per second.
        source: the file they came from.
        asked: how many frames the spec asked for; None where it asked for all.
        remarks: a line for each thing that may have been done unawares, as `remarks` gives them.
    """

    frames: torch.Tensor
    fps: float
    source: Path
    asked: int | None
    remarks: tuple[str, ...] = ()

    @property
    def short(self) -> bool:
        """Whether the video held fewer frames than were asked for."""
        return self.asked is not None and len(self.frames) < self.asked


def remarks(path: str | Path, info: VideoInfo, spec: ClipSpec) -> tuple[str, ...]:
    """Say what somebody who takes a part of a video may want to know before relying on it.

    Args:
        path: the video's file.
        info: what `probe` says of it.
        spec: what is taken.

    Returns:
        At most a line for interlaced material and one for a picture that is cropped by more than a quarter.
    """
    lines = []
    if info.interlaced:
        lines.append(
            f"{path}: is interlaced; its frames are taken as they are, with combed edges where something moves; "
            "deinterlace it first"
        )
    if spec.height and spec.width:
        lost = cropped_share((info.height, info.width), (spec.height, spec.width))
        if lost > _MUCH_CROPPED:
            lines.append(
                f"{path}: {lost:.0%} of the picture is cut off: {info.height}x{info.width} (height x width) is "
                f"scaled to cover {spec.height}x{spec.width} and centre-cropped; a size of its own shape keeps all"
            )
    return tuple(lines)
