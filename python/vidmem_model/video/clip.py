"""Descriptions of videos: the part to take, file metadata, and decoded frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ..checks import MOST_FPS, MOST_PIXELS, MOST_SECONDS, Checked, not_negative, positive, require
from .picture import cropped_share

# Cropping 4:3 to 16:9 loses 25 % of a picture. A larger loss is probably unintended and is reported.
_MUCH_CROPPED = 0.255


@dataclass(frozen=True)
class ClipSpec(Checked):
    """Which part of a video to take, and at which frame size and frame rate.

    Frames are scaled to cover height x width, then centre-cropped.

    Args:
        height: Rows of a frame, in pixels; None keeps those of the video.
        width: Columns of a frame, in pixels; None keeps those of the video.
        fps: Frames per second, constant; None keeps the mean rate of the video.
        start: Start of the part, in seconds from the beginning of the video.
        seconds: Length of the part, in seconds; None takes everything after `start`.

    Raises:
        ValueError: A size, rate or length is not positive, or only one of height and width is given.
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
    """Metadata of a video file.

    Attributes:
        width: Columns of a frame as displayed, in pixels (pixel aspect ratio and orientation are applied).
        height: Rows of a frame as displayed, in pixels.
        fps: Mean frame rate, in frames per second.
        frames: Number of frames; an estimate for a large file whose container does not store it.
        duration: Time from the start of the first frame to the end of the last one, in seconds.
        interlaced: Whether the first frame is interlaced.
    """

    width: int
    height: int
    fps: float
    frames: int
    duration: float
    interlaced: bool = False


@dataclass(frozen=True)
class Clip:
    """Decoded frames at a constant frame rate.

    Attributes:
        frames: uint8 (T, H, W, 3), RGB.
        fps: Frames per second.
        source: The video file.
        asked: Number of frames that the ClipSpec asked for; None if it asked for all.
        remarks: Warnings for the user, from the function `remarks`.
    """

    frames: torch.Tensor
    fps: float
    source: Path
    asked: int | None
    remarks: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int, int]:
        """Number of frames, rows and columns."""
        frames, rows, columns, _ = self.frames.shape
        return frames, rows, columns

    @property
    def short(self) -> bool:
        """Whether the video has fewer frames than asked for."""
        return self.asked is not None and len(self.frames) < self.asked


def remarks(path: str | Path, info: VideoInfo, spec: ClipSpec) -> tuple[str, ...]:
    """Warn of what may spoil a clip: interlacing, and cropping of more than a quarter of the picture.

    Args:
        path: The video file.
        info: Its metadata, from `probe`.
        spec: The part, size and rate to take.

    Returns:
        One line for each warning.
    """
    lines = []
    if info.interlaced:
        lines.append(f"{path}: is interlaced, so that moving edges look combed; deinterlace it first")
    if spec.height and spec.width:
        lost = cropped_share((info.height, info.width), (spec.height, spec.width))
        if lost > _MUCH_CROPPED:
            lines.append(
                f"{path}: {lost:.0%} of the picture is cut off, because {info.height}x{info.width} (height x width) "
                f"is scaled to cover {spec.height}x{spec.width} and centre-cropped; give a size of its aspect ratio"
            )
    return tuple(lines)
