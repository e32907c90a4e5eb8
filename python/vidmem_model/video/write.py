"""Write frames to an MP4 file as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from ..errors import UserError
from ..files import cannot_write, replacing

# Encoders in order of preference, with options of about the same quality. Without cpu-independent, x264 made 15
# different files of the same frames in 30 runs (240 x 416, with noise); with it one, in 5 to 15 % more time.
_ENCODERS = {
    "libx264": {"crf": "16", "preset": "medium", "x264-params": "cpu-independent=1"},
    "mpeg4": {"qmin": "2", "qmax": "3"},
}
# Colour primaries, transfer function and matrix in the numbering of ITU-T H.273, and the matrix in that of swscale.
_BT709 = (1, 1, 1, Colorspace.ITU709)
_BT601 = (6, 6, 6, Colorspace.ITU601)


def video_encoder() -> str:
    """Name of the available encoder of FFmpeg: libx264, else mpeg4.

    Raises:
        UserError: Neither is available.
    """
    for name in _ENCODERS:
        if name in av.codecs_available:
            try:
                av.codec.Codec(name, "w")
            except av.codec.codec.UnknownCodecError:
                continue
            return name
    raise UserError(f"this build of PyAV has none of the encoders {', '.join(_ENCODERS)}; install the wheel of av")


@contextmanager
def video_writer(path: str | Path, fps: float) -> Iterator[Callable[[torch.Tensor | np.ndarray], None]]:
    """Open an MP4 file for writing; it appears at `path` only after everything is written.

    The video is H.264 in yuv420p, which every player supports, at a constant rate. Colours are BT.709 from 720 rows on
    and BT.601 below, and tagged accordingly. If height or width is odd, the last row or column is repeated, because
    yuv420p has one colour for 2 x 2 pixels.

    Args:
        path: File *.mp4 to write.
        fps: Frames per second.

    Yields:
        A function that writes uint8 frames (t, H, W, 3), RGB.

    Raises:
        UserError: The path is not *.mp4 or cannot be written, or there is no encoder.
        ValueError: fps is not positive, frames differ in size, or there are no frames.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: videos are written as MP4; give --output a name that ends in .mp4")
    if not fps > 0:
        raise ValueError(f"video_writer: fps must be positive, got {fps}")
    encoder = video_encoder()
    with replacing(path) as part:
        try:
            with av.open(str(part), "w", format="mp4", options={"movflags": "+faststart"}) as container:
                stream = _Stream(container, encoder, Fraction(fps).limit_denominator(100_000))
                yield stream.write
                stream.close()
        except (av.error.FFmpegError, OSError) as error:
            raise cannot_write(path, error) from error


class _Stream:
    """The video stream of an open container; the first frames determine its size."""

    def __init__(self, container: av.container.OutputContainer, encoder: str, rate: Fraction) -> None:
        self.container, self.encoder, self.rate = container, encoder, rate
        self.stream: av.VideoStream | None = None
        self.shape: tuple[int, ...] = ()
        self.count = 0
        self.reformatter = VideoReformatter()

    def write(self, frames: torch.Tensor | np.ndarray) -> None:
        """Encode uint8 frames (t, H, W, 3)."""
        frames = frames.cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
        if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(
                f"video_writer: frames must be uint8 (t, H, W, 3) and not empty, got {frames.dtype} {frames.shape}"
            )
        if self.stream is None:
            self._open(frames.shape[1:])
        if frames.shape[1:] != self.shape:
            raise ValueError(f"video_writer: frames must be {self.shape} as the first, got {frames.shape[1:]}")
        height, width, _ = self.shape
        even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        for image in even:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            picture = self.reformatter.reformat(
                picture,
                format="yuv420p",
                dst_colorspace=self.colours[3],
                dst_color_range=ColorRange.MPEG,
                interpolation="BICUBIC",
            )
            picture.pts, picture.time_base = self.count, 1 / self.rate
            self.count += 1
            self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        """Flush the encoder."""
        if self.stream is None:
            raise ValueError("video_writer: there must be at least one frame, got none")
        self.container.mux(self.stream.encode(None))

    def _open(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.stream = self.container.add_stream(self.encoder, rate=self.rate, options=_ENCODERS[self.encoder])
        self.stream.height, self.stream.width = (n + n % 2 for n in shape[:2])
        self.stream.pix_fmt = "yuv420p"
        context = self.stream.codec_context
        context.time_base = 1 / self.rate
        self.colours = _BT709 if shape[0] >= 720 else _BT601
        context.color_primaries, context.color_trc, context.colorspace = self.colours[:3]
        context.color_range = 1  # studio range, 16 to 235
