"""Open and decode video files: pictures in display order, with their times.

Decoding from the beginning defines which picture is shown when. Seeking is only faster: it is used if all timestamps up
to the start are valid, and abandoned if the first picture comes too late.
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

# Up to this size all packets are counted instead of trusting the container, which takes less than a second.
READ_THROUGH = 64 << 20
# Maximum pixels of pictures that are held while timestamps are sorted, twice the limit of H.264 level 4.
_HELD_PIXELS = 16 * 1920 * 1088 * 2
# Containers that store decoding times only. The display times that FFmpeg derives for B-frames are guesses.
_CODING_ORDER = ("avi", "asf")
# Containers without seeking: key frames depend on earlier pictures (GIF), or all pictures are key frames.
_WHOLE = ("gif", "apng", "image2")
# Program streams have one timestamp per pack of pictures.
_PACKED = "mpeg"
_INDEXED = ("mov", "matroska")
# Decoders that support the alpha channel of WebM.
_WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}


@dataclass(frozen=True)
class Picture:
    """A decoded picture, or a placeholder for a lost one.

    Attributes:
        frame: The frame; None if it is lost.
        broken: Why the picture is damaged; None if it is not.
    """

    frame: av.VideoFrame | None
    broken: str | None = None


class Film:
    """An open file and its first video stream.

    Attributes:
        path: The file.
        stepped: Whether timestamps are ignored and pictures are counted, as in a raw stream.
        joinable: Whether the format allows timestamps to jump, as at joins.
        rate: Mean pictures per second; 0 until it is measured, if the file does not state it.
        aspect: Pixel aspect ratio, width divided by height, or None.
        first: Timestamp of the first picture, in seconds; None until it is decoded.
        reached: Timestamp up to which packets were read, in seconds.
        failure: Why the file cannot be read to its end, or None.
    """

    def __init__(self, path: Path, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        self.path, self._container, self._stream = path, container, stream
        flags = Flags(container.format.flags)
        self._bare = bool(flags & Flags.no_timestamps)
        # AVI numbers chunks in coding order; with B-frames the numbers have meaningless gaps.
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
        # The average rate of a raw stream is a default; its headers have the true one.
        known = (coded, stream.guessed_rate, average) if self._bare else (average, coded)
        rate = next((float(rate) for rate in known if rate), None)
        likely = coded or stream.guessed_rate
        # An AVI converted from another container may consist mostly of chunks without a picture.
        return None if rate and likely and self.name == "avi" and rate > 1.5 * likely else rate

    def measure_rate(self) -> float:
        """Measure pictures per second from the timestamps of the first thousand packets."""
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
                f"{self.path}: has an alpha channel, which requires FFmpeg's decoder {own}; "
                "convert it to a video without alpha"
            ) from error
        transparent.extradata = context.extradata
        return transparent

    @property
    def step(self) -> float:
        """Mean seconds between pictures."""
        return 1 / self.rate

    @property
    def counted(self) -> int:
        """Number of pictures that the container states, or 0."""
        return self._stream.frames

    def _unfinished(self) -> bool:
        """Whether this is an AVI that was written to a pipe, whose header is not valid."""
        if self.name != "avi":
            return False
        with self.path.open("rb") as file:
            return file.read(8)[4:] in (b"\0\0\0\0", b"\xff\xff\xff\xff")

    @property
    def name(self) -> str:
        """FFmpeg's name of the container."""
        return self._container.format.name.split(",")[0]

    def seconds(self, stamp: int | None) -> float | None:
        """Convert a timestamp of the stream to seconds; None if it is not reliable."""
        return None if stamp is None or self.stepped else float(stamp * self._stream.time_base)

    def length(self, picture: Picture) -> float:
        """Display time of a picture, in seconds."""
        duration = picture.frame.duration if picture.frame and not self.stepped else 0
        if not duration:
            return self.step
        seconds = float(duration * self._stream.time_base)
        # A whole number of fields; the unit of timestamps may not divide it.
        return round(2 * seconds / self.step) * self.step / 2 if self.name == _PACKED else seconds

    def stated_seconds(self) -> float | None:
        """Length of the video stream that the container states, in seconds; None if it does not, or guesses."""
        if self._bare or self.joinable or self._unfinished():
            return None  # FFmpeg read the length from the end of the file, which may belong to another joined video
        # NUT and FLV count from the start of the file, MP4 and AVI from the start of the stream.
        late = 0.0 if self.name in ("mov", "avi") else max(0.0, self.first or 0.0)
        if self._stream.duration is not None:
            return float(self._stream.duration * self._stream.time_base) - late
        # Matroska stores the end of a stream in this tag, counted from the start of the file.
        if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self._stream.metadata.get("DURATION", "")):
            hours, minutes, seconds = match.groups()
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - late
        # The length of a container is that of its longest stream, so it is used for a single stream only.
        if self._container.duration is not None and len(self._container.streams) == 1:
            return self._container.duration / av.time_base - late
        return None

    def estimated_seconds(self) -> float | None:
        """Length that the container states or FFmpeg guesses, in seconds, or None."""
        stated = self.stated_seconds()
        if stated is None and self._container.duration is not None:
            stated = self._container.duration / av.time_base
        return stated

    def count(self, first: float) -> tuple[int, float]:
        """Read all packets without decoding.

        Args:
            first: Timestamp of the first picture, in seconds; earlier packets refer to pictures that were cut off.

        Returns:
            Number of pictures, and length in seconds.
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
        """Yield the packets of the stream that can be read, and an empty one at the end."""
        try:
            yield from self._container.demux(self._stream)
        except av.error.FFmpegError as error:
            self.failure = error.strerror
        except IndexError:
            pass  # PyAV raises at the end of a file in which a stream appeared later; ours is complete

    def _packet_stamps(self) -> PacketStamps:
        return PacketStamps(self.step, self.joinable, even=self.name == _PACKED)

    def packets_before(self, start: float) -> tuple[int, float]:
        """Find the key frame at which decoding may start to show the same picture at `start` as from the first packet.

        All timestamps up to it must exist, be distinct and not jump, and B-frames must show that they are display
        times.

        Args:
            start: Time since the first picture, in seconds.

        Returns:
            Number of packets before this key frame, 0 if there is none, and the timestamp of the first picture, in
            seconds.
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
        """Decode a packet; return the timestamp of the first resulting picture, or None."""
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
        """Seek to the key frame before `start` with the container's index, if it is reliable.

        Args:
            start: Time since the first picture, in seconds.

        Returns:
            Timestamp of the first picture, in seconds, or None if seeking did not help.
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
        """Decode from the current position of the file.

        Args:
            skip: Number of packets to skip.
            first: Timestamp of the first picture, in seconds; None at the start of the file.

        Returns:
            Iterator over (seconds since the first picture, picture). If the file cannot be read to its end, the
            iterator ends there and sets `failure`.
        """
        self.first = first
        # Codec levels limit the memory of a decoder: it holds back fewer pictures if they are larger.
        pixels = self._stream.codec_context.width * self._stream.codec_context.height
        reorder = min(REORDER, max(4, _HELD_PIXELS // max(1, pixels))) if self._reorders else 0
        pictures = self._pictures(skip)
        if self.name == _PACKED:
            pictures = steadied(pictures, self.length, self.step)
        for now, picture in shown_times(pictures, self.step, self.joinable, reorder):
            self.first = now if self.first is None else self.first
            yield now - self.first, picture

    def _pictures(self, skip: int) -> Iterator[tuple[float | None, bool, Picture]]:
        """Decode; yield the timestamp in seconds if reliable, whether decoding times decreased, and the picture."""
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
    """Open a video file and determine its frame rate.

    Raises:
        MediaError: As for `_opened`.
    """
    with _opened(path) as film:
        if not film.rate:
            with _opened(path) as other:
                film.rate = other.measure_rate()
        yield film


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Film]:
    """Open a file and its first video stream that is not cover art.

    Raises:
        MediaError: The file does not exist, FFmpeg cannot read it, or it has no pictures.
    """
    _check_file(path)
    # An absolute path, because FFmpeg would take `a:b.mp4` for the protocol a. A playlist may only name files.
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
            raise MediaError(f"{path}: has no video stream; give the path of a video")
        streams = [s for s in streams if s.codec_context is not None]
        if not streams:
            raise MediaError(f"{path}: FFmpeg has no decoder for its video codec; convert it first")
        yield Film(path, container, streams[0])


def _check_file(path: Path) -> None:
    """Check that a path can be a video file before FFmpeg opens it."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        # Path has replaced "//" by "/".
        if url := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):/+", str(path)):
            slashes = "///" if url[1].lower() == "file" else "//"
            address = f"{url[1]}:{slashes}{str(path)[url.end() :]}"
            raise MediaError(f"{address}: URLs are not supported; download the video and give its path") from error
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise MediaError(f"{path}: no such file; give the path of a video") from error
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{str(path)[:200]!r}: cannot be opened ({reason}); give the path of a video") from error
    if stat.S_ISDIR(found.st_mode):
        raise MediaError(f"{path}: is a directory; give the path of a video")
    if not stat.S_ISREG(found.st_mode):
        raise MediaError(f"{path}: is a pipe or a device, which can only be read once; give the path of a video file")
    if found.st_size == 0:
        raise MediaError(f"{path}: is empty (0 bytes); give the path of a video")


@contextlib.contextmanager
def playing(path: Path, start: float = 0.0) -> Iterator[tuple[Film, Iterator[tuple[float, Picture]]]]:
    """Decode a video from its beginning, or from a key frame before `start` if that gives the same pictures.

    Args:
        path: The file.
        start: Time since the first picture, in seconds.

    Yields:
        The open file, and an iterator over (seconds since the first picture, picture).

    Raises:
        MediaError: As for `open_film`.
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
    """Return the pictures if the first is not damaged and not later than `start`, else None."""
    head = next(pictures, None)
    if head is None or head[0] > start or head[1].broken:
        return None
    return itertools.chain([head], pictures)
