"""Detect damaged pictures, as opposed to pictures that refer to others that were cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av


@dataclass
class _Damage:
    """A range of damaged pictures, from a timestamp to that of the next key frame; None if timestamps are missing."""

    reason: str
    first: int | None
    end: int | None = None
    seen: bool = False

    def spoils(self, stamp: int | None) -> bool:
        if stamp is None or self.first is None:
            return True
        return self.first <= stamp and (self.end is None or stamp < self.end)


class DamageWatch:
    """Watches packets and frames for damage, which FFmpeg conceals by default.

    These are not damage:

    - pictures before the first key frame: they refer to pictures that were cut off or skipped;
    - a packet marked as corrupt that is followed by a key frame, with no packet missing between: at a join of transport
      streams the packet counters do not match, but no picture is lost.

    Args:
        step: Mean difference of timestamps between packets.
    """

    def __init__(self, step: float) -> None:
        self._step = step
        self._keyed = False
        self._key: int | None = None
        self._damages: list[_Damage] = []
        self._suspect: av.Packet | None = None
        self._behind = 0
        self._coded: int | None = None

    def enter(self, packet: av.Packet) -> None:
        """Inspect a packet before it is decoded."""
        if packet.is_keyframe:
            if not self._keyed:
                self._keyed, self._key = True, packet.pts
            for damage in self._damages:
                damage.end = packet.pts if damage.end is None else damage.end
            self._suspect = None
        elif self._suspect is not None:
            self._behind += 1
            if self._behind == 2 or packet.is_corrupt or self._misses(packet):
                self.end()
        if packet.is_corrupt and packet.size:
            self._suspect, self._behind = packet, 0
        self._coded = packet.dts

    def _misses(self, packet: av.Packet) -> bool:
        """Whether packets are missing before this one."""
        return None not in (self._coded, packet.dts) and packet.dts - self._coded > 1.5 * self._step

    def end(self) -> None:
        """Treat the packet marked as corrupt as damaged, because no key frame followed."""
        if self._suspect is not None:
            self.fails(self._suspect, "damaged data")
            self._suspect = None

    def fails(self, packet: av.Packet, reason: str) -> None:
        """Record that a packet cannot be decoded."""
        if not self._leans(packet.pts):
            self._damages.append(_Damage(reason, packet.pts))

    def judge(self, frame: av.VideoFrame) -> tuple[bool, str | None]:
        """Return whether to keep a frame, and the reason why it is damaged, or None."""
        if frame.is_corrupt and self._leans(frame.pts):
            return False, None
        found = [damage for damage in self._damages if damage.spoils(frame.pts)]
        for damage in found:
            damage.seen = True
        return True, found[0].reason if found else "damaged data" if frame.is_corrupt else None

    def lost(self) -> Iterator[tuple[int | None, str]]:
        """Yield timestamp and reason of damages for which no picture was decoded."""
        for damage in self._damages:
            if not damage.seen:
                damage.seen = True
                yield damage.first, damage.reason

    def _leans(self, stamp: int | None) -> bool:
        return not self._keyed or (None not in (stamp, self._key) and stamp < self._key)
