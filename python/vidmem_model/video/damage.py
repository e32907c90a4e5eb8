"""Which pictures of a film are damaged, told from those that only lean on what was cut off or joined."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av


@dataclass
class _Damage:
    """Pictures that cannot be trusted, from a stamp to that of the next key frame; None where stamps are missing."""

    reason: str
    first: int | None
    end: int | None = None
    seen: bool = False

    def spoils(self, stamp: int | None) -> bool:
        if stamp is None or self.first is None:
            return True
        return self.first <= stamp and (self.end is None or stamp < self.end)


class DamageWatch:
    """Follows packets and frames. FFmpeg conceals damage by default; here it is found.

    No damage are:

    - pictures before the first key frame that comes: they lean on ones that were cut off or skipped;
    - a packet marked as corrupt with a key frame right behind it and none missing between: where transport
      streams are joined, the counters of their packets do not fit, and no picture is lost.

    Args:
        step: stamps from packet to packet, on average.
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
        """Look at a packet that is about to be decoded."""
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
        """Take a packet that was marked as corrupt for damaged, as no key frame came."""
        if self._suspect is not None:
            self.fails(self._suspect, "damaged data")
            self._suspect = None

    def fails(self, packet: av.Packet, reason: str) -> None:
        """Note that a packet cannot be decoded."""
        if not self._leans(packet.pts):
            self._damages.append(_Damage(reason, packet.pts))

    def judge(self, frame: av.VideoFrame) -> tuple[bool, str | None]:
        """Whether a frame is to be kept, and what is wrong with it."""
        if frame.is_corrupt and self._leans(frame.pts):
            return False, None
        found = [damage for damage in self._damages if damage.spoils(frame.pts)]
        for damage in found:
            damage.seen = True
        return True, found[0].reason if found else "damaged data" if frame.is_corrupt else None

    def lost(self) -> Iterator[tuple[int | None, str]]:
        """Stamp and reason of damages that end with no picture to show for them."""
        for damage in self._damages:
            if not damage.seen:
                damage.seen = True
                yield damage.first, damage.reason

    def _leans(self, stamp: int | None) -> bool:
        return not self._keyed or (None not in (stamp, self._key) and stamp < self._key)
