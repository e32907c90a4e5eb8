"""What is measured: held-out pieces of video, of a film's test blocks or of a video of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ..checks import MOST_SEED, Checked, SamplerSteps, not_negative, positive
from ..errors import UserError
from ..memory.learned import DEFAULT_STEPS, TrainedModel
from ..model.config import ModelConfig
from ..model.file import MODEL_FILE
from ..progress import note
from ..train.blocks import cut_films
from ..video import probe, read_clip, remarks
from ..video.clip import ClipSpec
from ..video.films import SAMPLE, film_paths


@dataclass(frozen=True)
class HeldOut:
    """A piece of held-out video.

    Attributes:
        frames: uint8 (T, H, W, 3).
        source: name of the video.
        start: its first second.
    """

    frames: torch.Tensor
    source: str
    start: float


@dataclass(frozen=True)
class RetrievalConfig(Checked):
    """What is measured.

    Args:
        clips: number of histories.
        history: their length in video frames.
        steps: of the sampler.
        seed: of the sampler's noise.

    Raises:
        ValueError: a value is out of range.
    """

    clips: Annotated[int, positive(1_000_000)] = 8
    history: Annotated[int, positive(10_000_000)] = 240
    steps: SamplerSteps = DEFAULT_STEPS
    seed: Annotated[int, not_negative(MOST_SEED)] = 0


def find_models(folder: Path) -> list[Path]:
    """List the finished models in the folders of a folder, by name.

    Raises:
        UserError: there is none.
    """
    found = sorted(file.parent for file in folder.glob(f"*/{MODEL_FILE}"))
    if not found:
        raise UserError(f"{folder}: holds no folder with a {MODEL_FILE}; train one with `vidmem pretrain`")
    return found


def trained_history(model: Path) -> int:
    """Video frames of the histories that a model was trained on, or the default where it does not say."""
    trained = TrainedModel.load(model)
    latent_frames = trained.training.history
    return trained.vae.video_frames(latent_frames) if latent_frames else RetrievalConfig.history


def trained_films(model: Path) -> list[Path]:
    """Films that a model's file says it was trained on, the sample film left out."""
    trained_on = TrainedModel.load(model).model.extra.get("training", {}).get("data", {})
    return [Path(name) for name in trained_on.get("videos", ()) if name != SAMPLE]


def choose_histories(models: list[Path], config: RetrievalConfig, video: Path | None = None) -> list[HeldOut]:
    """Take pieces that do not overlap of a video, or of the test blocks of what the first model was trained on.

    Args:
        models: at least one; the first fixes frame size and rate.
        config: how many and how long; fewer are taken where there are no more.
        video: a video, or None for the test blocks.

    Returns:
        The pieces, histories of one length.

    Raises:
        UserError: there is none of that length.
    """
    trained = TrainedModel.load(models[0])
    model = trained.model.config
    if video is None:
        data = trained.training.data
        cut = cut_films(data, film_paths(data), model, trained.vae, "test")
        stretches = [(Path(row["film"]), row["start"], row["frames"]) for row, _ in cut]
    else:
        info = probe(video)
        note(remarks(video, info, ClipSpec(model.height, model.width)))
        stretches = [(video, 0.0, int(info.duration * model.fps))]
    pieces = [
        (film, start + n * config.history / model.fps)
        for film, start, frames in stretches
        for n in range(frames // config.history)
    ]
    if not pieces:
        longest = max((frames for *_, frames in stretches), default=0)
        raise UserError(f"no piece of video has {config.history} frames, the longest has {longest}; shorten --history")
    return [_read_history(*pieces[n], config.history, model) for n in _spread_over(len(pieces), config.clips)]


def _spread_over(count: int, wanted: int) -> list[int]:
    """At most `wanted` of `count` indices, evenly spread."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _read_history(film: Path, start: float, frames: int, model: ModelConfig) -> HeldOut:
    clip = read_clip(film, ClipSpec(model.height, model.width, model.fps, start, frames / model.fps))
    if clip.short:
        raise UserError(f"{film}: ends before {frames} frames from {start:.2f} s; shorten --history")
    return HeldOut(clip.frames, film.name, start)
