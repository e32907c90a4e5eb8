"""Bundles: blocks of training videos in one small file that can be read without a video decoder.

Frames are stored as quantised coefficients of the built-in DCT codec, compressed with LZMA: a few megabytes for minutes
of small frames. They are for training on machines that have PyTorch only.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..checks import (
    MOST_SECONDS,
    Checked,
    FileName,
    OneOf,
    at_least,
    build,
    not_negative,
    parse_json,
    positive,
    require,
    shorten,
    show,
)
from ..errors import UserError
from ..model.config import ModelConfig
from ..vae import DCTCodec, VideoCodec, frames_to_float, frames_to_uint8, pad_frames
from ..weights import write_tensors

FORMAT = "vidmem.bundle"
VERSION = 1
# Fractions from this on are rounded up: small coefficients become zeros, which compress best.
_ROUND_UP = 0.35
# Values are ordered by coefficient, so that the zeros of high frequencies are contiguous.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 0, "pb": 0}]
# Quantiser steps in levels of 255: initial, minimum, maximum; iterations of the search, and blocks that it samples.
_FIRST, _FINEST, _COARSEST, _LOOKS, _SAMPLE = 40.0, 2.0, 255.0, 3, 4


@dataclass(frozen=True)
class Row(Checked):
    """Metadata of a block; see `blocks.Block`.

    Args:
        name: Name of the block's files.
        film: Path of the video.
        start: Start of the block, in seconds of the video.
        frames: Number of video frames.
        scenes: Number of scenes.
        split: "train" or "test".
        mirrored: Whether the frames are mirrored.
        zoom: Factor by which the frames are enlarged.
    """

    name: FileName
    film: FileName
    start: Annotated[float, not_negative(MOST_SECONDS)]
    frames: Annotated[int, positive(1 << 31)]
    scenes: Annotated[int, positive(1 << 31)]
    split: Annotated[str, OneOf("train", "test")]
    mirrored: bool
    zoom: Annotated[float, at_least(1, 16)]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(Path(self.name).name == self.name, "Row: name must be a file name", self.name)


def is_bundle(film: Path) -> bool:
    """Whether a path is that of a bundle, by its suffix."""
    return film.suffix == ".safetensors"


def write_bundle(
    path: Path, blocks: Iterable[tuple[dict[str, Any], torch.Tensor]], model: ModelConfig, most: int
) -> dict[str, float]:
    """Write blocks to a bundle, with the best quality that fits into a file size.

    Args:
        path: File *.safetensors to write.
        blocks: Rows and uint8 frames (T, H, W, 3), from `blocks.cut_films`.
        model: Configuration with height, width and rate of the frames, and the time stride of the VAE.
        most: Maximum size of the file, in bytes.

    Returns:
        Number of "frames", quantiser "step" in levels of 255, and "psnr" of the stored frames.

    Raises:
        UserError: There are no blocks, they do not fit, or the file cannot be written.
    """
    rows, stored = [], []
    codec = DCTCodec()
    for row, frames in blocks:
        rows.append({**row, "film": Path(row["film"]).name})
        padded = pad_frames(frames_to_float(frames), codec.stride)
        stored.append((frames, codec.encode(padded)[0].half().contiguous()))
    if not rows:
        raise UserError(f"{path}: there are no blocks of video to bundle; give a longer video")
    step, made = _fitted(
        [each for _, each in stored], most - 20_000 - 1_000 * len(rows)
    )  # the remaining bytes are for the header
    if step > _COARSEST:
        raise UserError(f"{path}: {len(rows)} blocks of video do not fit into {most:,} bytes; give fewer seconds")
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        "rows": json.dumps(rows),
        "for": json.dumps(_made_for(model, model.vae.stride[0])),
        "step": repr(step),
    }
    tensors = {
        row["name"]: torch.frombuffer(bytearray(each), dtype=torch.uint8) for row, each in zip(rows, made, strict=True)
    }
    write_tensors(path, tensors, header)
    error = count = 0.0
    for (frames, _), each in zip(stored, made, strict=True):
        left = _frames(each, frames.shape[:3], step).float() - frames.float()
        error += left.square().sum(dtype=torch.float64).item()
        count += left.numel()
    level = 10 * math.log10(255**2 * count / error) if error else math.inf
    return {"frames": sum(len(frames) for frames, _ in stored), "step": step, "psnr": level}


def read_bundle(
    path: Path, model: ModelConfig, vae: VideoCodec, only: str | None = None
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Read the blocks of a bundle.

    Args:
        path: The file.
        model: As for `blocks.cut_films`.
        vae: As for `blocks.cut_films`.
        only: As for `blocks.cut_films`.

    Returns:
        Iterator over (row of the index, frames of the block, uint8 (T, H, W, 3)).

    Raises:
        UserError: The file is missing or damaged, or its frames have another size, rate or length.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is not a file' if path.exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            if (header.get("format"), header.get("version")) != (FORMAT, str(VERSION)):
                raise ValueError(f"not of format {FORMAT}, version {VERSION}")
            rows = [build(Row, row) for row in parse_json(header["rows"], "rows")]
            made_for, wanted = parse_json(header["for"], "for"), _made_for(model, vae.stride[0])
            if made_for != wanted:
                raise UserError(f"{path}: was made for {show(made_for)}, not for {show(wanted)}")
            step = float(header["step"])
            for row in rows:
                if only in (None, row.split):
                    stored = opened.get_tensor(row.name).numpy().tobytes()
                    yield dataclasses.asdict(row), _frames(stored, (row.frames, model.height, model.width), step)
    except (SafetensorError, lzma.LZMAError, KeyError, ValueError, TypeError, MemoryError) as error:
        raise UserError(f"{path}: is damaged or not a bundle of video ({shorten(error)})") from error


def _made_for(model: ModelConfig, stride: int) -> dict[str, Any]:
    return {"height": model.height, "width": model.width, "fps": model.fps, "stride": stride}


def _fitted(coefficients: list[torch.Tensor], room: int) -> tuple[float, list[bytes]]:
    """Compress coefficients into `room` bytes; return the quantiser step, above _COARSEST if they do not fit."""

    def sizes(some: list[torch.Tensor]) -> list[bytes]:
        with ThreadPoolExecutor() as pool:  # LZMA releases the GIL
            return list(pool.map(lambda each: _compress(each, step), some))

    sample = coefficients[:: -(-len(coefficients) // _SAMPLE)]
    share = sum(map(torch.Tensor.numel, sample)) / sum(map(torch.Tensor.numel, coefficients))
    step = _FIRST
    for _ in range(_LOOKS):  # the size is about inversely proportional to the step
        step = min(max(step * sum(map(len, sizes(sample))) / (share * room), _FINEST), _COARSEST)
    made = sizes(coefficients)
    while sum(map(len, made)) > room and step <= _COARSEST:  # the sample was not representative
        step *= max(1.01, sum(map(len, made)) / room)
        made = sizes(coefficients)
    return step, made


def _compress(coefficients: torch.Tensor, step: float) -> bytes:
    """Quantise coefficients of frames in [-1, 1], with a step in levels of 255, and compress them."""
    scaled = coefficients.float() * (127.5 / step)
    whole = ((scaled.abs() + _ROUND_UP).floor() * scaled.sign()).numpy().astype(np.int16)
    folded = ((whole << 1) ^ (whole >> 15)).astype("<u2")  # 0, -1, 1, -2, ... to 0, 1, 2, 3, ...
    halves = folded.view(np.uint8).reshape(-1, 2).T  # high bytes are nearly all zero
    return lzma.compress(halves.tobytes(), lzma.FORMAT_RAW, filters=_FILTERS)


def _frames(compressed: bytes, size: tuple[int, int, int], step: float) -> torch.Tensor:
    """Inverse of `_compress`: uint8 frames (T, H, W, 3) of a size (frames, rows, columns)."""
    codec = DCTCodec()
    grid = [-(-n // stride) for n, stride in zip(size, codec.stride, strict=True)]
    count = 2 * codec.channels * math.prod(grid)
    halves = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_FILTERS).decompress(compressed, count)
    if len(halves) != count:
        raise ValueError(f"{len(halves)} of {count} bytes of a block")
    folded = np.frombuffer(halves, np.uint8).reshape(2, -1).T.copy().view("<u2").astype(np.int32)
    whole = torch.from_numpy((folded >> 1) ^ -(folded & 1)).view(1, codec.channels, *grid)
    frames, height, width = size
    return frames_to_uint8(codec.decode(whole * (step / 127.5))[:, :, :frames, :height, :width])
