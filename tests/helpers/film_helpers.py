"""Small films that commands and readers are tried on, written by PyAV."""

from fractions import Fraction

import av
import numpy as np

# Options of a command that leave a film as it is.
SMALL = ["--size", "source", "--fps", "source"]


def waves(index, height, width):
    """A smooth pattern that moves, so that every frame differs from its neighbours."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin((x * a + y * b) / 9 + index / 5) for a, b in ((1, 0.3), (0.2, 1), (0.6, -0.7))]
    return np.round(np.stack(waves, -1) * 100 + 128).astype(np.uint8)


def make_video(path, frames=24, height=80, width=112, codec="ffv1", sound=False):
    with av.open(str(path), "w") as container:
        if frames:
            stream = container.add_stream(codec, rate=24)
            stream.height, stream.width = height, width
            stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        if sound:
            speech = container.add_stream("pcm_s16le", rate=8000)
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            samples.sample_rate = 8000
            container.mux(speech.encode(samples))
            container.mux(speech.encode(None))
        for i in range(frames):
            image = av.VideoFrame.from_ndarray(waves(i, height, width), format="rgb24")
            container.mux(stream.encode(image))
        if frames:
            container.mux(stream.encode(None))
    return path


def gradient(k, height, width):
    """Flat colour that tells its number: 6 k in red, with a gradient in green."""
    image = np.empty((height, width, 3), np.uint8)
    image[..., 0] = min(6 * k, 255)
    image[..., 1] = np.linspace(40, 200, width).astype(np.uint8)
    image[..., 2] = np.linspace(200, 40, height).astype(np.uint8)[:, None]
    return image


def write_video(path, count=24, height=48, width=64, rate=24, stamps=None, draw=gradient, **options):
    """Write frames, at `stamps` milliseconds where given; lossless RGB unless told otherwise."""
    codec, pixels = options.pop("codec", "libx264rgb"), options.pop("pixels", "rgb24")
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.options = {"crf": "0", "qp": "0", **options.pop("stream", {})}
        if aspect := options.pop("aspect", None):
            stream.codec_context.sample_aspect_ratio = aspect
        if stamps:
            stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(draw(k, height, width), format="rgb24")
            if stamps:
                frame.pts, frame.time_base = stamps[k], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
