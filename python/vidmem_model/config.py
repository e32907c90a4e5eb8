"""Configurations of the memory pipeline: what to take from a video and how to compress it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from .checks import MOST_FPS, MOST_PIXELS, MOST_SECONDS, Checked, OneOf, not_negative, positive, require, within

METHODS = ("dct", "merge")
# How many patch tokens one token of memory covers along height, width and time.
Rate = Annotated[tuple[int, int, int], positive(128)]
ROW_DTYPES = ("float16", "float32", "float8", "int8")


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
class CodecConfig(Checked):
    """The embedded codec: an orthonormal DCT over blocks of 4 frames x 8 x 8 pixels x 3 colours.

    Args:
        channels: coefficients kept of a block's 768, lowest frequencies first.

    Raises:
        ValueError: channels is outside [1, 768].
    """

    channels: Annotated[int, within(1, 768)] = 768


@dataclass(frozen=True)
class CompressorConfig(Checked):
    """How a clip's patch tokens become a short context.

    Args:
        method: "dct" (one row a box, its strongest low frequencies) or "merge" (token merging,
            then sparsification).
        rate: patch tokens a box covers along height, width and time. It fixes the number of rows
            of dct, and of merge where `budget` is not given.
        channels: width of a dct row; a merge row is as wide as a patch token.
        budget: number of rows of merge.
        dtype: how rows are stored: float16, float32, or float8 and int8 with one scale a row.

    Raises:
        ValueError: a value is out of range, or `budget` is given with method "dct".
    """

    method: Annotated[str, OneOf(*METHODS)] = "dct"
    rate: Rate = (4, 4, 2)
    channels: Annotated[int, positive(1 << 20)] = 3072
    budget: Annotated[int | None, positive(1 << 31)] = None
    dtype: Annotated[str, OneOf(*ROW_DTYPES)] = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.budget is None or self.method == "merge",
            "CompressorConfig: budget belongs to method merge; the rate fixes the rows of dct",
            self.budget,
        )
