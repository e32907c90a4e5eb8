"""Write and read safetensors files of weights, stored in 32, 16 or 8 bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from vidmem_kernels import quantize_rows

from .checks import parse_json, shorten, show
from .errors import MemoryFormatError, UserError
from .files import cannot_write, replacing
from .skeleton import skeleton

DTYPES = ("float32", "float16", "int8")
_SCALE = ".row_scale"
# Dtypes of stored weights; int8 comes with scales.
_STORED = ("F64", "F32", "F16", "BF16", "I8")
_MOST_HEADER = 32 << 20  # bytes
# Vectors and small matrices (norms, biases, tables) take little space but are sensitive to rounding.
_LEAST = 4096


def pack(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Convert weights to a storage format.

    Args:
        tensors: float32 weights by name.
        dtype: "float32", "float16", or "int8": matrices of at least 4,096 numbers as int8 with one float32 scale per
            row (all dimensions but the first), the others as float32.

    Returns:
        Tensors to store; `unpack` converts them back.

    Raises:
        ValueError: The dtype is unknown, or a weight is not finite or out of the range of float16.
    """
    if dtype not in DTYPES:
        raise ValueError(f"pack: dtype must be one of {DTYPES}, got {dtype!r}")
    packed = {}
    for name, tensor in tensors.items():
        stored = tensor
        if tensor.is_floating_point() and dtype == "float16":
            stored = tensor.half()
        elif tensor.is_floating_point() and dtype == "int8" and tensor.ndim > 1 and tensor.numel() >= _LEAST:
            rows, packed[name + _SCALE] = quantize_rows(tensor.flatten(1))
            stored = rows.view(tensor.shape)
        finite = packed.get(name + _SCALE, stored)
        if tensor.is_floating_point() and not finite.isfinite().all():
            raise ValueError(f"pack: weights must be in the range of {dtype}, got {name} out of range")
        packed[name] = stored
    return packed


def unpack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert stored weights back to float32; inverse of `pack` up to rounding."""
    weights = {}
    for name, tensor in tensors.items():
        if not name.endswith(_SCALE):
            weights[name] = tensor.float()
        if tensor.dtype == torch.int8:
            weights[name] *= tensors[name + _SCALE].view(-1, *[1] * (tensor.ndim - 1))
    return weights


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file atomically; equal content gives equal bytes.

    Raises:
        UserError: The file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(file, error) from error
    need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with replacing(file, need) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=header)


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file like the package safetensors, but in place and with a sorted header."""
    content = memoryview(save(tensors))
    size = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:size]))
    if metadata:
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.write(content[size:])


def content_digest(file: Path) -> str:
    """SHA-256 of the content of a safetensors file, independent of the order of its header."""
    with safe_open(file, framework="pt") as opened:
        digest = hashlib.sha256(json.dumps(opened.metadata() or {}, sort_keys=True).encode())
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_dtype(file: Path) -> str:
    """Storage format of a file's matrices, one of DTYPES."""
    with safe_open(file, framework="pt") as opened:
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return "int8" if "I8" in found else "float16" if "F16" in found else "float32"


