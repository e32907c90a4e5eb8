"""The content of the golden files as plain values: golden/write.py recorded them, test_golden.py recomputes them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from paths import GOLDEN
from torch.distributed.checkpoint import FileSystemReader

from vidmem_kernels import MemoryBank
from vidmem_model import shipped
from vidmem_model.memory import learned
from vidmem_model.memory.file import read_memory
from vidmem_model.model.encoder import History
from vidmem_model.model.file import load_model
from vidmem_model.train import checkpoint
from vidmem_model.train.recipe import read_finetune, read_pretrain, read_pretrain_vae

BANKS = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
MEMORIES = tuple(f"{m}-{d}" for m in ("dct", "merge", "learned") for d in ("float32", "float16", "int8", "float8"))
FRAME = 6  # is read back from every memory
# The preset in int8, adapters that name it, and in float16 a small model with all that the preset does without.
MODELS = ("tiny", "tiny_continue", "small")
# Recipes with every key, and what reads them.
RECIPES = {"pretrain_vae": read_pretrain_vae, "pretrain": read_pretrain, "finetune": read_finetune}
# Runs stopped in the middle, and what they leave in the end; each needs the result of the one before.
RUNS = {"vae": "vae.safetensors", "one": "model.safetensors", "two": "lora.safetensors"}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        whole.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def plain(value: Any) -> Any:
    """What JSON gives back for a configuration."""
    value = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
    return json.loads(json.dumps(value))


def wave(*shape: int) -> torch.Tensor:
    """Numbers in [-1, 1] that need no random generator."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + 0.3).float().view(shape)


def of_bank(bank: MemoryBank) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Values of a bank that are one thing to the bit, and those that are sums."""
    values, index = bank.topk(wave(3, bank.channels), 5)
    some = torch.tensor([[3, -1, 0], [len(bank) - 1, 3, 3]])
    exact = {
        "rows": bank.gather(torch.arange(len(bank)), out_dtype=torch.float32),
        "positions": bank.positions.clone(),
        "gathered": bank.gather(some),
        "topk_index": index,
    }
    return exact | {f"extras.{name}": tensor for name, tensor in bank.extras.items()}, {"topk": values}


def of_memory(path: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """What a memory file says of its clip, with digests of what it stores, and a frame read back from it."""
    memory = read_memory(path)
    about = {name: getattr(memory, name) for name in ("method", "frames", "height", "width", "fps", "source")}
    exact, _ = of_bank(memory.bank)
    kept = {name: digest({name: exact[name]}) for name in exact if name.startswith(("rows", "positions", "extras."))}
    return {**about, "stored": kept}, memory.retrieve(FRAME)


def use_golden_models(monkeypatch: Any) -> None:
    """Learned memories name the model `one` of the finished runs, as one that comes with the package."""
    monkeypatch.setattr(shipped, "CHECKPOINTS", GOLDEN / "training" / "finished")
    learned.open_model.cache_clear()


@torch.no_grad()
def of_model(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], str]:
    """What a model's file says of it, what it makes of fixed inputs, and the digest of its weights."""
    model = load_model(path)
    channels, (rows, columns) = model.config.vae.channels, model.config.latent_size
    lows = [
        wave(2, channels, 4 // t, rows // h, columns // w) if each.reads_low else None
        for each in model.config.encoders
        for t, h, w in [each.compression]
    ]
    memory = model.remember(History(1.5 * wave(2, channels, 4, rows, columns), lows))
    velocity = model.predict(
        2.0 * wave(2, channels, 2, rows, columns),
        torch.tensor([0.25, 0.75]),
        ["a red disc", ""],
        memory=memory,
        frames=torch.tensor([[1.0, 3.0], [4.0, 5.0]]),
        window=wave(2, channels, 1, rows, columns),
        window_frames=torch.tensor([[3.0], [3.0]]),
    )
    about = {"config": plain(model.config), "extra": model.extra}
    made = {"memory": memory.tokens, "positions": memory.positions, "velocity": velocity}
    return about, made, digest(model.state_dict())


def of_checkpoint(path: Path) -> str:
    """Digest of all tensors of a run's checkpoint."""
    stored = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {name: torch.empty(each.size, dtype=each.properties.dtype) for name, each in stored.items()}
    checkpoint.load(path, state)
    return digest(state)


def copy_of_training(folder: Path) -> Path:
    """A copy of the training folder with the stopped runs in it; paths in its recipes are from there."""
    copy = shutil.copytree(GOLDEN / "training", folder / "training")
    for name in RUNS:
        shutil.unpack_archive(copy / f"{name}.zip", copy)
    return copy


def curve(folder: Path) -> list[list[float]]:
    """Rows of a run's curve, without the seconds."""
    return [[float(n) for n in line.split(",")[:-1]] for line in (folder / "curve.csv").read_text().splitlines()[1:]]
