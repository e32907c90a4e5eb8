"""How tokens split into sources and destinations: what may merge, and masks brought into an order that kernels know."""

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
    """What a match is given of its tokens, besides their metric.

    Attributes:
        tokens: N.
        grid, stride, window: of `match_tokens`.
        whole_cells: only cells that the grid does not cut have a destination.
        num_destinations: the first so many tokens are destinations, whatever the grid; None: as the grid says, or odd
            ones without.
    """

    tokens: Size
    grid: Sequence[Size] | None = None
    stride: Sequence[Size] = (2, 2, 2)
    window: Sequence[Size] | None = None
    whole_cells: bool = False
    num_destinations: Size | None = None

    @property
    def arguments(self) -> tuple[object, ...]:
        """Arguments of the op behind `num_merge`."""
        destinations = -1 if self.num_destinations is None else self.num_destinations
        return self.grid, self.stride, self.window, self.whole_cells, destinations

    def count_sources(self) -> Size:
        """How many tokens see a destination, and may merge."""
        if self.num_destinations is not None:
            return (self.tokens - self.num_destinations) * torch.sym_min(self.num_destinations, 1)
        if self.grid is None:
            return (self.tokens + 1) // 2 * torch.sym_min(self.tokens // 2, 1)  # one token has nothing to merge into
        if not self.whole_cells:
            return self.tokens - _volume(*[(n + s - 1) // s for n, s in zip(self.grid, self.stride, strict=True)])
        window = self.window or (1, 1, 1)
        # A cut cell is next to a whole one on every axis along which it is cut: the smallest window reaches that.
        seeing = [n if w > 0 else n // s * s for n, s, w in zip(self.grid, self.stride, window, strict=True)]
        destinations = _volume(*[n // s for n, s in zip(self.grid, self.stride, strict=True)])
        return (_volume(*seeing) - destinations) * torch.sym_min(destinations, 1)

    def count_unprotected(self, protect: Tensor) -> Tensor:
        """(B,) how many sources may merge where tokens (B, N) stay alone: these see a destination that does not."""
        destinations = -1 if self.num_destinations is None else self.num_destinations
        marks = mark_destinations(self.tokens, self.grid, self.stride, self.whole_cells, destinations, protect.device)
        sources, seen = ~protect & ~marks, ~protect & marks
        if self.window is None:
            return sources.sum(dim=1) * seen.any(dim=1)
        seen = seen.view(seen.shape[0], *self.grid)
        # What is seen is a box, so one axis after the other: whether there is a destination in the cells around.
        for axis, (n, s, w) in enumerate(zip(self.grid, self.stride, self.window, strict=True), 1):
            cell = torch.arange(n, device=protect.device) // s
            s, w = min(s, n), min(w, n)  # sums of any size must not overflow
            before = torch.nn.functional.pad(seen.movedim(axis, -1).cumsum(dim=-1), (1, 0))
            first, last = ((cell - w) * s).clamp(min=0), ((cell + w + 1) * s).clamp(max=n)
            seen = (before[..., last] > before[..., first]).movedim(-1, axis)
        return (sources & seen.flatten(1)).sum(dim=1)


def order_by_mask(destinations: Tensor) -> Tensor:
    """(B, N) positions: the tokens that are marked, then the others, both ascending."""
    return (~destinations).to(torch.int8).argsort(dim=1, stable=True)


def plan_of_order(plan: Sequence[Tensor], order: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The plan, of tokens that were taken in an order (B|1, N), as one of the tokens in their own places."""
    assignment, kept = (field.long() for field in plan[:2])
    order = order.expand(assignment.shape[0], -1)
    kept, former = order.gather(1, kept).sort(dim=1)
    ranks = torch.arange(kept.shape[1], device=kept.device).expand_as(former)
    row = torch.empty_like(former).scatter_(1, former, ranks)  # of a row in the plan that was given
    assignment = torch.empty_like(assignment).scatter_(1, order, row.gather(1, assignment))
    return assignment.to(torch.int32), kept.to(torch.int32), *group_by_row(assignment, kept.shape[1])
