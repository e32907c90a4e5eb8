"""Write PNG files with zlib only."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import torch

from ..files import replacing


def write_png(path: Path, image: torch.Tensor | np.ndarray) -> None:
    """Write a PNG file atomically.

    Args:
        path: File to write.
        image: uint8 (H, W, 3), RGB.

    Raises:
        ValueError: The image has another shape or dtype.
        UserError: The file cannot be written.
    """
    pixels = np.ascontiguousarray(torch.as_tensor(image).numpy())
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"write_png: image must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    # PNG filter "Up": each row minus the row above, modulo 256.
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with replacing(path) as part:
        part.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + _png_chunk(b"IHDR", header)
            + _png_chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
            + _png_chunk(b"IEND", b"")
        )


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
