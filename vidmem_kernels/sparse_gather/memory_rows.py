"""The content of a MemoryBank at one moment, and the checks of what may be stored in it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, QUANTIZED_DTYPES, check_tensor, names
from . import memory_file
from .memory_file import Saved
from .memory_mapping import OpenFile, map_tensor, nameless_file, reserve

BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *QUANTIZED_DTYPES)
STORAGES = ("device", "pinned", "mmap")
POSITION_DTYPES = (*FLOAT_DTYPES, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_CHECKED_ELEMENTS = 1 << 22  # elements checked at a time
_EXACT_INTEGERS = 1 << 24  # float32 represents every integer up to here


class StoredRows(NamedTuple):
    """Stored rows with their scales and positions.

    Attributes:
        rows: (M, C) of the bank's dtype; row m dequantises to `rows[m].float() * scale[m]`.
        scale: (M,) float32 for int8 and float8_e4m3fn rows; None otherwise.
        positions: (M, 3) float32.
    """

    rows: Tensor
    scale: Tensor | None
    positions: Tensor


class Held(NamedTuple):
    """The content of a bank as one immutable object, so that a reader that takes it once sees a consistent state.

    An append writes behind `count`, or into new buffers, and then replaces the object.
    """

    count: int
    rows: Tensor  # (capacity, C); this and the next two have room for more than `count` rows
    positions: Tensor
    scale: Tensor | None
    file: OpenFile | None = None  # file that the rows of an "mmap" bank are mapped from
    offset: int = 0  # first byte of the rows in that file
    own: bool = False  # whether an append may write to that file
    working: str | None = None  # name of the file if it is a working file, not a memory file
    saved: Saved | None = None  # memory file with exactly these rows

    def trimmed(self) -> Held:
        """The same rows without spare capacity: an append has to allocate new buffers."""
        scale = None if self.scale is None else self.scale[: self.count]
        return self._replace(
            rows=self.rows[: self.count], positions=self.positions[: self.count], scale=scale, own=False
        )

    def copied(self, capacity: int, storage: str, rows: bool = True) -> Held:
        """A copy in new memory with room for `capacity` rows; without the rows themselves if `rows` is False."""

        def copy(old: Tensor) -> Tensor:
            pinned = storage == "pinned" and old.device.type == "cpu"
            new = torch.empty(capacity, *old.shape[1:], dtype=old.dtype, device=old.device, pin_memory=pinned)
            new[: self.count].copy_(old[: self.count])
            return new

        # A tensor created in inference mode could not be appended to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._replace(
                rows=copy(self.rows) if rows else self.rows,
                positions=copy(self.positions),
                scale=None if self.scale is None else copy(self.scale),
            )

    def grown(self, capacity: int, storage: str, folder: Path | None) -> Held:
        """A writable version with room for `capacity` rows."""
        if storage != "mmap":
            return self.copied(capacity, storage)
        held = self.copied(capacity, storage, rows=False)
        # A memory file, or the file of another bank, must not change: its rows go to an unnamed file next to it.
        file = self.file if self.own else nameless_file(folder)
        shape = (capacity, self.rows.shape[1])
        reserve(file, math.prod(shape) * self.rows.element_size())
        with torch.inference_mode(False), torch.no_grad():
            rows = map_tensor(file, 0, shape, self.rows.dtype, writable=True)
            if self.own:
                return held._replace(rows=rows)
            rows[: self.count].copy_(self.rows[: self.count])
        return held._replace(rows=rows, file=file, offset=0, own=True, working=None)

    def remapped(self) -> Held:
        """A version without spare capacity: mapped rows get their own mapping, other rows are copied."""
        held = self.copied(self.count, "mmap", rows=False)
        shape = (self.count, self.rows.shape[1])
        file = OpenFile(os.dup(self.file.fileno()))
        return held._replace(
            rows=map_tensor(file, self.offset, shape, self.rows.dtype, writable=False), file=file, own=False
        )

    def placed(self, device: torch.device, storage: str) -> Held:
        """A version with every part on the device that the storage asks for."""
        host = device if storage == "device" else torch.device("cpu")
        rows, scale = self.rows.to(host), None if self.scale is None else self.scale.to(host)
        if storage == "pinned":  # CUDA reads rows in place only if their scales are pinned too
            rows, scale = rows.pin_memory(), None if scale is None else scale.pin_memory()
        return self._replace(rows=rows, positions=self.positions.to(device), scale=scale)


def check_storage(op: str, storage: object) -> None:
    if storage not in STORAGES:
        raise ValueError(f"{op}: storage must be {', '.join(STORAGES[:-1])} or {STORAGES[-1]}, got {storage!r}")
    if storage == "pinned" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: storage 'pinned' requires a CUDA device, got none")


def check_no_gradient(op: str, what: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise ValueError(
            f"{op}: {what} must not require a gradient, which the bank does not keep; "
            "detach them or use torch.no_grad()"
        )


def check_parts(op: str, rows: object, positions: object, scale: object) -> None:
    """Checks the shapes and dtypes of rows, positions and scale, without reading their values."""
    check_tensor(op, "rows", rows, "M, C", BANK_DTYPES)
    if rows.shape[1] < 1:
        raise ValueError(f"{op}: rows must have at least 1 channel, got shape {tuple(rows.shape)}")
    check_tensor(op, "positions", positions, "M, 3", POSITION_DTYPES)
    if positions.shape != (rows.shape[0], 3):
        raise ValueError(f"{op}: positions must have shape {(rows.shape[0], 3)}, got {tuple(positions.shape)}")
    if (scale is not None) != (rows.dtype in QUANTIZED_DTYPES):
        raise TypeError(
            f"{op}: scale is required for {names(QUANTIZED_DTYPES)} rows and not allowed for others, "
            f"got {names([rows.dtype])} rows and {'no' if scale is None else 'a'} scale"
        )
    if scale is not None:
        check_tensor(op, "scale", scale, "M", FLOAT_DTYPES)
        if scale.shape != rows.shape[:1]:
            raise ValueError(f"{op}: scale must have shape {(rows.shape[0],)}, got {tuple(scale.shape)}")


def _rows_not_finite(tensor: Tensor) -> int:
    """The number of rows of a (M, C) tensor with a NaN or an infinity."""
    if not tensor.dtype.is_floating_point:
        return 0
    step = max(1, _CHECKED_ELEMENTS // tensor.shape[1])
    pieces = (tensor[start : start + step].to(torch.float32) for start in range(0, tensor.shape[0], step))
    return sum(len(piece) - int(piece.isfinite().all(dim=1).sum()) for piece in pieces)


def checked_values(op: str, rows: Tensor, positions: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Checks the values of rows, positions and scale; returns positions and scale in float32."""
    placed = positions.to(torch.float32)
    if not positions.dtype.is_floating_point and positions.numel():
        low, high = (int(end) for end in positions.to(torch.int64).aminmax())
        if low < -_EXACT_INTEGERS or high > _EXACT_INTEGERS:
            raise ValueError(
                f"{op}: positions must be in [{-_EXACT_INTEGERS}, {_EXACT_INTEGERS}] where they are integers, which "
                f"float32 then holds exactly, got {low if low < -_EXACT_INTEGERS else high}"
            )
    factor = None if scale is None else scale.to(torch.float32)
    parts = {"rows": rows, "positions": placed, "scale": None if factor is None else factor.unsqueeze(1)}
    for name, tensor in parts.items():
        wrong = 0 if tensor is None else _rows_not_finite(tensor)
        if wrong:
            raise ValueError(f"{op}: {name} must be finite, got {wrong} rows that are not")
    return placed, factor


