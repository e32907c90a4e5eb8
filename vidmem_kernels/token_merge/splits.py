"""Divides tokens into sources and destinations: what may merge, and the order of tokens for masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .reference import group_by_row, mark_destinations

Size = int | torch.SymInt


def _volume(t: Size, h: Size, w: Size) -> Size:
    return t * h * w


class Split(NamedTuple):
    """The arguments of a match besides the metric.

    Attributes:
        tokens: N.
        grid: see `match_tokens`.
        stride: see `match_tokens`.
        window: see `match_tokens`.
        whole_cells: only cells that the border of the grid does not cut have a destination.
        num_destinations: if given, this many first tokens are destinations; None: as the grid defines, or the odd ones.
    """

    tokens: Size
    grid: Sequence[Size] | None = None
    stride: Sequence[Size] = (2, 2, 2)
    window: Sequence[Size] | None = None
    whole_cells: bool = False
    num_destinations: Size | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        """The op's arguments after num_merge."""
        destinations = -1 if self.num_destinations is None else self.num_destinations
        return self.grid, self.stride, self.window, self.whole_cells, destinations

    def count_sources(self) -> Size:
        """The number of tokens that see a destination and may merge."""
        if self.num_destinations is not None:
            return (self.tokens - self.num_destinations) * torch.sym_min(self.num_destinations, 1)
        if self.grid is None:
            return (self.tokens + 1) // 2 * torch.sym_min(self.tokens // 2, 1)  # a single token has no destination
        if not self.whole_cells:
            return self.tokens - _volume(*[(n + s - 1) // s for n, s in zip(self.grid, self.stride, strict=True)])
        window = self.window or (1, 1, 1)
        # A cut cell is next to a whole one on each axis on which it is cut, so a window of 1 reaches it.
        seeing = [n if w > 0 else n // s * s for n, s, w in zip(self.grid, self.stride, window, strict=True)]
        destinations = _volume(*[n // s for n, s in zip(self.grid, self.stride, strict=True)])
        return (_volume(*seeing) - destinations) * torch.sym_min(destinations, 1)

    def count_unprotected(self, protect: Tensor) -> Tensor:
        """(B,) the number of sources that may merge if the tokens marked in (B, N) stay alone.

        A source must see a destination that is not protected.
        """
        destinations = -1 if self.num_destinations is None else self.num_destinations
        marks = mark_destinations(self.tokens, self.grid, self.stride, self.whole_cells, destinations, protect.device)
        sources, seen = ~protect & ~marks, ~protect & marks
        if self.window is None:
            return sources.sum(dim=1) * seen.any(dim=1)
        seen = seen.view(seen.shape[0], *self.grid)
        # The visible cells form a box, so each axis is handled in turn: whether the cells around have a destination.
        for axis, (n, s, w) in enumerate(zip(self.grid, self.stride, self.window, strict=True), 1):
            cell = torch.arange(n, device=protect.device) // s
            s, w = min(s, n), min(w, n)  # avoids overflow for huge sizes
            before = torch.nn.functional.pad(seen.movedim(axis, -1).cumsum(dim=-1), (1, 0))
            first, last = ((cell - w) * s).clamp(min=0), ((cell + w + 1) * s).clamp(max=n)
            seen = (before[..., last] > before[..., first]).movedim(-1, axis)
        return (sources & seen.flatten(1)).sum(dim=1)


def order_by_mask(destinations: Tensor) -> Tensor:
    """(B, N) positions: first the marked tokens, then the others, both ascending."""
    return (~destinations).to(torch.int8).argsort(dim=1, stable=True)


def plan_of_order(plan: Sequence[Tensor], order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Converts a plan for tokens in the order (B or 1, N) to a plan for the tokens in their original order."""
    assignment, kept = (field.long() for field in plan[:2])
    order = order.expand(assignment.shape[0], -1)
    kept, former = order.gather(1, kept).sort(dim=1)
    ranks = torch.arange(kept.shape[1], device=kept.device).expand_as(former)
    row = torch.empty_like(former).scatter_(1, former, ranks)  # new row of each row of the given plan
    assignment = torch.empty_like(assignment).scatter_(1, order, row.gather(1, assignment))
    return assignment.to(torch.int32), kept.to(torch.int32), *group_by_row(assignment, kept.shape[1])
