"""Determines which tokens of an attention may merge: those of the video frames that are not protected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .families import Grid


class Span(NamedTuple):
    """A range [start, stop) of consecutive tokens that may or may not merge."""

    start: int
    stop: int
    free: bool


class TokenLayout(NamedTuple):
    """The tokens of an attention that have a rotary embedding, as consecutive spans.

    Tokens are selected by slices whose sizes follow from the grid, so nothing waits for the device, and one compiled
    graph serves all sizes.

    Attributes:
        spans: the spans, from the first token to the last.
        grid: (frames, H, W) of the tokens that may merge, in their order.
    """

    spans: tuple[Span, ...]
    grid: Grid

    @classmethod
    def of(cls, length: int, grid: Grid, video_last: bool, protect_frames: Sequence[int]) -> TokenLayout:
        """The layout of `length` tokens: the T * H * W of the grid, and others before or after them, which never
        merge."""
        frames, height, width = grid
        per_frame = height * width
        first = length - frames * per_frame if video_last else 0
        protected: list[int] = []  # ascending
        for frame in protect_frames:
            frame = frame + frames if frame < 0 else frame
            place = 0  # by comparisons, because torch.compile cannot sort symbolic numbers
            while place < len(protected) and protected[place] < frame:
                place += 1
            known = place < len(protected) and protected[place] == frame
            if 0 <= frame < frames and not known:
                protected.insert(place, frame)
        spans: list[Span] = []

        def add(start: int, stop: int, free: bool) -> None:
            if start == stop:
                return
            if spans and spans[-1].free == free:
                start = spans.pop().start
            spans.append(Span(start, stop, free))

        add(0, first, False)
        done, free_frames = 0, 0
        for frame in protected:
            add(first + done * per_frame, first + frame * per_frame, True)
            add(first + frame * per_frame, first + (frame + 1) * per_frame, False)
            done, free_frames = frame + 1, free_frames + frame - done
        add(first + done * per_frame, first + frames * per_frame, True)
        add(first + frames * per_frame, length, False)
        return cls(tuple(spans), (free_frames + frames - done, height, width))

    def free(self, x: Tensor) -> Tensor:
        """(B, L, ...) of the tokens that may merge."""
        return _picked(x, [span for span in self.spans if span.free])

    def fixed(self, x: Tensor) -> Tensor:
        """(B, L, ...) of the tokens that may not merge."""
        return _picked(x, [span for span in self.spans if not span.free])

    def joined(self, free: Tensor, fixed: Tensor) -> Tensor:
        """Recombines the tokens selected by `free` and `fixed` in their original order."""
        parts, taken = [], {True: 0, False: 0}
        for span in self.spans:
            start, length = taken[span.free], span.stop - span.start
            parts.append((free if span.free else fixed)[:, start : start + length])
            taken[span.free] = start + length
        return torch.cat(parts, dim=1)


def _picked(x: Tensor, spans: Sequence[Span]) -> Tensor:
    parts = [x[:, span.start : span.stop] for span in spans] or [x[:, :0]]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