def is_bank(rows: Tensor | None, positions: Tensor | None, scale: Tensor | None) -> bool:
    """Whether the tensors have exactly the shapes and dtypes that a memory file stores."""
    try:
        check_parts("", rows, positions, scale)
    except (TypeError, ValueError):
        return False
    return positions.dtype == torch.float32 and (scale is None or scale.dtype == torch.float32)


def check_metadata(op: str, metadata: object) -> None:
    if not isinstance(metadata, Mapping):
        raise TypeError(f"{op}: metadata must be a dict of str, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{op}: metadata must be a dict of str to str, got {key!r}: {value!r}")
        if key.startswith(memory_file.RESERVED):
            raise ValueError(f"{op}: metadata must not have keys that start with {memory_file.RESERVED!r}, got {key!r}")


def check_extras(op: str, extras: object) -> None:
    if not isinstance(extras, Mapping):
        raise TypeError(f"{op}: extras must be a dict of tensors, got {type(extras).__name__}")
    for name, tensor in extras.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: extras must be a dict of str to tensor, got {name!r}: {type(tensor).__name__}")
        if tensor.dtype not in memory_file.DTYPES or tensor.layout != torch.strided:
            raise TypeError(
                f"{op}: extras must be dense and {names(memory_file.DTYPES)}, got {names([tensor.dtype])} "
                f"({tensor.layout}) for {name!r}"
            )
