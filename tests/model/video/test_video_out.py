"""Frames written to a video are read back; a failed write leaves no file."""

import math

import av
import numpy as np
import pytest
import torch

from vidmem_model.errors import UserError
from vidmem_model.video import probe, read_clip
from vidmem_model.video import write as video_out
from vidmem_model.video.clip import ClipSpec
from vidmem_model.video.write import video_writer

AS_IS = ClipSpec(height=None, width=None, fps=None, seconds=None)


def moving_picture(frames, height, width):
    """Smooth saturated colours that drift: uint8 (T, H, W, 3)."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(x / 17 + t / 5), np.cos(y / 13 - t / 7), np.sin((x + y) / 23 + t / 3)]
    return np.round(127.5 + 110 * np.stack(waves, -1)).astype(np.uint8)


def psnr(a, b):
    return 10 * math.log10(255**2 / ((a.astype(float) - b.astype(float)) ** 2).mean())


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_round_trip(encoder, tmp_path, monkeypatch):
    if encoder not in av.codecs_available:
        pytest.skip(f"this build has no {encoder}")
    monkeypatch.setattr(video_out, "_ENCODERS", {encoder: video_out._ENCODERS[encoder]})
    frames = moving_picture(25, 64, 96)
    path = tmp_path / "a.mp4"
    with video_writer(path, 12.5) as write:
        for part in np.array_split(frames, [1, 9, 16]):
            write(torch.from_numpy(part))
        assert not path.exists()
    info = probe(path)
    assert (info.width, info.height, info.fps, info.frames) == (96, 64, 12.5, 25)
    back = read_clip(path, AS_IS).frames.numpy()
    assert back.shape == frames.shape
    assert psnr(back, frames) > 36
    assert min(psnr(a, b) for a, b in zip(back, frames, strict=True)) > 34
    assert list(tmp_path.iterdir()) == [path]


def test_equal_frames_give_equal_files(tmp_path):
    noise = np.random.default_rng(0).normal(0, 6, (12, 240, 416, 3))
    frames = np.clip(moving_picture(12, 240, 416) + noise, 0, 255).astype(np.uint8)
    made = set()
    for _ in range(6):  # 15 of 30 files differed where x264 chose by the CPU
        with video_writer(tmp_path / "a.mp4", 24) as write:
            write(frames)
        made.add((tmp_path / "a.mp4").read_bytes())
    assert len(made) == 1


def test_times_are_those_of_the_rate(tmp_path):
    path = tmp_path / "a.mp4"
    with video_writer(path, 24000 / 1001) as write:
        write(moving_picture(10, 32, 32))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * stream.time_base) for frame in container.decode(stream)]
    assert times == pytest.approx([i * 1001 / 24000 for i in range(10)], abs=1e-4)


@pytest.mark.parametrize(("height", "tags"), [(64, (6, 6, 6)), (720, (1, 1, 1))])
def test_colours_are_tagged_as_they_are_written(height, tags, tmp_path):
    colours = np.array([[230, 40, 40], [40, 200, 40], [40, 40, 230]], np.uint8)
    frames = np.zeros((2, height, 48, 3), np.uint8)
    frames[:] = colours.repeat(16, 0)
    path = tmp_path / "a.mp4"
    with video_writer(path, 8) as write:
        write(frames)
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
    assert (frame.color_primaries, frame.color_trc, frame.colorspace) == tags
    assert context.pix_fmt == "yuv420p"
    back = read_clip(path, AS_IS).frames[0, height // 2, [8, 24, 40]].numpy()
    # With the wrong matrix green is off by more than 15.
    assert np.abs(back.astype(int) - colours.astype(int)).max() <= 3


def test_odd_sizes_get_their_last_row_and_column_twice(tmp_path):
    frames = moving_picture(4, 33, 47)
    path = tmp_path / "a.mp4"
    with video_writer(path, 8) as write:
        write(frames)
    back = read_clip(path, AS_IS).frames.numpy()
    assert back.shape == (4, 34, 48, 3)
    assert psnr(back[:, :33, :47], frames) > 34


def test_nothing_is_left_where_writing_fails(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")
    with pytest.raises(ZeroDivisionError), video_writer(path, 8) as write:
        write(moving_picture(3, 32, 32))
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="at least one frame"), video_writer(path, 8):
        pass
    with pytest.raises(ValueError, match="as the first"), video_writer(path, 8) as write:
        write(moving_picture(3, 32, 32))
        write(moving_picture(3, 32, 34))
    with pytest.raises(ValueError, match="uint8"), video_writer(path, 8) as write:
        write(np.zeros((1, 32, 32, 3)))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_mistakes_of_the_user(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"ends in \.mp4"), video_writer(tmp_path / "a.gif", 8):
        pass
    with pytest.raises(UserError, match="does not exist"), video_writer(tmp_path / "b" / "a.mp4", 8):
        pass
    with pytest.raises(ValueError, match="fps must be positive"), video_writer(tmp_path / "a.mp4", 0):
        pass
    monkeypatch.setattr(video_out, "_ENCODERS", {"no-such-encoder": {}})
    with pytest.raises(UserError, match="none of the encoders"), video_writer(tmp_path / "a.mp4", 8):
        pass
