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
    pictures: Iterable[tuple[float | None, bool, T]], step: float, joinable: bool, reorder: int = REORDER
) -> Iterator[tuple[float, T]]:
    """Give every picture the time at which it is shown, on a clock that rises.

    The order of the pictures is right, for a decoder gives them as they are shown; their stamps are not always.

    - A picture without a stamp follows the one before it by `step`, and so does one whose stamp is that of the
      picture before it, or a single stamp far off those around it.
    - Stamps that fall by up to `reorder` steps are those of the coding order, which AVI and ASF keep: they are
      sorted.
    - Stamps that fall by more are those of another film that was joined to the first: it follows by `step`, and
      what comes keeps its distance from there. So are stamps that fall at all after times of decoding fell, and
      in a `joinable` format those that jump ahead by more than 10 s; otherwise a picture stays on screen until
      the next one's stamp.

    Args:
        pictures: (stamp in seconds or None, whether times of decoding fell since the last one, picture), in the
            order in which they are shown.
        step: seconds from picture to picture where no stamp tells.
        joinable: whether the format allows stamps to jump.
        reorder: pictures to look ahead where a stamp leaves a gap, 0 for a codec whose coding order is that of
            showing.

    Returns:
        Iterator over (seconds, picture), strictly rising, on the clock of the first stamp.
    """
    waiting: deque[T] = deque()
    sorted_stamps: list[float] = []
    before, least = -math.inf, -math.inf

    def next_shown() -> tuple[float, T]:
        nonlocal before, least
        stamp = heapq.heappop(sorted_stamps)
        if stamp > least:
            before = least = stamp
        else:
            # Where a picture was put by a step, the rounding of the next one's stamp must not hide it.
            before += step
            least = before + min(0.002, step / 4)
        return before, waiting.popleft()

    for stamp, picture in _on_one_clock(pictures, step, joinable):
        heapq.heappush(sorted_stamps, stamp)
        waiting.append(picture)
        # Nothing comes before the picture that is coded first, nor before a stamp right after the last one.
        while waiting and (len(waiting) > reorder or before == -math.inf or sorted_stamps[0] < before + 1.25 * step):
            yield next_shown()
    while waiting:
        yield next_shown()


def steadied(
    pictures: Iterable[tuple[float | None, bool, T]], length: Callable[[T], float], step: float
) -> Iterator[tuple[float | None, bool, T]]:
    """Take stamps that are off by a few pictures for what they should be.

    A program stream stamps packs, which may hold several pictures: FFmpeg may give a stamp to a neighbour.

    Args:
        pictures: as for `shown_times`.
        length: seconds for which a picture is to be shown.
        step: seconds from picture to picture, on average.
    """
    expected: float | None = None
    for stamp, fell, picture in pictures:
        if expected is not None and (stamp is None or abs(stamp - expected) < PACKED * step):
            stamp = expected
        yield stamp, fell, picture
        expected = None if stamp is None else stamp + length(picture)


class PacketStamps:
    """Whether the stamps of packets can be believed without decoding, as they come in coding order.

    They can while each has a time of showing, no two of these are equal and none jumps, and times of decoding rise.

    Args:
        step: seconds from picture to picture, on average.
        joinable: as for `shown_times`.
        even: the steps of decoding must be about equal, too.

    Attributes:
        sound: whether they can, so far.
        reordered: whether one came that is before another: these are times of showing, not of decoding.
        lowest, highest: times of showing; None at first.
    """

    def __init__(self, step: float, joinable: bool, even: bool) -> None:
        self._step, self._joinable, self._even = step, joinable, even
        self._seen: set[float] = set()
        self._decoded: float | None = None
        self.sound, self.reordered = True, False
        self.lowest: float | None = None
        self.highest: float | None = None

    def add(self, shown: float | None, decoded: float | None) -> None:
        """Take the times in seconds of the next packet, None where there is none."""
        self.sound = self.sound and shown is not None and shown not in self._seen and self._follows(shown, decoded)
        if self.sound:
            self._seen.add(shown)
            self.reordered = self.reordered or (self.highest is not None and shown < self.highest)
            self.lowest = shown if self.lowest is None else min(self.lowest, shown)
            self.highest = shown if self.highest is None else max(self.highest, shown)
            self._decoded = self._decoded if decoded is None else decoded

    def _follows(self, shown: float, decoded: float | None) -> bool:
        if self.highest is not None and _jumps(shown, self.highest, self._step, self._joinable):
            return False
        if decoded is None or self._decoded is None:
            return True
        gap = (decoded - self._decoded) / self._step
        return 0.5 < gap < 1.8 if self._even else gap > 0


def _jumps(stamp: float, highest: float, step: float, joinable: bool) -> bool:
    """Whether a stamp cannot belong to the film whose highest stamp so far is given."""
    return stamp < highest - REORDER * step or (joinable and stamp > highest + JOIN_SECONDS)


def _on_one_clock(
    pictures: Iterable[tuple[float | None, bool, T]], step: float, joinable: bool
) -> Iterator[tuple[float, T]]:
    """Fill in missing stamps, drop single ones that are far off, and let joined films follow each other."""
    highest: float | None = None
    offset, joined = 0.0, False
    ahead = itertools.chain(pictures, [None])
    current = next(ahead)
    while current is not None:
        following = next(ahead)
        stamp, fell, picture = current
        joined = joined or fell
        if highest is None:
            stamp = 0.0 if stamp is None else stamp
        elif stamp is None:
            stamp = highest + step
        else:
            stamp += offset
            after = None if following is None or following[0] is None else following[0] + offset
            if _stray(stamp, after, highest, step):
                stamp = highest + step
            elif (joined and stamp < highest) or _jumps(stamp, highest, step, joinable):
                offset += highest + step - stamp
                stamp, joined = highest + step, False
        highest = stamp if highest is None else max(highest, stamp)
        yield stamp, picture
        current = following


def _stray(stamp: float, after: float | None, highest: float, step: float) -> bool:
    """Whether a stamp leaves its film and the next one returns to it."""
    reach = REORDER * step
    near = after is not None and highest - reach < after <= highest + reach
    return near and not highest - reach <= stamp <= after + reach
