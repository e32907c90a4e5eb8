"""MemoryBank: an append-only store of token rows and their positions, on device, in pinned memory or on disk."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, INDEX_DTYPES, QUANTIZED_DTYPES, check_int, check_tensor, names
from . import memory_file
from .api import gather_tokens, quantize_rows
from .reference import merge_best

BANK_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *QUANTIZED_DTYPES)
STORAGES = ("device", "pinned", "mmap")
_SMALLEST_CAPACITY = 64  # rows of the first allocation, so that single appends do not reallocate at once
_SCORED_ELEMENTS = 1 << 22  # elements of the rows that `topk` widens to float32 at a time


def _check_storage(op: str, storage: object) -> None:
    if storage not in STORAGES:
        raise ValueError(f"{op}: storage must be {', '.join(STORAGES[:-1])} or {STORAGES[-1]}, got {storage!r}")
    if storage == "pinned" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: storage 'pinned' must have a CUDA device to pin memory for, got none")


class MemoryBank:
    """An append-only store of tokens (M, C) and their positions (M, 3).

    Args:
        channels: C, at least 1.
        dtype: what rows are stored as: float32, bfloat16, float16, or int8 and float8_e4m3fn, which are quantised
            with one scale a row (see `quantize_rows`).
        device: where rows ("device") and positions lie. The rows of the two other storages lie on the host.
        storage: "device"; "pinned", host memory that CUDA gathers read in place; or "mmap", a file on disk of which
            only the rows that are asked for are read.
        path: for "mmap", the working file that holds the rows, which must not exist yet. It is not a memory file and
            is not removed; `save` writes one that `load` reads.
        capacity: rows to make room for at once. Room is doubled whenever it is used up.

    Attributes:
        metadata: dict[str, str] that `save` writes and `load` reads.
        extras: dict[str, Tensor] likewise.

    Stored values are no part of an autograd graph: `append` refuses tokens that require a gradient, and what `gather`
    and `topk` return requires none. One thread at a time may append.

    Raises:
        ValueError, TypeError: arguments that do not fit.
        RuntimeError: "pinned" without a CUDA device.
        FileExistsError: `path` exists.

    Example:
        >>> bank = MemoryBank(3072, dtype=torch.int8)
        >>> bank.append(tokens, positions)
        >>> context = bank.gather(index, out_dtype=torch.bfloat16)
    """

    metadata: dict[str, str]
    extras: dict[str, Tensor]

    def __init__(
        self,
        channels: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
        capacity: int = 0,
    ):
        op = "MemoryBank"
        check_int(op, "channels", channels, 1)
        if dtype not in BANK_DTYPES:
            raise TypeError(f"{op}: dtype must be {names(BANK_DTYPES)}, got {dtype}")
        _check_storage(op, storage)
        check_int(op, "capacity", capacity, 0)
        if (path is not None) != (storage == "mmap"):
            raise ValueError(f"{op}: path must be given exactly for storage 'mmap', got {path!r} for {storage!r}")
        self.channels = channels
        self.dtype = dtype
        self.device = torch.device(device)
        self.storage = storage
        self.metadata = {}
        self.extras = {}
        self._count = 0
        self._file: BinaryIO | None = None  # backs the rows of "mmap"
        self._folder: Path | None = None  # where a loaded "mmap" bank makes that file when it is appended to
        self._rows = torch.empty(0, channels, dtype=dtype, device=self._rows_device())
        self._positions = torch.empty(0, 3, dtype=torch.float32, device=self.device)
        self._scale = None
        if dtype in QUANTIZED_DTYPES:
            self._scale = torch.empty(0, dtype=torch.float32, device=self._rows_device())
        if storage == "mmap":
            self._keep_open(open(path, "x+b", buffering=0))  # noqa: SIM115 (lives as long as the bank)
        if capacity:
            try:
                self._grow(capacity)
            except BaseException:
                if path is not None:
                    os.unlink(path)
                raise

    def _keep_open(self, file: BinaryIO) -> None:
        """Makes `file` back the rows until the bank is gone."""
        self._file = file
        weakref.finalize(self, file.close)

    def _rows_device(self) -> torch.device:
        return self.device if self.storage == "device" else torch.device("cpu")

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        dtype = names([self.dtype])
        return f"MemoryBank({len(self)} x {self.channels}, {dtype}, {self.storage} on {self._rows.device})"

    @property
    def positions(self) -> Tensor:
        """(M, 3) float32 positions (t, h, w) on `device`; a view that is not to be written to."""
        return self._positions[: self._count]

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, scales and positions held, without the room kept for more."""
        return self._count * self._bytes_per_row()

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated for rows, scales and positions, on disk for the rows of "mmap"."""
        return self._rows.shape[0] * self._bytes_per_row()

    def _bytes_per_row(self) -> int:
        scale = 0 if self._scale is None else self._scale.element_size()
        return self.channels * self._rows.element_size() + scale + 3 * self._positions.element_size()

    def append(self, tokens: Tensor, positions: Tensor) -> None:
        """Adds rows at the end; either all of them or, on an error, none.

        Args:
            tokens: (K, C) float32, bfloat16, float16 or float64, on any device; rounded to the bank's dtype.
            positions: (K, 3) float32, (t, h, w) of each token, in units of the caller's choice.

        Raises:
            ValueError: shapes that do not fit, a token or position that is NaN or infinite, or a token beyond the
                largest number of the bank's dtype. (The check waits for the GPU where tokens are there.)
            TypeError: no tensors, or of other dtypes.
            OSError: no space left on the disk of an "mmap" bank.
        """
        op = "MemoryBank.append"
        check_tensor(op, "tokens", tokens, "K, C", FLOAT_DTYPES)
        check_tensor(op, "positions", positions, "K, 3", (torch.float32,))
        count = tokens.shape[0]
        if tokens.shape[1] != self.channels:
            raise ValueError(f"{op}: tokens must have {self.channels} channels, got {tokens.shape[1]}")
        if positions.shape != (count, 3):
            raise ValueError(f"{op}: positions must have shape {(count, 3)}, got {tuple(positions.shape)}")
        if torch.is_grad_enabled() and (tokens.requires_grad or positions.requires_grad):
            raise ValueError(
                f"{op}: tokens and positions must not require a gradient, which the bank would not carry; "
                "detach them or use torch.no_grad()"
            )
        if count == 0:
            return
        with torch.no_grad():
            if self._scale is None:
                rows, scale = tokens.to(self.dtype), None
                finite = rows.isfinite().all(dim=1)
            else:
                rows, scale = quantize_rows(tokens.to(torch.float32), self.dtype)
                finite = scale.isfinite()
            if not finite.all():
                largest = torch.finfo(torch.float32 if self._scale is not None else self.dtype).max
                wrong = count - int(finite.sum())
                raise ValueError(
                    f"{op}: tokens must be finite and at most {largest:g} in magnitude, got {wrong} rows that are not"
                )
            finite = positions.isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(f"{op}: positions must be finite, got {count - int(finite.sum())} rows that are not")
            end = self._count + count
            if end > self._rows.shape[0]:
                self._grow(max(end, 2 * self._rows.shape[0], _SMALLEST_CAPACITY))
            self._rows[self._count : end].copy_(rows)
            self._positions[self._count : end].copy_(positions)
            if scale is not None:
                self._scale[self._count : end].copy_(scale)
        self._count = end

    def _grow(self, capacity: int) -> None:
        """Makes room for `capacity` rows; the bank is unchanged if that fails."""
        # A tensor made in inference mode could not be appended to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            positions = self._copied(self._positions, capacity)
            scale = None if self._scale is None else self._copied(self._scale, capacity)
            rows = self._mapped_rows(capacity) if self.storage == "mmap" else self._copied(self._rows, capacity)
        self._rows, self._positions, self._scale = rows, positions, scale

    def _copied(self, old: Tensor, capacity: int) -> Tensor:
        pinned = self.storage == "pinned" and old.device.type == "cpu"
        new = torch.empty(capacity, *old.shape[1:], dtype=old.dtype, device=old.device, pin_memory=pinned)
        new[: self._count].copy_(old[: self._count])
        return new

    def _mapped_rows(self, capacity: int) -> Tensor:
        file = self._file
        if file is None:
            # Loaded from a memory file, which must stay what it is: its rows move to a nameless file beside it.
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115
        # Blocks are taken now: a sparse file on a full disk would kill the process at a later write to memory.
        size = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, capacity * self.channels * self.dtype.itemsize)
        except OSError:
            os.truncate(file.fileno(), size)  # gives back what it got before the disk was full
            raise
        rows = memory_file.map_tensor(file, 0, (capacity, self.channels), self.dtype, writable=True)
        if self._file is None:
            rows[: self._count].copy_(self._rows[: self._count])
            self._keep_open(file)
        return rows

    def gather(self, index: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Reads rows, dequantising them in the same pass; see `gather_tokens`.

        Args:
            index: (K,) or (B, K) int32 or int64; -1 gives a row of zeros. On the device of the rows, or anywhere
                when they lie on the host.
            out_dtype: float dtype of the result; default the bank's, or float32 for int8 and float8_e4m3fn.

        Returns:
            (K, C) or (B, K, C) on the device of `index`; requires no gradient.

        Raises:
            ValueError, TypeError: an index of another shape, dtype or device.
            IndexError: an index outside [-1, M - 1]; see `gather_tokens` for GPUs.
        """
        op = "MemoryBank.gather"
        single = isinstance(index, Tensor) and index.dim() == 1
        check_tensor(op, "index", index.unsqueeze(0) if single else index, "B, K", INDEX_DTYPES)
        scale = None if self._scale is None else self._scale[: self._count].unsqueeze(0)
        out = gather_tokens(
            self._rows[: self._count].unsqueeze(0),
            index.unsqueeze(0) if single else index,
            scale=scale,
            out_dtype=out_dtype,
        )
        return out.squeeze(0) if single else out

    def topk(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the rows whose dot product with each query is largest, computed in float32.

        The scores of all rows are never held at once: rows are read in pieces, from disk too.

        Args:
            query: (Q, C) float32, bfloat16 or float16; on the device of the rows, or anywhere when they lie on the
                host.
            k: rows to find for each query, in [0, M].

        Returns:
            (values (Q, k) float32, index (Q, k) int32), best first, equal ones by ascending index; on the device of
            `query`. A score that is NaN counts as -inf.

        Raises:
            ValueError, TypeError: arguments that do not fit.
        """
        op = "MemoryBank.topk"
        check_tensor(op, "query", query, "Q, C", FLOAT_DTYPES[:3])
        if query.shape[1] != self.channels:
            raise ValueError(f"{op}: query must have {self.channels} channels, got {query.shape[1]}")
        if self._rows.device != query.device and self._rows.device.type != "cpu":
            raise ValueError(f"{op}: query must be on the bank's device, {self._rows.device}, got {query.device}")
        if self._count > torch.iinfo(torch.int32).max:
            raise ValueError(f"{op}: the bank must have at most {torch.iinfo(torch.int32).max} rows, got {self._count}")
        check_int(op, "k", k, 0, self._count)
        values = query.new_empty(query.shape[0], 0, dtype=torch.float32)
        index = query.new_empty(query.shape[0], 0, dtype=torch.int32)
        step = max(1, _SCORED_ELEMENTS // self.channels)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            wanted = query.to(torch.float32)
            for start in range(0, self._count, step):
                end = min(start + step, self._count)
                scores = wanted @ self._rows[start:end].to(query.device).to(torch.float32).T
                if self._scale is not None:
                    scores = scores * self._scale[start:end].to(query.device)
                values, index = merge_best(values, index, scores, start, k)
        return values, index

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the bank to a file (safetensors), whole or not at all.

        The file is written under a temporary name in the same folder, flushed to the disk and renamed, so that `path`
        holds the old content or the new at every moment. An exception or interrupt removes the temporary file. A
        process that is killed leaves it, as ".vidmem-*.tmp"; the next `save` into that folder removes those whose
        writer is gone. The header has a SHA-256 of the whole file.

        Args:
            path: file to create or replace; where it is a symbolic link, what it points to.
            metadata: text entries to store with the bank; default `self.metadata`. Keys that start with "vidmem."
                are taken.
            extras: tensors to store with the bank; default `self.extras`.

        Raises:
            ValueError, TypeError: metadata or extras that cannot be stored.
            OSError: the folder is missing, full or not writable.
        """
        metadata = self.metadata if metadata is None else metadata
        extras = self.extras if extras is None else extras
        _check_metadata(metadata)
        _check_extras(extras)
        tensors = {"rows": self._rows[: self._count], "positions": self.positions}
        if self._scale is not None:
            tensors["scale"] = self._scale[: self._count]
        tensors |= {f"extras.{name}": tensor for name, tensor in extras.items()}
        memory_file.write(Path(path), tensors, metadata)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", storage: str = "device"
    ) -> MemoryBank:
        """Opens a file that `save` wrote, after checking every byte of it against its checksum.

        With storage "mmap" the rows stay in the file and are read when they are asked for; the check reads the file
        through once, without keeping it in memory. The file is never changed: the first `append` copies its rows to a
        nameless file in the same folder, which disappears with the bank. Others must not change a file in place while
        it is mapped; `save` does not, it replaces it.

        Args:
            path: the file.
            device: where rows ("device"), positions and extras go.
            storage: see `MemoryBank`.

        Returns:
            The bank, with `metadata` and `extras` as saved.

        Raises:
            MemoryFileError: the file is foreign, damaged, cut short or of another version.
            FileNotFoundError: there is none; other OSErrors where it cannot be read.
        """
        _check_storage("MemoryBank.load", storage)
        path = Path(path)
        tensors, metadata = memory_file.read(path, "rows", storage)
        rows, positions, scale = tensors.get("rows"), tensors.get("positions"), tensors.get("scale")
        if not _is_bank(rows, positions, scale):
            raise memory_file.foreign(path, "it does not hold the rows of a bank")
        bank = cls.__new__(cls)
        bank.channels, bank.dtype = rows.shape[1], rows.dtype
        bank.device, bank.storage = torch.device(device), storage
        bank.metadata = metadata
        bank.extras = {
            name.removeprefix("extras."): tensor.to(bank.device)
            for name, tensor in tensors.items()
            if name.startswith("extras.")
        }
        bank._count, bank._file, bank._folder = rows.shape[0], None, path.absolute().parent
        bank._rows = rows.to(bank._rows_device())
        bank._positions = positions.to(bank.device)
        bank._scale = None if scale is None else scale.to(bank._rows_device())
        if storage == "pinned" and scale is not None:
            bank._scale = scale.pin_memory()  # CUDA reads rows in place only where their scales are pinned too
        return bank


def _is_bank(rows: Tensor | None, positions: Tensor | None, scale: Tensor | None) -> bool:
    if rows is None or rows.dim() != 2 or rows.shape[1] < 1 or rows.dtype not in BANK_DTYPES:
        return False
    if positions is None or positions.shape != (rows.shape[0], 3) or positions.dtype != torch.float32:
        return False
    if rows.dtype not in QUANTIZED_DTYPES:
        return scale is None
    return scale is not None and scale.shape == rows.shape[:1] and scale.dtype == torch.float32


def _check_metadata(metadata: object) -> None:
    op = "MemoryBank.save"
    if not isinstance(metadata, Mapping):
        raise TypeError(f"{op}: metadata must be a dict of str, got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"{op}: metadata must be a dict of str to str, got {key!r}: {value!r}")
        if key.startswith(memory_file.RESERVED):
            raise ValueError(f"{op}: metadata must not have keys that start with {memory_file.RESERVED!r}, got {key!r}")


def _check_extras(extras: object) -> None:
    op = "MemoryBank.save"
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
