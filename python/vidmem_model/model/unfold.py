"""Reading the memory in place: what the memory token of a box says about each patch token of the box."""

from __future__ import annotations

import torch
from torch import nn

from vidmem_kernels import gather_tokens

from .config import Compression
from .encoder import MemoryTokens

# Positions are multiples of a half; more than any of them, less than what int64 holds three of.
_RADIX = 1 << 20


class Unfold(nn.Module):
    """Gives every patch token a linear map, that of its place, of the memory token whose box it is in.

    This is a transposed convolution with a memory token's box as kernel and stride. Boxes are found by the
    positions of the tokens, which stand at their midpoints; those of other sizes are never the same.
    Frames that follow the memory read its last frame: a video goes on where it was.

    Args:
        dim: width of the memory tokens.
        channels: of what a patch token reads.
        compression: of the memory: patch tokens of a box.
    """

    def __init__(self, dim: int, channels: int, compression: Compression) -> None:
        super().__init__()
        self.span, self.places, self.channels = tuple(compression), compression.count, channels
        self.projection = nn.Linear(dim, self.places * channels)
        # On the device with the weights: a copy to it in the middle of a step could not be captured as a CUDA graph.
        self.register_buffer("_box", torch.tensor(self.span), persistent=False)

    def forward(self, memory: MemoryTokens, places: torch.Tensor) -> torch.Tensor:
        """Read.

        Args:
            memory: tokens (B, M, D) with positions (B or 1, M, 3).
            places: (B, Q, 3) positions of patch tokens, whole numbers.

        Returns:
            (B, Q, channels) of the projection's dtype; zeros where the memory has no token of the box.
        """
        weight = self.projection.weight
        if not memory.tokens.shape[1]:
            return weight.new_zeros(*places.shape[:2], self.channels)
        span = self._box
        last = torch.floor(memory.positions[:, :, 0].amax(1) + (self.span[0] - 1) / 2)
        places = torch.cat([places[..., :1].minimum(last[:, None, None]), places[..., 1:]], -1)
        box = torch.floor(places / span)
        t, h, w = (places - box * span).round().long().unbind(-1)
        offset = (t * self.span[1] + h) * self.span[2] + w
        wanted = _key((box + 0.5) * span - 0.5)
        keys, order = _key(memory.positions).expand(len(wanted), -1).sort(-1)
        at = torch.searchsorted(keys, wanted).clamp(max=keys.shape[1] - 1)
        row = order.gather(1, at) * self.places + offset
        row = row.masked_fill(keys.gather(1, at) != wanted, -1)
        made = self.projection(memory.tokens.to(weight.dtype))
        return gather_tokens(made.unflatten(2, (-1, self.channels)).flatten(1, 2), row)


def _key(positions: torch.Tensor) -> torch.Tensor:
    """One int64 for each position (..., 3), which has halves at most and may be negative."""
    t, h, w = (2 * positions).round().long().unbind(-1)
    return (t * _RADIX + h) * _RADIX + w
