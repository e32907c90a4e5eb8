"""Choose held-out histories: from the test blocks of the training videos, or from a video of the user."""

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
    """A held-out history.

    Attributes:
        frames: uint8 (T, H, W, 3).
        source: Name of the video.
        start: Start in the video, in seconds.
    """

    frames: torch.Tensor
    source: str
    start: float


@dataclass(frozen=True)
class RetrievalConfig(Checked):
    """Configuration of the evaluation.

    Args:
        clips: Number of histories.
        history: Length of a history, in video frames.
        steps: Number of denoising steps.
        seed: Random seed of the noise.

    Raises:
        ValueError: A value is out of range.
    """

    clips: Annotated[int, positive(1_000_000)] = 8
    history: Annotated[int, positive(10_000_000)] = 240
    steps: SamplerSteps = DEFAULT_STEPS
    seed: Annotated[int, not_negative(MOST_SEED)] = 0


def find_models(folder: Path) -> list[Path]:
    """List the finished models in the subfolders of a folder, by name.

    Raises:
        UserError: There is none.
    """
    found = sorted(file.parent for file in folder.glob(f"*/{MODEL_FILE}"))
    if not found:
        raise UserError(f"{folder}: has no subfolder with a {MODEL_FILE}; train one with `vidmem pretrain`")
    return found


def trained_history(model: Path) -> int:
    """Training length of a model's histories, in video frames; the default if its file does not say."""
    trained = TrainedModel.load(model)
    latent_frames = trained.training.history
    return trained.vae.video_frames(latent_frames) if latent_frames else RetrievalConfig.history


def trained_films(model: Path) -> list[Path]:
    """Videos that a model was trained on, as its file says, without the sample film."""
    trained_on = TrainedModel.load(model).model.extra.get("training", {}).get("data", {})
    return [Path(name) for name in trained_on.get("videos", ()) if name != SAMPLE]


def choose_histories(models: list[Path], config: RetrievalConfig, video: Path | None = None) -> list[HeldOut]:
    """Choose non-overlapping histories from a video, or from the test blocks of the first model's training videos.

    Args:
        models: At least one model; the first one sets frame size and rate.
        config: Number and length of the histories; fewer are returned if there are not enough.
        video: Video file, or None for the test blocks.

    Returns:
        Histories of one length.

    Raises:
        UserError: There is no history of this length.
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
        raise UserError(
            f"no held-out block has {config.history} frames, the longest has {longest}; give a shorter --history"
        )
    return [_read_history(*pieces[n], config.history, model) for n in _spread_over(len(pieces), config.clips)]


def _spread_over(count: int, wanted: int) -> list[int]:
    """Choose at most `wanted` of `count` indices, evenly spread."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def _read_history(film: Path, start: float, frames: int, model: ModelConfig) -> HeldOut:
    clip = read_clip(film, ClipSpec(model.height, model.width, model.fps, start, frames / model.fps))
    if clip.short:
        raise UserError(f"{film}: ends less than {frames} frames after {start:.2f} s; give a shorter --history")
    return HeldOut(clip.frames, film.name, start)
