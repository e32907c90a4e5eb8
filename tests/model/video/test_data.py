"""Decoding to a constant rate and size, and every way a file can be bad."""

from __future__ import annotations

import struct
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from film_helpers import gradient, write_video

from vidmem_model import video as data
from vidmem_model.errors import MediaError
from vidmem_model.video import iter_frames, probe, read_clip
from vidmem_model.video.clip import ClipSpec

WHOLE = ClipSpec(height=None, width=None, fps=None, seconds=None)


def numbers(frames):
    """Which pictures the frames show."""
    return [round(float(f[..., 0].mean()) / 6) for f in np.asarray(frames)]


def noise(k, height, width):
    rng = np.random.default_rng(k)
    return (gradient(k, height, width) // 2 + rng.integers(0, 120, (height, width, 3))).astype(np.uint8)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "clip.mp4")


def test_lossless_frames_come_back_exactly(video):
    clip = read_clip(video, WHOLE)
    assert clip.fps == 24 and clip.source == video and clip.asked is None and not clip.short
    expected = np.stack([gradient(k, 48, 64) for k in range(24)])
    assert np.array_equal(clip.frames.numpy(), expected)


def test_probe(video):
    assert probe(video) == data.VideoInfo(width=64, height=48, fps=24.0, frames=24, duration=1.0)


@pytest.mark.parametrize("chunk", [1, 7, 24, 100])
def test_chunks(video, chunk):
    chunks = list(iter_frames(video, WHOLE, chunk))
    assert [len(c) for c in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    assert numbers(np.concatenate(chunks)) == list(range(24))
    with pytest.raises(ValueError, match="chunk must be positive"):
        next(iter_frames(video, WHOLE, 0))


def test_start_and_length(tmp_path):
    path = write_video(tmp_path / "a.mp4", count=40, stream={"g": "16"})
    clip = read_clip(path, ClipSpec(48, 64, fps=24, start=0.75, seconds=0.5))
    assert numbers(clip.frames) == list(range(18, 30)) and not clip.short
    clip = read_clip(path, ClipSpec(48, 64, fps=24, start=1.5, seconds=1))
    assert numbers(clip.frames) == list(range(36, 40))
    assert clip.asked == 24 and clip.short


def test_less_than_a_frame_asked_gives_one(video):
    assert numbers(read_clip(video, ClipSpec(48, 64, start=0.5, seconds=0.001)).frames) == [12]


def test_odd_sizes_and_ntsc_rate(tmp_path):
    path = write_video(tmp_path / "a.mkv", 12, 37, 53, rate=Fraction(24000, 1001))
    clip = read_clip(path, WHOLE)
    assert clip.frames.shape == (12, 37, 53, 3)
    assert clip.fps == pytest.approx(24000 / 1001, rel=1e-3)
    assert numbers(clip.frames) == list(range(12))
    assert numbers(read_clip(path, ClipSpec(37, 53, fps=24, seconds=0.5)).frames) == list(range(12))


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (12, 24, [k // 2 for k in range(24)]),
        (30, 15, list(range(0, 30, 2))),
        (25, 24, [int(k * 25 / 24 + 0.25) for k in range(24)]),
    ],
)
def test_other_rates_show_the_picture_of_the_moment(tmp_path, rate, fps, expected):
    path = write_video(tmp_path / "a.mp4", count=rate, rate=rate)
    assert numbers(read_clip(path, ClipSpec(48, 64, fps=fps, seconds=1)).frames) == expected


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mkv", "libx264"), ("ts", "libx264"), ("h264", "libx264"), ("mpg", "mpeg2video"), ("webm", "libvpx-vp9")],
)
def test_start_in_other_containers(tmp_path, suffix, codec):
    path = write_video(tmp_path / f"a.{suffix}", 42, rate=25, codec=codec, pixels="yuv420p", stream={"g": "12"})
    whole = read_clip(path, ClipSpec(48, 64, fps=25, seconds=None)).frames
    assert len(whole) == 42
    part = read_clip(path, ClipSpec(48, 64, fps=25, start=1.2, seconds=0.4)).frames
    assert torch.equal(part, whole[30:40])


def test_variable_rate(tmp_path):
    stamps = [0, 100, 150, 400, 900]
    path = write_video(tmp_path / "a.mkv", 5, stamps=stamps, rate=20)
    frames = read_clip(path, ClipSpec(48, 64, fps=20, seconds=0.9)).frames
    assert numbers(frames) == [0, 0, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]


def test_cover_keeps_the_aspect_and_crops_the_centre(tmp_path):
    def disc(k, height, width):
        y, x = np.mgrid[:height, :width]
        inside = (y - height / 2 + 0.5) ** 2 + (x - width / 2 + 0.5) ** 2 < 30**2
        return np.repeat(np.where(inside, 255, 0).astype(np.uint8)[..., None], 3, 2)

    path = write_video(tmp_path / "portrait.mp4", 2, 160, 90, draw=disc)
    frame = read_clip(path, ClipSpec(80, 180, seconds=None)).frames[0].numpy()
    assert frame.shape == (80, 180, 3)
    # Scaled by 2 to be 180 wide, then 80 of 320 rows: the disc of radius 60 spans 120 columns.
    assert (frame[40, :, 0] > 127).sum() == pytest.approx(120, abs=2)
    assert (frame[:, 90, 0] > 127).all()
    assert abs(int(frame[40, 28:32, 0].mean()) - int(frame[40, 148:152, 0].mean())) < 20


def test_pixel_aspect_is_applied(tmp_path):
    path = write_video(tmp_path / "a.mp4", 2, 48, 64, aspect=Fraction(2, 1))
    assert (probe(path).width, probe(path).height) == (128, 48)
    assert read_clip(path, WHOLE).frames.shape == (2, 48, 128, 3)


@pytest.mark.parametrize("turn", [0, 90, 180, 270])
def test_rotation_of_phones_is_applied(tmp_path, turn):
    path = write_video(tmp_path / "a.mp4", 1)
    upright = gradient(0, 48, 64)
    matrices = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
    a, b, c, d = (v * 65536 for v in matrices[turn])
    content = path.read_bytes()
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    track = content.index(b"tkhd")
    at = content.index(identity, track)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content[:at] + turned + content[at + len(turned) :])
    frame = read_clip(path, WHOLE).frames[0].numpy()
    # The matrix turns clockwise on screen.
    assert np.array_equal(frame, np.rot90(upright, -turn // 90))
    assert (probe(path).height, probe(path).width) == frame.shape[:2]


def test_progress_reaches_the_end(video):
    calls = []
    read_clip(video, ClipSpec(48, 64, seconds=5), lambda done, total: calls.append((done, total)))
    assert calls == [(16, 24), (24, 24)]


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and message
    return message


@pytest.mark.parametrize("read", [probe, lambda p: read_clip(p, ClipSpec()), lambda p: next(iter_frames(p, WHOLE))])
def test_files_that_are_no_videos(tmp_path, read):
    with pytest.raises(MediaError, match="no such file") as error:
        read(tmp_path / "none.mp4")
    one_line(error)
    with pytest.raises(MediaError, match="is a directory"):
        read(tmp_path)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(MediaError, match="0 bytes"):
        read(empty)
    text = tmp_path / "text.mp4"
    text.write_text("not a video\n" * 100)
    with pytest.raises(MediaError, match="cannot be opened as a video") as error:
        read(text)
    one_line(error)
    song = tmp_path / "song.wav"
    with wave.open(str(song), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(MediaError, match="has no video stream"):
        read(song)


def test_audio_only_mp4(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(MediaError, match="has no video stream"):
        probe(path)


def test_start_beyond_the_end(video):
    with pytest.raises(MediaError, match=r"no picture at 7 s; it ends at 1.00 s") as error:
        read_clip(video, ClipSpec(start=7))
    one_line(error)


def test_missing_index_of_a_cut_mp4(tmp_path):
    path = write_video(tmp_path / "a.mp4", draw=noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="cannot be opened as a video"):
        probe(path)


@pytest.mark.parametrize("share", [0.3, 0.62, 0.9])
def test_cut_in_the_middle_says_where(tmp_path, share):
    path = write_video(
        tmp_path / "a.mp4", 96, draw=noise, container={"movflags": "faststart"}, stream={"bf": "0", "g": "12"}
    )
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(MediaError, match="is damaged at") as error:
        read_clip(path, ClipSpec(48, 64, seconds=4))
    seconds = float(one_line(error).split("is damaged at ")[1].split(" s")[0])
    assert seconds == pytest.approx(4 * share, abs=0.35)
    clip = read_clip(path, ClipSpec(48, 64, seconds=0.5))
    assert len(clip.frames) == 12 and not clip.short


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_other_containers_cut_in_the_middle(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", 96, draw=noise, codec="mpeg4", pixels="yuv420p")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match="is damaged at"):
        read_clip(path, ClipSpec(48, 64, seconds=4))


def test_cut_matroska_with_sound(tmp_path):
    """The sound is as long as the picture was: only the picture's own stated length tells."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        picture_stream = container.add_stream("mpeg4", rate=24)
        picture_stream.width, picture_stream.height, picture_stream.pix_fmt = 64, 48, "yuv420p"
        sound_stream = container.add_stream("aac", rate=8000, layout="mono")
        for k in range(96):
            frame = av.VideoFrame.from_ndarray(noise(k, 48, 64), format="rgb24")
            container.mux(picture_stream.encode(frame))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 333), np.float32), format="fltp", layout="mono")
            sound.rate, sound.pts = 8000, 333 * k
            container.mux(sound_stream.encode(sound))
        container.mux(picture_stream.encode(None))
        container.mux(sound_stream.encode(None))
    assert len(read_clip(path, ClipSpec(48, 64, seconds=4)).frames) == 96
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(MediaError, match=r"is damaged at .* s \(4.00 s expected"):
        read_clip(path, ClipSpec(48, 64, seconds=4))


def test_overwritten_data_in_the_middle(tmp_path):
    path = write_video(tmp_path / "a.mp4", 96, draw=noise, container={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = bytes(20_000)
    path.write_bytes(content)
    with pytest.raises(MediaError, match="is damaged at"):
        read_clip(path, ClipSpec(48, 64, seconds=4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"height": 0},
        {"width": -1},
        {"height": None},
        {"height": 480.0},
        {"fps": 0},
        {"fps": float("nan")},
        {"start": -1},
        {"seconds": 0},
        {"seconds": float("inf")},
    ],
)
def test_clip_spec_refuses(wrong):
    with pytest.raises(ValueError, match="ClipSpec: .*, got "):
        ClipSpec(**wrong)
