"""The output folder of a training run: its lock, the settings that must not change, and the files of the run."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ..checks import FieldError, renewed
from ..errors import UserError
from ..files import locked, make_folder, outputs, replacing
from ..model.config import Compression, ModelConfig
from ..model.file import MODEL_FILE, VAE_FILE, save_model
from ..model.lora import LORA_FILE
from ..model.memory_model import MemoryModel
from ..vae import VideoCodec
from ..video.films import SAMPLE, DataConfig
from .curve import read_curve
from .distributed import first_then_others, rank
from .latents import Latents, prepare

CURVE = "curve.csv"
PLOT = "curve.png"
SPEED = "speed.json"
# Names of the files that a run writes beside its checkpoints.
_WRITTEN = (MODEL_FILE, VAE_FILE, LORA_FILE, CURVE, PLOT, SPEED)
# Settings that may change when a run is resumed.
_FREE = (
    *("checkpoint_every", "log_every", "max_seconds", "draw_ahead", "cuda_graph", "threads", "device"),
    *("output", "cache"),
)


class RunSettings(dict[str, Any]):
    """Settings that must be the same to resume a run: JSON values by dotted keys.

    Attributes:
        kind: Class of the configuration, which knows the former names of its fields.
        defaults: Default values; a key that is missing in a run of another version has its default.
    """

    def __init__(self, kind: type, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__(values)
        self.kind, self.defaults = kind, defaults


def run_settings(config: Any) -> RunSettings:
    """Flatten a configuration to dotted keys, without the settings that may change."""
    values, defaults = (dict(flat(_plain(each))) for each in (dataclasses.asdict(config), _defaults(config)))
    return RunSettings(type(config), values, defaults)


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings; mappings in lists have their index as key."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(place): inner for place, inner in enumerate(value)}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{where}.{key}".lstrip("."))
    elif where.rpartition(".")[2] not in _FREE:
        yield where, value


def as_now(before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Rename the dotted keys of a checkpoint's settings to the present names of the fields."""
    if not isinstance(settings, RunSettings):
        return dict(flat(before))
    try:
        return dict(flat(renewed(settings.kind, _nested(before))))
    except FieldError:  # a value that this version does not know; the message shows it unchanged
        return dict(flat(before))


def _nested(flattened: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `flat`."""
    whole: dict[str, Any] = {}
    for key, value in flattened.items():
        *way, last = key.split(".")
        inside = whole
        for name in way:
            inside = inside.setdefault(name, {})
            if not isinstance(inside, dict):
                raise FieldError(f"settings: {key} must not be inside of a value", key)
        inside[last] = value
    return _listed(whole)


def _listed(value: Any) -> Any:
    """Convert mappings with indices as keys to lists."""
    if not isinstance(value, dict):
        return value
    made = {key: _listed(inner) for key, inner in value.items()}
    if not made or not all(key.isascii() and key.isdigit() and len(key) < 4 for key in made):
        return made
    return [made.get(str(place), {}) for place in range(1 + max(map(int, made)))]


def _defaults(config: Any) -> Any:
    """Default values of a configuration's fields, nested configurations included."""
    if isinstance(config, tuple) and config and dataclasses.is_dataclass(config[0]):
        return [_defaults(part) for part in config]
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value) or (
            isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0])
        ):
            found[field.name] = _defaults(value)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _plain(value: Any) -> Any:
    """Convert a value as writing and reading JSON does."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def prepare_latents(
    config: DataConfig, model: ModelConfig, vae: VideoCodec, compressions: Sequence[Compression]
) -> Latents:
    """Encode the videos in the first process, with progress on stderr, and read the latents in all processes."""
    from ..progress import progress_bar

    with progress_bar() as tell:
        latents = first_then_others(lambda: prepare(config, model, vae, compressions, tell))
    if rank() == 0:
        scenes = sum(block.scenes for block in latents.blocks)
        seconds = sum(b.latents.shape[1] for b in latents.blocks) * latents.seconds_per_latent
        test = len(latents.split("test").blocks)
        print(
            f"{len(latents.blocks)} blocks of {scenes} scenes, {seconds:.0f} s of video, {test} blocks for testing",
            file=sys.stderr,
        )
    return latents


@contextmanager
def run_folder(config: Any, *read: str | Path | None) -> Iterator[Path]:
    """Lock the output folder of a run, and check that the run does not overwrite its inputs.

    Args:
        config: Configuration of the run; its videos, captions and VAE are inputs.
        *read: Further input files.

    Yields:
        The folder.

    Raises:
        UserError: Another process is writing there, the folder cannot be written, or it contains an input under the
            name of an output, or a training video.
    """
    folder = Path(config.output)
    if rank() != 0:
        yield folder
        return
    films = [Path(name) for name in config.data.videos if name != SAMPLE]
    given = [Path(each) for each in (*read, config.data.captions) if each]
    made = make_folder(folder)
    try:
        for film in films:
            if folder.resolve() in film.resolve().parents:
                raise UserError(f"{folder}: contains the training video {film}; choose another output")
        outputs([*films, *given], folders={folder: _WRITTEN})
        with locked(folder / ".lock", folder):
            yield folder
    finally:
        if made:
            with suppress(OSError):  # the folder is empty only if the run did not start
                folder.rmdir()


def run_extra(output: Path, config: Any) -> dict[str, Any]:
    """Make the training record for the header of a model file: configuration, steps and last loss.

    The output folder and max_seconds are left out, so that equal runs give equal files.
    """
    last = read_curve(output / CURVE)[-1]
    training = _plain(dataclasses.asdict(config))
    del training["output"], training["data"]["cache"], training["optimisation"]["max_seconds"]
    return {"training": training, "steps": last["step"], "loss": last["loss"]}


def finish(output: Path, model: MemoryModel, config: Any, vae: str | Path | None) -> Path | None:
    """Write the trained model, its configuration and the VAE's weights, in the first process."""
    if rank() != 0:
        return None
    file = save_model(output, model, run_extra(output, config))
    if vae is not None and Path(vae).is_file():
        with replacing(file.with_name(VAE_FILE)) as part:
            shutil.copyfile(vae, part)
    return file
