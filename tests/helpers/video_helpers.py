"""Films of numbered frames, written by PyAV, whose numbers can be read from the picture after lossy coding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from vidmem_model.errors import MediaError
from vidmem_model.video import probe, read_clip
from vidmem_model.video.clip import ClipSpec

WHOLE = ClipSpec(height=None, width=None, fps=None, seconds=None)
HEIGHT, WIDTH = 64, 96
_DARK, _BRIGHT = 40, 215
_FORMATS = {".m4v": "m4v", ".m1v": "mpeg1video", ".m2v": "mpeg2video"}
_PIXELS = {"mjpeg": "yuvj420p", "gif": "rgb8", "prores_ks": "yuv422p10le", "qtrle": "rgb24", "png": "rgb24"}


def draw(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A picture of 2 x 4 patches, bright where a bit of the number is 1; uint8 (height, width, 3)."""
    bits = np.array([number >> k & 1 for k in range(8)]).reshape(2, 4)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 4 // width
    patches = np.where(bits, _BRIGHT, _DARK).astype(np.uint8)[rows][:, columns]
    return np.repeat(patches[..., None], 3, axis=2)


def number_of(image: np.ndarray) -> int:
    """Read the number that `draw` put into a picture of any size."""
    height, width = image.shape[:2]
    rows, columns = ((2 * np.arange(n) + 1) * size // (2 * n) for n, size in ((2, height), (4, width)))
    return sum(int(image[r, c].mean() > 127) << k for k, (r, c) in enumerate((r, c) for r in rows for c in columns))


def numbers(frames) -> list[int]:
    return [number_of(image) for image in np.asarray(frames)]


def read(path: Path, **spec) -> list[int]:
    """Numbers of the frames that a part of a film gives; by default of all its frames, at its own rate."""
    whole = {"height": None, "width": None, "fps": None, "seconds": None}
    return numbers(read_clip(path, ClipSpec(**{**whole, **spec})).frames)


def encoder_options(codec: str, gop: int, bframes: int, open_gop: bool) -> dict[str, str]:
    """Options of good quality with key frames at exactly every `gop` frames, and B-frames wherever they may be."""
    if codec in ("libx264", "libx264rgb"):
        private = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0:open-gop={int(open_gop)}"
        return {"preset": "ultrafast", "qp": "20", "x264-params": private}
    if codec == "libx265":
        private = f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={bframes}:b-adapt=0:open-gop={int(open_gop)}"
        return {"preset": "ultrafast", "x265-params": f"{private}:qp=20:log-level=none:pools=1"}
    if codec.startswith("libvpx"):
        return {"g": str(gop), "keyint_min": str(gop), "deadline": "realtime", "cpu-used": "8", "b": "2M"}
    if codec in ("mpeg4", "mpeg2video", "mpeg1video"):
        closed = {} if open_gop else {"flags": "+cgop"}
        return {"g": str(gop), "bf": str(bframes), "b": "4M", "sc_threshold": "1000000000", **closed}
    return {"g": str(gop), "b": "4M"}


def write_film(
    path: Path,
    codec: str = "libx264",
    count: int = 30,
    rate: Fraction | int = 25,
    offset: float = 0.0,
    stamps: Callable[[int], float] | None = None,
    container: dict[str, str] | None = None,
    format: str | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    first: int = 0,
    pixels: str | None = None,
    options: dict[str, str] | None = None,
    gop: int = 12,
    bframes: int = 2,
    open_gop: bool = False,
) -> Path:
    """Write a film of numbered frames.

    Args:
        path: its suffix chooses the container.
        offset: seconds added to every stamp.
        stamps: gives the stamp of frame k in frames, not falling; by default k itself.
        container, format: options of the muxer, and its name where it is not that of the suffix.
        first: number of the first frame.
        pixels, options: of the encoder, where its own are not meant.
        gop, bframes, open_gop: as for `encoder_options`.
    """
    with av.open(str(path), "w", format or _FORMATS.get(path.suffix), options=container or {}) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.height, stream.width = size
        stream.pix_fmt = pixels or _PIXELS.get(codec, "yuv420p")
        stream.options = {**encoder_options(codec, gop, bframes, open_gop), **(options or {})}
        stream.codec_context.thread_count = 1
        for packet in _encoded(stream, count, first, size):
            shown, coded = packet.pts * packet.time_base * rate, packet.dts * packet.time_base * rate
            if stamps is not None:  # decoding times rise always and come before those of showing
                shown, coded = stamps(int(shown)), coded - 1
            packet.time_base = Fraction(1, 90000)
            packet.pts, packet.dts = (round((Fraction(v) / rate + Fraction(offset)) * 90000) for v in (shown, coded))
            out.mux(packet)
    return path


def _encoded(stream, count: int, first: int, size: tuple[int, int]) -> Iterator[av.Packet]:
    for k in range(count):
        frame = av.VideoFrame.from_ndarray(draw(first + k, *size), format="rgb24")
        frame.pts, frame.time_base = k, 1 / Fraction(stream.average_rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def join(path: Path, *parts: Path) -> Path:
    """Write files one after another, as `cat` does."""
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def refused(path, **spec) -> str:
    """The one line with which a film is refused."""
    with pytest.raises(MediaError) as error:
        read(path, **spec)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def length(path) -> tuple[int, float]:
    info = probe(path)
    return info.frames, pytest.approx(info.duration, abs=0.03)
