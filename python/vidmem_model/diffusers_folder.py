"""Folders that diffusers' save_pretrained wrote: what is in them, and the class that reads it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def part_folder(folder: Path, part: str) -> Path:
    """The folder itself, or the part's in a whole pipeline's folder: that which has a config.json."""
    inside = folder / part
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """The config.json of a model of diffusers.

    Args:
        folder: of the model.
        what: it should be, for the message.

    Raises:
        UserError: it is missing or no such configuration.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{file}: cannot be read ({error.strerror}); give the folder of a {what} of diffusers"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: is not the configuration of a model of diffusers") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: is not the configuration of a model of diffusers")
    return config


def diffusers_class(name: str) -> Any:
    """A class of the package diffusers.

    Raises:
        UserError: diffusers is missing, or has no such class.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(f"{name} needs diffusers: pip install 'vidmem-model[diffusers]' ({error})") from error
    found = getattr(diffusers, name, None)
    if found is None:
        raise UserError(f"diffusers {diffusers.__version__} has no {name}; install a newer one")
    return found


def read_weights(name: str, folder: Path, **given: Any) -> Any:
    """Load a model of diffusers from a folder alone: nothing is fetched.

    Args:
        name: of its class.
        folder: of the model.
        given: to from_pretrained.

    Raises:
        UserError: diffusers is missing, or the weights cannot be read.
    """
    kind = diffusers_class(name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **given)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the weights of {name} cannot be read ({reason})") from error
