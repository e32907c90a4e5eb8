"""Real-world videos: the right picture at each time, and one-line errors for unreadable ones."""

from __future__ import annotations

import math
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_helpers import WHOLE, draw, encoder_options, join, length, numbers, read, refused, write_film

from vidmem_model.errors import MediaError
from vidmem_model.video import decode, probe, read_clip
from vidmem_model.video.clip import ClipSpec

ALL = list(range(30))
SECOND = list(range(100, 130))


# Where decoding begins


@pytest.mark.sample(12)
@pytest.mark.parametrize("gop", [50, 500])
@pytest.mark.parametrize("bframes", [0, 3])
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("ts", "libx264"), ("ts", "libx265"), ("ts", "mpeg2video"), ("m2ts", "libx264"), ("mpg", "mpeg2video")]
    + [("mkv", "libx265"), ("mp4", "libx264"), ("avi", "libx264"), ("wmv", "libx264"), ("h264", "libx264")],
)
def test_a_start_between_key_frames(tmp_path, suffix, codec, gop, bframes):
    path = write_film(tmp_path / f"a.{suffix}", codec, 120, gop=gop, bframes=bframes, open_gop=True)
    for first in (1, 47, 51, 99, 119):
        assert read(path, start=first / 25, seconds=0.08) == [first, first + 1][: 120 - first]


def test_a_part_is_not_decoded_from_the_beginning(tmp_path, monkeypatch):
    path = write_film(tmp_path / "a.ts", count=120, gop=10)
    seen = []
    shown = decode.Film.shown
    monkeypatch.setattr(decode.Film, "shown", lambda film, *skip: seen.append(skip) or shown(film, *skip))
    assert read(path, start=4, seconds=0.2) == list(range(100, 105))
    assert [skip[0] for skip in seen if skip] == [100]


def test_a_recovery_point_that_needs_more_frames_is_no_place_to_begin(tmp_path):
    options = {"x264-params": "intra-refresh=1:keyint=20:bframes=0:qp=20"}
    path = write_film(tmp_path / "a.ts", count=90, options=options)
    for first in (19, 21, 25, 45, 80):
        assert read(path, start=first / 25, seconds=0.2) == list(range(first, first + 5))


def test_large_files_are_sought_and_read_through_where_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "READ_THROUGH", 0)
    path = write_film(tmp_path / "a.mp4", count=120, gop=20, open_gop=True)
    monkeypatch.setattr(decode.Film, "packets_before", lambda *_: pytest.fail("is read through"))
    assert read(path, start=3, seconds=0.2) == list(range(75, 80))
    monkeypatch.undo()
    monkeypatch.setattr(decode.Film, "seek", lambda *_: 0.0)  # as if every index led to the end
    monkeypatch.setattr(decode, "READ_THROUGH", 0)
    assert read(path, start=3, seconds=0.2) == list(range(75, 80))


# Joined, cut and damaged streams

JOINABLE = [("ts", "libx264"), ("ts", "libx265"), ("ts", "mpeg2video"), ("m2ts", "libx264"), ("mpg", "mpeg2video")]
BARE = [("h264", "libx264"), ("hevc", "libx265"), ("m2v", "mpeg2video"), ("m1v", "mpeg1video"), ("mjpeg", "mjpeg")]


@pytest.mark.sample(20)
@pytest.mark.parametrize("open_gop", [False, True])
@pytest.mark.parametrize("offsets", [(0, 0), (0, 1.2), (0, 100), (100, 0), (0, 0.9), (0, 0.613), (30, 29.9)])
@pytest.mark.parametrize(("suffix", "codec"), JOINABLE)
def test_joined_streams_follow_each_other(tmp_path, suffix, codec, offsets, open_gop):
    one = write_film(tmp_path / f"1.{suffix}", codec, offset=offsets[0], open_gop=open_gop)
    two = write_film(tmp_path / f"2.{suffix}", codec, offset=offsets[1], open_gop=open_gop, first=100)
    path = join(tmp_path / f"both.{suffix}", one, two)
    assert read(path) == ALL + SECOND
    assert read(path, start=1.6, seconds=0.2) == SECOND[10:15]
    assert length(path) == (60, 2.4)


