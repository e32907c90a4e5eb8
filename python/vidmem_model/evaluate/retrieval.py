"""Evaluate memories on held-out histories: three quality metrics at every latent position."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import write_json
from ..machine import describe_device, versions
from ..memory import untrained
from ..memory.learned import TrainedModel
from ..model.config import Compression, ModelConfig
from ..model.file import model_path
from ..weights import stored_dtype
from .baselines import ReadBack, mean_frame, untrained_memory
from .held_out import HeldOut, RetrievalConfig
from .metrics import psnr, ssim, stlpips

Progress = Callable[[str, int, int | None], None]

# Names of the files that keep the results of each run.
RUNS = "[0-9a-f]" * 16 + ".json"
MEASURES = ("psnr", "ssim", "stlpips")
WHAT = (
    "Frames of held-out histories read back from memories and compared with the video. A row is a memory: tokens, how "
    "many a history takes, of `width` numbers each; trained, whether a model makes it; runs, its models of other seeds "
    "(without training, one). psnr (dB, at most 60 a frame), ssim and stlpips: mean; spread, the standard deviation "
    "over the runs; curve, a value for each latent frame of the history in order; of a run also clips, a value for "
    "each of `clips` in order. frame_size is height, width; fps, frames a second."
)
# Upper limit, because an equal frame (such as a black one) has infinite PSNR.
_BEST_PSNR = 60.0


def compare(read: torch.Tensor, truth: torch.Tensor, positions: list[range]) -> dict[str, list[float]]:
    """Compare frames with their sources, position by position.

    PSNR (at most 60 dB) and SSIM are means over the frames of a latent position; ST-LPIPS, which takes ten times as
    long, is computed for the middle frame only.

    Args:
        read: uint8 (T, H, W, 3), frames read back.
        truth: uint8 (T, H, W, 3), their sources.
        positions: Frame numbers of each latent position.

    Returns:
        For each metric one value per position.
    """
    pairs = list(zip(read, truth, strict=True))
    middle = [span[len(span) // 2] for span in positions]
    return {
        "psnr": [statistics.fmean(min(_BEST_PSNR, psnr(*pairs[i])) for i in span) for span in positions],
        "ssim": [statistics.fmean(ssim(*pairs[i]) for i in span) for span in positions],
        "stlpips": stlpips(read[middle], truth[middle]).tolist(),
    }


def describe(config: ModelConfig) -> str:
    """Name of a table row: branches and compression of the model's encoders."""
    words = {"both": "both", "lr": "only LR", "hr": "without LR", "patchifier": "large patchifier"}
    return " + ".join(
        f"{words.get(each.branches, each.branches)} {_times(each.compression)}" for each in config.encoders
    )


def _times(compression: Compression) -> str:
    return str(compression).replace("x", "×")


