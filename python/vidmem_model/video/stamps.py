"""When the pictures of a film are shown, from stamps that may repeat, jump, be missing or be in wrong order."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# A decoder holds back 16 pictures at most, so that stamps in coding order are off by no more.
REORDER = 16
# Where a format may be joined (a transport stream, say), a jump ahead by more seconds is a join, as for ffmpeg.
JOIN_SECONDS = 10.0
# Pictures that a pack of a program stream may hold and still be stamped once.
PACKED = 5.5


def shown_times(
    pictures: Iterable[tuple[float | None, T]], step: float, joinable: bool, reorder: int = REORDER
) -> Iterator[tuple[float, T]]:
    """Give every picture the time at which it is shown, on a clock that rises.

    The order of the pictures is right, for a decoder gives them as they are shown; their stamps are not always.

    - A picture without a stamp follows the one before it by `step`, and so does one whose stamp is that of the
      picture before it, or a single stamp far off those around it.
    - Stamps that fall by up to `reorder` steps are those of the coding order, which AVI and ASF keep: they are
      sorted.
    - Stamps that fall by more are those of another film that was joined to the first: it follows by `step`, and
      what comes keeps its distance from there. In a `joinable` format so do stamps that jump ahead by more
      than 10 s; elsewhere a picture stays on screen until the next one's stamp.

    Args:
        pictures: (stamp in seconds or None, picture), in the order in which they are shown.
        step: seconds from picture to picture where no stamp tells.
        joinable: whether the format allows stamps to jump.
        reorder: pictures to look ahead, 0 for a codec that codes them in the order in which they are shown.

    Returns:
        Iterator over (seconds, picture), strictly rising, on the clock of the first stamp.
    """
    waiting: deque[T] = deque()
    sorted_stamps: list[float] = []
    before = -math.inf

    def next_shown() -> tuple[float, T]:
        nonlocal before
        stamp = heapq.heappop(sorted_stamps)
        before = stamp if stamp > before else before + step
        return before, waiting.popleft()

    for stamp, picture in _on_one_clock(pictures, step, joinable):
        heapq.heappush(sorted_stamps, stamp)
        waiting.append(picture)
        if len(waiting) > reorder:
            yield next_shown()
    while waiting:
        yield next_shown()


def steadied(
    pictures: Iterable[tuple[float | None, T]], length: Callable[[T], float], step: float
) -> Iterator[tuple[float | None, T]]:
    """Take stamps that are off by a few pictures for what they should be.

    A program stream stamps packs, which may hold several pictures: FFmpeg may give a stamp to a neighbour.

    Args:
        pictures: (stamp in seconds or None, picture), in the order in which they are shown.
        length: seconds for which a picture is to be shown.
        step: seconds from picture to picture, on average.
    """
    expected: float | None = None
    for stamp, picture in pictures:
        if expected is not None and (stamp is None or abs(stamp - expected) < PACKED * step):
            stamp = expected
        yield stamp, picture
        expected = None if stamp is None else stamp + length(picture)


def is_jump(stamp: float, highest: float, step: float, joinable: bool) -> bool:
    """Whether a stamp cannot belong to the film whose highest stamp so far is given."""
    return stamp < highest - REORDER * step or (joinable and stamp > highest + JOIN_SECONDS)


def _on_one_clock(pictures: Iterable[tuple[float | None, T]], step: float, joinable: bool) -> Iterator[tuple[float, T]]:
    """Fill in missing stamps, drop single ones that are far off, and let joined films follow each other."""
    highest: float | None = None
    offset = 0.0
    ahead = itertools.chain(pictures, [None])
    current = next(ahead)
    while current is not None:
        following = next(ahead)
        stamp, picture = current
        if highest is None:
            stamp = 0.0 if stamp is None else stamp
        elif stamp is None:
            stamp = highest + step
        else:
            stamp += offset
            after = None if following is None or following[0] is None else following[0] + offset
            if _stray(stamp, after, highest, step):
                stamp = highest + step
            elif is_jump(stamp, highest, step, joinable):
                offset += highest + step - stamp
                stamp = highest + step
        highest = stamp if highest is None else max(highest, stamp)
        yield stamp, picture
        current = following


def _stray(stamp: float, after: float | None, highest: float, step: float) -> bool:
    """Whether a stamp leaves its film and the next one returns to it."""
    reach = REORDER * step
    near = after is not None and highest - reach < after <= highest + reach
    return near and not highest - reach <= stamp <= after + reach