@pytest.mark.parametrize(("suffix", "codec"), BARE)
def test_joined_bare_streams(tmp_path, suffix, codec):
    parts = [write_film(tmp_path / f"{k}.{suffix}", codec, first=k) for k in (0, 100, 200)]
    path = join(tmp_path / f"all.{suffix}", *parts)
    assert read(path) == ALL + SECOND + list(range(200, 230))
    assert read(path, start=1.6, seconds=0.2) == SECOND[10:15]
    assert length(path) == (90, 3.6)


def test_many_short_joined_films(tmp_path):
    part = write_film(tmp_path / "part.ts", count=9)
    path = join(tmp_path / "all.ts", *[part] * 6)
    assert read(path) == list(range(9)) * 6


def test_a_gap_of_a_broadcast_keeps_the_picture(tmp_path):
    path = write_film(tmp_path / "a.ts", stamps=lambda k: k + 50 * (k >= 12))
    assert read(path, fps=25.0) == [*range(12), *[11] * 50, *range(12, 30)]


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("h264", "libx264"), ("hevc", "libx265"), ("ts", "libx264"), ("mkv", "libvpx"), ("mjpeg", "mjpeg")],
)
@pytest.mark.parametrize("sizes", [((64, 96), (96, 160)), ((96, 160), (64, 96)), ((64, 96), (96, 64))])
def test_a_film_that_changes_size_keeps_that_of_its_first_picture(tmp_path, suffix, codec, sizes):
    parts = [
        write_film(tmp_path / f"{k}.{suffix}", codec, size=size, first=k)
        for k, size in zip((0, 100), sizes, strict=True)
    ]
    path = tmp_path / f"both.{suffix}"
    if suffix == "mkv":
        remux(path, parts)
    else:
        join(path, *parts)
    frames = read_clip(path, WHOLE).frames
    assert frames.shape == (60, *sizes[0], 3)
    assert numbers(frames)[:30] == ALL
    if sizes[1] != (96, 64):  # of a picture that is turned the centre is left
        assert numbers(frames)[30:] == SECOND
    assert len(read(path, height=32, width=48)) == 60


def remux(path: Path, parts: list[Path], change=lambda packet: None) -> Path:
    """Write the packets of films one after another."""
    with av.open(str(path), "w") as out:
        films = [av.open(str(part)) for part in parts]
        stream = out.add_stream_from_template(films[0].streams.video[0])
        end = 0
        for film in films:
            unit = film.streams.video[0].time_base
            for packet in film.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts = packet.pts + end, packet.dts + end if packet.dts is not None else None
                    packet.stream = stream
                    change(packet)
                    out.mux(packet)
            end += round(Fraction(30, 25) / unit)
    return path


@pytest.mark.sample(14)
@pytest.mark.parametrize("open_gop", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.35, 0.45])
@pytest.mark.parametrize(("suffix", "codec"), JOINABLE + BARE[:3])
def test_a_stream_that_begins_anywhere(tmp_path, suffix, codec, share, open_gop):
    path = write_film(tmp_path / f"a.{suffix}", codec, 60, bframes=3, gop=20, open_gop=open_gop)
    content = path.read_bytes()
    path.write_bytes(content[round(share * len(content) / 188) * 188 :])
    found = read(path)
    assert found == list(range(found[0], 60)) and found[0] <= 40 + 19 * (suffix == "mpg")
    if suffix not in ("h264", "hevc", "m2v", "mpg"):
        assert length(path) == (len(found), len(found) / 25)


@pytest.mark.parametrize("lost", [1, 3, 10])
@pytest.mark.parametrize("share", [0.3, 0.55, 0.8])
def test_lost_packets_of_a_transport_stream(tmp_path, share, lost):
    path = write_film(tmp_path / "a.ts", count=90, gop=90, bframes=0)
    content = path.read_bytes()
    packets = [content[at : at + 188] for at in range(0, len(content), 188)]
    pictures = [k for k, packet in enumerate(packets) if packet[1] & 31 == 1 and packet[2] == 0]
    first = round(share * len(pictures))
    for k in pictures[first : first + lost]:
        packets[k] = b""
    path.write_bytes(b"".join(packets))
    seconds = float(refused(path).split("is damaged at ")[1].split(" s")[0])
    assert seconds == pytest.approx(3.6 * share, abs=0.3)
    assert read(path, seconds=0.5) == list(range(12))


