"""Process a picture: rotate it, scale it to cover the frame size, crop it, and compose it on black."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

_UNTAGGED = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class Orientation:
    """How a coded picture is displayed: first it is transposed, then mirrored and flipped.

    Attributes:
        transposed: Whether rows become columns.
        mirrored: Whether the (transposed) picture is mirrored left to right.
        flipped: Whether the (transposed) picture is mirrored top to bottom.
    """

    transposed: bool = False
    mirrored: bool = False
    flipped: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Orient an image (H, W, C); returns a view."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return image[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


def orientation(frame: av.VideoFrame) -> Orientation:
    """Read the display matrix of a frame, rounded to the nearest of the eight orientations.

    The matrix maps (x, y) to (a x + c y, b x + d y). A zero matrix, which some writers store, means upright.
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
        frame: Decoded frame.
        aspect: Pixel aspect ratio, width divided by height; None or a value that is not positive means 1.

    Returns:
        Height and width, in pixels.
    """
    height, width = frame.height, frame.width
    if aspect and aspect > 0:
        width = max(1, round(width * aspect))
    return (width, height) if orientation(frame).transposed else (height, width)


def cropped_share(shown: tuple[int, int], raster: tuple[int, int]) -> float:
    """Share of a picture's area that is cropped when it is scaled to cover a frame size.

    Args:
        shown: Height and width of the picture.
        raster: Height and width of the frame size.

    Returns:
        A number from 0 to 1.
    """
    ratio = (shown[0] * raster[1]) / (shown[1] * raster[0])
    return 1 - min(ratio, 1 / ratio)


def to_raster(
    frame: av.VideoFrame,
    aspect: Fraction | None,
    size: tuple[int, int],
    reformatter: VideoReformatter,
) -> np.ndarray:
    """Orient a frame, scale it to cover a frame size, and crop its centre.

    Args:
        frame: Decoded frame; transparent areas become black.
        aspect: As for `shown_size`.
        size: Height and width of the result.
        reformatter: Converter that keeps the tables of swscale between frames.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: swscale does not support the pixel format.
    """
    turn = orientation(frame)
    shown_height, shown_width = shown_size(frame, aspect)
    height, width = size
    scale = max(height / shown_height, width / shown_width)
    tall, wide = max(height, round(shown_height * scale)), max(width, round(shown_width * scale))
    see_through = frame.format.has_palette or any(each.is_alpha for each in frame.format.components)
    # Players assume BT.709 for untagged high-definition video; swscale would assume BT.601.
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
