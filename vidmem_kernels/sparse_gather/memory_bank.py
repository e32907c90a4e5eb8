"""MemoryBank: an append-only store of token rows and their positions, on the device, in pinned memory or on disk."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, INDEX_DTYPES, QUANTIZED_DTYPES, check_int, check_tensor, names
from . import memory_file, memory_import, memory_pickle
from .api import gather_tokens, quantize_rows
from .memory_mapping import OpenFile
from .memory_rows import (
    BANK_DTYPES,
    Held,
    StoredRows,
    check_extras,
    check_metadata,
    check_no_gradient,
    check_parts,
    check_storage,
    checked_values,
    is_bank,
)
from .reference import merge_best

_SMALLEST_CAPACITY = 64  # rows of the first allocation, so that single appends do not reallocate at once
_SCORED_ELEMENTS = 1 << 22  # elements that `topk` widens to float32 at a time


class MemoryBank:
    """An append-only store of tokens (M, C) and their positions (M, 3).

    Args:
        channels: C, at least 1.
        dtype: dtype of the stored rows: float32, bfloat16, float16, or int8 and float8_e4m3fn, which are quantised with
            one scale per row (see `quantize_rows`).
        device: device of the positions and, with storage "device", of the rows. With "pinned" and "mmap" the rows are
            on the host.
        storage: "device"; "pinned": host memory that CUDA gathers read in place; or "mmap": a file on disk, of which
            only the requested rows are read.
        path: required for "mmap" and not allowed otherwise: the working file for the rows, which must not exist yet. It
            is not a memory file and is never deleted; `save` writes a memory file that `load` reads (see
            docs/bank_file.md).
        capacity: number of rows to reserve at once. A full bank doubles its capacity.

    Attributes:
        metadata: dict[str, str] that `save` writes and `load` reads.
        extras: dict[str, Tensor] that `save` writes and `load` reads.

    Raises:
        ValueError, TypeError: an argument has a wrong type or value.
        RuntimeError: storage "pinned" without a CUDA device.
        FileExistsError: `path` exists.

    Examples:
        >>> bank = MemoryBank(3072, dtype=torch.int8)
        >>> bank.append(tokens, positions)
        >>> context = bank.gather(index, out_dtype=torch.bfloat16)

    Autograd: the stored rows are detached. `append` refuses tokens that require a gradient; the results of `gather` and
    `topk` require none.

    Threads: one thread may append while any number of threads read, without a lock. Each reading call (`gather`,
    `topk`, `save`, `positions`, `len`, `nbytes`, copying, pickling, ...) sees the bank as it was between two appends;
    two calls may see different states. Appends from several threads run one after the other. On a GPU this holds within
    one stream: synchronise other streams with the append as for any tensor. `metadata` and `extras` are plain dicts
    without this protection.

    Copies: `copy.copy` and `copy.deepcopy` make an independent bank: an append to one is not visible in the other. The
    copy of an "mmap" bank maps the same file again. (`copy.copy` shares the tensors of `extras`.)

    Pickling, also by `torch.save` and `torch.load(weights_only=False)`: the pickle contains the rows. The pickle of an
    "mmap" bank contains only the name of its file, provided that the file has all rows of the bank: the file it was
    loaded from or saved to, or the working file at `path`. Loading the pickle checks that the file still holds the same
    rows. An append to a loaded bank leaves no such file; the pickle then contains the rows until `save` writes a file.

    Processes: sending a bank to other processes (`spawn`, `forkserver`, DataLoader workers, queues) does not copy it:
    each process maps the rows of an "mmap" bank, saved or not; other rows are in shared memory. In the other process,
    or in a forked one, the bank is independent: its appends are not visible elsewhere.
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
        check_storage(op, storage)
        check_int(op, "capacity", capacity, 0)
        if (path is not None) != (storage == "mmap"):
            raise ValueError(
                f"{op}: path is required for storage 'mmap' and not allowed for others, got {path!r} for {storage!r}"
            )
        self.metadata = {}
        self.extras = {}
        device = torch.device(device)
        host = device if storage == "device" else torch.device("cpu")
        held = Held(
            count=0,
            rows=torch.empty(0, channels, dtype=dtype, device=host),
            positions=torch.empty(0, 3, dtype=torch.float32, device=device),
            scale=torch.empty(0, dtype=torch.float32, device=host) if dtype in QUANTIZED_DTYPES else None,
        )
        folder = None
        if path is not None:
            with open(path, "x+b") as file:
                held = held._replace(file=OpenFile(os.dup(file.fileno())), own=True, working=os.path.realpath(path))
            folder = Path(path).absolute().parent
        self._hold(held, device, storage, folder)
        if capacity:
            try:
                self._grow(capacity)
            except BaseException:
                if path is not None:
                    os.unlink(path)
                raise

    def _hold(self, held: Held, device: torch.device, storage: str, folder: Path | None) -> None:
        """Initialises the attributes of the bank from its content."""
        self.channels, self.dtype = held.rows.shape[1], held.rows.dtype
        self.device, self.storage = device, storage
        self._held = held  # replaced as a whole, so that a reader sees a consistent state
        self._folder = folder  # folder for a new file of "mmap" rows if their current file must not be appended to
        self._writing = threading.Lock()
        memory_pickle.BANKS.add(self)

    @classmethod
    def _holding(cls, held: Held, device: torch.device, storage: str, folder: Path | None) -> MemoryBank:
        bank = cls.__new__(cls)
        bank.metadata, bank.extras = {}, {}
        bank._hold(held, device, storage, folder)
        return bank

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        memory_pickle.share_when_sent(cls)

    # Single parts of `_held`.

    @property
    def _rows(self) -> Tensor:
        return self._held.rows

    @property
    def _positions(self) -> Tensor:
        return self._held.positions

    @property
    def _scale(self) -> Tensor | None:
        return self._held.scale

    @property
    def _file(self) -> OpenFile | None:
        return self._held.file

    @property
    def _count(self) -> int:
        return self._held.count

    @_count.setter
    def _count(self, count: int) -> None:
        """Publishes the first `count` rows of the buffers to readers."""
        self._held = self._held._replace(count=count, saved=None)

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        dtype = names([self.dtype])
        held = self._held
        return f"MemoryBank({held.count} x {self.channels}, {dtype}, {self.storage} on {held.rows.device})"

    @property
    def positions(self) -> Tensor:
        """(M, 3) float32 positions (t, h, w) on `device`, as a read-only view."""
        held = self._held
        return held.positions[: held.count]

    def stored(self) -> StoredRows:
        """Returns views of the stored rows, scales and positions, without dequantising or copying them.

        All three belong to the same state of the bank and must not be written to. Attention can read them in place,
        also from a mapped file, with any number of heads that divides C:

            rows, scale, _ = bank.stored()
            memory = rows.view(1, len(rows), heads, -1)
            factor = None if scale is None else scale.unsqueeze(0)
            out = cross_attention(q, memory, memory, k_scale=factor, v_scale=factor)

        The rows must be on the device of q. On a GPU, use storage "device". For a bank on the host, either move the
        stored bytes with `rows.to(q.device)`, or use `gather`, which dequantises the selected rows.

        Returns:
            StoredRows with rows (M, C) of the bank's dtype, scale (M,) float32 or None, and positions (M, 3) float32.
        """
        held = self._held
        scale = None if held.scale is None else held.scale[: held.count]
        return StoredRows(held.rows[: held.count], scale, held.positions[: held.count])

    @property
    def nbytes(self) -> int:
        """Bytes of the stored rows, scales and positions, without spare capacity."""
        return self._count * self._bytes_per_row()

    @property
    def capacity_bytes(self) -> int:
        """Bytes allocated for rows, scales and positions; with "mmap", the rows are on disk."""
        return self._rows.shape[0] * self._bytes_per_row()

    def _bytes_per_row(self) -> int:
        scale = 4 if self.dtype in QUANTIZED_DTYPES else 0
        return self.channels * self.dtype.itemsize + scale + 3 * 4

    def append(self, tokens: Tensor, positions: Tensor) -> None:
        """Appends rows; on an error the bank is unchanged.

        Args:
            tokens: (K, C) float32, bfloat16, float16 or float64, on any device; rounded or quantised to the bank's
                dtype.
            positions: (K, 3) float32, (t, h, w) of each token, in any unit.

        Raises:
            ValueError: a wrong shape, a NaN or infinity, a token beyond the range of the bank's dtype, or a tensor that
                requires a gradient. The check synchronises with the GPU if the tokens are there.
            TypeError: an argument is not a tensor or has a wrong dtype.
            OSError: the disk of an "mmap" bank is full.
        """
        op = "MemoryBank.append"
        check_tensor(op, "tokens", tokens, "K, C", FLOAT_DTYPES)
        check_tensor(op, "positions", positions, "K, 3", (torch.float32,))
        count = tokens.shape[0]
        if tokens.shape[1] != self.channels:
            raise ValueError(f"{op}: tokens must have {self.channels} channels, got {tokens.shape[1]}")
        if positions.shape != (count, 3):
            raise ValueError(f"{op}: positions must have shape {(count, 3)}, got {tuple(positions.shape)}")
        check_no_gradient(op, "tokens and positions", tokens, positions)
        if count == 0:
            return
        with torch.no_grad():
            if self.dtype not in QUANTIZED_DTYPES:
                rows, scale = tokens.to(self.dtype), None
                finite = rows.isfinite().all(dim=1)
            else:
                rows, scale = quantize_rows(tokens.to(torch.float32), self.dtype)
                finite = scale.isfinite()
            if not finite.all():
                largest = torch.finfo(self.dtype if scale is None else torch.float32).max
                wrong = count - int(finite.sum())
                raise ValueError(
                    f"{op}: tokens must be finite and at most {largest:g} in magnitude, got {wrong} rows that are not"
                )
            finite = positions.isfinite().all(dim=1)
            if not finite.all():
                raise ValueError(f"{op}: positions must be finite, got {count - int(finite.sum())} rows that are not")
            self._store(rows, positions, scale)

    def _store(self, rows: Tensor, positions: Tensor, scale: Tensor | None) -> None:
        """Appends rows that already have the bank's dtype."""
        with self._writing, torch.no_grad():
            start = self._held.count
            end = start + rows.shape[0]
            capacity = self._held.rows.shape[0]
            if end > capacity:
                self._grow(max(end, 2 * capacity, _SMALLEST_CAPACITY))
            held = self._held
            held.rows[start:end].copy_(rows)
            held.positions[start:end].copy_(positions)
            if held.scale is not None and scale is not None:  # both or neither, by the dtype
                held.scale[start:end].copy_(scale)
            self._count = end

    def _grow(self, capacity: int) -> None:
        """Reserves room for `capacity` rows; the bank is unchanged if that fails."""
        before = self._held
        self._held = before.grown(capacity, self.storage, self._folder)
        if self.storage == "pinned":
            torch.cuda.synchronize()  # kernels may still read the rows of `before`, whose memory is freed

    def gather(self, index: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
        """Gathers rows and dequantises them in the same pass; see `gather_tokens`.

        Args:
            index: (K,) or (B, K) int32 or int64; -1 gives a row of zeros. On the device of the rows, or on any device
                if the rows are on the host.
            out_dtype: float dtype of the result; default: that of the bank, or float32 for int8 and float8_e4m3fn.

        Returns:
            (K, C) or (B, K, C) on the device of `index`, without gradient.

        Raises:
            ValueError, TypeError: `index` has a wrong shape, dtype or device.
            IndexError: an index is outside [-1, M - 1]; see `gather_tokens` for GPUs.
        """
        op = "MemoryBank.gather"
        single = isinstance(index, Tensor) and index.dim() == 1
        check_tensor(op, "index", index.unsqueeze(0) if single else index, "B, K", INDEX_DTYPES)
        held = self._held
        out = gather_tokens(
            held.rows[: held.count].unsqueeze(0),
            index.unsqueeze(0) if single else index,
            scale=None if held.scale is None else held.scale[: held.count].unsqueeze(0),
            out_dtype=out_dtype,
        )
        if out.is_cuda and self.storage == "pinned" and self._held.rows is not held.rows:
            torch.cuda.current_stream(out.device).synchronize()  # the rows were replaced meanwhile: see `_grow`
        return out.squeeze(0) if single else out

    def topk(self, query: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Finds the rows with the largest dot product with each query, computed in float32.

        The rows are read in pieces, also from disk, so that the full matrix of scores is never held in memory.

        Args:
            query: (Q, C) float32, bfloat16 or float16; on the device of the rows, or on any device if the rows are on
                the host.
            k: number of rows to find for each query, in [0, M].

        Returns:
            (values, index): values (Q, k) float32 and index (Q, k) int32, best first, equal values by ascending index,
            on the device of `query`. A NaN score counts as -inf.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        """
        op = "MemoryBank.topk"
        check_tensor(op, "query", query, "Q, C", FLOAT_DTYPES[:3])
        if query.shape[1] != self.channels:
            raise ValueError(f"{op}: query must have {self.channels} channels, got {query.shape[1]}")
        held = self._held
        if held.rows.device != query.device and held.rows.device.type != "cpu":
            raise ValueError(f"{op}: query must be on the bank's device, {held.rows.device}, got {query.device}")
        if held.count > torch.iinfo(torch.int32).max:
            raise ValueError(f"{op}: the bank must have at most {torch.iinfo(torch.int32).max} rows, got {held.count}")
        check_int(op, "k", k, 0, held.count)
        values = query.new_empty(query.shape[0], 0, dtype=torch.float32)
        index = query.new_empty(query.shape[0], 0, dtype=torch.int32)
        step = max(1, _SCORED_ELEMENTS // self.channels)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            wanted = query.to(torch.float32)
            for start in range(0, held.count, step):
                end = min(start + step, held.count)
                scores = wanted @ held.rows[start:end].to(query.device).to(torch.float32).T
                if held.scale is not None:
                    scores = scores * held.scale[start:end].to(query.device)
                values, index = merge_best(values, index, scores, start, k)
        return values, index

    def save(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, str] | None = None,
        extras: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Writes the bank to a safetensors file, atomically.

        The file is written under a temporary name in the same folder, flushed to disk and renamed, so that `path`
        always holds either the old content or the new. An exception or interrupt removes the temporary file. A killed
        process leaves it as ".vidmem-*.tmp"; the next `save` into the folder removes such files of processes that have
        ended. The header contains a SHA-256 of the whole file.

        Args:
            path: file to create or replace; a symbolic link is followed.
            metadata: text entries to store with the bank; default `self.metadata`. Keys that start with "vidmem." are
                reserved.
            extras: tensors to store with the bank; default `self.extras`.

        Raises:
            ValueError, TypeError: the metadata or extras cannot be stored.
            OSError: the folder is missing, full or not writable.
        """
        metadata = self.metadata if metadata is None else metadata
        extras = self.extras if extras is None else extras
        check_metadata("MemoryBank.save", metadata)
        check_extras("MemoryBank.save", extras)
        held = self._held
        tensors = {"rows": held.rows[: held.count], "positions": held.positions[: held.count]}
        if held.scale is not None:
            tensors["scale"] = held.scale[: held.count]
        tensors |= {f"extras.{name}": tensor for name, tensor in extras.items()}
        saved = memory_file.write(Path(path), tensors, metadata)
        with self._writing:
            # A pickle may refer to this file, unless rows were appended meanwhile or the bank still has another file.
            if self._held.count == held.count and not memory_file.is_untouched(self._held.saved):
                self._held = self._held._replace(saved=saved)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", storage: str = "device"
    ) -> MemoryBank:
        """Loads a file that `save` wrote, after verifying the checksum of every byte.

        With storage "mmap" the rows stay in the file and are read on demand; the verification reads the file once
        without keeping it in memory. The file is never modified: the first `append` copies its rows to an unnamed file
        in the same folder, which is deleted with the bank. Do not modify a file in place while it is mapped; `save`
        replaces it instead.

        Args:
            path: the file.
            device: device of the positions and extras and, with storage "device", of the rows.
            storage: see `MemoryBank`.

        Returns:
            The bank, with `metadata` and `extras` as saved.

        Raises:
            MemoryFileError: the file is not a memory file, is damaged or truncated, or has another version.
            FileNotFoundError: the file does not exist; other OSErrors if it cannot be read.
        """
        check_storage("MemoryBank.load", storage)
        path = Path(path)
        return cls._of_content(memory_file.read(path, "rows", storage), path, torch.device(device), storage)

    @classmethod
    def _of_content(cls, content: memory_file.Content, path: Path, device: torch.device, storage: str) -> MemoryBank:
        """Makes the bank from the content of a memory file."""
        tensors = content.tensors
        rows, positions, scale = tensors.get("rows"), tensors.get("positions"), tensors.get("scale")
        if rows is None or positions is None or not is_bank(rows, positions, scale):
            raise memory_file.foreign(path, "it does not hold the rows of a bank")
        if not all(part is None or bool(part.isfinite().all()) for part in (positions, scale)):
            raise memory_file.foreign(path, "its positions and scales are not finite, which append refuses")
        held = Held(rows.shape[0], rows, positions, scale, content.file, content.offset, saved=content.saved)
        bank = cls._holding(held.placed(device, storage), device, storage, path.absolute().parent)
        bank.metadata = content.metadata
        bank.extras = {
            name.removeprefix("extras."): tensor.to(device)
            for name, tensor in tensors.items()
            if name.startswith("extras.")
        }
        return bank

    @classmethod
    def from_tensors(
        cls,
        rows: Tensor,
        positions: Tensor,
        scale: Tensor | None = None,
        *,
        device: torch.device | str = "cpu",
        storage: str = "device",
        path: str | os.PathLike[str] | None = None,
    ) -> MemoryBank:
        """Makes a bank from stored rows; 8-bit rows come with their scales and are not quantised again.

        Args:
            rows: (M, C) of one of the bank's dtypes, which becomes the dtype of the bank; copied.
            positions: (M, 3) floats, rounded to float32, or signed or 8-bit integers of at most 2**24 in magnitude.
            scale: (M,) floats, rounded to float32: row m dequantises to `rows[m].float() * scale[m]`. Required for int8
                and float8_e4m3fn rows and not allowed for others.
            device: see `MemoryBank`.
            storage: see `MemoryBank`.
            path: see `MemoryBank`.

        Returns:
            The bank.

        Raises:
            ValueError, TypeError: a wrong shape or dtype, a NaN or infinity, or a tensor that requires a gradient.
        """
        op = "MemoryBank.from_tensors"
        check_parts(op, rows, positions, scale)
        check_no_gradient(op, "rows, positions and scale", rows, positions, scale)
        positions, scale = checked_values(op, rows, positions, scale)
        count, channels = rows.shape
        bank = cls(channels, dtype=rows.dtype, device=device, storage=storage, path=path, capacity=count)
        bank._store(rows, positions, scale)
        return bank

    @classmethod
    def from_safetensors(
        cls,
        path: str | os.PathLike[str],
        *,
        rows: str = "rows",
        positions: str = "positions",
        scale: str = "scale",
        device: torch.device | str = "cpu",
        storage: str = "device",
    ) -> MemoryBank:
        """Imports a safetensors file from another program, or a bank's file that another program rewrote.

        Such a file has no checksum, so only impossible content is detected: use `load` for files that `save` wrote.
        Nothing in the file is executed, and no memory is allocated before its header is found consistent with the file
        and with a bank.

        Args:
            path: the file.
            rows: name of the tensor that becomes `rows` of `from_tensors`.
            positions: name of the tensor that becomes `positions`.
            scale: name of the tensor that becomes `scale`. All other tensors become `extras`, under their names without
                a leading "extras."; the text entries of the header become `metadata`.
            device: see `load`.
            storage: see `MemoryBank`. With "mmap" the rows are copied to an unnamed file in the same folder; to map
                them where they are, `save` the bank and `load` it.

        Returns:
            The bank.

        Raises:
            MemoryFileError: the file is not a safetensors file, is truncated, or is a bank's file of a later version.
            ValueError, TypeError: a tensor is missing, or `from_tensors` refuses it.
            FileNotFoundError: the file does not exist; other OSErrors if it cannot be read.
        """
        op = "MemoryBank.from_safetensors"
        check_storage(op, storage)
        path, device = Path(path), torch.device(device)
        folder = path.absolute().parent
        held, metadata, extras = memory_import.read(op, path, (rows, positions, scale), storage, folder)
        bank = cls._holding(held.placed(device, storage), device, storage, folder)
        bank.metadata = metadata
        bank.extras = {name: tensor.to(device) for name, tensor in extras.items()}
        return bank

    def __copy__(self) -> MemoryBank:
        return memory_pickle.copied(self, dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return memory_pickle.copied(self, lambda value: copy.deepcopy(value, memo))

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return memory_pickle.reduced(self)


memory_pickle.share_when_sent(MemoryBank)