@pytest.mark.sample(8)
@pytest.mark.parametrize(
    ("suffix", "codec"),
    [("mp4", "libx264"), ("mkv", "libx264"), ("ts", "libx264"), ("avi", "mpeg4"), ("mpg", "mpeg2video")]
    + [("webm", "libvpx"), ("flv", "libx264"), ("wmv", "wmv2"), ("gif", "gif"), ("mov", "prores_ks")]
    + [("h264", "libx264"), ("nut", "mpeg4"), ("ogv", "libvpx"), ("mxf", "mpeg2video")],
)
@pytest.mark.parametrize("part", range(3))
def test_a_file_with_wrong_bytes_is_read_or_refused_in_a_line(tmp_path, suffix, codec, part):
    path = tmp_path / f"a.{suffix}"
    content = write_film(path, codec).read_bytes()
    rng = random.Random(f"{suffix} {part}")
    for _ in range(20):
        wrong = bytearray(content)
        for _ in range(rng.choice([1, 3, 20])):
            wrong[rng.randrange(rng.choice([len(wrong), min(1500, len(wrong))]))] = rng.randrange(256)
        if rng.random() < 0.2:
            del wrong[rng.randrange(len(wrong)) :]
        path.write_bytes(wrong)
        try:
            read_clip(path, ClipSpec(48, 64, fps=None, start=rng.choice([0, 0.5]), seconds=1))
        except MediaError as error:
            assert "\n" not in str(error)


# Stamps


@pytest.mark.parametrize("bframes", [0, 2])
def test_an_avi_with_chunks_that_hold_no_picture(tmp_path, bframes):
    """As many as there are where films are copied into it: it then has 600 chunks a second."""
    count = 0

    def change(packet):
        nonlocal count
        gap = round(Fraction(20 * (count >= 30), 25) / packet.time_base)
        packet.pts, packet.dts = packet.pts + gap, packet.dts + gap
        count += 1

    part = write_film(tmp_path / "part.mp4", "mpeg4", 60, bframes=bframes)
    path = remux(tmp_path / "a.avi", [part], change)
    info = probe(path)
    assert (info.frames, info.fps) == (60, pytest.approx(60 / 3.2, rel=0.05))
    if bframes:  # what holes mean there is not known: every picture is shown, evenly
        assert read(path) == list(range(60))
    else:
        assert read(path, fps=25.0) == [*range(30), *[29] * 20, *range(30, 60)]


@pytest.mark.parametrize(("suffix", "codec"), [("avi", "libx264"), ("avi", "mpeg4"), ("wmv", "libx264")])
@pytest.mark.parametrize("bframes", [0, 1, 3, 8])
def test_formats_that_keep_the_coding_order_only(tmp_path, suffix, codec, bframes):
    path = write_film(tmp_path / f"a.{suffix}", codec, 60, bframes=bframes, gop=25, open_gop=True)
    assert read(path) == list(range(60))
    assert read(path, start=1.16, seconds=0.4) == list(range(29, 39))


@pytest.mark.sample(6)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "nut", "ts"])
@pytest.mark.parametrize("repeat", [1, 2, 5])
def test_stamps_of_the_coding_order_repeated(tmp_path, suffix, repeat):
    """As `setts=pts=floor(N/2)*2` leaves them."""
    count = 0

    def change(packet):
        nonlocal count
        unit = packet.time_base
        packet.pts = round(Fraction(count // repeat * repeat + 1, 25) / unit)
        packet.dts = round(Fraction(count + 1 - repeat, 25) / unit)
        count += 1

    part = write_film(tmp_path / f"part.{suffix}", count=60, bframes=3)
    path = remux(tmp_path / f"a.{suffix}", [part], change)
    assert read(path, fps=25.0) == list(range(60))
    assert read(path, start=1.2, seconds=0.2, fps=25.0) == list(range(30, 35))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "nut"])
