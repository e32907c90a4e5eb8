"""Compute display times of pictures from timestamps that may repeat, jump, be missing or be out of order."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

# A decoder holds back at most 16 pictures, so that timestamps in coding order are off by at most this.
REORDER = 16
# In formats that may be joined, such as transport streams, a larger jump ahead is a join, as in ffmpeg.
JOIN_SECONDS = 10.0
# Maximum number of pictures in a pack of a program stream with one timestamp.
PACKED = 5.5


def shown_times(
    pictures: Iterable[tuple[float | None, bool, T]], step: float, joinable: bool, reorder: int = REORDER
) -> Iterator[tuple[float, T]]:
    """Compute strictly increasing display times of pictures.

    Pictures are in display order, as a decoder returns them, but their timestamps may be wrong.

    - A picture without a timestamp, with the timestamp of the picture before, or with a single outlier comes `step`
      after the picture before.
    - Timestamps that decrease by up to `reorder` steps are in coding order, which AVI and ASF store: they are sorted.
    - Timestamps that decrease by more, or decrease at all after decoding times decreased, or (in a `joinable` format)
      jump ahead by more than 10 s, belong to another video that was joined: it follows after `step`, and later
      pictures keep their distance. In other formats a picture is displayed until the next timestamp.

    Args:
        pictures: (timestamp in seconds or None, whether decoding times decreased since the last one, picture), in
            display order.
        step: Seconds between pictures without timestamps.
        joinable: Whether the format allows timestamps to jump.
        reorder: Number of pictures to look ahead after a gap; 0 for a codec without reordering.

    Returns:
        Iterator over (seconds, picture), strictly increasing, starting at the first timestamp.
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
            # A picture placed by a step must not be hidden by the rounding of the next timestamp.
            before += step
            least = before + min(0.002, step / 4)
        return before, waiting.popleft()

    for stamp, picture in _on_one_clock(pictures, step, joinable):
        heapq.heappush(sorted_stamps, stamp)
        waiting.append(picture)
        # No picture comes before the first coded one, nor before a timestamp right after the last one.
        while waiting and (len(waiting) > reorder or before == -math.inf or sorted_stamps[0] < before + 1.25 * step):
            yield next_shown()
    while waiting:
        yield next_shown()


def steadied(
    pictures: Iterable[tuple[float | None, bool, T]], length: Callable[[T], float], step: float
) -> Iterator[tuple[float | None, bool, T]]:
    """Correct timestamps that are off by a few pictures.

    A program stream has timestamps for packs of several pictures, and FFmpeg may assign one to a neighbouring picture.

    Args:
        pictures: As for `shown_times`.
        length: Function picture -> display time in seconds.
        step: Mean seconds between pictures.
    """
    expected: float | None = None
    for stamp, fell, picture in pictures:
        if expected is not None and (stamp is None or abs(stamp - expected) < PACKED * step):
            stamp = expected
        yield stamp, fell, picture
        expected = None if stamp is None else stamp + length(picture)


class PacketStamps:
    """Checks whether the timestamps of packets, in coding order, are reliable without decoding.

    They are reliable while each packet has a display time, these are distinct and do not jump, and decoding times
    increase.

    Args:
        step: Mean seconds between pictures.
        joinable: As for `shown_times`.
        even: Whether decoding times must also be about evenly spaced.

    Attributes:
        sound: Whether they are reliable so far.
        reordered: Whether a display time decreased, which shows that they are not decoding times.
        lowest: Smallest display time so far, or None.
        highest: Largest display time so far, or None.
    """

    def __init__(self, step: float, joinable: bool, even: bool) -> None:
        self._step, self._joinable, self._even = step, joinable, even
        self._seen: set[float] = set()
        self._decoded: float | None = None
        self.sound, self.reordered = True, False
        self.lowest: float | None = None
        self.highest: float | None = None

    def add(self, shown: float | None, decoded: float | None) -> None:
        """Add display and decoding time of the next packet, in seconds, or None."""
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
    """Whether a timestamp belongs to another video, given the highest timestamp so far."""
    return stamp < highest - REORDER * step or (joinable and stamp > highest + JOIN_SECONDS)


def _on_one_clock(
    pictures: Iterable[tuple[float | None, bool, T]], step: float, joinable: bool
) -> Iterator[tuple[float, T]]:
    """Fill in missing timestamps, drop outliers, and append joined videos."""
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
    """Whether a timestamp is an outlier: the next one fits those before again."""
    reach = REORDER * step
    near = after is not None and highest - reach < after <= highest + reach
    return near and not highest - reach <= stamp <= after + reach
