"""Files of weights: written whole or not at all, and stored in 32, 16 or 8 bits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vidmem_kernels import quantize_rows

from .errors import MemoryFormatError, UserError
from .files import cannot_write, replacing

DTYPES = ("float32", "float16", "int8")
_SCALE = ".row_scale"
# Vectors and small matrices are norms, biases and tables: their bytes do not count, their errors do.
_LEAST = 4096


def pack(tensors: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Make weights ready to be stored.

    Args:
        tensors: weights by name, float32.
        dtype: "float32", "float16", or "int8": matrices of at least 4,096 numbers as int8 with one
            float32 scale a row (of all that follows the first dimension), the rest as float32.

    Returns:
        What to store; `unpack` undoes it.

    Raises:
        ValueError: the dtype is another, or a weight is not finite or beyond float16.
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
            raise ValueError(f"pack: weights must be in the range of {dtype}, got {name} beyond it")
        packed[name] = stored
    return packed


def unpack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Undo pack, up to its rounding: all weights float32."""
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE):
            continue
        if tensor.dtype == torch.int8:
            scale = tensors[name + _SCALE]
            weights[name] = tensor.float() * scale.view(-1, *[1] * (tensor.ndim - 1))
        else:
            weights[name] = tensor.float() if tensor.dtype == torch.float16 else tensor
    return weights


def write_tensors(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all; equal content gives equal bytes.

    Raises:
        UserError: it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(file, error) from error
    need = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with replacing(file, need) as part:
        save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=header)


def save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file as the package of that name does, but in place and with a header in one order."""
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
    """SHA-256 of what a safetensors file says, whatever the order of its header."""
    with safe_open(file, framework="pt") as opened:
        digest = hashlib.sha256(json.dumps(opened.metadata() or {}, sort_keys=True).encode())
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name).contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored_dtype(file: Path) -> str:
    """Name of the numbers that a file keeps its matrices in, one of DTYPES."""
    with safe_open(file, framework="pt") as opened:
        found = {opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118 (not a dict)
    return "int8" if "I8" in found else "float16" if "F16" in found else "float32"


def read_tensors(file: Path, kind: str, version: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file of a given format: its tensors, unpacked, and its header.

    Raises:
        UserError: it is missing.
        MemoryFormatError: it is damaged, of another format or another version.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != kind:
                raise MemoryFormatError(f"{file}: not a file of format {kind}")
            if header.get("version") != str(version):
                raise MemoryFormatError(
                    f"{file}: is of version {header.get('version')}, this vidmem reads version {version}"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise MemoryFormatError(f"{file}: is damaged or not a safetensors file ({error})") from error
    try:
        return unpack(tensors), header
    except (KeyError, RuntimeError) as error:
        raise MemoryFormatError(f"{file}: its rows and their scales do not fit ({error})") from error