@pytest.mark.parametrize("jump", [3, 100, 1000])
def test_a_stamp_that_jumps_keeps_the_picture_before_it(tmp_path, suffix, jump):
    path = write_film(tmp_path / f"a.{suffix}", stamps=lambda k: k + jump * (k >= 20))
    held = [*range(20), *[19] * jump, *range(20, 30)]
    assert read(path, fps=25.0) == held
    assert read(path, start=0.4, seconds=1, fps=25.0) == held[10:35]
    assert read(path, start=(20 + jump) / 25, fps=25.0) == list(range(20, 30))


@pytest.mark.parametrize("suffix", ["ts", "m2ts"])
def test_a_transport_stream_whose_clock_jumps_goes_on(tmp_path, suffix):
    path = write_film(tmp_path / f"a.{suffix}", stamps=lambda k: k + 1000 * (k >= 12), bframes=0)
    assert read(path) == ALL
    assert read(path, start=0.6, seconds=0.2) == ALL[15:20]


@pytest.mark.sample(12)
@pytest.mark.parametrize("missing", [range(60), range(1, 60), range(2, 60, 3), range(30, 60), range(20, 40)])
@pytest.mark.parametrize("bframes", [0, 2])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
def test_stamps_that_are_missing(tmp_path, codec, bframes, missing):
    path = write_film(tmp_path / "a.ts", codec, 60, bframes=bframes)
    content, number = bytearray(path.read_bytes()), -1
    for at in range(0, len(content), 188):
        if content[at + 1] & 0x5F == 0x41 and content[at + 2] == 0:  # a picture begins in this packet
            number += 1
            head = content.index(b"\0\0\1\xe0", at)
            if number in missing:
                content[head + 7] &= 0x3F
                content[head + 9 : head + 9 + content[head + 8]] = b"\xff" * content[head + 8]
    assert number == 59
    path.write_bytes(content)
    assert read(path, fps=25.0) == list(range(60))
    assert read(path, fps=25.0, start=1.6, seconds=0.2) == list(range(40, 45))


@pytest.mark.sample(6)
@pytest.mark.parametrize("offset", [0, 2, 7.5])
@pytest.mark.parametrize(
    ("suffix", "codec"), [("mkv", "libx264"), ("mp4", "libx264"), ("webm", "libvpx"), ("flv", "libx264")]
)
def test_a_picture_that_starts_late_or_early(tmp_path, suffix, codec, offset):
    path = write_film(tmp_path / f"a.{suffix}", codec, 75, offset=offset)
    assert read(path) == list(range(75))
    assert read(path, start=1, seconds=0.2) == list(range(25, 30))
    assert length(path) == (75, 3.0)


@pytest.mark.parametrize("cut", [3, 10, 12, 25])
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_pictures_that_an_edit_list_cuts_off(tmp_path, suffix, cut):
    """What the muxer makes of negative stamps."""
    path = write_film(tmp_path / f"a.{suffix}", count=75, offset=-cut / 25)
    assert read(path) == list(range(cut, 75))
    assert read(path, start=1, seconds=0.2) == list(range(25 + cut, 30 + cut))
    assert length(path) == (75 - cut, 3 - cut / 25)


@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("ts", "libx264"), ("flv", "libx264")])
def test_stamps_below_zero(tmp_path, suffix, codec):
    path = write_film(tmp_path / f"a.{suffix}", codec, offset=-0.4)
    assert read(path) == ALL and length(path) == (30, 1.2)


@pytest.mark.parametrize("suffix", ["h264", "ts"])
def test_a_film_that_changes_its_pixel_format(tmp_path, suffix):
    formats = ("yuv420p", "yuv444p", "yuv420p10le")
    parts = [write_film(tmp_path / f"{k}.{suffix}", pixels=p, first=100 * k) for k, p in enumerate(formats)]
    assert read(join(tmp_path / f"a.{suffix}", *parts)) == [(k + 100 * part) % 256 for part in range(3) for k in ALL]


def test_a_picture_that_starts_after_the_sound(tmp_path):
    part, path = write_film(tmp_path / "part.mkv", count=75), tmp_path / "a.mkv"
    with av.open(str(path), "w") as out, av.open(str(part)) as film:
        picture = out.add_stream_from_template(film.streams.video[0])
        sound = out.add_stream("aac", rate=8000, layout="mono")
        for k in range(40):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1000), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 8000, 1000 * k
            out.mux(sound.encode(frame))
        out.mux(sound.encode(None))
        for packet in film.demux(video=0):
            if packet.size:
                packet.pts += 2000
                packet.dts = None if packet.dts is None else packet.dts + 2000
                packet.stream = picture
                out.mux(packet)
    assert read(path) == list(range(75))
    assert length(path) == (75, 3.0)


