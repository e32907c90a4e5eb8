"""Configurations of the memory pipeline: what to take from a video and how to compress it."""

from __future__ import annotations

import math
from dataclasses import dataclass

METHODS = ("dct", "merge")
ROW_DTYPES = ("float16", "float32", "float8", "int8")


def _check(holds: bool, what: str, got: object) -> None:
    if not holds:
        raise ValueError(f"{what}, got {got!r}")


def _is_count(value: object, minimum: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


@dataclass(frozen=True)
class ClipSpec:
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

    height: int | None = 480
    width: int | None = 832
    fps: float | None = 24.0
    start: float = 0.0
    seconds: float | None = 20.0

    def __post_init__(self) -> None:
        _check(
            (self.height is None) == (self.width is None),
            "ClipSpec: height and width must be given together",
            (self.height, self.width),
        )
        for name in ("height", "width"):
            value = getattr(self, name)
            _check(value is None or _is_count(value), f"ClipSpec: {name} must be positive", value)
        for name in ("fps", "seconds"):
            value = getattr(self, name)
            _check(
                value is None or (math.isfinite(value) and value > 0),
                f"ClipSpec: {name} must be positive",
                value,
            )
        _check(
            math.isfinite(self.start) and self.start >= 0,
            "ClipSpec: start must not be negative",
            self.start,
        )


@dataclass(frozen=True)
class CodecConfig:
    """The embedded codec: an orthonormal DCT over blocks of 4 frames x 8 x 8 pixels x 3 colours.

    Args:
        channels: coefficients kept of a block's 768, lowest frequencies first.

    Raises:
        ValueError: channels is outside [1, 768].
    """

    channels: int = 768

    def __post_init__(self) -> None:
        _check(
            _is_count(self.channels) and self.channels <= 768,
            "CodecConfig: channels must be in [1, 768]",
            self.channels,
        )


@dataclass(frozen=True)
class CompressorConfig:
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

    method: str = "dct"
    rate: tuple[int, int, int] = (4, 4, 2)
    channels: int = 3072
    budget: int | None = None
    dtype: str = "float16"

    def __post_init__(self) -> None:
        _check(
            self.method in METHODS,
            f"CompressorConfig: method must be one of {METHODS}",
            self.method,
        )
        _check(
            len(self.rate) == 3 and all(_is_count(r) for r in self.rate),
            "CompressorConfig: rate must be three positive integers (height, width, time)",
            self.rate,
        )
        _check(_is_count(self.channels), "CompressorConfig: channels must be positive", self.channels)
        _check(
            self.budget is None or _is_count(self.budget),
            "CompressorConfig: budget must be positive",
            self.budget,
        )
        _check(
            self.budget is None or self.method == "merge",
            "CompressorConfig: budget belongs to method merge; the rate fixes the rows of dct",
            self.budget,
        )
        _check(
            self.dtype in ROW_DTYPES,
            f"CompressorConfig: dtype must be one of {ROW_DTYPES}",
            self.dtype,
        )
