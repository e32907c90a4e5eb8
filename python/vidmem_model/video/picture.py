"""One picture of a film: how it is turned, scaled to cover the raster, and composed on black."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class Orientation:
    """How a coded picture becomes the shown one: first its axes are exchanged, then it is mirrored.

    Attributes:
        transposed: rows become columns.
        mirrored: the transposed picture is mirrored left to right.
        flipped: the transposed picture is mirrored top to bottom.
    """

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an image (H, W, C); a view."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return image[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


def orientation(frame: av.VideoFrame) -> Orientation:
    """Read a frame's display matrix; one that is none of the eight orientations counts as the nearest.

    The matrix takes (x, y) to (a x + c y, b x + d y). A matrix of zeros, which some writers leave, is upright.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    a, b, _, c, d = (int(v) for v in np.frombuffer(matrix, np.int32)[:5])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Orientation(True, c < 0, b < 0)
    return Orientation(False, a < 0, d < 0)


def shown_size(frame: av.VideoFrame, aspect: Fraction | None) -> tuple[int, int]:
    """Height and width of a frame as displayed.

    Args:
        frame: a decoded frame.
        aspect: width of its pixels divided by their height; None, or one that is not positive, means 1.
    """
    height, width = frame.height, frame.width
    if aspect and aspect > 0:
        width = max(1, round(width * aspect))
    return (width, height) if orientation(frame).transposed else (height, width)


def cropped_share(shown: tuple[int, int], raster: tuple[int, int]) -> float:
    """Share of a picture's area that is lost when it is scaled to cover a raster and centre-cropped.

    Args:
        shown: height and width of the picture.
        raster: height and width of what it is to cover.
    """
    ratio = (shown[0] * raster[1]) / (shown[1] * raster[0])
    return 1 - min(ratio, 1 / ratio)


def to_raster(
    frame: av.VideoFrame,
    aspect: Fraction | None,
    size: tuple[int, int],
    reformatter: VideoReformatter,
) -> np.ndarray:
    """Turn a frame upright, scale it to cover the raster and crop its centre.

    Args:
        frame: a decoded frame; where it is transparent, black shows through.
        aspect: as for `shown_size`.
        size: height and width of the raster.
        reformatter: keeps swscale's tables from frame to frame.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: swscale does not know the pixel format.
    """
    turn = orientation(frame)
    shown_height, shown_width = shown_size(frame, aspect)
    height, width = size
    scale = max(height / shown_height, width / shown_width)
    tall, wide = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    see_through = frame.format.has_palette or any(each.is_alpha for each in frame.format.components)
    # Players take untagged high definition as BT.709; swscale would take it as BT.601.
    high_definition = frame.height >= 720 or frame.width >= 1280
    untagged_hd = high_definition and frame.colorspace == _UNTAGGED and not frame.format.is_rgb
    image = reformatter.reformat(
        frame,
        width=tall if turn.transposed else wide,
        height=wide if turn.transposed else tall,
        format="rgba" if see_through else "rgb24",
        interpolation="BICUBIC",
        src_colorspace="ITU709" if untagged_hd else None,
    ).to_ndarray()
    image = turn.apply(image)
    top, left = (tall - height) // 2, (wide - width) // 2
    image = image[top : top + height, left : left + width]
    return _on_black(image) if see_through else np.ascontiguousarray(image)


def _on_black(image: np.ndarray) -> np.ndarray:
    """Compose uint8 (H, W, 4) on black."""
    colour, alpha = image[..., :3].astype(np.uint16), image[..., 3:]
    return ((colour * alpha + 127) // 255).astype(np.uint8)