def measure_row(
    read: Callable[[HeldOut], ReadBack],
    histories: Iterable[HeldOut],
    positions: list[range],
    tell: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure one memory on all histories.

    Args:
        read: Compresses a history and reads its frames back.
        histories: Histories of one length.
        positions: Video frames of each latent frame.
        tell: Called with the number of histories done.

    Returns:
        Number and width of the tokens; for each metric its mean, one value per history, and one value per latent
        position.
    """
    found, back = [], None
    for done, history in enumerate(histories):
        tell(done)
        back = read(history)
        found.append(compare(back.frames, history.frames, positions))
    result: dict[str, Any] = {"tokens": back.tokens, "width": back.width}
    for name in MEASURES:
        values = [each[name] for each in found]
        by_clip = [statistics.fmean(v) for v in values]
        curve = [statistics.fmean(v) for v in zip(*values, strict=True)]
        result[name] = {"mean": statistics.fmean(by_clip), "clips": by_clip, "curve": curve}
    return result


def latent_positions(frames: int, first: int, stride: int) -> list[range]:
    """Video frames of each latent frame: `first` in the first, `stride` in each other."""
    starts = [0, *range(first, frames, stride)]
    return [range(start, min(end, frames)) for start, end in zip(starts, [*starts[1:], frames], strict=True)]


def read_model(trained: TrainedModel, config: RetrievalConfig) -> Callable[[HeldOut], ReadBack]:
    """Make a function that encodes a history with a trained model and retrieves all frames."""

    def read(history: HeldOut) -> ReadBack:
        encoded = trained.encode(history.frames)
        remembered = trained.remember(encoded)
        made = trained.retrieve(remembered, list(range(encoded.latents.shape[2])), config.steps, config.seed)
        frames = trained.decode(made, tuple(history.frames.shape[:3]))
        return ReadBack(frames, *remembered.tokens.shape[1:])

    return read


def read_vae(trained: TrainedModel) -> Callable[[HeldOut], ReadBack]:
    """Make a function that decodes the true latents, the upper bound for a memory with this VAE."""

    def read(history: HeldOut) -> ReadBack:
        latents, _ = trained.encode(history.frames)
        return ReadBack(trained.decode(latents, tuple(history.frames.shape[:3])), 0, 0)

    return read


class _Rows:
    """Rows of a table, each a list of runs; results of earlier calls are read from `store`."""

    def __init__(
        self, histories: list[HeldOut], config: RetrievalConfig, store: Path | None, tell: Progress | None
    ) -> None:
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self._histories, self._store, self._tell = histories, store, tell or (lambda *_: None)
        self._asked = [dataclasses.asdict(config), *((h.source, h.start) for h in histories)]

    def add(self, name: str, trained: TrainedModel, read: Callable[[HeldOut], ReadBack], **identity: Any) -> None:
        """Measure one run of a row, on histories cut as `trained` needs them; `identity` distinguishes runs."""
        asked = json.dumps([name, identity, self._asked])
        file = self._store and self._store / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.json"
        if file and file.is_file():
            run = json.loads(file.read_text(encoding="utf-8"))
        else:
            positions = latent_positions(
                len(self._histories[0].frames), trained.vae.first_frames, trained.vae.stride[0]
            )
            total = len(self._histories)
            run = {**identity, **measure_row(read, self._histories, positions, lambda n: self._tell(name, n, total))}
            if file:
                write_json(file, run)
        self.runs.setdefault(name, []).append(run)


def evaluate_retrieval(
    models: list[Path],
    histories: list[HeldOut],
    config: RetrievalConfig,
    store: Path | None = None,
    tell: Progress | None = None,
) -> dict[str, Any]:
    """Measure trained models, the methods without a model, the mean frame, and the VAE itself.

    Models of one configuration and storage dtype are runs of one row. The methods without a model get the compression
    of each model with one encoder, and so the same number and width of tokens.

    Args:
        models: At least one model file or folder; all of one frame size and VAE.
        histories: Held-out histories of one length, at the models' size and rate.
        config: Configuration of the evaluation.
        store: Folder that keeps the results of every run, so that an interrupted evaluation can be resumed.
        tell: Called with (description, steps done, steps in total).

    Returns:
        The content of retrieval.json.

    Raises:
        UserError: A model cannot be used, or the models differ in frame size or VAE.
    """
    rows = _Rows(histories, config, store, tell)
    configs: dict[str, ModelConfig] = {}
    first = None
    for path in models:
        trained = TrainedModel.load(path)
        mine = trained.model.config
        first = first or trained
        theirs = first.model.config
        if (mine.vae, mine.height, mine.width, mine.fps) != (theirs.vae, theirs.height, theirs.width, theirs.fps):
            raise UserError(f"{path}: differs from {models[0]} in VAE, frame size or rate; evaluate them separately")
        stored = stored_dtype(model_path(path))
        name = describe(mine) + ("" if stored == "float32" else f", {stored}")
        if configs.setdefault(name, mine) != mine:
            name = f"{name} ({Path(path).stem})"
        rows.add(name, trained, read_model(trained, config), sha256=trained.digest, vae=trained.vae_digest)
    of_models = set(rows.runs)
    rows.runs = dict(sorted(rows.runs.items(), key=lambda row: (*_place(configs.get(row[0]), row[1]), row[0])))
    boxes = {(c.encoders[0].compression, c.dit.dim) for c in configs.values() if len(c.encoders) == 1}
    for compression, width in sorted(boxes, key=lambda each: (each[0].height, each[0].width, each[0].time, each[1])):
        for method in untrained():
            read = functools.partial(_read_untrained, method, compression, width)
            rows.add(f"{method} {_times(compression)}", first, read, most_width=width)
    rows.add("mean frame", first, lambda history: mean_frame(history.frames))
    rows.add("VAE alone", first, read_vae(first), vae=first.vae_digest)
    return {
        "format": "vidmem.retrieval",
        "version": 1,
        "what": WHAT,
        "config": dataclasses.asdict(config),
        "clips": [{"source": h.source, "start_seconds": h.start} for h in histories],
        "frame_size": [first.model.config.height, first.model.config.width],
        "fps": first.model.config.fps,
        "rows": {name: {"trained": name in of_models, **summarise(runs)} for name, runs in rows.runs.items()},
        "device": describe_device("cpu"),
        "versions": versions(),
    }


def _place(config: ModelConfig | None, runs: list[dict[str, Any]]) -> tuple[int, int]:
    """Sort key of the trained rows: number of tokens, then encoders from the simplest to the full one."""
    order = ("patchifier", "lr", "hr", "both")
    branches = config.encoders[0].branches if config else ""
    return runs[0]["tokens"], order.index(branches) if branches in order else len(order)


def _read_untrained(method: str, compression: Compression, width: int, history: HeldOut) -> ReadBack:
    return untrained_memory(method, history.frames, compression, width)


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarise the runs of one row: mean, standard deviation over runs (None for a single one), mean curve."""
    row: dict[str, Any] = {"tokens": runs[0]["tokens"], "width": runs[0]["width"]}
    for name in MEASURES:
        means = [run[name]["mean"] for run in runs]
        row[name] = {
            "mean": statistics.fmean(means),
            "spread": statistics.stdev(means) if len(means) > 1 else None,
            "curve": [statistics.fmean(v) for v in zip(*(run[name]["curve"] for run in runs), strict=True)],
        }
    row["runs"] = runs
    return row
