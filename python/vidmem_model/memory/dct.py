"""The method dct: each box of the clip becomes one token of its strongest low DCT frequencies.

The clip is cut into boxes of `compression` patch tokens. The token of a box holds those coefficients of its DCT over
(colour, time, height, width) that have the most energy in the whole clip.
"""

from __future__ import annotations

import functools
import json
import math

import torch

from vidmem_kernels import MemoryBank

from ..errors import UserError
from ..vae import PATCH, DCTCodec, dct_matrix, frames_to_uint8, pad_frames, rechunk
from ..video import Clip
from .config import CompressorConfig
from .header import MemoryHeader, check_range, check_rows, extra
from .method import EncodedClip, Progress, Rows, box_grid, encoded

# Candidate coefficients per kept one. On four clips of 20 s at 480x832, choosing the strongest 3,072 of 4 x 3,072 loses
# less than 0.03 dB against choosing among all 98,304.
_CANDIDATES = 4


@functools.lru_cache(maxsize=16)
def _axis_transform(length: int, boxes: int, box: int) -> torch.Tensor:
    """Matrix (boxes * box, length) that resamples an axis to whole boxes and applies the DCT to each box.

    Resampling truncates or zero-pads the DCT of the whole axis, so that the transpose
    reads the axis back (without the truncated frequencies).
    """
    total = boxes * box
    shared = min(total, length)
    resample = dct_matrix(total)[:shared].T @ dct_matrix(length)[:shared]
    blocks = torch.block_diag(*[dct_matrix(box)] * boxes)
    return (blocks @ resample).to(torch.float32)


def _transform_columns(frames: torch.Tensor, boxes: int, box: int) -> torch.Tensor:
    if frames.shape[-1] == boxes * box:  # without resampling, a transform per box is much cheaper
        return (frames.unflatten(-1, (boxes, box)) @ dct_matrix(box).float().T).flatten(-2)
    return frames @ _axis_transform(frames.shape[-1], boxes, box).T


def _low_frequencies(box: tuple[int, int, int], count: int) -> torch.Tensor:
    """Indices of the `count` lowest frequencies in a flattened (colour, time, height, width) box."""
    kc, kt, kh, kw = torch.meshgrid(*map(torch.arange, (3, *box)), indexing="ij")
    frequency = (kt + 1) * (kh + 4) * (kw + 4) * torch.where(kc > 0, 3, 1)
    return frequency.flatten().argsort(stable=True)[:count]


def compress(clip: Clip | EncodedClip, config: CompressorConfig, progress: Progress | None) -> Rows:
    """Make a token of every box; see `method.Implementation`."""
    clip = encoded(clip)
    codec, size = clip.codec, clip.size
    grid, box = box_grid(size, codec.stride, config.compression)
    whole = 3 * math.prod(box)
    if config.channels > whole:
        raise UserError(
            f"channels must be in [1, {whole}], the coefficients of a box of {box[0]} frames x {box[1]} x {box[2]} "
            f"pixels, got {config.channels}"
        )
    down, across = grid[1:]
    rows = _axis_transform(size[1], down, box[1])
    moments = torch.kron(dct_matrix(3), dct_matrix(box[0])).float()
    candidates = _low_frequencies(box, _CANDIDATES * config.channels)
    energy = torch.zeros(len(candidates), dtype=torch.float64)
    spectra = []
    latent_frames = -(-size[0] // codec.stride[0])
    boxes = rechunk(codec.decode_chunks(clip.latents, size), box[0], dim=2)
    for done, frames in enumerate(boxes, start=1):
        planes = pad_frames(frames, (box[0], 1, 1)).flatten(0, 2)
        bands = rows @ _transform_columns(planes, across, box[2])
        bands = (moments @ bands.flatten(1)).view(-1, down, box[1], across, box[2])
        bands = bands.permute(1, 3, 0, 2, 4).reshape(down * across, whole)[:, candidates]
        energy += bands.square().sum(0)
        spectra.append(bands)
        if progress:
            progress(min(done * config.compression.time, latent_frames), latent_frames)
    if len(spectra) != grid[0]:  # for example, if an iterator is read a second time
        raise ValueError(f"compress: latents must hold {grid[0]} boxes in time for {size}, got {len(spectra)}")
    strongest = energy.argsort(descending=True, stable=True)[: config.channels]
    tokens = torch.cat([bands[:, strongest] for bands in spectra])
    table = candidates[strongest].to(torch.int32)
    patches = [-(-n // (s * PATCH)) for n, s in zip(size[1:], codec.stride[1:], strict=True)]
    spans = (config.compression.time, patches[0] / down, patches[1] / across)
    axes = [(torch.arange(n) + 0.5) * span - 0.5 for n, span in zip(grid, spans, strict=True)]
    positions = torch.cartesian_prod(*axes).to(torch.float32)
    meta = {"grid": json.dumps(grid), "box": json.dumps(box)}
    return Rows(tokens, positions, codec, {"table": table}, meta)


def check(bank: MemoryBank, header: MemoryHeader) -> None:
    """Check that there is one token for each box of the clip; see `method.Implementation`."""
    (frames, *pixels), box = header.size, header.box
    grid = (-(-frames // box[0]), *(max(1, n // side) for n, side in zip(pixels, box[1:], strict=True)))
    if header.grid != grid or math.prod(grid) != len(bank):
        raise ValueError(f"{len(bank)} rows and grid {header.grid} for size {header.size} in boxes {box}")
    check_range("table", extra(bank, "table", (torch.int32,), (bank.channels,)), 3 * math.prod(box))
    t, h, w = DCTCodec.stride
    check_rows(bank, header, (grid[0] * box[0] / t, -(-pixels[0] // (h * PATCH)), -(-pixels[1] // (w * PATCH))))


def read(bank: MemoryBank, frame: int) -> torch.Tensor:
    """Read one frame from the tokens of the boxes that contain it; see `method.Implementation`."""
    _, height, width = json.loads(bank.metadata["size"])
    _, down, across = json.loads(bank.metadata["grid"])
    box = json.loads(bank.metadata["box"])
    slab, phase = divmod(frame, box[0])
    index = torch.arange(slab * down * across, (slab + 1) * down * across)
    tokens = bank.gather(index, out_dtype=torch.float32) * bank.extras["scale"]
    table = bank.extras["table"].long()
    plane = box[1] * box[2]
    # Only the requested frame is synthesised: coefficients are weighted by the time basis at that frame.
    moment = dct_matrix(box[0])[:, phase].float()[table // plane % box[0]]
    place = table // (plane * box[0]) * plane + table % plane
    bands = torch.zeros(len(index), 3 * plane).index_add_(1, place, tokens * moment)
    bands = bands.view(down, across, 3, *box[1:]).permute(2, 0, 3, 1, 4)
    bands = bands.reshape(3, down * box[1], across * box[2])
    rows = _axis_transform(height, down, box[1])
    columns = _axis_transform(width, across, box[2])
    image = rows.T @ (bands @ columns)
    return frames_to_uint8((dct_matrix(3).float().T @ image.flatten(1)).view(1, 3, 1, height, width))[0]
