"""Films opened and decoded: their pictures in the order and at the times at which they are shown.

Decoding from the beginning defines what is shown when. To skip the part before a moment is only faster: it is
done where every stamp on the way is sound, and taken back where the first picture comes too late.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
from av.codec.codec import Properties
from av.format import Flags

from ..errors import MediaError
from .damage import DamageWatch
from .stamps import REORDER, PacketStamps, shown_times, steadied

# Up to this size a file is read through where its container's word would do: that takes no second, and is true.
READ_THROUGH = 64 << 20
# Pixels of the pictures that are held while their stamps are sorted, twice what level 4 of H.264 allows.
_HELD_PIXELS = 16 * 1920 * 1088 * 2
# They keep the time of decoding alone. What FFmpeg makes of it for B-frames is a guess.
_CODING_ORDER = ("avi", "asf")
# Their key frames do not stand alone (a GIF's pictures are patches of the one before), or are as good as all.
_WHOLE = ("gif", "apng", "image2")
# Program streams stamp packs of pictures.
_PACKED = "mpeg"
_INDEXED = ("mov", "matroska")
# Decoders that give the transparency which WebM keeps beside the picture.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Picture:
    """A decoded picture, or the place of one that is lost.

    Attributes:
        frame: None for one that is lost.
        broken: why it cannot be trusted; None for a sound one.
    """

    frame: av.VideoFrame | None
    broken: str | None = None


class Film:
    """An open file and its first video stream.

    Attributes:
        path: the file.
        stepped: whether no stamp is to be believed and pictures are counted, as in a bare stream.
        joinable: whether the format allows stamps to jump, as where films were joined.
        rate: mean pictures a second; 0 until it was measured where nothing states it.
        aspect: width of a pixel divided by its height, or None.
        first: stamp in seconds of the first picture; None until it was decoded.
        reached: seconds of the file up to which packets were read, as it numbers them.
        failure: why the file could not be read to its end; None while it could.
    """

    def __init__(self, path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.path, self._container, self._stream = path, container, stream
        flags = Flags(container.format.flags)
        self._bare = bool(flags & Flags.no_timestamps)
        # AVI numbers its chunks as they are coded; those of films with B-frames have holes that mean nothing.
        self.stepped = self._bare or (self.name == "avi" and bool(stream.codec_context.has_b_frames))
        self.joinable = bool(flags & Flags.ts_discont)
        self.rate = self._stated_rate() or 0.0
        self.aspect: Fraction | None = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        self.failure: str | None = None
        self.first: float | None = None
        self.reached = 0.0
        self._decoder = self._choose_decoder()

    def _stated_rate(self) -> float | None:
        stream = self._stream
        average, coded = stream.average_rate, stream.codec_context.framerate
        # The average of a bare stream is a default; its headers say the rate.
        known = (coded, stream.guessed_rate, average) if self._bare else (average, coded)
        rate = next((float(rate) for rate in known if rate), None)
        likely = coded or stream.guessed_rate
        # An AVI that was made from another container is mostly chunks without a picture.
        return None if rate and likely and self.name == "avi" and rate > 1.5 * likely else rate

    def measure_rate(self) -> float:
        """Pictures a second by the stamps of the first thousand packets, for a film that does not say."""
        stamps = {packet.pts for packet in itertools.islice(self._packets(), 1000)} - {None}
        stamps = [float(stamp * self._stream.time_base) for stamp in sorted(stamps)]
        return (len(stamps) - 1) / (stamps[-1] - stamps[0]) if len(stamps) > 1 else 25.0

    def _choose_decoder(self) -> av.VideoCodecContext:
        context = self._stream.codec_context
        context.thread_type = "AUTO"
        tags = {key.lower(): value for key, value in self._stream.metadata.items()}
        own = _WITH_ALPHA.get(self._stream.codec.canonical_name)
        if tags.get("alpha_mode") != "1" or own is None:
            return context
        try:
            transparent = av.CodecContext.create(own, "r")
        except av.codec.codec.UnknownCodecError as error:
            raise MediaError(
                f"{self.path}: is transparent, which needs FFmpeg's decoder {own}; convert it to one without alpha"
            ) from error
        transparent.extradata = context.extradata
        return transparent

    @property
    def step(self) -> float:
        """Seconds from picture to picture, on average."""
        return 1 / self.rate

    @property
    def counted(self) -> int:
        """Number of pictures as the container states it; 0 where it does not."""
        return self._stream.frames

    def _unfinished(self) -> bool:
        """Whether this is an AVI that was written to a pipe, whose header is made up."""
        if self.name != "avi":
            return False
        with self.path.open("rb") as file:
            return file.read(8)[4:] in (b"\0\0\0\0", b"\xff\xff\xff\xff")

    @property
    def name(self) -> str:
        """FFmpeg's name of the container."""
        return self._container.format.name.split(",")[0]

    def seconds(self, stamp: int | None) -> float | None:
        """Convert a stamp of the stream, None where it is not to be believed."""
        return None if stamp is None or self.stepped else float(stamp * self._stream.time_base)

    def length(self, picture: Picture) -> float:
        """Seconds for which a picture is to be shown."""
        duration = picture.frame.duration if picture.frame and not self.stepped else 0
        if not duration:
            return self.step
        seconds = float(duration * self._stream.time_base)
        # Fields are whole; the stamps' unit may not divide them.
        return round(2 * seconds / self.step) * self.step / 2 if self.name == _PACKED else seconds

    def stated_seconds(self) -> float | None:
        """Length of the picture as the container states it; None where it does not, or guesses."""
        if self._bare or self.joinable or self._unfinished():
            return None  # FFmpeg has looked at the end of the file, which may be another film's
        # NUT and FLV count from the file's beginning, MP4 and AVI from the stream's.
        late = 0.0 if self.name in ("mov", "avi") else max(0.0, self.first or 0.0)
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base) - late
        # Matroska keeps the end of a stream in this tag, counted from the file's beginning.
        if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self._stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - late
        # A container's length is that of its longest stream: it tells of the picture only when alone.
        if self._container.duration is not None and len(self._container.streams) == 1:
            return self._container.duration / av.time_base - late
        return None

    def estimated_seconds(self) -> float | None:
        """Length as the container states or FFmpeg guesses it; None where neither can."""
        stated = self.stated_seconds()
        if stated is None and self._container.duration is not None:
            stated = self._container.duration / av.time_base
        return stated

    def count(self, first: float) -> tuple[int, float]:
        """Read all packets, decoding none.

        Args:
            first: stamp in seconds of the first picture; what is stamped before it was cut off from what it leans on.

        Returns:
            Number of pictures and length in seconds.
        """
        count, keys = 0, 0
        stamps = self._packet_stamps()
        length = self.step
        for packet in self._packets():
            stamp = self.seconds(packet.pts)
            keys += packet.is_keyframe
            leans = not keys or (keys == 1 and stamp is not None and stamp < first)
            if not packet.size or packet.is_discard or leans:
                continue
            count += 1
            stamps.add(stamp, self.seconds(packet.dts))
            if stamps.sound and stamp == stamps.highest:
                length = float(packet.duration * self._stream.time_base) if packet.duration else self.step
        if count and stamps.sound:
            return count, stamps.highest - stamps.lowest + length
        return max(1, count), max(1, count) * self.step

    def _packets(self) -> Iterator[av.Packet]:
        """The stream's packets and an empty one at the end, or as many as can be read."""
        try:
            yield from self._container.demux(self._stream)
        except av.error.FFmpegError as error:
            self.failure = error.strerror
        except IndexError:
            pass  # PyAV's end of a file in which a stream appeared on the way; ours has been read

    def _packet_stamps(self) -> PacketStamps:
        return PacketStamps(self.step, self.joinable, even=self.name == _PACKED)

    def packets_before(self, start: float) -> tuple[int, float]:
        """Find where decoding may begin so that it shows at `start` what it would if begun at the first packet.

        That is a key frame up to which every stamp is there, no two are equal and none jumps, and B-frames show
        that the stamps are those of showing.

        Args:
            start: in seconds since the first picture.

        Returns:
            Packets before that key frame, 0 if there is none, and the stamp in seconds of the first picture.
        """
        nothing = 0, 0.0
        if self.stepped or self.name in _CODING_ORDER + _WHOLE:
            return nothing
        found, first = 0, None
        stamps = self._packet_stamps()
        for number, packet in enumerate(self._packets()):
            if first is None:
                first = self._first_stamp(packet)
            if not packet.size:  # the end
                break
            shown, decoded = self.seconds(packet.pts), self.seconds(packet.dts)
            stamps.add(shown, decoded)
            if not stamps.sound or packet.is_discard or packet.is_corrupt:
                return nothing
            if first is None:
                continue
            if (shown if decoded is None else decoded) - first > start:
                break
            if packet.is_keyframe and shown - first <= start:
                found = number
        proven = stamps.reordered or not (self._reorders and self._stream.codec_context.has_b_frames)
        return (found, first) if found and proven else nothing

    def _first_stamp(self, packet: av.Packet) -> float | None:
        """Decode a packet; the stamp of the first picture that comes out, if one does."""
        try:
            return next(
                (self.seconds(frame.pts) for frame in self._decoder.decode(packet) if not frame.is_corrupt), None
            )
        except av.error.FFmpegError:
            return None

    @property
    def _reorders(self) -> bool:
        return bool(self._stream.codec.properties & Properties.REORDER.value)

    def seek(self, start: float) -> float | None:
        """Go to the key frame before `start` by the container's index, where it has one that can be believed.

        Args:
            start: in seconds since the first picture.

        Returns:
            The stamp in seconds of the first picture, or None where nothing was done that helps.
        """
        if self.name not in _INDEXED:
            return None
        first = next((s for packet in self._packets() if (s := self._first_stamp(packet)) is not None), None)
        if first is None:
            return None
        try:
            self._container.seek(int((first + start) / self._stream.time_base), stream=self._stream)
        except av.error.FFmpegError:
            return None
        self._decoder.flush_buffers()
        return first

    def shown(self, skip: int = 0, first: float | None = None) -> Iterator[tuple[float, Picture]]:
        """Decode on from where the file stands.

        Args:
            skip: packets to leave out.
            first: stamp of the film's first picture; None where this is the beginning.

        Returns:
            Iterator over (seconds since the first picture, picture). It ends where the file can be read no
            further, and `failure` says so.
        """
        self.first = first
        # The levels of the codecs bound a decoder's memory: of larger pictures it holds back fewer.
        pixels = self._stream.codec_context.width * self._stream.codec_context.height
        reorder = min(REORDER, max(4, _HELD_PIXELS // max(1, pixels))) if self._reorders else 0
        pictures = self._pictures(skip)
        if self.name == _PACKED:
            pictures = steadied(pictures, self.length, self.step)
        for now, picture in shown_times(pictures, self.step, self.joinable, reorder):
            self.first = now if self.first is None else self.first
            yield now - self.first, picture

    def _pictures(self, skip: int) -> Iterator[tuple[float | None, bool, Picture]]:
        """Decode: stamp in seconds if that is to be believed, whether times of decoding fell, and the picture."""
        fell, decoded = False, None
        watch = DamageWatch(self.step / self._stream.time_base)
        for packet in itertools.islice(self._packets(), skip, None):
            fell = fell or (None not in (decoded, packet.dts) and packet.dts < decoded)
            decoded = packet.dts
            if decoded is not None:
                self.reached = float(decoded * self._stream.time_base)
            watch.enter(packet)
            try:
                frames = self._decoder.decode(packet)
            except av.error.FFmpegError as error:
                watch.fails(packet, error.strerror)
                continue
            for frame in frames:
                keep, broken = watch.judge(frame)
                if keep:
                    yield self.seconds(frame.pts), fell, Picture(frame, broken)
                    fell = False
        watch.end()
        for stamp, reason in watch.lost():
            yield self.seconds(stamp), False, Picture(None, reason)


@contextlib.contextmanager
def open_film(path: Path) -> Iterator[Film]:
    """Open a film and know its rate.

    Raises:
        MediaError: as `_opened`.
    """
    with _opened(path) as film:
        if not film.rate:
            with _opened(path) as other:
                film.rate = other.measure_rate()
        yield film


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Film]:
    """Open a file and its first real video stream (cover art of a song is none).

    Raises:
        MediaError: there is no such file, it is none that FFmpeg reads, or it holds no pictures.
    """
    _check_file(path)
    # An absolute name, or `a:b.mp4` would be file b.mp4 by protocol a. A playlist may name files only.
    name = os.path.abspath(path)
    try:
        container = av.open(name, metadata_errors="replace", options={"protocol_whitelist": "file"})
    except (av.error.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(
            f"{path}: cannot be opened as a video ({reason}); it is damaged, cut short or not a video"
        ) from error
    with container:
        cover = av.stream.Disposition.attached_pic
        streams = [s for s in container.streams.video if not s.disposition & cover]
        if not streams:
            raise MediaError(f"{path}: holds no video stream; give a file with pictures")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise MediaError(f"{path}: its pictures are coded in a way that FFmpeg does not know; convert it first")
        yield Film(path, container, streams[0])


def _check_file(path: Path) -> None:
    """Refuse what cannot be a film before FFmpeg looks at it."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        # A Path has made one slash of the two.
        if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", str(path)):
            slashes = "///" if url[1].lower() == "file" else "//"
            address = f"{url[1]}:{slashes}{str(path)[url.end() :]}"
            raise MediaError(f"{address}: URLs are not read; download the film and give its path") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise MediaError(f"{path}: no such file; give the path of a video") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{str(path)[:200]!r}: cannot be opened ({reason}); give the path of a video") from error
    if stat.S_ISDIR(found.st_mode):
        raise MediaError(f"{path}: is a directory; give the path of a video")
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"{path}: is a pipe or a device, which can be read once only; give the path of a video file")
    if found.st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); give the path of a video")


@contextlib.contextmanager
def playing(path: Path, start: float = 0.0) -> Iterator[tuple[Film, Iterator[tuple[float, Picture]]]]:
    """Decode a film from its beginning, or from a key frame before `start` where that shows the same.

    Args:
        path: the file.
        start: in seconds since the first picture.

    Yields:
        The film and an iterator over (seconds since the first picture, picture).

    Raises:
        MediaError: as `open_film`.
    """
    if start > 0 and path.stat().st_size > READ_THROUGH:
        with open_film(path) as film:
            first = film.seek(start)
            pictures = None if first is None else _in_time(film.shown(0, first), start)
            if pictures:
                yield film, pictures
                return
    skip, first = 0, None
    if start > 0:
        with open_film(path) as film:
            skip, first = film.packets_before(start)
    if skip:
        with open_film(path) as film:
            pictures = _in_time(film.shown(skip, first), start)
            if pictures:
                yield film, pictures
                return
    with open_film(path) as film:
        yield film, film.shown()


def _in_time(pictures: Iterator[tuple[float, Picture]], start: float) -> Iterator[tuple[float, Picture]] | None:
    """The same pictures, if the first is sound and comes no later than `start`."""
    head = next(pictures, None)
    if head is None or head[0] > start or head[1].broken:
        return None
    return itertools.chain([head], pictures)
