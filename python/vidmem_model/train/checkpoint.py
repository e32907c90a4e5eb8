"""Write and read checkpoints of a training run: everything that the next step depends on."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from ..checks import parse_json, require
from ..errors import MemoryFormatError, UserError
from ..files import reason
from ..weights import WeightsFile, write_tensors
from .distributed import local, sharded_as

_SETTINGS = "settings.json"
_BEGINNING = "beginning.safetensors"
# Classes that torch's metadata of a checkpoint of tensors may contain, by module.
_DESCRIBES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def training_state(
    parameters: dict[str, torch.nn.Parameter], ema: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]
) -> dict[str, torch.Tensor]:
    """Collect the tensors of a run by name: trained weights, their EMA, and the optimizers' moments.

    Moments that AdamW has not allocated yet are allocated here as zeros, so that a checkpoint can be loaded in place.

    Args:
        parameters: Trained weights by name.
        ema: Exponential moving averages of the weights, by the same names.
        optimizers: AdamW and others; each weight has one of them.

    Returns:
        The tensors themselves, not copies; DTensors if the weights are sharded.
    """
    state: dict[str, torch.Tensor] = {}
    owner = {p: each for each in optimizers for group in each.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        moments = owner[parameter].state[parameter]
        if not moments:
            moments["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            moments["exp_avg"] = torch.zeros_like(parameter, requires_grad=False)
            moments["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False)
        state[f"weight.{name}"] = parameter.detach()
        state[f"ema.{name}"] = ema[name]
        state |= {f"{key}.{name}": value for key, value in moments.items()}
    return state


def save(folder: Path, step: int, state: dict[str, torch.Tensor], settings: dict[str, Any], keep: int = 2) -> None:
    """Write a checkpoint and delete all but the last `keep`. Every process of a run calls this.

    Args:
        folder: Folder of the run's checkpoints.
        step: Optimisation steps done.
        state: Tensors from `training_state`.
        settings: Settings, as JSON values, that must be the same when the run is resumed.
        keep: Number of checkpoints to keep.

    Raises:
        UserError: The checkpoint cannot be written.
    """
    alone = not dist.is_initialized()
    need = sum(local(tensor).nbytes for tensor in state.values())
    part, target = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
    first = alone or dist.get_rank() == 0
    try:
        if first:
            clean(folder)
            part.mkdir(parents=True)
            (part / _SETTINGS).write_text(json.dumps(settings))
        _wait()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as `alone` says
            dcp.save(state, storage_writer=dcp.FileSystemWriter(part), no_dist=alone)
        if first:
            shutil.rmtree(target, ignore_errors=True)
            os.rename(part, target)
            for old in _complete(folder)[:-keep]:
                shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, CheckpointException) as error:
        cause = _cause(error, folder, need)
        if first:
            shutil.rmtree(part, ignore_errors=True)
        raise UserError(
            f"{folder}: the checkpoint of step {step} cannot be written ({reason(cause, folder, need)}); "
            "make room and run the same command again, which resumes from the checkpoint before"
        ) from error
    _wait()


def _cause(error: BaseException, folder: Path, need: int) -> OSError:
    """Find the system error behind an error of PyTorch, which keeps some as text only and loses others."""
    each = [error, *(failure[0] for failure in getattr(error, "failures", {}).values())]
    for one in [link for link in each for link in (link, link.__cause__, link.__context__)]:
        if isinstance(one, OSError):
            return one
    if shutil.disk_usage(folder).free < need:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return OSError(errno.EIO, " ".join(str(error).split())[-200:])


def clean(folder: Path, everything: bool = False) -> None:
    """Remove incomplete checkpoints that killed processes left, or all checkpoints."""
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path, ignore_errors=True)
    if everything:
        for path in _complete(folder):
            shutil.rmtree(path)
        (folder / _BEGINNING).unlink(missing_ok=True)


def begin_with(folder: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Prepare a run to resume from weights and a step of another machine, without a checkpoint.

    Args:
        folder: Folder of the run's checkpoints.
        step: Optimisation steps done.
        weights: Trained weights by name.

    Raises:
        UserError: The weights cannot be written.
    """
    write_tensors(folder / _BEGINNING, weights, {"step": str(step)})


def first_step(folder: Path) -> int:
    """Step that was given to `begin_with`, or 0.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / _BEGINNING
    try:
        return int(WeightsFile(path).header["step"]) if path.exists() else 0
    except (MemoryFormatError, KeyError, ValueError) as error:
        raise UserError(f"{path}: cannot be read; give --restart to discard the run and start again") from error


def begin(folder: Path, state: dict[str, torch.Tensor]) -> int:
    """Set the weights of `state` and their EMA to those given to `begin_with`, if there are any.

    Returns:
        The step to resume from; the optimizers have no moments there.

    Raises:
        UserError: The file is damaged, or holds another model.
    """
    path = folder / _BEGINNING
    step = first_step(folder)
    try:
        weights = WeightsFile(path).read() if step else {}
    except MemoryFormatError as error:
        raise UserError(f"{path}: cannot be read; give --restart to discard the run and start again") from error
    given = {f"{key}.{name}": tensor for name, tensor in weights.items() for key in ("weight", "ema")}
    wanted = {name: tensor for name, tensor in state.items() if name.startswith(("weight.", "ema."))}
    if step and {k: v.shape for k, v in given.items()} != {k: v.shape for k, v in wanted.items()}:
        raise UserError(
            f"{path}: holds the weights of another model; give --restart to discard the run and start again"
        )
    for name, tensor in given.items():
        state[name].copy_(sharded_as(tensor.to(state[name].device), state[name]))
    return step


class _Unpickler(pickle.Unpickler):
    """Unpickles only the classes of checkpoint metadata, because a pickle may call any function."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        path = module.split(".")[0] == "pathlib" and name == type(Path()).__name__
        if dtype or path or name in _DESCRIBES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in checkpoint metadata")


class _Reader(dcp.FileSystemReader):
    """Torch's reader with the restricted unpickler for the metadata."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load(path: Path, state: dict[str, torch.Tensor]) -> int:
    """Load a checkpoint into the tensors of `state`, with any number of processes.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: The checkpoint is damaged, or of another model.
    """
    level = logging.root.manager.disable
    logging.disable()  # torch also logs tracebacks of damaged files
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(state, storage_reader=_Reader(path), no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as error:  # CheckpointException derives from BaseException only
        raise UserError(f"{path}: cannot be read; give --restart to discard the run and start again") from error
    finally:
        logging.disable(level)
    return step_of(path)


def newest(folder: Path) -> Path | None:
    """Path of the last complete checkpoint of a run, or None."""
    return next(iter(reversed(_complete(folder))), None)


def step_of(path: Path) -> int:
    """Step of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def settings_of(path: Path) -> dict[str, Any]:
    """Settings that a checkpoint was written with.

    Raises:
        UserError: The file of the settings is damaged.
    """
    try:
        settings = parse_json((path / _SETTINGS).read_text(), "settings")
        require(isinstance(settings, dict), "settings must be a mapping of keys to values", settings)
        return settings
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is damaged; give --restart to discard the run and start again") from error


def _complete(folder: Path) -> list[Path]:
    found = folder.glob("step-*") if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-[0-9]{8,12}", path.name)), key=step_of)


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
