"""Two training-free compressors of a clip's patch tokens behind one interface.

Both turn the latents of a codec into M rows with positions, and can read one frame back from the
rows that cover it:

- dct: the clip is cut into boxes of `rate` patch tokens; a box becomes one row, the coefficients of
  its DCT over (colour, time, height, width) that carry the most energy over the clip.
- merge: similar patch tokens are averaged on the token grid, then the heaviest rows are kept; see
  `vidmem_model.merging`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from vidmem_kernels import MemoryBank

from . import merging
from .config import CompressorConfig
from .errors import UserError
from .vae import PATCH, VideoCodec, dct_matrix, frames_to_uint8, pad_frames, rechunk

# Coefficients looked at for each one kept: on 20 s of film at 480x832 the strongest 3,072 lie within
# the lowest 24,576 of a 64x64x8 box's 98,304.
_CANDIDATES = 8


@dataclass(frozen=True)
class CompressedMemory:
    """What a compressor makes of a clip.

    Attributes:
        tokens: float32 (M, C), each channel scaled to unit mean square over the rows.
        positions: float32 (M, 3), midpoints (t, h, w) in units of the patch-token grid.
        extras: tensors that reading back needs, among them `scale` (C,), which undoes the scaling.
        meta: header entries that reading back needs.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)


def compress(
    latents: Iterable[torch.Tensor],
    codec: VideoCodec,
    size: tuple[int, int, int],
    config: CompressorConfig,
    progress: Callable[[int, int], None] | None = None,
) -> CompressedMemory:
    """Compress a clip's latents to a short context.

    Args:
        latents: chunks (1, C, t', H', W') as `codec.encode_chunks` gives them.
        codec: the codec they come from.
        size: frames, rows and columns of the clip before padding.
        config: method, rate and budget.
        progress: called with (latent frames done, latent frames in all).

    Returns:
        CompressedMemory.

    Raises:
        UserError: the clip cannot be compressed to what `config` asks; the message has the range.
    """
    method = _compress_dct if config.method == "dct" else merging.compress_merge
    tokens, positions, extras, meta = method(latents, codec, size, config, progress)
    # Latents range over three decades. One mean square for all channels lets rows of 8 bits with one
    # scale keep the high frequencies, and is what a projection that reads the tokens wants anyway.
    scale = tokens.square().mean(0).sqrt_()
    scale[scale == 0] = 1.0
    meta = {
        "method": config.method,
        "size": json.dumps(size),
        "codec": codec.name,
        "codec_channels": str(codec.channels),
        "dtype": config.dtype,
        **meta,
    }
    return CompressedMemory(tokens.div_(scale), positions, {"scale": scale, **extras}, meta)


def reconstruct(bank: MemoryBank, frame_index: int) -> torch.Tensor:
    """Read one frame back from a bank, touching only the rows that cover it.

    Args:
        bank: loaded bank with the `metadata` and `extras` of a CompressedMemory.
        frame_index: frame to read, in [0, number of frames).

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        ValueError: frame_index is out of range.
    """
    frames = json.loads(bank.metadata["size"])[0]
    if not 0 <= frame_index < frames:
        raise ValueError(f"reconstruct: frame_index must be in [0, {frames}), got {frame_index}")
    method = _read_dct if bank.metadata["method"] == "dct" else merging.read_merge
    return frames_to_uint8(method(bank, frame_index))[0]


