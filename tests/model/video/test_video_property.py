"""Videos of every container, codec and frame order, read from any time at any rate, give the right pictures."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest
from video_helpers import read, write_film

from vidmem_model.video import decode, probe

NTSC = Fraction(24000, 1001)
CODECS = {
    "ts": ("libx264", "libx265", "mpeg2video", "mpeg1video", "mpeg4"),
    "m2ts": ("libx264", "libx265", "mpeg2video"),
    "mpg": ("mpeg2video", "mpeg1video"),
    "vob": ("mpeg2video",),
    "avi": ("libx264", "mpeg4", "mjpeg", "msmpeg4"),
    "wmv": ("libx264", "wmv2", "msmpeg4"),
    "flv": ("libx264", "flv"),
    "mkv": ("libx264", "libx265", "mpeg4", "mpeg2video", "libvpx", "libvpx-vp9", "ffv1", "mjpeg"),
    "mp4": ("libx264", "libx265", "mpeg4", "mjpeg"),
    "mov": ("libx264", "prores_ks", "qtrle", "png", "mpeg4"),
    "webm": ("libvpx", "libvpx-vp9"),
    "nut": ("libx264", "mpeg4"),
    "mxf": ("mpeg2video",),
    "ogv": ("libvpx",),
    "h264": ("libx264",),
    "hevc": ("libx265",),
    "m1v": ("mpeg1video",),
    "m2v": ("mpeg2video",),
    "m4v": ("mpeg4",),
    "mjpeg": ("mjpeg",),
    "gif": ("gif",),
    "y4m": ("rawvideo",),
}
REORDERING = ("libx264", "libx265", "mpeg4", "mpeg2video", "mpeg1video")
# Stamps of their own, in which a picture can be held or two can be equal.
FREE_STAMPS = ("ts", "m2ts", "mkv", "mp4", "mov", "nut")


@dataclass(frozen=True)
class Case:
    """A film, and the part of it that is read."""

    suffix: str
    codec: str
    rate: Fraction
    count: int
    gop: int
    bframes: int
    open_gop: bool
    offset: float
    stamps: str
    start: float
    fps: float | None
    seconds: float | None


def draw_case(seed: int) -> Case:
    rng = random.Random(seed)
    suffix = rng.choice(list(CODECS))
    codec = rng.choice(CODECS[suffix])
    rates = [Fraction(25), Fraction(25), NTSC, Fraction(30), Fraction(50)]
    if codec not in ("mpeg2video", "mpeg1video"):  # these know the rates of television only
        rates += [Fraction(10), Fraction(12)]
    if suffix in ("mjpeg", "m4v"):
        rates = [Fraction(25)]  # a bare stream without a rate in its headers is taken as 25 pictures a second
    if suffix == "gif":
        rates = [Fraction(25), Fraction(10)]
    count = rng.randint(8, 60)  # FFmpeg itself opens no shorter transport stream
    stamps = rng.choice(["even", "even", "repeated", "held"]) if suffix in FREE_STAMPS else "even"
    rate = rng.choice(rates)
    length = float((count - 1) / rate)
    return Case(
        suffix=suffix,
        codec=codec,
        rate=rate,
        count=count,
        gop=rng.choice([1, 5, 12, 12, 500]) if codec != "ffv1" else 1,
        bframes=rng.choice([0, 1, 2, 3]) if codec in REORDERING else 0,
        open_gop=rng.random() < 0.5,
        offset=rng.choice([0, 0, 1.4, 7]) if suffix in (*FREE_STAMPS, "flv", "webm") else 0,
        stamps=stamps,
        start=rng.choice([0.0, 0.0, rng.uniform(0, length), float(rng.randint(0, count - 1) / rate)]),
        fps=rng.choice([None, None, 24.0, 25.0, 12.0, 5.0, 1.0, 60.0]),
        seconds=rng.choice([None, rng.uniform(0.02, 2)]),
    )


def stamp_of(case: Case, k: int) -> int:
    """Stamp of frame k, in frames."""
    if case.stamps == "held" and k >= case.count // 2:
        return k + 7
    if case.stamps == "repeated" and k % 5 == 3:
        return k - 1
    return k


def shown_at(case: Case, k: int) -> float:
    """Second at which frame k is shown: as stamped, but after the one before where the stamps are equal."""
    return float((k if case.stamps == "repeated" else stamp_of(case, k)) / case.rate)


def check(case: Case, path: Path) -> None:
    rate = probe(path).fps
    if case.stamps != "held":
        assert rate == pytest.approx(float(case.rate), rel=0.05)
    fps = case.fps or rate
    end = shown_at(case, case.count - 1) + 1 / case.rate
    found = read(path, start=case.start, fps=case.fps, seconds=case.seconds)
    # Stamps are rounded to a millisecond or, in a GIF, ten; near rates allow a quarter of the interval.
    rounding = 0.0101 if case.suffix == "gif" else 0.0021
    late = rounding + (0.25 / fps if 0.85 < fps / rate < 1.15 else 0)

    def on_screen(moment: float) -> int:
        return max((k for k in range(case.count) if shown_at(case, k) <= moment), default=0)

    for j, number in enumerate(found):
        moment = case.start + j / fps
        assert on_screen(moment - rounding) <= number <= on_screen(moment + late), (j, moment, found)
    asked = None if case.seconds is None else max(1, round(case.seconds * fps))
    fewest, most = (int((end + slip - case.start) * fps + 1) for slip in (-late, rounding))
    if asked is not None:
        fewest, most = min(fewest, asked), min(most, asked)
    assert max(1, fewest - 1) <= len(found) <= most, found


def run(seed: int, folder: Path) -> None:
    case = draw_case(seed)
    path = write_film(
        folder / f"film.{case.suffix}",
        case.codec,
        case.count,
        case.rate,
        case.offset,
        stamps=lambda k: stamp_of(case, k) if case.stamps != "even" else k,
        gop=case.gop,
        bframes=case.bframes,
        open_gop=case.open_gop,
    )
    check(case, path)


@pytest.mark.sample(45)
@pytest.mark.parametrize("seed", range(400))
def test_any_part_of_any_film(tmp_path, seed):
    run(seed, tmp_path)


@pytest.mark.sample(15)
@pytest.mark.parametrize("seed", range(1000, 1100))
def test_a_large_file_is_sought_by_its_index(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(decode, "READ_THROUGH", 0)
    run(seed, tmp_path)
