"""Unfold memory tokens: each patch token reads the memory token of its box by a linear map."""

from __future__ import annotations

import torch
from torch import nn

from vidmem_kernels import gather_tokens

from .config import Compression
from .encoder import MemoryTokens

# Positions are multiples of 0.5; three of them must fit into an int64.
_RADIX = 1 << 20


class Unfold(nn.Module):
    """Maps the memory token of a box to each patch token in the box, by one linear map per place in the box.

    This is a transposed convolution whose kernel and stride are a box. Boxes are found by the positions of the memory
    tokens, their centres; the centres of boxes of other sizes never match. Frames after the memory read its last memory
    frame, so that a video continues from there.

    Args:
        dim: Channels of a memory token.
        channels: Channels that a patch token reads.
        compression: Patch tokens per box.
    """

    def __init__(self, dim: int, channels: int, compression: Compression) -> None:
        super().__init__()
        self.span, self.places, self.channels = tuple(compression), compression.count, channels
        self.projection = nn.Linear(dim, self.places * channels)
        # A buffer, because a copy to the device during a step cannot be captured in a CUDA graph.
        self.register_buffer("_box", torch.tensor(self.span), persistent=False)

    def forward(self, memory: MemoryTokens, places: torch.Tensor) -> torch.Tensor:
        """Read the memory at the positions of patch tokens.

        Args:
            memory: Memory tokens (B, M, D) with positions (B or 1, M, 3).
            places: (B, Q, 3), positions of patch tokens, whole numbers.

        Returns:
            (B, Q, channels), of the projection's dtype; zeros if the memory has no token of the box.
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
    """Encode each position (..., 3), a multiple of 0.5 that may be negative, as one int64."""
    t, h, w = (2 * positions).round().long().unbind(-1)
    return (t * _RADIX + h) * _RADIX + w
