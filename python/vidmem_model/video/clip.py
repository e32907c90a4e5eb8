"""What is known of a video, and the frames that were taken of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ..checks import MOST_FPS, MOST_PIXELS, MOST_SECONDS, Checked, not_negative, positive, require
from .picture import cropped_share

# A film of 4:3 in a raster of 16:9 loses 25 %; what loses more was hardly meant to.
_MUCH_CROPPED = 0.255


@dataclass(frozen=True)
class ClipSpec(Checked):
    """The part of a video to take, and the raster that it is brought to.

    Args:
        height: rows of a frame in pixels, or None for the video's own.
        width: columns of a frame in pixels, or None for the video's own.
        fps: constant frame rate in frames per second, or None for the video's own.
        start: first moment to take, in seconds.
        seconds: length to take, or None for all that follows `start`.

    Raises:
        ValueError: a size, rate or length is not positive, or only one of height and width is given.
    """

    height: Annotated[int | None, positive(MOST_PIXELS)] = 480
    width: Annotated[int | None, positive(MOST_PIXELS)] = 832
    fps: Annotated[float | None, positive(MOST_FPS)] = 24.0
    start: Annotated[float, not_negative(MOST_SECONDS)] = 0.0
    seconds: Annotated[float | None, positive(MOST_SECONDS)] = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.height is None) == (self.width is None),
            "ClipSpec: height and width must be given together",
            (self.height, self.width),
        )


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
    def size(self) -> tuple[int, int, int]:
        """Frames, rows and columns."""
        frames, rows, columns, _ = self.frames.shape
        return frames, rows, columns

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
