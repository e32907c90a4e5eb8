"""Read training recipes, the YAML files of `vidmem pretrain-vae`, `vidmem pretrain` and `vidmem finetune`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from .. import yaml_file
from ..checks import FieldError, build, former_names, renewed, show
from ..errors import UserError
from ..model.config import PRESETS, ModelConfig
from ..model.diffusers_dit import dit_fields
from .continuation import FinetuneConfig
from .retrieval import PretrainConfig
from .vae import PretrainVAEConfig

# Recipes of the shipped checkpoints; users give their names without folder and suffix.
RECIPES = Path(__file__).parents[1] / "recipes"


def read_pretrain(path: Path) -> PretrainConfig:
    """Read a recipe of Stage I.

    `model` is the name of a preset, or a mapping whose key `preset` names one and whose other keys replace its fields.
    Entries of `encoders` replace fields of the preset's encoders at the same index.

    Former names of fields are accepted with a DeprecationWarning.

    Args:
        path: The YAML file, or the name of a shipped recipe.

    Returns:
        The configuration.

    Raises:
        UserError: The file cannot be read, or a key or value in it is wrong; the message is "file:line: key …".
    """
    return _Recipe(path).build(PretrainConfig)


def read_pretrain_vae(path: Path) -> PretrainVAEConfig:
    """Read a recipe of the VAE; `model` is as for `read_pretrain`.

    Args:
        path: The YAML file, or the name of a shipped recipe.

    Returns:
        The configuration.

    Raises:
        UserError: The file cannot be read, or a key or value in it is wrong; the message is "file:line: key …".
    """
    return _Recipe(path).build(PretrainVAEConfig)


def read_finetune(path: Path) -> FinetuneConfig:
    """Read a recipe of Stage II; its key `from` is the model of Stage I.

    Args:
        path: The YAML file, or the name of a shipped recipe.

    Returns:
        The configuration.

    Raises:
        UserError: The file cannot be read, or a key or value in it is wrong; the message is "file:line: key …".
    """
    recipe = _Recipe(path)
    if "start" in recipe.values:
        raise recipe.error("start", "the key of the Stage I model is `from`, got start")
    if "from" not in recipe.values:
        raise recipe.error("", "the key `from` is missing; set it to the model of Stage I")
    return recipe.build(FinetuneConfig, {"start": "from"})


class _Recipe:
    """A YAML file of settings, with the line of each."""

    def __init__(self, path: Path) -> None:
        if not path.exists() and (shipped := RECIPES / f"{path}.yaml").is_file():
            path = shipped
        self.path = path
        try:
            values, self.lines = yaml_file.load(yaml_file.read_text(path), str(path))
        except OSError as error:
            names = sorted(file.name.removesuffix(".yaml") for file in RECIPES.glob("*.yaml") if "." not in file.stem)
            raise UserError(
                f"{path}: {error.strerror or error}; "
                f"give the path of a YAML file or a shipped recipe: {', '.join(names)}"
            ) from error
        if not isinstance(values, dict):
            raise UserError(f"{path}: must be a mapping of keys to values, got {type(values).__name__}")
        self.values: dict[str, Any] = values
        given = values.get("data")
        # A relative path of captions is looked for beside the recipe first.
        if isinstance(given, dict) and isinstance(given.get("captions"), str):
            beside = path.parent / given["captions"]
            values["data"] = {**given, "captions": str(beside if _is_file(beside) else given["captions"])}

    def error(self, place: str, what: str) -> UserError:
        """The error of a key, with its line or that of the innermost enclosing key in the file."""
        while place and place not in self.lines:
            place = place[: max(place.rfind("."), place.rfind("["), 0)]
        return UserError(f"{self.path}:{self.lines.get(place, 1)}: {what}")

    def build(self, kind: type, called: dict[str, str] | None = None) -> Any:
        """Build the configuration; `called` maps fields to their keys in the file where these differ."""
        called = called or {}
        values = dict(self.values)
        for place, name in former_names(kind, values):
            key = place.rpartition(".")[2]
            line = f"{self.path}:{self.lines.get(place, 1)}"
            what = f"rename it to {name}" if name else "remove it"
            warnings.warn(f"{line}: {place}: {key} is deprecated; {what}", DeprecationWarning, stacklevel=3)
        for field, key in called.items():
            values[field] = values.pop(key)
        if "model" in values:
            values["model"] = self.model(values["model"])
        try:
            return build(kind, values)
        except FieldError as error:
            place = called.get(error.place, error.place)
            raise self.error(place, str(error).replace(error.place, place, 1)) from error

    def model(self, values: Any) -> Any:
        """The fields of a model, including those of its preset."""
        given = {"preset": values} if isinstance(values, str) else self.with_transformer(values)
        if not isinstance(given, dict) or "preset" not in given:
            return given
        given = dict(given)
        preset = given.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise self.error("model.preset", f"model.preset must be one of {sorted(PRESETS)}, got {show(preset)}")
        try:
            return _merge(PRESETS[preset].to_dict(), renewed(ModelConfig, given, "model"))
        except FieldError as error:
            raise self.error(error.place, str(error)) from error

    def with_transformer(self, values: Any) -> Any:
        """The fields of a model, including the sizes of the diffusers transformer in `dit.diffusers`."""
        dit = values.get("dit") if isinstance(values, dict) else None
        folder = dit.get("diffusers") if isinstance(dit, dict) else None
        if not isinstance(folder, str):
            return values
        try:
            sizes = dit_fields(folder)
        except UserError as error:
            raise self.error("model.dit.diffusers", f"model.dit.diffusers: {error}") from error
        for key in ("dim", "depth", "heads", "mlp"):
            if dit.get(key, sizes[key]) != sizes[key]:
                what = f"must be {show(sizes[key])} as in {folder}, got {show(dit[key])}; leave it out"
                raise self.error(f"model.dit.{key}", f"model.dit.{key} {what}")
        return {**values, "dit": {**sizes, **dit}}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # an invalid file name
        return False


def _merge(base: Any, given: Any) -> Any:
    """Replace fields of a preset; a list entry beyond those of the preset replaces fields of its last entry."""
    if isinstance(base, dict) and isinstance(given, dict):
        return {**base, **{k: _merge(base.get(k), v) for k, v in given.items()}}
    if isinstance(given, list) and isinstance(base, (list, tuple)) and base and isinstance(base[0], dict):
        return [_merge(base[min(i, len(base) - 1)], entry) for i, entry in enumerate(given)]
    return given