def box_grid(
    size: tuple[int, int, int], codec_stride: tuple[int, int, int], rate: tuple[int, int, int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Cut a clip into boxes of `rate` patch tokens.

    Rows and columns are resampled to whole boxes (the number rounded down, at least one), so that
    nothing is cropped; the last frames are padded to a whole box.

    Args:
        size: frames, rows and columns.
        codec_stride: of the codec, (time, height, width).
        rate: patch tokens a box covers along height, width and time.

    Returns:
        Number of boxes and size of a box in pixels, both as (time, height, width).
    """
    t, h, w = codec_stride
    box = (rate[2] * t, rate[0] * h * PATCH, rate[1] * w * PATCH)
    return (-(-size[0] // box[0]), max(1, size[1] // box[1]), max(1, size[2] // box[2])), box


@functools.lru_cache(maxsize=16)
def _axis_transform(length: int, boxes: int, box: int, keep: int) -> torch.Tensor:
    """Matrix (boxes * keep, length): resample to boxes * box samples, then `keep` DCT terms a box.

    Resampling truncates (or zero-pads) the DCT of the whole axis, so the rows stay orthonormal, and
    the transpose reads back.
    """
    total = boxes * box
    shared = min(total, length)
    resample = dct_matrix(total)[:shared].T @ dct_matrix(length)[:shared]
    blocks = torch.block_diag(*[dct_matrix(box)[:keep]] * boxes)
    return (blocks @ resample).to(torch.float32)


def _kept_bands(box: tuple[int, int, int], channels: int) -> tuple[int, int]:
    """Lowest bands along height and width that hold the candidates for `channels` places."""
    t, h, w = box
    wanted = _CANDIDATES * channels / (3 * t)
    high = min(h, math.ceil(math.sqrt(wanted)))
    wide = min(w, math.ceil(wanted / high))
    return min(h, math.ceil(wanted / wide)), wide


def _compress_dct(
    latents: Iterable[torch.Tensor],
    codec: VideoCodec,
    size: tuple[int, int, int],
    config: CompressorConfig,
    progress: Callable[[int, int], None] | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor], dict[str, str]]:
    grid, box = box_grid(size, codec.stride, config.rate)
    whole = 3 * math.prod(box)
    if config.channels > whole:
        raise UserError(
            f"a box of {box[0]} frames x {box[1]} x {box[2]} pixels has {whole} coefficients, "
            f"channels asks for {config.channels}; give channels in [1, {whole}]"
        )
    high, wide = _kept_bands(box, config.channels)
    rows = _axis_transform(size[1], grid[1], box[1], high)
    columns = _axis_transform(size[2], grid[2], box[2], wide)
    time, colour = dct_matrix(box[0]).float(), dct_matrix(3).float()
    energy = torch.zeros(3, box[0], high, wide, dtype=torch.float64)
    spectra = []
    boxes = rechunk(codec.decode_chunks(latents, size), box[0], dim=2)
    for done, frames in enumerate(boxes, start=1):
        bands = rows @ (pad_frames(frames, (box[0], 1, 1))[0] @ columns.T)
        bands = torch.einsum("kc,ft,cthw->kfhw", colour, time, bands)
        bands = bands.view(3, box[0], grid[1], high, grid[2], wide).permute(2, 4, 0, 1, 3, 5)
        energy += bands.square().sum((0, 1))
        spectra.append(bands.reshape(grid[1] * grid[2], -1))
        if progress:
            latent_frames = -(-size[0] // codec.stride[0])
            progress(min(done * config.rate[2], latent_frames), latent_frames)
    table = energy.flatten().argsort(descending=True, stable=True)[: config.channels]
    tokens = torch.cat([spectrum[:, table] for spectrum in spectra])
    tokens_high, tokens_wide = (-(-n // (s * PATCH)) for n, s in zip(size[1:], codec.stride[1:]))
    spans = (config.rate[2], tokens_high / grid[1], tokens_wide / grid[2])
    axes = [(torch.arange(n) + 0.5) * span - 0.5 for n, span in zip(grid, spans, strict=True)]
    positions = torch.cartesian_prod(*axes).to(torch.float32)
    meta = {"grid": json.dumps(grid), "box": json.dumps(box), "bands": json.dumps((high, wide))}
    return tokens, positions, {"table": table.to(torch.int32)}, meta


def _read_dct(bank: MemoryBank, frame_index: int) -> torch.Tensor:
    _, height, width = json.loads(bank.metadata["size"])
    _, down, across = json.loads(bank.metadata["grid"])
    box = json.loads(bank.metadata["box"])
    high, wide = json.loads(bank.metadata["bands"])
    slab, phase = divmod(frame_index, box[0])
    index = torch.arange(slab * down * across, (slab + 1) * down * across)
    tokens = bank.gather(index, out_dtype=torch.float32) * bank.extras["scale"]
    table = bank.extras["table"].long()
    plane = high * wide
    # Only the moment asked for is synthesised: each coefficient counts by its basis at that moment.
    moment = dct_matrix(box[0])[:, phase].float()[table // plane % box[0]]
    place = table // (plane * box[0]) * plane + table % plane
    bands = torch.zeros(len(index), 3 * plane).index_add_(1, place, tokens * moment)
    bands = bands.view(down, across, 3, high, wide).permute(2, 0, 3, 1, 4)
    bands = bands.reshape(3, down * high, across * wide)
    rows = _axis_transform(height, down, box[1], high)
    columns = _axis_transform(width, across, box[2], wide)
    image = rows.T @ (bands @ columns)
    return torch.einsum("kc,khw->chw", dct_matrix(3).float(), image)[None, :, None]