# Rates


@pytest.mark.parametrize(
    ("suffix", "codec", "rate"),
    [("h264", "libx264", 10), ("hevc", "libx265", 10), ("h264", "libx264", 60), ("m2v", "mpeg2video", 50)]
    + [("h264", "libx264", Fraction(24000, 1001)), ("m1v", "mpeg1video", 30), ("h264", "libx264", 1)],
)
def test_bare_streams_have_the_rate_of_their_headers(tmp_path, suffix, codec, rate):
    path = write_film(tmp_path / f"a.{suffix}", codec, rate=rate)
    assert read(path) == ALL
    assert probe(path).fps == pytest.approx(float(rate))
    assert length(path) == (30, 30 / float(rate))


@pytest.mark.parametrize(("suffix", "codec"), [("webm", "libvpx"), ("mkv", "libx264"), ("mkv", "ffv1")])
def test_a_film_that_does_not_say_its_rate(tmp_path, suffix, codec):
    """As browsers record it: stamps of about 30 pictures a second, and nothing else."""
    stamps = [Fraction(k) + Fraction(k * 7 % 5, 10) for k in range(90)]
    path = write_film(tmp_path / f"a.{suffix}", codec, 90, 30, stamps=lambda k: stamps[k] if k >= 0 else k)
    content = bytearray(path.read_bytes())
    at = content.index(b"\x23\xe3\x83\x84")  # DefaultDuration becomes Void
    content[at : at + 8] = b"\xec\x86" + bytes(6)
    path.write_bytes(content)
    assert probe(path).fps == pytest.approx(30, rel=0.02)
    assert read(path, fps=30.0, start=1, seconds=1) == pytest.approx(list(range(30, 60)), abs=1)
    assert len(read(path)) == pytest.approx(90, abs=1)


@pytest.mark.sample(12)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
@pytest.mark.parametrize(("rate", "fps"), [(25, 1), (25, 2), (25, 5), (25, 8), (100, 24), (60, 24), (50, 24), (30, 12)])
def test_a_lower_rate_shows_the_picture_of_the_moment(tmp_path, suffix, rate, fps):
    path = write_film(tmp_path / f"a.{suffix}", "mpeg4", 120, rate, bframes=0)
    found = read(path, fps=float(fps))
    assert found == [rate * k // fps for k in range(len(found))]
    assert len(found) == math.ceil(120 * fps / rate)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001)])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "flv"])
def test_rates_that_nearly_agree_show_every_picture_once(tmp_path, suffix, rate):
    path = write_film(tmp_path / f"a.{suffix}", "libx264", 120, rate)
    assert read(path) == list(range(120))
    assert read(path, fps=float(round(rate)), seconds=2) == list(range(2 * round(rate)))


class Pipe:
    """A file that cannot be sought in."""

    def __init__(self):
        self.content = bytearray()

    def write(self, block):
        self.content += block
        return len(block)


@pytest.mark.parametrize(
    ("format", "codec"),
    [("webm", "libvpx"), ("webm", "libvpx-vp9"), ("matroska", "libx264"), ("flv", "libx264"), ("mp4", "libx264")]
    + [("avi", "mpeg4"), ("mpegts", "libx264"), ("nut", "mpeg4"), ("ogg", "libvpx")],
)
def test_a_film_that_was_written_to_a_pipe(tmp_path, format, codec):
    pipe = Pipe()
    fragments = {"movflags": "frag_keyframe+empty_moov"} if format == "mp4" else {}
    with av.open(pipe, "w", format=format, options=fragments) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.options = encoder_options(codec, 12, 2, False)
        for k in range(75):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(draw(k), format="rgb24")))
        out.mux(stream.encode(None))
    path = tmp_path / "a.film"
    path.write_bytes(pipe.content)
    assert length(path) == (75, 3.0)
    assert read(path) == list(range(75))
    assert read(path, start=2, seconds=0.2) == list(range(50, 55))
