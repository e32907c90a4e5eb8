"""Read folders that diffusers' save_pretrained wrote: configuration, class and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import UserError


def part_folder(folder: Path, part: str) -> Path:
    """The folder itself, or the folder of a part in that of a pipeline: the one with a config.json."""
    inside = folder / part
    return inside if not (folder / "config.json").is_file() and (inside / "config.json").is_file() else folder


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """Read the config.json of a diffusers model.

    Args:
        folder: Folder of the model.
        what: Kind of the model, for messages.

    Returns:
        The configuration.

    Raises:
        UserError: The file is missing or not such a configuration.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give the folder of a diffusers {what}") from error
    except ValueError as error:
        raise UserError(f"{file}: is not the configuration of a diffusers model; give the folder of one") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: is not the configuration of a diffusers model; give the folder of one")
    return config


def diffusers_class(name: str) -> Any:
    """Return a class of the package diffusers.

    Raises:
        UserError: diffusers is not installed, or has no such class.
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
    """Load a diffusers model from a local folder; nothing is downloaded.

    Args:
        name: Name of its class.
        folder: Folder of the model.
        **given: Further arguments of from_pretrained.

    Returns:
        The model.

    Raises:
        UserError: diffusers is not installed, or the weights cannot be read.
    """
    kind = diffusers_class(name)
    try:
        return kind.from_pretrained(folder, local_files_only=True, **given)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: the weights of {name} cannot be read ({reason})") from error