class WeightsFile:
    """A safetensors file of weights; only its header is read until it has been checked.

    Args:
        path: The file.
        kind: Format that its header must name; None for files without a format, such as those of VAEs.
        version: Version that its header must name.
        advice: Remedy for the message about a missing file.

    Attributes:
        header: Texts of the header by name.
        shapes: Shapes of the unpacked weights by name.

    Raises:
        UserError: The file is missing.
        MemoryFormatError: The file is damaged, of another format or version, or its tensors are not weights.
    """

    def __init__(self, path: Path, kind: str | None = None, version: int = 1, advice: str = "") -> None:
        self.path = path
        if not path.is_file():
            raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}{advice}")
        try:
            content = self._content()
            self.header = content.pop("__metadata__", {})
            if not isinstance(self.header, dict) or not all(isinstance(v, str) for v in self.header.values()):
                raise ValueError("the metadata of its header is not text")
        except (OSError, ValueError) as error:
            reason = shorten(getattr(error, "strerror", None) or error)
            raise MemoryFormatError(f"{path}: is damaged or not a safetensors file ({reason})") from error
        if kind is not None:
            self._check_format(kind, version)
        try:
            stored = {name: _entry(name, entry) for name, entry in content.items()}
            self.shapes = _unpacked_shapes(stored)
        except ValueError as error:
            raise MemoryFormatError(f"{path}: its rows and their scales do not fit ({error})") from error

    def _content(self) -> dict[str, Any]:
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MOST_HEADER):
                raise ValueError("cut short, or without a header")
            text = file.read(length).decode()
        content = parse_json(text, "its header")
        if not isinstance(content, dict):
            raise ValueError("its header is not valid")
        return content

    def _check_format(self, kind: str, version: int) -> None:
        if self.header.get("format") != kind:
            raise MemoryFormatError(f"{self.path}: is not a file of format {kind}")
        found = self.header.get("version")
        if found != str(version):
            raise MemoryFormatError(
                f"{self.path}: has format version {shorten(found, 40)}, this vidmem reads version {version}"
            )

    def json(self, name: str) -> dict[str, Any]:
        """Parse an entry of the header that holds a JSON object.

        Raises:
            KeyError: The entry is missing.
            ValueError: It is not a JSON object.
        """
        value = parse_json(self.header[name], name)
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be a mapping of keys to values, got {show(value)}")
        return value

    def check(
        self, make: Callable[[], nn.Module], depth: int, stored: Callable[[Any], Container[str]] | None = None
    ) -> None:
        """Check that the file holds the weights of a model, before weights are read.

        Args:
            make: Makes the model.
            depth: Number of its blocks; if the file has fewer weights, the model is not made.
            stored: Returns the names of the state that the file holds; by default all.

        Raises:
            ValueError: The model cannot be made.
            MemoryFormatError: A weight is missing, unknown, or of another shape.
        """
        if depth > len(self.shapes):
            raise self._misfit(f"{depth:,} blocks, {len(self.shapes):,} weights")
        model = skeleton(make)
        state = model.state_dict()
        held = state if stored is None else stored(model)
        expected = {name: tuple(tensor.shape) for name, tensor in state.items() if name in held}
        missing = [f"no {name}" for name in expected if name not in self.shapes]
        unknown = [f"unknown {name}" for name in self.shapes if name not in expected]
        other = [
            f"{name} of shape {self.shapes[name]}, not {shape}"
            for name, shape in expected.items()
            if self.shapes.get(name, shape) != shape
        ]
        if wrong := [*missing[:3], *unknown[:3], *other[:1]]:
            raise self._misfit(", ".join(wrong))

    def _misfit(self, how: str) -> MemoryFormatError:
        return MemoryFormatError(f"{self.path}: its weights do not fit its configuration ({shorten(how)})")

    def read(self) -> dict[str, torch.Tensor]:
        """Read the weights in float32.

        Raises:
            MemoryFormatError: The file is damaged, or a number is not finite.
        """
        try:
            with safe_open(self.path, framework="pt") as opened:
                weights = unpack({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise MemoryFormatError(f"{self.path}: is damaged or not a safetensors file ({shorten(error)})") from error
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise MemoryFormatError(f"{self.path}: {shorten(name, 80)} holds numbers that are not finite")
        return weights


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...]]:
    """Dtype and shape of a tensor from its header entry."""
    dtype, shape = (entry.get(key) for key in ("dtype", "shape")) if isinstance(entry, dict) else (None, None)
    if dtype not in _STORED:
        raise ValueError(f"{shorten(name, 80)} has dtype {show(dtype)}, weights have {', '.join(_STORED)}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        raise ValueError(f"{shorten(name, 80)} has shape {show(shape)}")
    return dtype, tuple(shape)


def _unpacked_shapes(stored: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights, without the scales of int8 weights."""
    shapes = {}
    for name, (dtype, shape) in stored.items():
        of = name.removesuffix(_SCALE)
        if of == name:
            shapes[name] = shape
        elif stored.get(of, ("", ()))[0] != "I8":
            raise ValueError(f"{shorten(name, 80)} is a scale without its int8 weight")
        if dtype == "I8" and stored.get(name + _SCALE) != ("F32", shape[:1]):
            raise ValueError(f"{shorten(name, 80)} lacks one float32 scale per row")
    return shapes
