"""Which videos are used for training, which parts of them, and their captions."""

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
    """Training videos, and how they are cut into blocks.

    Args:
        videos: Paths of videos; "sample" is the sample film, which is downloaded on first use.
        start: Start of the part to use of each video, in seconds.
        seconds: Length of the part to use of each video, in seconds; null for everything after `start`.
        block_seconds: Target length of a block, in seconds; a block consists of whole consecutive scenes.
        test_every: Every test_every-th block is held out for testing; training never uses it.
        test: Parts [from, to] of each video to hold out for testing instead, in seconds, in ascending order. They
            should start and end at cuts.
        cut_threshold: Mean change of luma, from 0 to 255, at which a new scene starts.
        shortest: Minimum length of a block, in latent frames; shorter blocks (the end of a video) are not used.
        mirror: Whether the mirror image of every block is used, too.
        zooms: Factors above 1 by which every block is enlarged for further copies; each copy is a crop of the frame
            size at a random place, fixed for each block.
        captions: YAML file of a list of {start, end, prompt}, in seconds of the video; for a single video.
        cache: Folder for the latents; by default in the cache folder of vidmem.

    Raises:
        ValueError: A value is out of range.
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
            "DataConfig: test must be parts [from, to] in ascending order, after start",
            self.test,
        )
        require(
            self.captions is None or len(self.videos) == 1,
            "DataConfig: captions requires a single video",
            self.videos,
        )

    def parts(self) -> list[tuple[float, float | None, str | None]]:
        """Return (start second, seconds or None for the rest, split or None) of each part of a video.

        Without `test` there is one part, whose blocks are split by number.
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
    """The prompt of a part of a video.

    Args:
        start: Start of the part, in seconds of the video.
        end: End of the part, in seconds of the video.
        prompt: What the part shows.
    """

    start: Annotated[float, not_negative(MOST_SECONDS)]
    end: Annotated[float, not_negative(MOST_SECONDS)]
    prompt: Annotated[str, Text(10_000)]


def film_paths(config: DataConfig) -> list[Path]:
    """Paths of the videos; downloads the sample film if it is among them."""

    return [fetch_sample_clip() if name == SAMPLE else Path(name) for name in config.videos]


def read_captions(path: Path) -> tuple[Caption, ...]:
    """Read captions from a YAML list of {start, end, prompt}.

    Raises:
        UserError: The file is missing or not such a list, or an entry is wrong; the message names its line.
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
