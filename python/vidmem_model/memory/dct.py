"""Two training-free compressors of a clip's patch tokens behind one interface; `learned` is the third method.

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

from ..errors import UserError
from ..vae import PATCH, DCTCodec, VideoCodec, dct_matrix, frames_to_uint8, pad_frames, rechunk
from . import merge as merging
from .config import CompressorConfig
from .header import MemoryHeader, check_range, check_rows, extra

# Coefficients looked at for each one kept. Measured on four stretches of 20 s of film at 480x832,
# choosing the strongest 3,072 of 4 x 3,072 loses under 0.03 dB against choosing among all 98,304.
_CANDIDATES = 4


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
        progress: called with (steps done, steps in all).

    Returns:
        CompressedMemory.

    Raises:
        UserError: the clip cannot be compressed to what `config` asks; the message has the range.
    """
    if config.method == "dct":
        made = _compress_dct(latents, codec, size, config, progress)
    else:
        boxes = math.prod(box_grid(size, codec.stride, config.rate)[0])
        made = merging.compress_merge(latents, codec, size, config, boxes, progress)
    tokens, positions, extras, meta = made
    meta = {
        "method": config.method,
        "size": json.dumps(size),
        "codec": codec.name,
        "codec_channels": str(codec.channels),
        "dtype": config.dtype,
        **meta,
    }
    return packed(tokens, positions, extras, meta)


def packed(
    tokens: torch.Tensor, positions: torch.Tensor, extras: dict[str, torch.Tensor], meta: dict[str, str]
) -> CompressedMemory:
    """Scale tokens (M, C) in place to unit mean square a channel and keep the scale.

    Latents range over three decades. One mean square for all channels lets rows of 8 bits with one
    scale keep the high frequencies, and is what a projection that reads the tokens wants anyway.
    """
    scale = tokens.square().mean(0).sqrt_()
    scale[scale == 0] = 1.0
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


def check_bank(bank: MemoryBank, header: MemoryHeader) -> None:
    """Check that a loaded bank has all that reconstruct reads, before anything is allocated for it.

    Args:
        bank: loaded bank.
        header: what its entries say.

    Raises:
        KeyError, ValueError: an entry is missing or does not fit the rows.
        MemoryFormatError: the rows belong to a codec that is not built in.
    """
    if header.method == "merge":
        merging.check_merge(bank, header)
        return
    (frames, *pixels), box = header.size, header.box
    grid = (-(-frames // box[0]), *(max(1, n // side) for n, side in zip(pixels, box[1:], strict=True)))
    if header.grid != grid or math.prod(grid) != len(bank):
        raise ValueError(f"{len(bank)} rows and grid {header.grid} for size {header.size} in boxes {box}")
    check_range("table", extra(bank, "table", (torch.int32,), (bank.channels,)), 3 * math.prod(box))
    t, h, w = DCTCodec.stride
    check_rows(bank, header, (grid[0] * box[0] / t, -(-pixels[0] // (h * PATCH)), -(-pixels[1] // (w * PATCH))))


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
def _axis_transform(length: int, boxes: int, box: int) -> torch.Tensor:
    """Matrix (boxes * box, length): resample to whole boxes, then the DCT of each.

    Resampling truncates (or zero-pads) the DCT of the whole axis, so that the matrix keeps lengths
    and its transpose reads back.
    """
    total = boxes * box
    shared = min(total, length)
    resample = dct_matrix(total)[:shared].T @ dct_matrix(length)[:shared]
    blocks = torch.block_diag(*[dct_matrix(box)] * boxes)
    return (blocks @ resample).to(torch.float32)


def _transform_columns(frames: torch.Tensor, boxes: int, box: int) -> torch.Tensor:
    if frames.shape[-1] == boxes * box:  # nothing to resample: a box at a time is far cheaper
        return (frames.unflatten(-1, (boxes, box)) @ dct_matrix(box).float().T).flatten(-2)
    return frames @ _axis_transform(frames.shape[-1], boxes, box).T


def _low_frequencies(box: tuple[int, int, int], count: int) -> torch.Tensor:
    """Places of the `count` lowest frequencies in a flattened (colour, time, height, width) box."""
    kc, kt, kh, kw = torch.meshgrid(*map(torch.arange, (3, *box)), indexing="ij")
    frequency = (kt + 1) * (kh + 4) * (kw + 4) * torch.where(kc > 0, 3, 1)
    return frequency.flatten().argsort(stable=True)[:count]


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
    down, across = grid[1:]
    rows = _axis_transform(size[1], down, box[1])
    moments = torch.kron(dct_matrix(3), dct_matrix(box[0])).float()
    candidates = _low_frequencies(box, _CANDIDATES * config.channels)
    energy = torch.zeros(len(candidates), dtype=torch.float64)
    spectra = []
    latent_frames = -(-size[0] // codec.stride[0])
    boxes = rechunk(codec.decode_chunks(latents, size), box[0], dim=2)
    for done, frames in enumerate(boxes, start=1):
        planes = pad_frames(frames, (box[0], 1, 1)).flatten(0, 2)
        bands = rows @ _transform_columns(planes, across, box[2])
        bands = (moments @ bands.flatten(1)).view(-1, down, box[1], across, box[2])
        bands = bands.permute(1, 3, 0, 2, 4).reshape(down * across, whole)[:, candidates]
        energy += bands.square().sum(0)
        spectra.append(bands)
        if progress:
            progress(min(done * config.rate[2], latent_frames), latent_frames)
    strongest = energy.argsort(descending=True, stable=True)[: config.channels]
    tokens = torch.cat([bands[:, strongest] for bands in spectra])
    table = candidates[strongest].to(torch.int32)
    patches = [-(-n // (s * PATCH)) for n, s in zip(size[1:], codec.stride[1:], strict=True)]
    spans = (config.rate[2], patches[0] / down, patches[1] / across)
    axes = [(torch.arange(n) + 0.5) * span - 0.5 for n, span in zip(grid, spans, strict=True)]
    positions = torch.cartesian_prod(*axes).to(torch.float32)
    meta = {"grid": json.dumps(grid), "box": json.dumps(box)}
    return tokens, positions, {"table": table}, meta


def _read_dct(bank: MemoryBank, frame_index: int) -> torch.Tensor:
    _, height, width = json.loads(bank.metadata["size"])
    _, down, across = json.loads(bank.metadata["grid"])
    box = json.loads(bank.metadata["box"])
    slab, phase = divmod(frame_index, box[0])
    index = torch.arange(slab * down * across, (slab + 1) * down * across)
    tokens = bank.gather(index, out_dtype=torch.float32) * bank.extras["scale"]
    table = bank.extras["table"].long()
    plane = box[1] * box[2]
    # Only the moment asked for is synthesised: each coefficient counts by its basis at that moment.
    moment = dct_matrix(box[0])[:, phase].float()[table // plane % box[0]]
    place = table // (plane * box[0]) * plane + table % plane
    bands = torch.zeros(len(index), 3 * plane).index_add_(1, place, tokens * moment)
    bands = bands.view(down, across, 3, *box[1:]).permute(2, 0, 3, 1, 4)
    bands = bands.reshape(3, down * box[1], across * box[2])
    rows = _axis_transform(height, down, box[1])
    columns = _axis_transform(width, across, box[2])
    image = rows.T @ (bands @ columns)
    return (dct_matrix(3).float().T @ image.flatten(1)).view(1, 3, 1, height, width)
