"""Reads and writes the file of a memory attention: safetensors with its configuration and a checksum in the header."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import files
from ..modules import MemoryCrossAttention
from ..sparse_gather.memory_file import MemoryFileError

_KEY = "vidmem.memory_attention"
_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """The requirements on a model, and the configuration of its readers.

    Attributes:
        family: name of the model's `Family`.
        dim: channels of the model's tokens.
        memory_dim: channels of the memory tokens.
        num_heads: number of heads.
        rope: whether the readers use positions.
        blocks: names of the blocks that read.
    """

    family: str
    dim: int
    memory_dim: int
    num_heads: int
    rope: bool
    blocks: list[str]


def _checksum(weights: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {weights[name].dtype} {tuple(weights[name].shape)}".encode())
        digest.update(memoryview(weights[name].reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def write(path: str | os.PathLike[str], config: Config, weights: Mapping[str, Tensor]) -> None:
    """Replaces the file at `path` atomically.

    Raises:
        OSError: the folder is missing, full or not writable.
    """
    target = files.target_of(path)
    weights = {name: x.detach().cpu().contiguous() for name, x in weights.items()}
    header = {"version": _VERSION, "checksum": _checksum(weights), "config": dataclasses.asdict(config)}
    content = safetensors.torch.save(weights, {_KEY: json.dumps(header)})
    with files.temporary_file(target) as (temporary, file):
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        files.put(temporary, target)
    files.sync(target.parent)


def read(op: str, path: str | os.PathLike[str]) -> tuple[Config, dict[str, Tensor]]:
    """Reads the configuration and the weights, which must match the configuration.

    Raises:
        MemoryFileError: the file is not a memory adapter, or is damaged.
        OSError: the file cannot be read.
    """
    with open(path, "rb"):  # raises the usual OSError if the file is missing or a folder
        pass
    path = os.fspath(path)
    try:
        with safe_open(path, "pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            if header is None:
                raise MemoryFileError(
                    f"{op}: {path} is not a memory adapter; give a file that MemoryAttention.save wrote"
                )
            header = json.loads(header)
            if header["version"] != _VERSION:
                raise MemoryFileError(
                    f"{op}: {path} is of version {header['version']}, this vidmem_kernels reads version {_VERSION}; "
                    "install the vidmem_kernels that wrote it"
                )
            config = Config(**header["config"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise MemoryFileError(f"{op}: {path} is damaged ({error}); write it again") from error
    if _checksum(weights) != header["checksum"] or _shapes(weights) != _expected(config):
        raise MemoryFileError(f"{op}: {path} is damaged (its checksum does not match its content); write it again")
    return config, weights


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: x.shape for name, x in weights.items()}


def _expected(config: Config) -> dict[str, torch.Size]:
    reader = MemoryCrossAttention(config.dim, config.num_heads, memory_dim=config.memory_dim, device="meta")
    return {f"{block}.{key}": x.shape for block in config.blocks for key, x in reader.state_dict().items()}
