"""Memory encoders: compress the latents of a history to memory tokens for the diffusion transformer.

The encoder of arXiv 2512.23851 sums two branches. The low-resolution branch (LR) passes a downscaled video through the
VAE and the transformer's patch embedding; the high-resolution branch (HR) passes the full latents through causal
convolutions and attention. EncoderConfig.branches can select one branch only, or a single large patch projection,
token merging or sparsification instead.

A history may be encoded segment by segment: `append` keeps the state that later segments need, and the concatenated
tokens equal those of the whole history.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vidmem_kernels import match_tokens, merge_tokens, select_tokens

from ..vae import PATCH, patchify
from ..vae.config import VAEConfig
from .config import Compression, EncoderConfig
from .encoder_layers import HighResolution, HighState

PatchEmbed = Callable[[torch.Tensor], torch.Tensor]

_MERGE_STRIDE = (2, 2, 2)
_MERGE_WINDOW = (2, 2, 2)
# Root mean square of HR tokens at initialisation, for inputs of 1. LR tokens have about 0.5, so that they dominate at
# first in "both"; without LR tokens, HR tokens are still large enough beside the position features.
_HIGH_INIT = 0.25


class MemoryTokens(NamedTuple):
    """Memory tokens of a history.

    Attributes:
        tokens: (B, M, D), D being the width of the diffusion transformer.
        positions: float32 (B or 1, M, 3), centre (t, h, w) of each token, in patch tokens.
    """

    tokens: torch.Tensor
    positions: torch.Tensor


class History(NamedTuple):
    """Latents of a video, the input of the memory encoders.

    Attributes:
        latents: (B, C, T, H, W), scaled; None if no encoder reads them.
        lows: For each encoder the scaled latents (B, C, T', H', W') of its low-resolution video (`low_resolution`),
            or None if the encoder reads none.
    """

    latents: torch.Tensor | None
    lows: Sequence[torch.Tensor | None]

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> History:
        """Apply a function to all latents.

        Args:
            change: The function, called with each tensor.

        Returns:
            The changed history.
        """
        latents, *lows = (None if x is None else change(x) for x in (self.latents, *self.lows))
        return History(latents, lows)

    @classmethod
    def stack(cls, histories: Sequence[History]) -> History:
        """Stack histories without a batch dimension to a batch.

        Args:
            histories: Histories of one shape.

        Returns:
            A history with a batch dimension.
        """
        latents, lows = zip(*histories, strict=True)
        return cls(
            torch.stack(latents), [None if low[0] is None else torch.stack(low) for low in zip(*lows, strict=True)]
        )


class EncoderState(NamedTuple):
    """State of an encoder between segments.

    Attributes:
        boxes: Boxes in time that are encoded.
        history: Latents that do not fill a box yet, or wait for low-resolution latents.
        low: Low-resolution latents that wait for their box.
        high: State of the HR branch.
    """

    boxes: int
    history: torch.Tensor | None
    low: torch.Tensor | None
    high: HighState | None


def memory_grid(compression: Compression, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Count the boxes of latents; each box becomes one memory token.

    Numbers are rounded down: rows at the bottom and columns at the right that do not fill a box are cropped; frames at
    the end that do not fill a box are not encoded yet.

    Args:
        compression: Patch tokens per box.
        frames: Latent frames.
        rows: Latent rows.
        columns: Latent columns.

    Returns:
        Number of boxes (t, h, w).
    """
    time, height, width = compression
    return frames // time, rows // (PATCH * height), columns // (PATCH * width)


def count_tokens(config: EncoderConfig, vae: VAEConfig, frames: int, height: int, width: int) -> int:
    """Count the memory tokens of a video, with the padding of the VAE and the cropping of the encoder.

    Args:
        config: Configuration of the memory encoder.
        vae: Configuration of the VAE; the first latent frame of Wan's and Hunyuan's covers a single frame.
        frames: Number of video frames.
        height: Rows of a frame, in pixels.
        width: Columns of a frame, in pixels.

    Returns:
        Number of tokens; 5,460 for 480 frames of 480x832 (height x width) at the default compression, 4x4x2.
    """
    time, rows, columns = vae.stride
    first = 1 if vae.kind in ("wan", "hunyuan") else time
    latent_frames = 1 + -(-max(frames - first, 0) // time) if frames > 0 else 0
    size = (-(-n // (s * PATCH)) * PATCH for n, s in ((height, rows), (width, columns)))
    return math.prod(memory_grid(config.compression, latent_frames, *size))


def low_resolution(frames: torch.Tensor, compression: Compression) -> torch.Tensor:
    """Make the video of the LR branch, downscaled by `compression` along time, height and width.

    Every `time`-th frame is taken, and areas of `height` x `width` pixels are averaged. Rows at the bottom and columns
    at the right that do not fill an area are cropped; the encoder crops the latents to its boxes. A long video may be
    given in pieces of multiples of `compression.time` frames.

    Args:
        frames: (B, 3, T, H, W) in [-1, 1].
        compression: Compression of the memory encoder.

    Returns:
        (B, 3, ceil(T / time), H // height, W // width).

    Raises:
        ValueError: The frames are not (B, 3, T, H, W), or smaller than one area.
    """
    time, height, width = compression
    if frames.ndim != 5 or frames.shape[3] < height or frames.shape[4] < width:
        raise ValueError(
            f"low_resolution: frames must be (B, 3, T, H, W) of at least {height} x {width} pixels, "
            f"got {tuple(frames.shape)}"
        )
    kept = frames[:, :, ::time]
    return F.avg_pool2d(kept.flatten(0, 2)[:, None], (height, width))[:, 0].unflatten(0, kept.shape[:3])


class MemoryEncoder(nn.Module):
    """Encodes the latents of a history to memory tokens.

    Args:
        config: Compression, branches, channels and attention.
        dim: Channels D of the tokens, the width of the diffusion transformer. If `config.width` is set, tokens are
            projected from that width to D.
        latent_channels: Channels of the VAE.
    """

    TRAINED_AS = {"shortcut": "fitted", "patchifier": "fitted"}

    def __init__(self, config: EncoderConfig, dim: int, latent_channels: int) -> None:
        super().__init__()
        self.config, self.dim, self.channels = config, dim, latent_channels
        self.high = self.projection = self.shortcut = self.patchifier = self.patches = self.output = None
        if config.width:
            dim, self.output = config.width, _linear(config.width, dim)
            if config.reads_low:
                self.patches = _linear(latent_channels * PATCH**2, dim)
        numbers = latent_channels * math.prod(self._box())
        if config.branches in ("both", "hr"):
            self.high = HighResolution(config, latent_channels)
            self.projection = nn.Linear(config.channels[-1], dim)
            nn.init.normal_(self.projection.weight, std=_HIGH_INIT * config.channels[-1] ** -0.5)
            nn.init.zeros_(self.projection.bias)
            if config.shortcut:
                self.shortcut = nn.Sequential(
                    _linear(numbers, config.shortcut), nn.Linear(config.shortcut, dim, bias=False)
                )
                nn.init.orthogonal_(self.shortcut[1].weight)
        elif config.branches == "patchifier":
            self.patchifier = _linear(numbers, dim)

    def grid(self, frames: int, rows: int, columns: int) -> tuple[int, int, int]:
        """Count the boxes of latents; see `memory_grid`."""
        return memory_grid(self.config.compression, frames, rows, columns)

    def forward(self, history: torch.Tensor | None, low: torch.Tensor | None, patch_embed: PatchEmbed) -> MemoryTokens:
        """Encode a whole history.

        Args:
            history: Scaled latents (B, C, T, H, W). Optional for branches "lr"; if given, they set the number of boxes.
            low: Scaled latents (B, C, T', H', W') of the low-resolution video, at least one frame and 2 x 2 cells per
                box; more are cropped. Required for branches "both" and "lr".
            patch_embed: Patch embedding of the transformer, latents (B, C, T, H, W) -> (B, T * H/2 * W/2, D).

        Returns:
            Memory tokens of t * h * w boxes (`grid`), limited by the frames of `low`.

        Raises:
            ValueError: An input is missing or does not fit.
        """
        return self.append(history, low, patch_embed, None)[0]

    def append(
        self,
        history: torch.Tensor | None,
        low: torch.Tensor | None,
        patch_embed: PatchEmbed,
        state: EncoderState | None,
    ) -> tuple[MemoryTokens, EncoderState]:
        """Encode the next segment of a history.

        Segments may have any length, even 0, and those of `history` and `low` need not match: a token is returned as
        soon as both cover its box. The concatenated tokens equal those of `forward`, except for branches "merge" and
        "sparse", which reduce the boxes of each segment separately.

        Args:
            history: As for `forward`, of the segment.
            low: As for `forward`, of the segment.
            patch_embed: As for `forward`.
            state: State from the call before; None at the start. It is not modified.

        Returns:
            Memory tokens of the boxes that became complete, and the new state.

        Raises:
            ValueError: An input is missing, or does not fit or match the segments before.
        """
        history, low = self._segment(history, low)
        if state is not None:
            history, low = _join("history", state.history, history), _join("low", state.low, low)
        start, kept = (state.boxes, state.high) if state is not None else (0, None)
        time = self.config.compression.time
        counts = [x.shape[2] // n for x, n in ((history, time), (low, 1)) if x is not None]
        count = min(counts)
        if count == 0:
            given = history if history is not None else low
            empty = given.new_zeros(len(given), 0, self.dim), torch.zeros(1, 0, 3, device=given.device)
            return MemoryTokens(*empty), EncoderState(start, history, low, kept)

        boxes = history[:, :, : count * time] if history is not None else None
        made, kept = self._encode(boxes, low[:, :, :count] if low is not None else None, patch_embed, start, kept)
        # Copies: a view would keep the whole segment in memory.
        history = history[:, :, count * time :].clone() if history is not None else None
        low = low[:, :, count:].clone() if low is not None else None
        return made, EncoderState(start + count, history, low, kept)

    def _encode(
        self,
        history: torch.Tensor | None,
        low: torch.Tensor | None,
        patch_embed: PatchEmbed,
        start: int,
        kept: HighState | None,
    ) -> tuple[MemoryTokens, HighState | None]:
        """Encode whole boxes, from number `start` in time."""
        branches = self.config.branches
        if low is not None:
            grid = (low.shape[2], low.shape[3] // PATCH, low.shape[4] // PATCH)
        else:
            grid = self.grid(*history.shape[2:])
        if branches in ("merge", "sparse"):
            return self._reduce(history, math.prod(grid), patch_embed, start), kept
        parts = []
        if low is not None:
            parts.append(patch_embed(low) if self.patches is None else self._embed(low))
        if self.high is not None:
            hidden, kept = self.high(history.to(self.projection.weight.dtype), start, kept)
            parts.append(self.projection(hidden))
        for layers in (self.shortcut, self.patchifier):
            if layers is not None:
                parts.append(layers(self.boxes(history).to(next(layers.parameters()).dtype)))
        positions = _positions(grid, self.config.compression, start, parts[0].device)
        tokens = sum(parts[1:], parts[0])
        return MemoryTokens(tokens if self.output is None else self.output(tokens), positions), kept

    def _embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Patch tokens of width `config.width`."""
        return self.patches(patchify(latents)[0].to(self.patches.weight.dtype))

    def boxes(self, history: torch.Tensor) -> torch.Tensor:
        """Cut latents (B, C, T, H, W) into whole boxes: (B, boxes, C * cells per box)."""
        time, rows, columns = self._box()
        cells = history.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, time))
        return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def _reduce(self, history: torch.Tensor, count: int, patch_embed: PatchEmbed, start: int) -> MemoryTokens:
        """Reduce the patch tokens of whole boxes to `count`, by merging or selection."""
        grid = (history.shape[2], history.shape[3] // PATCH, history.shape[4] // PATCH)
        tokens = patch_embed(history)
        places = _positions(grid, (1, 1, 1), 0, tokens.device)
        places[..., 0] += start * self.config.compression.time
        if self.config.branches == "sparse":
            kept, index = select_tokens(tokens, count)
            return MemoryTokens(kept, places[0][index.long()])
        return _merge(tokens, places.expand(len(tokens), -1, -1), grid, count)

    def _box(self) -> tuple[int, int, int]:
        """Latent cells per box, (time, height, width)."""
        time, height, width = self.config.compression
        return time, PATCH * height, PATCH * width

    def _segment(
        self, history: torch.Tensor | None, low: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Check a segment and crop it to whole boxes; latents that the encoder does not read become None."""
        branches = self.config.branches
        if not self.config.reads_low:
            low = None
        elif low is None:
            raise ValueError(f"MemoryEncoder: low must be given for branches {branches!r}, got None")
        if history is None and branches != "lr":
            raise ValueError(f"MemoryEncoder: history must be given for branches {branches!r}, got None")
        for name, x in (("history", history), ("low", low)):
            if x is not None and (x.ndim != 5 or x.shape[1] != self.channels):
                shape = f"(B, {self.channels}, T, H, W)"
                raise ValueError(f"MemoryEncoder: {name} must be of shape {shape}, got {tuple(x.shape)}")
        if history is not None:
            _, rows, columns = self.grid(*history.shape[2:])
            _, box_rows, box_columns = self._box()
            if not rows or not columns:
                raise ValueError(
                    f"MemoryEncoder: history must have at least {box_rows} x {box_columns} cells a frame, "
                    f"got {tuple(history.shape)}"
                )
            history = history[..., : rows * box_rows, : columns * box_columns]
        else:
            rows, columns = (n // PATCH for n in low.shape[3:])
        if low is not None:
            if low.shape[3] < rows * PATCH or low.shape[4] < columns * PATCH:
                raise ValueError(
                    f"MemoryEncoder: low must have at least {rows * PATCH} x {columns * PATCH} cells a frame, "
                    f"got {tuple(low.shape)}"
                )
            low = low[..., : rows * PATCH, : columns * PATCH]
        return history, low


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _join(name: str, before: torch.Tensor | None, segment: torch.Tensor | None) -> torch.Tensor | None:
    """Concatenate the waiting latents and the segment."""
    if (before is None) != (segment is None):
        raise ValueError(f"MemoryEncoder.append: {name} must be given in every segment or in none, got a change")
    if before is None:
        return None
    if before.shape[:2] + before.shape[3:] != segment.shape[:2] + segment.shape[3:]:
        raise ValueError(
            f"MemoryEncoder.append: {name} must have the batch and the size of the segments before, "
            f"(after cropping) {tuple(before.shape)}, got {tuple(segment.shape)}"
        )
    return torch.cat([before, segment], 2)


def _positions(grid: tuple[int, int, int], spans: Iterable[int], start: int, device: torch.device) -> torch.Tensor:
    """Centres (1, N, 3) of boxes of `spans` patch tokens, from number `start` in time."""
    axes = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    axes[0] += start
    axes = [(axis + 0.5) * span - 0.5 for axis, span in zip(axes, spans, strict=True)]
    return torch.cartesian_prod(*axes)[None]


def _merge(tokens: torch.Tensor, places: torch.Tensor, grid: tuple[int, int, int], count: int) -> MemoryTokens:
    """Merge tokens (B, N, D) to `count` by rounds of matching on ever coarser grids, as in ToMe."""
    weight = torch.ones(tokens.shape[:2], device=tokens.device)
    while tokens.shape[1] > count:
        coarse = tuple(-(-n // s) for n, s in zip(grid, _MERGE_STRIDE, strict=True))
        excess = tokens.shape[1] - max(count, math.prod(coarse))
        plan = match_tokens(_metric(tokens), excess, grid=grid, stride=_MERGE_STRIDE, window=_MERGE_WINDOW)
        places, merged = merge_tokens(places, plan, weight)
        tokens, _ = merge_tokens(tokens, plan, weight.to(torch.promote_types(tokens.dtype, torch.float32)))
        weight, grid = merged, coarse
    return MemoryTokens(tokens, places)


def _metric(tokens: torch.Tensor) -> torch.Tensor:
    """Append a large constant to tokens, so that cosine similarity ranks by distance.

    For vectors (x, r) with r much larger than |x|, 1 - cos is about |x - y|^2 / 2r^2. Tokens that differ in length but
    not in direction, such as those of dark and bright areas, then do not match.
    """
    metric = tokens.detach().to(torch.promote_types(tokens.dtype, torch.float32))
    lift = 4.0 * metric.square().sum(-1).mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    return torch.cat([metric, lift[..., None].expand(*metric.shape[:-1], 1)], -1)
