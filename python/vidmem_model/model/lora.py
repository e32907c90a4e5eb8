"""LoRA adapters (arXiv 2106.09685) for the linear layers of the DiT, with the package peft.

The weights of a pretrained diffusers transformer stay in its folder; `diffusers_dit` records the updates to them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from ..checks import Checked, Text, build, positive, require, shorten, show
from ..errors import MemoryFormatError, UserError
from ..weights import WeightsFile, pack, write_tensors

if TYPE_CHECKING:
    from .dit import DiT
    from .memory_model import MemoryModel

FORMAT = "vidmem.lora"
VERSION = 1
LORA_FILE = "lora.safetensors"
MOST_RANK = 16_384
_MARKS = (".lora_A.", ".lora_B.")


def add_lora(model: MemoryModel | DiT, rank: int, alpha: float | None = None) -> list[str]:
    """Add adapters to the linear layers of the DiT: y = base(x) + alpha / rank * B(A(x)).

    B is initialised to zero, so that the model is unchanged at first. The weights of the DiT are frozen. Memory
    encoders, text encoder, and parameters added to a pretrained transformer are not changed. Adapters go to all linear
    layers of the DiT, or to those in the blocks of a pretrained transformer.

    Args:
        model: A MemoryModel, or its DiT.
        rank: Rank of the adapters.
        alpha: Strength of the adapters; by default the rank, which gives a factor of 1.

    Returns:
        Names of the layers in the DiT.

    Raises:
        UserError: peft is not installed.
        ValueError: `rank` is not positive, or the model already has adapters.
    """
    peft = _peft()
    dit = _dit(model)
    if rank < 1:
        raise ValueError(f"add_lora: rank must be positive, got {rank}")
    if _adapters(dit):
        raise ValueError(f"add_lora: the model must have no adapters, got {_adapters(dit)[0]}; merge_lora first")
    names = dit.lora_layers()
    alpha = rank if alpha is None else alpha
    added = dit.added()
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, init_lora_weights=True)
    peft.inject_adapter_in_model(config, dit)
    for name, parameter in dit.named_parameters():
        parameter.requires_grad_(_is_adapter(name))
    for parameter in added:
        parameter.requires_grad_(True)
    return names


def merge_lora(model: MemoryModel | DiT) -> None:
    """Merge the adapters into the weights of their layers and remove them; the model's output stays the same.

    The weights of the DiT stay frozen: call `model.dit.requires_grad_(True)` to train them.

    Args:
        model: A MemoryModel, or its DiT.

    Raises:
        ValueError: The model has no adapters.
    """
    dit = _dit(model)
    for name in _present("merge_lora", dit):
        layer = dit.get_submodule(name)
        layer.merge()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = layer.scaling["default"] * b.detach(), a.detach()
        parent, _, child = name.rpartition(".")
        setattr(dit.get_submodule(parent), child, layer.get_base_layer())
        _note(dit, name, *update)
    del dit.peft_config  # by which peft knows that there are adapters


def lora_state(model: MemoryModel | DiT) -> dict[str, torch.Tensor]:
    """Return the weights of the adapters by their names in the DiT.

    Raises:
        ValueError: The model has no adapters.
    """
    dit = _dit(model)
    _present("lora_state", dit)
    return {name: tensor for name, tensor in dit.state_dict().items() if _is_adapter(name)}


def save_lora(path: str | Path, model: MemoryModel | DiT, extra: dict[str, Any] | None = None) -> None:
    """Write the adapters to a safetensors file; an error leaves an existing file unchanged.

    Args:
        path: File to write.
        model: A MemoryModel, or its DiT, with adapters.
        extra: Further JSON values for the header.

    Raises:
        UserError: The file cannot be written.
        ValueError: The model has no adapters.
    """
    dit = _dit(model)
    state = {name: tensor.detach().cpu() for name, tensor in lora_state(dit).items()}
    layer = dit.get_submodule(_adapters(dit)[0])
    form = {"rank": layer.r["default"], "alpha": layer.lora_alpha["default"]}
    _write(Path(path), state, form, extra)


def attach_lora(path: str | Path, output: Path, base: str, dtype: str) -> None:
    """Write adapters to a model file that refers to the base model beside it.

    Args:
        path: File that `save_lora` wrote.
        output: File to write; `file.load_model` reads it.
        base: File name of the base model in the folder of `output`.
        dtype: Storage format of the weights, see `weights.pack`.

    Raises:
        UserError: A file is missing or cannot be written.
        MemoryFormatError: The file is damaged, or not an adapter file.
    """
    state, form, extra = _read(Path(path))
    form = dataclasses.replace(form, base=check_base(base, output))
    _write(output, pack(state, dtype), dataclasses.asdict(form), extra)


def check_base(name: str, output: Path) -> str:
    """Check that the base model of adapters is given by a file name, without a folder, and return it.

    Raises:
        UserError: It is a path, or not a valid file name.
    """
    try:
        return AdapterForm(rank=1, alpha=1.0, base=name).base
    except ValueError as error:
        raise UserError(
            f"--base must be the file name of a model in the folder of {output}, got {show(name)}"
        ) from error


def with_bases(path: Path) -> list[Path]:
    """List a model file and the files of its base models: adapters first, the full model last.

    Raises:
        UserError: A file is missing.
        MemoryFormatError: A file is damaged, or its base model is in another folder or is the file itself.
    """
    files = [path]
    while (base := base_of(files[-1])) is not None:
        if base in files:
            raise MemoryFormatError(f"{path}: names itself as its base model; export the adapters again with --base")
        files.append(base)
    return files


def base_of(path: Path) -> Path | None:
    """Path of the base model of an adapter file; None if it names none, or is not an adapter file.

    Raises:
        UserError: The file is missing.
        MemoryFormatError: The file is damaged.
    """
    weights = WeightsFile(path, advice="; give a model file, or a folder with model.safetensors")
    if weights.header.get("format") != FORMAT:
        return None
    name = _form(weights).base
    return None if name is None else path.parent / name


@torch.no_grad()
def apply_lora(path: str | Path, model: MemoryModel | DiT) -> dict[str, Any]:
    """Merge the adapters of a file into the weights of a model; the package peft is not needed.

    Args:
        path: File that `save_lora` or `attach_lora` wrote.
        model: A MemoryModel, or its DiT, of the sizes of the adapters.

    Returns:
        The `extra` values of `save_lora`.

    Raises:
        UserError: The file is missing.
        MemoryFormatError: The file is damaged, not an adapter file, or does not fit the model.
    """
    file, dit = Path(path), _dit(model)
    state, form, extra = _read(file)
    first, second = (f"{mark}default.weight" for mark in _MARKS)
    weights = dict(dit.named_parameters())
    names = [name.removesuffix(first) for name in state if name.endswith(first)]
    expected = {}
    for name in names:
        out, inside = weights[f"{name}.weight"].shape if f"{name}.weight" in weights else (0, 0)
        expected |= {name + first: (form.rank, inside), name + second: (out, form.rank)}
    if {name: tuple(tensor.shape) for name, tensor in state.items()} != expected:
        raise MemoryFormatError(f"{file}: its adapters are for a model of other sizes; give the adapters of this model")
    for name in names:
        b, a = form.alpha / form.rank * state[name + second], state[name + first]
        weights[f"{name}.weight"] += b @ a
        _note(dit, name, b, a)
    return extra


def _write(file: Path, state: dict[str, torch.Tensor], form: dict[str, Any], extra: dict[str, Any] | None) -> None:
    header = {"lora": json.dumps(form), "extra": json.dumps(extra or {})}
    write_tensors(file, state, {"format": FORMAT, "version": str(VERSION), **header})


@dataclass(frozen=True)
class AdapterForm(Checked):
    """Header of an adapter file.

    Args:
        rank: Rank of the adapters.
        alpha: Strength of the adapters, see `add_lora`.
        base: File name of their base model in the same folder, or None.
    """

    rank: Annotated[int, positive(MOST_RANK)]
    alpha: Annotated[float, positive(1e6)]
    base: Annotated[str, Text(255, least=1)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.base
        require(
            name is None or (Path(name).name == name and not name.startswith(".")),
            "AdapterForm: base must be the name of a file in the same folder",
            name,
        )


def _form(weights: WeightsFile) -> AdapterForm:
    try:
        return build(AdapterForm, weights.json("lora"))
    except (KeyError, ValueError) as error:
        raise MemoryFormatError(f"{weights.path}: its header is damaged ({shorten(error)})") from error


def _read(file: Path) -> tuple[dict[str, torch.Tensor], AdapterForm, dict[str, Any]]:
    """Adapters, their header, and the extra values."""
    weights = WeightsFile(file, FORMAT, VERSION)
    form = _form(weights)
    try:
        return weights.read(), form, weights.json("extra")
    except (KeyError, ValueError) as error:
        raise MemoryFormatError(f"{file}: its header is damaged ({shorten(error)})") from error


def _peft():
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA needs the package peft; run: pip install peft") from error
    return peft


def _dit(model: MemoryModel | DiT) -> nn.Module:
    return getattr(model, "dit", model)


def _note(dit: nn.Module, name: str, b: torch.Tensor, a: torch.Tensor) -> None:
    """Record the update of a layer in a transformer whose weights are not stored."""
    if hasattr(dit, "keep_update"):
        dit.keep_update(name, b, a)


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in _MARKS)


def _adapters(dit: nn.Module) -> list[str]:
    return [name for name, layer in dit.named_modules() if hasattr(layer, "lora_A")]


def _present(function: str, dit: nn.Module) -> list[str]:
    names = _adapters(dit)
    if not names:
        raise ValueError(f"{function}: the model must have adapters (call add_lora first), got none")
    return names
