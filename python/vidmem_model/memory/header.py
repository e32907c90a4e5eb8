"""The header of a memory file, and checks that the file agrees with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from vidmem_kernels import MemoryBank

from ..checks import MOST_PIXELS, Checked, OneOf, Text, build, parse_json, positive, show
from . import METHODS, MethodName
from .config import ROW_DTYPES

ROW_TORCH_DTYPES = {
    "float16": torch.float16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
    "int8": torch.int8,
}
# Entries that are stored as JSON; the others are plain text.
_JSON = ("size", "fps", "codec_channels", "grid", "box")
_CHECKED_ELEMENTS = 1 << 22  # numbers checked at a time

_Frames = Annotated[int, positive(1 << 30)]
_Pixels = Annotated[int, positive(MOST_PIXELS)]
_Name = Annotated[str, Text(256)]


@dataclass(frozen=True)
class MemoryHeader(Checked):
    """Header of a memory file.

    Args:
        method: Compression method.
        size: Frames, rows and columns of the clip.
        fps: Frames per second.
        source: Name of the video file.
        codec: Name of the codec or VAE of the latents.
        codec_channels: Channels of the latents.
        dtype: Storage format of the tokens.
        grid: Boxes (dct) or patch tokens (merge) of the clip, (time, height, width).
        box: Frames, rows and columns of pixels that a box covers, for dct.
        model: Name of the trained model, for learned.
        model_sha256: Hash of the trained model.
        vae_sha256: Hash of its VAE.
    """

    method: MethodName
    size: tuple[_Frames, _Pixels, _Pixels]
    fps: Annotated[float, positive(1e6)]
    source: Annotated[str, Text(4096)]
    codec: _Name
    codec_channels: Annotated[int, positive(4096)]
    dtype: Annotated[str, OneOf(*ROW_DTYPES)]
    grid: tuple[_Frames, _Pixels, _Pixels] | None = None
    box: Annotated[tuple[int, int, int] | None, positive(2048)] = None
    model: _Name | None = None
    model_sha256: _Name | None = None
    vae_sha256: _Name | None = None

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> MemoryHeader:
        """Read the header from the metadata of a bank.

        Raises:
            KeyError: An entry is missing.
            ValueError: An entry is out of range.
        """
        values = {}
        for name in cls.__dataclass_fields__:
            if name in metadata:
                values[name] = parse_json(metadata[name], name) if name in _JSON else metadata[name]
        for name in ("method", "size", "fps", "source", "codec", "codec_channels", "dtype"):
            values[name]  # noqa: B018 (raises KeyError if it is missing)
        header = build(cls, values)
        for name in METHODS[header.method].needs:
            metadata[name]  # noqa: B018
        return header


def check_rows(bank: MemoryBank, header: MemoryHeader, ends: Sequence[float]) -> None:
    """Check what all methods have in common: tokens, their positions and the scale of their channels.

    Args:
        bank: Loaded bank.
        header: Its header.
        ends: End of the clip, (t, h, w) in patch tokens; positions must be below.

    Raises:
        KeyError: Something is missing.
        ValueError: Something is not finite or out of range.
    """
    if bank.dtype != ROW_TORCH_DTYPES[header.dtype]:
        raise ValueError(f"tokens of {str(bank.dtype).removeprefix('torch.')}, but dtype {header.dtype!r}")
    scale = extra(bank, "scale", (torch.float32,), (bank.channels,))
    if not (scale.isfinite() & (scale > 0)).all():
        raise ValueError("scale holds a number that is not positive and finite")
    inside = (bank.positions > -1) & (bank.positions < torch.tensor(list(ends), dtype=torch.float32))
    if not inside.all():  # NaN is not inside either
        raise ValueError(f"positions outside the clip of {tuple(float(f'{end:g}') for end in ends)} patch tokens")
    step = max(1, _CHECKED_ELEMENTS // bank.channels)
    for start in range(0, len(bank), step):
        rows = bank.gather(torch.arange(start, min(start + step, len(bank))), out_dtype=torch.float32)
        if not (rows * scale).isfinite().all():
            raise ValueError("tokens that are not finite")


def extra(bank: MemoryBank, name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> torch.Tensor:
    """Return a tensor that is stored beside the tokens.

    Raises:
        KeyError: It is missing.
        ValueError: It has another dtype or shape.
    """
    tensor = bank.extras[name]
    if tensor.dtype not in dtypes or tensor.shape != tuple(shape):
        got = f"{str(tensor.dtype).removeprefix('torch.')} of shape {show(tuple(tensor.shape))}"
        raise ValueError(f"{name} must have shape {show(tuple(shape))}, got {got}")
    return tensor


def check_range(name: str, tensor: torch.Tensor, end: int) -> None:
    """Check that every number is in [0, end).

    Raises:
        ValueError: A number is not.
    """
    least, most = (int(value) for value in tensor.aminmax()) if tensor.numel() else (0, 0)
    if least < 0 or most >= end:
        raise ValueError(f"{name} must be in [0, {end}), got {least} to {most}")
