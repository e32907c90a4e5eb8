"""Low-rank adapters (LoRA, arXiv 2106.09685) on the linear layers of the DiT, by the package peft.

A pretrained transformer of diffusers stays in its own folder: `diffusers_dit` keeps what is added to its weights.
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
    """Put an adapter beside linear layers of the DiT: y = base(x) + alpha / rank * B(A(x)).

    B is zero at first, so that the model is unchanged. The DiT's own weights are frozen; what is
    outside the DiT (memory encoders, text encoder), and what was added to a pretrained transformer, is left as it is.
    The layers are all of the DiT, and of a pretrained transformer those in its blocks.

    Args:
        model: a MemoryModel, or its DiT.
        rank: of the adapters.
        alpha: strength; by default the rank, a factor of 1.

    Returns:
        Names of the layers, in the DiT.

    Raises:
        UserError: peft is not installed.
        ValueError: rank is not positive, or there are adapters already.
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
    """Add the adapters to the weights they stand beside, and remove them; the model computes the same.

    The DiT's weights stay frozen as they are: `model.dit.requires_grad_(True)` trains them again.

    Args:
        model: a MemoryModel, or its DiT.

    Raises:
        ValueError: there are no adapters.
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
    del dit.peft_config  # peft's note that there are adapters


def lora_state(model: MemoryModel | DiT) -> dict[str, torch.Tensor]:
    """Weights of the adapters alone, by their names in the DiT.

    Raises:
        ValueError: there are no adapters.
    """
    dit = _dit(model)
    _present("lora_state", dit)
    return {name: tensor for name, tensor in dit.state_dict().items() if _is_adapter(name)}


def save_lora(path: str | Path, model: MemoryModel | DiT, extra: dict[str, Any] | None = None) -> None:
    """Write the adapters alone to a safetensors file, whole or not at all.

    Args:
        path: the file.
        model: a MemoryModel, or its DiT, with adapters.
        extra: anything JSON can hold, to be kept in the header.

    Raises:
        UserError: the file cannot be written.
        ValueError: there are no adapters.
    """
    dit = _dit(model)
    state = {name: tensor.detach().cpu() for name, tensor in lora_state(dit).items()}
    layer = dit.get_submodule(_adapters(dit)[0])
    form = {"rank": layer.r["default"], "alpha": layer.lora_alpha["default"]}
    _write(Path(path), state, form, extra)


def attach_lora(path: str | Path, output: Path, base: str, dtype: str) -> None:
    """Store adapters as a model file of their own, to be added to the model `base` beside it.

    Args:
        path: a file that save_lora wrote.
        output: the new file, which `file.load_model` reads.
        base: name of the model's file, in the folder of `output`.
        dtype: see `weights.pack`.

    Raises:
        UserError: a file is missing or cannot be written.
        MemoryFormatError: the file is damaged or foreign.
    """
    state, form, extra = _read(Path(path))
    form = dataclasses.replace(form, base=check_base(base, output))
    _write(output, pack(state, dtype), dataclasses.asdict(form), extra)


def check_base(name: str, output: Path) -> str:
    """Return the name of a model that adapters are to be added to, if a file beside `output` can have it.

    Raises:
        UserError: it is a path, or no name.
    """
    try:
        return AdapterForm(rank=1, alpha=1.0, base=name).base
    except ValueError as error:
        raise UserError(f"--base must be the name of a model's file beside {output}, got {show(name)}") from error


def with_bases(path: Path) -> list[Path]:
    """A model's file, and the ones that it is to be added to: of adapters first the adapters, the whole model last.

    Raises:
        UserError: a file is missing.
        MemoryFormatError: a file is damaged, or names a model outside of its folder, or itself.
    """
    files = [path]
    while (base := base_of(files[-1])) is not None:
        if base in files:
            raise MemoryFormatError(f"{path}: its adapters are to be added to themselves; export them anew with --base")
        files.append(base)
    return files


def base_of(path: Path) -> Path | None:
    """The model that a file of adapters is to be added to, or None if the file names none or is no such file.

    Raises:
        UserError, MemoryFormatError: as with_bases.
    """
    weights = WeightsFile(path)
    if weights.header.get("format") != FORMAT:
        return None
    name = _form(weights).base
    return None if name is None else path.parent / name


@torch.no_grad()
def apply_lora(path: str | Path, model: MemoryModel | DiT) -> dict[str, Any]:
    """Add the adapters of a file to the weights of a model, without the package peft.

    Args:
        path: a file that save_lora or attach_lora wrote.
        model: a MemoryModel, or its DiT, of the sizes that the adapters were made for.

    Returns:
        What save_lora was given as `extra`.

    Raises:
        UserError: the file is missing.
        MemoryFormatError: the file is damaged, foreign, or its adapters do not fit the model.
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
        raise MemoryFormatError(f"{file}: its adapters are for a model of other sizes")
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
    """Adapters, their form, and what else was kept."""
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
        raise UserError("LoRA needs the package peft: pip install peft") from error
    return peft


def _dit(model: MemoryModel | DiT) -> nn.Module:
    return getattr(model, "dit", model)


def _note(dit: nn.Module, name: str, b: torch.Tensor, a: torch.Tensor) -> None:
    """Have a transformer whose own weights are not stored keep what was added to a layer."""
    if hasattr(dit, "keep_update"):
        dit.keep_update(name, b, a)


def _is_adapter(name: str) -> bool:
    return any(mark in name for mark in _MARKS)


def _adapters(dit: nn.Module) -> list[str]:
    return [name for name, layer in dit.named_modules() if hasattr(layer, "lora_A")]


def _present(function: str, dit: nn.Module) -> list[str]:
    names = _adapters(dit)
    if not names:
        raise ValueError(f"{function}: the model must have adapters, add_lora puts them in, got none")
    return names
