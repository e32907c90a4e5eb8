"""Write and read model files, and find the files beside them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from ..checks import shorten
from ..errors import MemoryFormatError
from ..weights import WeightsFile, pack, write_tensors
from .config import ModelConfig
from .diffusers_dit import DiffusersDiT, empty_transformer
from .lora import apply_lora, with_bases
from .memory_model import MemoryModel

FORMAT = "vidmem.model"
VERSION = 1
MODEL_FILE = "model.safetensors"
VAE_FILE = "vae.safetensors"
TRANSFORMER = "transformer"  # folder of the diffusers transformer, if it is beside the model file


def model_path(path: str | Path) -> Path:
    """Path of a model file: the path itself, or model.safetensors in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / MODEL_FILE


def files_of(path: str | Path) -> list[Path]:
    """Files that a model is read from: its own, the base model of its adapters, and the VAE beside them."""
    files = with_bases(model_path(path))
    return [*files, files[-1].with_name(VAE_FILE)]


def save_model(
    path: str | Path, model: MemoryModel, extra: dict[str, Any] | None = None, *, dtype: str = "float32"
) -> Path:
    """Write a model and its configuration to a safetensors file; an error leaves an existing file unchanged.

    Args:
        path: File *.safetensors, or a folder for model.safetensors, which is made if it is missing.
        model: Model to write. A pretrained text encoder and the weights of a diffusers transformer are left out.
        extra: Further JSON values for the header.
        dtype: Storage format of the weights, see `weights.pack`.

    Returns:
        Path of the file.

    Raises:
        UserError: The file cannot be written.
        ValueError: The model has adapters (call merge_lora first), or the weights do not fit the dtype.
    """
    file = model_path(path)
    stored = model.stored()
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items() if k in stored}
    adapters = [name for name in tensors if ".lora_" in name]
    if adapters:
        raise ValueError(f"save_model: the model must have no adapters (call merge_lora first), got {adapters[0]}")
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(dataclasses.replace(model.config, dit=model.dit.config).to_dict()),
        "extra": json.dumps(extra or {}),
    }
    write_tensors(file, pack(tensors, dtype), header)
    return file


def load_model(
    path: str | Path, text_path: str | Path | None = None, transformer: nn.Module | None = None
) -> MemoryModel:
    """Load a model in float32 and evaluation mode.

    Args:
        path: Model file, the folder that holds it, or a file of LoRA adapters whose base model is beside it.
        text_path: Folder of the pretrained text encoder; required to encode prompts if the model uses one.
        transformer: Transformer of diffusers, for a model that uses one. By default it is loaded from the folder
            `transformer` beside the file or, without it, from the folder that the model was trained with.

    Returns:
        The model. Its attribute `extra` holds what `save_model` stored, `vae_weights` the path of vae.safetensors in
        the same folder, or None.

    Raises:
        UserError: The file, the text encoder or the transformer is missing.
        MemoryFormatError: The file is damaged, not a model file, or of another version.
    """
    file, *bases = with_bases(model_path(path))
    if bases:
        model = load_model(bases[0], text_path, transformer)
        model.extra = apply_lora(file, model)
        return model
    weights = WeightsFile(file, FORMAT, VERSION)
    try:
        config, extra = ModelConfig.from_dict(weights.json("config")), weights.json("extra")
        if config.dit.diffusers is not None and (beside := file.with_name(TRANSFORMER)).is_dir():
            config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, diffusers=str(beside)))
        blocks = (
            config.dit.depth if config.dit.diffusers is None else 1
        )  # blocks of a diffusers transformer are not in the file
        weights.check(
            lambda: MemoryModel(config, transformer=empty_transformer(config.dit, transformer)),
            blocks,
            MemoryModel.stored,
        )
    except (KeyError, ValueError) as error:
        raise MemoryFormatError(f"{file}: its header is damaged ({shorten(error)})") from error
    tensors = weights.read()
    model = MemoryModel(config, text_path, transformer)
    model.load_state_dict(tensors, strict=False)  # weights of pretrained parts are not in the file
    if isinstance(model.dit, DiffusersDiT):
        model.dit.add_updates()
    vae = file.parent / VAE_FILE
    model.extra, model.vae_weights = extra, vae if vae.is_file() else None
    return model.eval()
