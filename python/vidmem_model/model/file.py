"""The file of a model, and the files beside it."""

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
TRANSFORMER = "transformer"  # folder of the transformer of diffusers, if it lies beside a model's file


def model_path(path: str | Path) -> Path:
    """File of a model: the path itself, or model.safetensors in a folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / MODEL_FILE


def files_of(path: str | Path) -> list[Path]:
    """Files that a model is read from: its own, the one that its adapters are added to, and the VAE beside them."""
    files = with_bases(model_path(path))
    return [*files, files[-1].with_name(VAE_FILE)]


def save_model(
    path: str | Path, model: MemoryModel, extra: dict[str, Any] | None = None, *, dtype: str = "float32"
) -> Path:
    """Write a model and its configuration to a safetensors file, whole or not at all.

    Args:
        path: a file *.safetensors, or a folder, made if it is missing, for model.safetensors in it.
        model: what to write; a pretrained text encoder and the weights of a transformer of diffusers are left out.
        extra: anything JSON can hold, to be kept in the header.
        dtype: how the weights are stored, see `weights.pack`.

    Returns:
        The file.

    Raises:
        UserError: the file cannot be written.
        ValueError: the model has adapters (merge_lora first), or the weights cannot be stored so.
    """
    file = model_path(path)
    stored = model.stored()
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items() if k in stored}
    adapters = [name for name in tensors if ".lora_" in name]
    if adapters:
        raise ValueError(f"save_model: the model must have no adapters, merge_lora puts them in, got {adapters[0]}")
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
    """Read a model that save_model wrote, in float32, in evaluation mode.

    Args:
        path: the file, or the folder it is in; or a file of adapters that names the model beside it
            which they are to be added to (lora.attach_lora).
        text_path: folder of the pretrained text encoder, if the model reads prompts with one.
        transformer: of diffusers, for a model that has one; by default that of the folder transformer beside the
            file, and without that the one of the folder that the model was trained with.

    Returns:
        The model; its attribute `extra` is what save_model was given, `vae_weights` the file
        vae.safetensors in the same folder, if there is one.

    Raises:
        UserError: the file, the text encoder or the transformer is missing.
        MemoryFormatError: the file is damaged, not a model, or of another version.
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
        blocks = config.dit.depth if config.dit.diffusers is None else 1  # those of diffusers are not in the file
        weights.check(
            lambda: MemoryModel(config, transformer=empty_transformer(config.dit, transformer)),
            blocks,
            MemoryModel.stored,
        )
    except (KeyError, ValueError) as error:
        raise MemoryFormatError(f"{file}: its header is damaged ({shorten(error)})") from error
    tensors = weights.read()
    model = MemoryModel(config, text_path, transformer)
    model.load_state_dict(tensors, strict=False)  # without those of pretrained parts
    if isinstance(model.dit, DiffusersDiT):
        model.dit.add_updates()
    vae = file.parent / VAE_FILE
    model.extra, model.vae_weights = extra, vae if vae.is_file() else None
    return model.eval()
