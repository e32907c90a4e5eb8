"""The folder of a training run: who holds it, what must stay the same in it, and what the run leaves there."""

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
# Names of what a run writes beside its checkpoints.
_WRITTEN = (MODEL_FILE, VAE_FILE, LORA_FILE, CURVE, PLOT, SPEED)
# A run may go on with other values of these.
_FREE = (
    *("checkpoint_every", "log_every", "max_seconds", "draw_ahead", "cuda_graph", "threads", "device"),
    *("output", "cache"),
)


class RunSettings(dict[str, Any]):
    """What must be the same for a run to go on, by dotted keys, as JSON holds it.

    Attributes:
        kind: the configuration's class, which knows earlier names of its fields.
        defaults: of the keys that have one: a key that a run of another version does not name means it.
    """

    def __init__(self, kind: type, values: dict[str, Any], defaults: dict[str, Any]) -> None:
        super().__init__(values)
        self.kind, self.defaults = kind, defaults


def run_settings(config: Any) -> RunSettings:
    """Flatten a configuration to dotted keys, without those that may change from run to run."""
    values, defaults = (dict(flat(_plain(each))) for each in (dataclasses.asdict(config), _defaults(config)))
    return RunSettings(type(config), values, defaults)


def flat(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of nested mappings, and of mappings in lists by their places."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {str(place): inner for place, inner in enumerate(value)}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flat(inner, f"{where}.{key}".lstrip("."))
    elif where.rpartition(".")[2] not in _FREE:
        yield where, value


def as_now(before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The dotted keys of a run's checkpoint by the names that their fields have now."""
    if not isinstance(settings, RunSettings):
        return dict(flat(before))
    try:
        return dict(flat(renewed(settings.kind, _nested(before))))
    except FieldError:  # another value than this version knows, which is to be told as it stands
        return dict(flat(before))


def _nested(flattened: dict[str, Any]) -> dict[str, Any]:
    """Undo `flat`."""
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
    """Mappings whose keys are places, as lists."""
    if not isinstance(value, dict):
        return value
    made = {key: _listed(inner) for key, inner in value.items()}
    if not made or not all(key.isascii() and key.isdigit() and len(key) < 4 for key in made):
        return made
    return [made.get(str(place), {}) for place in range(1 + max(map(int, made)))]


def _defaults(config: Any) -> Any:
    """The defaults of a configuration's fields, in parts that are configurations those of theirs."""
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
    """What JSON gives back for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def prepare_latents(
    config: DataConfig, model: ModelConfig, vae: VideoCodec, compressions: Sequence[Compression]
) -> Latents:
    """Encode the films in the first process, with progress on stderr, and read the latents in all."""
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
    """Hold the folder of a run: no other process writes there, and nothing that the run reads is lost.

    Args:
        config: of the run; its films, captions and VAE are read.
        read: other files that it reads.

    Raises:
        UserError: another process holds it, it cannot be written, or it holds a film, or another file that is read
            under a name that the run writes.
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
                raise UserError(f"{folder}: holds the film {film}; choose another output")
        outputs([*films, *given], folders={folder: _WRITTEN})
        with locked(folder / ".lock", folder):
            yield folder
    finally:
        if made:
            with suppress(OSError):  # it is empty only if the run did not begin
                folder.rmdir()


def run_extra(output: Path, config: Any) -> dict[str, Any]:
    """What a trained model's file says of its training: configuration, steps and last loss.

    Where the run lay and how long a call of it might take is left out: equal runs give equal files.
    """
    last = read_curve(output / CURVE)[-1]
    training = _plain(dataclasses.asdict(config))
    del training["output"], training["data"]["cache"], training["optimisation"]["max_seconds"]
    return {"training": training, "steps": last["step"], "loss": last["loss"]}


def finish(output: Path, model: MemoryModel, config: Any, vae: str | Path | None) -> Path | None:
    """Write the trained model, its configuration beside it, and the VAE's weights, in the first process."""
    if rank() != 0:
        return None
    file = save_model(output, model, run_extra(output, config))
    if vae is not None and Path(vae).is_file():
        with replacing(file.with_name(VAE_FILE)) as part:
            shutil.copyfile(vae, part)
    return file
