"""Which films are taken, which parts of them, and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .. import yaml_file
from ..checks import (
    MOST_SECONDS,
    Checked,
    Entries,
    FileName,
    PathName,
    Text,
    at_least,
    build,
    more_than,
    not_negative,
    positive,
    require,
    within,
)
from ..errors import UserError
from .sample import fetch_sample_clip

SAMPLE = "sample"


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which films are trained on and how they are cut.

    Args:
        videos: paths of videos; "sample" is the sample film, fetched the first time.
        start: first moment of each video, in seconds.
        seconds: length to take of each video; null for all.
        block_seconds: whole consecutive scenes are grouped to about this length.
        test_every: every so many blocks one is for testing; what is tested is never trained on.
        test: the stretches [from, to] of each video that are for testing instead, in its seconds,
            ascending. Their ends should be cuts.
        cut_threshold: mean change of luma, of 255, at which a new scene begins.
        shortest: blocks of fewer latent frames (a video's end, or a short video) are left out.
        mirror: train on every block's mirror image too.
        zooms: train on every block enlarged by these factors too, a window of the frame's size from a place
            of the enlarged frames that is another for every block.
        captions: a YAML list of {start, end, prompt}, in seconds of the video; for one video.
        cache: folder of the latents; by default one in the cache folder of this program.

    Raises:
        ValueError: a value is out of range.
    """

    videos: Annotated[tuple[str, ...], Entries(1, 100_000), PathName()] = (SAMPLE,)
    start: Annotated[float, not_negative(MOST_SECONDS)] = 0.0
    seconds: Annotated[float | None, positive(MOST_SECONDS)] = None
    block_seconds: Annotated[float, within(0.01, 36_000)] = 24.0
    test_every: Annotated[int, at_least(2, 1_000_000)] = 6
    test: Annotated[tuple[tuple[float, float], ...], Entries(0, 10_000), not_negative(MOST_SECONDS)] = ()
    cut_threshold: Annotated[float, positive(1e6)] = 20.0
    shortest: Annotated[int, positive(1_000_000)] = 16
    mirror: bool = False
    zooms: Annotated[tuple[float, ...], Entries(0, 64), more_than(1, 16)] = ()
    captions: FileName | None = None
    cache: FileName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [self.start, *(moment for part in self.test for moment in part)]
        require(
            all(a <= b for a, b in zip(ends, ends[1:], strict=False)),
            "DataConfig: test must be ascending stretches [from, to] after start",
            self.test,
        )
        require(
            self.captions is None or len(self.videos) == 1,
            "DataConfig: captions belong to one video",
            self.videos,
        )

    def parts(self) -> list[tuple[float, float | None, str | None]]:
        """Return (first second, seconds or None for the rest, split or None) of the parts of a video.

        Without `test` that is one part, whose blocks are split by number.
        """
        if not self.test:
            return [(self.start, self.seconds, None)]
        end = None if self.seconds is None else self.start + self.seconds
        parts: list[tuple[float, float | None, str | None]] = []
        at = self.start
        for first, last in self.test:
            parts += [(at, first - at, "train"), (first, last - first, "test")]
            at = last
        parts.append((at, None if end is None else end - at, "train"))
        return [part for part in parts if part[1] is None or part[1] > 0]


@dataclass(frozen=True)
class Caption(Checked):
    """What is to be seen from `start` to `end`, in seconds of the film."""

    start: Annotated[float, not_negative(MOST_SECONDS)]
    end: Annotated[float, not_negative(MOST_SECONDS)]
    prompt: Annotated[str, Text(10_000)]


def film_paths(config: DataConfig) -> list[Path]:
    """Paths of the videos, the sample film fetched if it is among them."""

    return [fetch_sample_clip() if name == SAMPLE else Path(name) for name in config.videos]


def read_captions(path: Path) -> tuple[Caption, ...]:
    """Read a YAML list of {start, end, prompt}.

    Raises:
        UserError: the file is missing, is no such list, or an entry is wrong; the message numbers it.
    """
    try:
        rows, lines = yaml_file.load(yaml_file.read_text(path), str(path), "cannot be read as captions")
    except OSError as error:
        raise UserError(f"{path}: cannot be read as captions ({error.strerror or error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of {{start, end, prompt}}")
    captions = []
    for i, row in enumerate(rows):
        try:
            captions.append(build(Caption, row, f"caption {i + 1}"))
        except ValueError as error:
            raise UserError(f"{path}:{lines[f'[{i}]']}: {error}") from error
    return tuple(captions)
