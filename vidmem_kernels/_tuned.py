"""Chooses the tile of a Triton kernel: from the tuned table of the GPU's class, or the kernel's default.

A tile is the set of constants that a launch adds to a kernel's arguments: block sizes such as BLOCK_N, and Triton's
num_warps and num_stages. Each kernel has one `Tunable`, which declares what its tile depends on, the default, and the
candidates that `benchmarks/tune.py` times. That command writes tuned/<class>.json; every launch gets its tile from
`Tunable.tile`:

    GATHER = Tunable("_gather_tokens_fwd_kernel", ("dtype", "channels"), default=…, candidates=…)
    tile = GATHER.tile(bank.device, dtype="bf16", channels=bucket(channels))
    _gather_tokens_fwd_kernel[grid](…, BLOCK_K=…, **tile)

This module needs neither Triton nor a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

Tile = dict[str, Any]

FOLDER = Path(__file__).resolve().parent / "tuned"
DEFAULT = "default"
INTERPRETED = 80  # the interpreter uses the defaults of Ampere
# Compute capability -> the class whose table it reads. H100 and H200 (and GH200) are one, and so are B200 and B300.
_CLASSES = {80: "sm80", 86: "sm89", 89: "sm89", 90: "sm90", 100: "sm100", 103: "sm100", 120: "sm120", 121: "sm120"}
TUNABLES: dict[str, Tunable] = {}
_watchers: list[list[tuple[Tunable, dict[str, Any]]]] = []


class Chosen(NamedTuple):
    """The tile of a launch and its origin: `source` is "default" or the name of a table, such as "sm90"."""

    kernel: str
    key: str
    tile: Tile
    source: str

    def __str__(self) -> str:
        tile = " ".join(f"{name}={value}" for name, value in self.tile.items())
        return f"{self.kernel}[{self.key}]: {tile} ({self.source})"


@dataclass(eq=False)
class Tunable:
    """The choice of one kernel's tile.

    Attributes:
        kernel: name of the @triton.jit function.
        fields: what the choice depends on besides the GPU, e.g. ("dtype", "size", "features"). Values are strings,
            numbers or booleans; never a sequence length, which changes from call to call.
        default: `default(arch, **fields)` returns the tile if no table has one; `arch` is a number such as 90.
        candidates: `candidates(arch, **fields)` returns the tiles that tuning tries besides the default.
    """

    kernel: str
    fields: tuple[str, ...]
    default: Callable[..., Tile]
    candidates: Callable[..., Sequence[Tile]]
    _forced: list[Tile] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.kernel in TUNABLES:
            raise ValueError(f"{self.kernel}: must have one Tunable, got another")
        TUNABLES[self.kernel] = self
        self._chosen = cache(self._choose)

    def tile(self, device: torch.device, **fields: Any) -> Tile:
        """The tile of a launch on `device`."""
        for asked in _watchers:
            asked.append((self, fields))
        if self._forced:
            return self._forced[-1]
        return self._chosen(arch_of(device), **fields).tile

    def chosen(self, device: torch.device, **fields: Any) -> Chosen:
        """The tile of a launch on `device`, and its origin."""
        return self._chosen(arch_of(device), **fields)

    def shipped(self, arch: int, **fields: Any) -> list[Tile]:
        """Every tile that a launch on `arch` may use as shipped: the default, and the table's if there is one."""
        chosen = self._chosen(arch, **fields).tile
        default = self.default(arch, **fields)
        return [default] if chosen == default else [default, chosen]

    def key(self, **fields: Any) -> str:
        """The key of a table entry, such as "bf16 128 bias"."""
        if set(fields) != set(self.fields):
            raise TypeError(f"{self.kernel}: fields must be {', '.join(self.fields)}, got {', '.join(fields)}")
        return " ".join(str(fields[name]) for name in self.fields if fields[name] != "")

    @contextmanager
    def forced(self, tile: Tile) -> Iterator[None]:
        """Makes every launch of the kernel use `tile`, for tuning and for tests of all candidates."""
        self._forced.append(tile)
        try:
            yield
        finally:
            self._forced.pop()

    def _choose(self, arch: int, **fields: Any) -> Chosen:
        key = self.key(**fields)
        name = _CLASSES.get(arch)
        tile = table(name).get(self.kernel, {}).get(key, {}).get("tile") if name else None
        default = self.default(arch, **fields)
        if tile is None:
            return Chosen(self.kernel, key, default, DEFAULT)
        if tile.keys() != default.keys():  # the kernel's constants changed since tuning
            raise ValueError(
                f"{FOLDER.name}/{name}.json: {self.kernel}[{key}] must have {', '.join(default)}, "
                f"got {', '.join(tile)}; run benchmarks/tune.py again or remove the entry"
            )
        return Chosen(self.kernel, key, tile, name)


@contextmanager
def watching() -> Iterator[list[tuple[Tunable, dict[str, Any]]]]:
    """Records the (Tunable, fields) of every launch inside the `with` block."""
    asked: list[tuple[Tunable, dict[str, Any]]] = []
    _watchers.append(asked)
    try:
        yield asked
    finally:
        _watchers.remove(asked)


@cache
def arch_of(device: torch.device) -> int:
    """Compute capability of a GPU as a number such as 90; that of Ampere for the interpreter."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return INTERPRETED
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def class_of(arch: int) -> str | None:
    """The class of GPUs that shares a table with `arch`, such as "sm90", or None."""
    return _CLASSES.get(arch)


@cache
def document(name: str) -> dict[str, Any]:
    """A table as benchmarks/tune.py wrote it; {} if there is none."""
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(name: str) -> dict[str, dict[str, Any]]:
    """The table of a class of GPUs: kernel -> key -> {"tile": …, "ms": …, "default_ms": …, "call": …, "on": …}.

    The times are those of the whole call, with the tile and with the default; `on` names the GPU, date and Triton
    version.
    """
    return document(name).get("kernels", {})


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in keys: bf16, fp16, fp32, fp64, i8, fp8."""
    return _DTYPES[dtype]


_DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8",
}
