"""The YAML files of `vidmem pretrain` and `vidmem finetune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError
from .finetune import FinetuneConfig
from .model_config import PRESETS, build
from .pretrain import PretrainConfig
from .pretrain_vae import PretrainVAEConfig

# Those by which the shipped checkpoints were trained; named without folder and ending.
RECIPES = Path(__file__).parent / "recipes"


def read_pretrain(path: Path) -> PretrainConfig:
    """Read the configuration of a run of Stage I.

    Under `model` a preset's name stands for all of its fields; a mapping may name one by the key
    `preset` and give fields that differ. Encoders that differ are given by their places in the list.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong; the message names it.
    """
    return _build(path, PretrainConfig, _read_with_model(path))


def read_pretrain_vae(path: Path) -> PretrainVAEConfig:
    """Read the configuration of a run that trains the VAE; `model` as for read_pretrain.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong; the message names it.
    """
    return _build(path, PretrainVAEConfig, _read_with_model(path))


def read_finetune(path: Path) -> FinetuneConfig:
    """Read the configuration of a run of Stage II; its key `from` is the model of Stage I.

    Raises:
        UserError: the file cannot be read, or a key or value in it is wrong; the message names it.
    """
    values = _read(path)
    if "start" in values:
        raise UserError(f"{path}: the key of the model to start from is `from`, got start")
    if "from" not in values:
        raise UserError(f"{path}: needs the key from, the model of Stage I")
    return _build(path, FinetuneConfig, {("start" if k == "from" else k): v for k, v in values.items()})


def _read_with_model(path: Path) -> dict[str, Any]:
    values = _read(path)
    if "model" in values:
        values["model"] = _model(path, values["model"])
    return values


def _read(path: Path) -> dict[str, Any]:
    if not path.exists() and (shipped := RECIPES / f"{path}.yaml").is_file():
        path = shipped
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        names = sorted(file.name.removesuffix(".yaml") for file in RECIPES.glob("*.yaml") if "." not in file.stem)
        raise UserError(
            f"{path}: {error.strerror or error}; give the path of a YAML file or one of {', '.join(names)}"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a mapping of keys to values, got {type(values).__name__}")
    given = values.get("data")
    # Captions may lie beside the file that names them.
    if isinstance(given, dict) and isinstance(given.get("captions"), str):
        beside = path.parent / given["captions"]
        values["data"] = {**given, "captions": str(beside if beside.is_file() else given["captions"])}
    return values


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 3e-4 for text; here it is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _build(path: Path, kind: type, values: dict[str, Any]) -> Any:
    try:
        return build(kind, values)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def _model(path: Path, values: Any) -> Any:
    given = {"preset": values} if isinstance(values, str) else values
    if not isinstance(given, dict) or "preset" not in given:
        return given
    given = dict(given)
    preset = given.pop("preset")
    if preset not in PRESETS:
        raise UserError(f"{path}: model.preset must be one of {sorted(PRESETS)}, got {preset!r}")
    return _merge(PRESETS[preset].to_dict(), given)


def _merge(base: Any, given: Any) -> Any:
    """Put what is given over a preset; an entry of a list without counterpart differs from the last."""
    if isinstance(base, dict) and isinstance(given, dict):
        return {**base, **{k: _merge(base.get(k), v) for k, v in given.items()}}
    if isinstance(given, list) and isinstance(base, (list, tuple)) and base and isinstance(base[0], dict):
        return [_merge(base[min(i, len(base) - 1)], entry) for i, entry in enumerate(given)]
    return given
