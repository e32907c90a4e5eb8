"""Pictures of films: turned, transparent, coloured, interlaced and cropped; and files of any name."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from video_helpers import WHOLE, draw, number_of, numbers, read, refused, write_film

from vidmem_model import cli
from vidmem_model.video import probe, read_clip
from vidmem_model.video.clip import ClipSpec

# Pictures


def with_matrix(path: Path, *matrix: float) -> Path:
    """Patch the display matrix (a, b, c, d) of an MP4."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    a, b, c, d = (round(v * 65536) for v in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


def corners() -> np.ndarray:
    """A picture whose corners differ."""
    image = np.full((64, 96, 3), 128, np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return image


def written(path: Path, image: np.ndarray, codec: str, pixels: str, format="rgb24", count=2, **options) -> Path:
    """Write one picture as a film."""
    metadata = options.pop("metadata", {})
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt, stream.options = pixels, options
        stream.metadata.update(metadata)
        for _ in range(count):
            frame = av.VideoFrame.from_ndarray(image, format=format).reformat(format=pixels)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


TURNS = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "by 90": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "by 180": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "by 270": ((0, -1, 1, 0), lambda x: np.rot90(x)),
    "mirrored": ((-1, 0, 0, 1), lambda x: x[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda x: x[::-1]),
    "transposed": ((0, 1, 1, 0), lambda x: x.swapaxes(0, 1)),
    "transversed": ((0, -1, -1, 0), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
    "zero": ((0, 0, 0, 0), lambda x: x),
    "by 20": ((0.94, 0.34, -0.34, 0.94), lambda x: x),
    "by 80": ((0.17, 0.98, -0.98, 0.17), lambda x: np.rot90(x, -1)),
    "by 45": ((0.71, 0.71, -0.71, 0.71), lambda x: x),
    "twice as large": ((2, 0, 0, 2), lambda x: x),
    "mirrored and by 100": ((0.17, -0.98, -0.98, -0.17), lambda x: np.rot90(x, 2).swapaxes(0, 1)),
}


@pytest.mark.parametrize("turn", TURNS)
def test_display_matrix(tmp_path, turn):
    matrix, apply = TURNS[turn]
    path = with_matrix(written(tmp_path / "a.mp4", corners(), "libx264rgb", "rgb24", qp="0"), *matrix)
    frame = read_clip(path, WHOLE).frames[0].numpy()
    assert np.array_equal(frame, apply(corners()))
    assert (probe(path).height, probe(path).width) == frame.shape[:2]
    shape = (96, 192) if frame.shape[0] == 64 else (192, 96)
    scaled = read_clip(path, ClipSpec(*shape, seconds=None)).frames[0].numpy()
    assert np.abs(scaled[shape[0] // 3, shape[1] // 3].astype(int) - frame[8, 8]).max() < 8


TRANSPARENT = [
    ("webm", "libvpx", "yuva420p", {"auto-alt-ref": "0", "b": "2M", "metadata": {"alpha_mode": "1"}}),
    ("webm", "libvpx-vp9", "yuva420p", {"b": "2M", "metadata": {"alpha_mode": "1"}}),
    ("mkv", "libvpx-vp9", "yuva420p", {"b": "2M", "metadata": {"alpha_mode": "1"}}),
    ("mov", "prores_ks", "yuva444p10le", {"profile": "4444"}),
    ("mov", "qtrle", "argb", {}),
    ("mov", "png", "rgba", {}),
    ("mov", "png", "rgba64be", {}),
    ("mov", "png", "ya8", {}),
    ("mkv", "ffv1", "yuva420p", {}),
    ("mkv", "ffv1", "bgra", {}),
    ("mkv", "ffv1", "gbrap16le", {}),
    ("avi", "rawvideo", "bgra", {}),
    ("avi", "png", "rgba", {}),
    ("apng", "apng", "rgba", {}),
]


@pytest.mark.parametrize(("suffix", "codec", "pixels", "options"), TRANSPARENT)
def test_what_is_transparent_shows_black(tmp_path, suffix, codec, pixels, options):
    image = np.full((48, 96, 4), 240, np.uint8)
    image[..., 3] = np.repeat((0, 128, 255), 32)
    path = written(tmp_path / f"a.{suffix}", image, codec, pixels, "rgba", 4, **options)
    frames = read_clip(path, WHOLE).frames.float()
    assert len(frames) == 4
    for column, value in ((16, 0), (48, 120), (80, 240)):
        assert frames[:, 24, column].mean() == pytest.approx(value, abs=3)
    assert len(read(path, start=0.08)) == 2


def test_transparent_gif(tmp_path):
    """Two colours, white and a transparent one, in an image of 2 x 1, and one patch over it."""
    head = b"GIF89a" + struct.pack("<HHBBB", 2, 1, 0x80, 0, 0) + bytes((255, 255, 255, 10, 200, 30))
    picture = b"\x21\xf9\x04\x05\x0a\x00\x01\x00" + b"\x2c" + struct.pack("<HHHHB", 0, 0, 2, 1, 0)
    picture += b"\x02\x02\x44\x0a\x00"  # clear, 0, 1, end
    path = tmp_path / "a.gif"
    path.write_bytes(head + picture * 2 + b"\x3b")
    frames = read_clip(path, WHOLE).frames
    assert frames.shape == (2, 1, 2, 3)
    assert frames[:, 0].tolist() == [[[255] * 3, [0] * 3]] * 2


def flat(path: Path, height: int, width: int) -> list[int]:
    """Colour of a film of one untagged YUV value."""
    frame = av.VideoFrame(width, height, "yuv420p")
    for plane, value in zip(frame.planes, (120, 90, 200), strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"qp": "0"}
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return read_clip(path, WHOLE).frames[0, height // 2, width // 2].tolist()


@pytest.mark.parametrize(("height", "width", "high"), [(480, 640, 0), (534, 1280, 1), (720, 960, 1), (534, 1278, 0)])
def test_untagged_colours_are_those_of_players(tmp_path, height, width, high):
    bt601, bt709 = (235, 76, 44), (250, 90, 40)
    assert np.abs(np.subtract(flat(tmp_path / "a.mp4", height, width), bt709 if high else bt601)).max() <= 2


@pytest.mark.parametrize(
    ("suffix", "codec", "options"),
    [("ts", "mpeg2video", {"flags": "+ildct+ilme"}), ("mp4", "libx264", {"x264-params": "tff=1"})],
)
def test_interlaced_material_is_told(tmp_path, suffix, codec, options):
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt, stream.options = 64, 96, "yuv420p", options
        for k in range(12):
            frame = av.VideoFrame.from_ndarray(draw(k), format="rgb24").reformat(format="yuv420p")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert probe(path).interlaced
    (line,) = read_clip(path, WHOLE).remarks
    assert line.startswith(f"{path}: is interlaced")
    assert not probe(write_film(tmp_path / "progressive.mp4")).interlaced


@pytest.mark.parametrize(
    ("size", "raster", "told"),
    [
        ((160, 90), (48, 84), "68%"),
        ((96, 128), (48, 84), None),
        ((64, 96), (48, 84), None),
        ((64, 96), (32, 96), "50%"),
    ],
)
def test_a_crop_of_much_of_the_picture_is_told(tmp_path, size, raster, told):
    path = write_film(tmp_path / "a.mp4", size=size)
    remarks = read_clip(path, ClipSpec(*raster)).remarks
    assert [line for line in remarks if told and told in line and "cut off" in line] == list(remarks)
    assert bool(remarks) == bool(told)
    assert read_clip(path, WHOLE).remarks == ()


def test_the_commands_tell_of_a_crop_once(tmp_path, capfd):
    path = write_film(tmp_path / "portrait.mp4", size=(160, 90))
    arguments = ["compress", str(path), "-o", str(tmp_path / "m.safetensors"), "--size", "48x84", "--fps", "source"]
    assert cli.main(arguments) == 0
    notes = [line for line in capfd.readouterr().err.splitlines() if line.startswith("vidmem: note: ")]
    assert len(notes) == 1 and f"{path}: 68% of the picture is cut off" in notes[0]
    assert cli.main([*arguments[:-3], "160x90", *arguments[-2:]]) == 0
    assert "note" not in capfd.readouterr().err
    assert cli.main(["compress", "--help"]) == 0
    assert "scaled to cover --size, then centre-cropped" in " ".join(capfd.readouterr().out.split())


# Names

NAMES = (
    ["12:30:05.mp4", "concat:other.mp4", "file:x", "file:other.mp4", "-lead.mp4", "%03d.mp4", "a b.mp4", "a#b?c.mp4"]
    + ["ünï→.mp4", "subfile,,start,0,end,9,,:other.mp4", "pipe:0", "http:x.mp4", "data:,x", "a\nb.mp4", "a|b.mp4"]
    + [
        "*.mp4",
        "cache:other.mp4",
        "fd:",
        "film",
        ".mp4",
        "film.png",
        "film.ts",
        "film.m3u8",
        os.fsdecode(b"\xff\xfe.mp4"),
    ]
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relative", [True, False])
def test_any_name(tmp_path, monkeypatch, name, relative):
    monkeypatch.chdir(tmp_path)
    write_film(tmp_path / "other.mp4", count=5, first=100)
    try:
        write_film(tmp_path / "plain.mp4", count=5).rename(name)
    except OSError:
        pytest.skip("this file system has no such names")
    assert read(Path(name) if relative else tmp_path / name) == list(range(5))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("http://example.com/a.mp4", "http://example.com/a.mp4: URLs are not supported"),
        (Path("https://example.com/a b.mp4"), "https://example.com/a b.mp4: URLs are not supported"),
        (Path("rtsp://camera/1"), "rtsp://camera/1: URLs are not supported"),
        ("file:///tmp/a.mp4", "file:///tmp/a.mp4: URLs are not supported"),
        ("a\0b", "null byte"),
        ("x" * 5000, "too long"),
        ("/dev/null", "is a pipe or a device"),
    ],
)
def test_what_is_no_file(path, words):
    message = refused(path)
    assert words in message and len(message) < 400


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert "is a pipe or a device" in refused(tmp_path / "fifo")


def test_a_playlist_does_not_reach_the_network(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n")
    assert "cannot be opened" in refused(path)


def test_helpers_read_what_they_draw():
    assert [number_of(draw(k, 37, 53)) for k in range(256)] == list(range(256))
    assert numbers(torch.from_numpy(np.stack([draw(7), draw(9)]))) == [7, 9]
