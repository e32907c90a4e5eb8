"""Memory and time against context length of one attention layer that reads a video's history.

Four ways to let the queries of one new latent frame see the history are measured on the device at
hand, at rising lengths:

- whole history: cross-attention over the keys and values of every history token;
- sliding window: the same over the last 8 latent frames;
- linear attention: the history is carried in a state (S, z) of fixed size; the call folds the newest
  history frame in and reads;
- compressed memory: cross-attention over the tokens that are left at a compression of 4x4x2.

What is counted, in bytes of one layer and one batch entry:

- held: what a generator keeps between calls: the keys and values, or the state and the keys and
  values of the newest frame. Computed from the shapes, and measured;
- peak: the highest level, above the one before any of this existed, while it is held and one call
  runs: held + workspace of the call + its output. The queries exist before and are not counted.

On the CPU the level is the resident memory of this process (see `peak.PeakMemory`; it resolves
about 0.5 MiB), on CUDA that of torch's allocator. Time is that of the call alone, after a warm-up:
the median of several, or of one call where it is slow. Building keys, values or state is not timed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch

from vidmem_kernels import cross_attention, explain, linear_attention

from ..checks import Checked, Lengths, OneOf, positive
from ..errors import UserError
from ..machine import describe_device, versions
from ..model.config import Compression
from .peak import PeakMemory, timed
from .repeat import free_bytes, repeated

STRATEGIES = ("whole history", "sliding window", "linear attention", "compressed memory")
DTYPES = ("auto", "bfloat16", "float16", "float32")
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0)

# Repeats that differ by more than this tell of other work on the machine.
_NOISE = 3.0
# Room for a call, as a multiple of the K/V; the second where they are copied in float32.
_HEADROOM, _HEADROOM_COPIED = 1.5, 3.5


@dataclass(frozen=True)
class ProfileConfig(Checked):
    """One attention layer and the video that it looks back on; the defaults are Wan 1.3B's.

    Args:
        lengths: seconds of history to measure at.
        heads, head_dim: of the layer.
        grid: patch tokens of a latent frame, (rows, columns); 480x832 pixels give 30x52.
        fps: video frames per second.
        frames_per_latent: video frames that one latent frame covers.
        compression: of the compressed memory.
        window_frames: latent frames that the sliding window keeps.
        dtype: of queries, keys and values; "auto" is float32 on the CPU, where lower precisions are computed
            through copies in float32, and bfloat16 elsewhere.

    Raises:
        ValueError: a number is not positive, or the dtype unknown.
    """

    lengths: Lengths = LENGTHS
    heads: Annotated[int, positive(4096)] = 12
    head_dim: Annotated[int, positive(65_536)] = 128
    grid: Annotated[tuple[int, int], positive(16_384)] = (30, 52)
    fps: Annotated[float, positive(1000)] = 24.0
    frames_per_latent: Annotated[int, positive(64)] = 4
    compression: Compression = Compression()
    window_frames: Annotated[int, positive(1_000_000)] = 8
    dtype: Annotated[str, OneOf(*DTYPES)] = "auto"

    def on(self, device: torch.device | str) -> ProfileConfig:
        """The same with the dtype that "auto" stands for on a device."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype="float32" if torch.device(device).type == "cpu" else "bfloat16")

    @property
    def frame_tokens(self) -> int:
        """Patch tokens of a latent frame."""
        return self.grid[0] * self.grid[1]

    def latent_frames(self, seconds: float) -> int:
        """Latent frames in so many seconds of video, at least one."""
        return max(1, round(seconds * self.fps / self.frames_per_latent))

    def compressed_tokens(self, frames: int) -> int:
        """Tokens of compressed memory: rows and columns rounded down, the last frames kept."""
        time, height, width = self.compression
        rows, columns = max(1, self.grid[0] // height), max(1, self.grid[1] // width)
        return rows * columns * -(-frames // time)

    def held_tokens(self, strategy: str, frames: int) -> int:
        """Tokens whose keys and values are held for a history of so many latent frames."""
        if strategy == "whole history":
            return frames * self.frame_tokens
        if strategy == "sliding window":
            return min(frames, self.window_frames) * self.frame_tokens
        if strategy == "linear attention":
            return self.frame_tokens
        return self.compressed_tokens(frames)

    def held_bytes(self, strategy: str, frames: int) -> int:
        """Bytes of what is held, from the shapes alone; the dtype must not be "auto"."""
        width = self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        state = self.heads * self.head_dim * (self.head_dim + 1) * torch.float32.itemsize
        kept = 2 * self.held_tokens(strategy, frames) * width
        return kept + (state if strategy == "linear attention" and frames > 1 else 0)


@dataclass(frozen=True)
class Point:
    """One measurement; the module docstring says what is counted.

    Attributes:
        strategy: one of STRATEGIES.
        seconds: seconds of history.
        latent_frames, context_tokens: the same in latent frames and in uncompressed patch tokens.
        held_tokens: tokens whose keys and values are held.
        held_bytes_computed, held_bytes_measured: what is held.
        peak_bytes: held, workspace and output.
        call_seconds, call_seconds_fastest, call_seconds_slowest: time of a call; the first is the median.
        repeats: calls the median is of.
        backend: what runs the call.
    """

    strategy: str
    seconds: float
    latent_frames: int
    context_tokens: int
    held_tokens: int
    held_bytes_computed: int
    held_bytes_measured: int
    peak_bytes: int
    call_seconds: float
    call_seconds_fastest: float
    call_seconds_slowest: float
    repeats: int
    backend: str


def _filled(config: ProfileConfig, tokens: int, device: torch.device) -> torch.Tensor:
    """(1, tokens, heads, head_dim): random numbers of one latent frame, repeated.

    Written straight into place, so that building leaves nothing behind to be counted.
    """
    dtype = getattr(torch, config.dtype)
    whole = torch.empty(1, tokens, config.heads, config.head_dim, dtype=dtype, device=device)
    unit = min(tokens, config.frame_tokens)
    whole[:, :unit].normal_()
    for start in range(unit, tokens, unit):
        stop = min(start + unit, tokens)
        whole[:, start:stop] = whole[:, : stop - start]
    return whole


def _hold(
    strategy: str, config: ProfileConfig, frames: int, query: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Build what is held; returns the arguments after the query, and the keywords, of the call."""
    tokens = config.held_tokens(strategy, frames)
    key, value = (_filled(config, tokens, query.device) for _ in range(2))
    if strategy != "linear attention":
        return (key, value), {}
    state = None
    for _ in range(frames - 1):
        _, state = linear_attention(query, key, value, state=state, return_state=True)
    return (key, value), {"state": state}


def measure_point(strategy: str, config: ProfileConfig, seconds: float, device: torch.device | str = "cpu") -> Point:
    """Measure one strategy at one length; see the module docstring for what is counted.

    Args:
        strategy: one of STRATEGIES.
        config: layer and video.
        seconds: length of the history.
        device: where to measure.

    Returns:
        Point.

    Raises:
        ValueError: unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"measure_point: strategy must be one of {STRATEGIES}, got {strategy!r}")
    device = torch.device(device)
    config = config.on(device)
    frames = config.latent_frames(seconds)
    attention = linear_attention if strategy == "linear attention" else cross_attention
    query = _filled(config, config.frame_tokens, device)
    with torch.inference_mode():
        # Thread pools and library workspaces, made by the first call, stay with the process.
        held, keywords = _hold(strategy, config, min(2, frames), query)
        attention(query, *held, **keywords)
        del held, keywords
        with PeakMemory(device) as memory:
            held, keywords = _hold(strategy, config, frames, query)
            memory.restart()
            held_bytes = memory.held_bytes()
            first = timed(lambda: attention(query, *held, **keywords), device)
        times = repeated(lambda: attention(query, *held, **keywords), device, first)
        backend = explain(attention, query, *held, **keywords)[0].backend
    return Point(
        strategy=strategy,
        seconds=seconds,
        latent_frames=frames,
        context_tokens=frames * config.frame_tokens,
        held_tokens=config.held_tokens(strategy, frames),
        held_bytes_computed=config.held_bytes(strategy, frames),
        held_bytes_measured=held_bytes,
        peak_bytes=memory.grown_bytes,
        call_seconds=statistics.median(times),
        call_seconds_fastest=min(times),
        call_seconds_slowest=max(times),
        repeats=len(times),
        backend=backend,
    )


def check_room(config: ProfileConfig, device: torch.device | str) -> None:
    """Raise UserError if the longest history does not fit the device's free memory."""
    device = torch.device(device)
    config = config.on(device)
    longest = max(config.lengths)
    need = config.held_bytes("whole history", config.latent_frames(longest))
    copied = device.type == "cpu" and config.dtype != "float32"
    room = need * (_HEADROOM_COPIED if copied else _HEADROOM)
    free = free_bytes(device)
    if room > free:
        raise UserError(
            f"keys and values of {longest:g} s take {need / 2**30:.1f} GiB, with room to work "
            f"{room / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}; "
            "give shorter --lengths"
        )


def profile(
    config: ProfileConfig | None = None,
    device: torch.device | str = "cpu",
    strategies: Sequence[str] = STRATEGIES,
    progress: Callable[[str, int, int], None] | None = None,
    interrupts: list[BaseException] | None = None,
) -> dict[str, Any]:
    """Measure memory and time against context length.

    Args:
        config: layer, video and lengths.
        device: where to measure.
        strategies: which of STRATEGIES.
        progress: called with (description, points done, points in all).
        interrupts: where an interrupt goes that ends the measurement early, if there is a point; by default it
            is raised.

    Returns:
        What goes into the JSON file: format, what is measured, device, versions, config, points, `noisy`:
        whether repeats of a call differed so much that times should not be trusted, and `missing`: the points
        that an interrupt has left out.

    Raises:
        UserError: the longest history does not fit the device's memory.
    """
    device = torch.device(device)
    config = (config or ProfileConfig()).on(device)
    check_room(config, device)
    lengths = sorted(set(config.lengths))
    points: list[Point] = []
    asked = [(strategy, seconds) for strategy in strategies for seconds in lengths]
    try:
        for strategy, seconds in asked:
            if progress:
                progress(f"{strategy}, {seconds:g} s", len(points), len(asked))
            points.append(measure_point(strategy, config, seconds, device))
    except (KeyboardInterrupt, SystemExit) as stop:
        if interrupts is None or not points:
            raise
        interrupts.append(stop)
    if progress:
        progress("profile", len(points), len(asked))
    with PeakMemory(device) as probe:
        pass
    return {
        "format": "vidmem.memory_vs_context",
        "version": 2,
        "what": (
            "One attention layer, batch 1, queries of one latent frame. held_bytes: K/V (or the "
            "linear-attention state and the newest frame's K/V) kept between calls. peak_bytes: "
            "highest level while they are held and one call runs, above the level before they "
            "existed: held + workspace + output, queries not counted. call_seconds: median of "
            "`repeats` calls after a warm-up; building K/V or state is not timed."
        ),
        "memory_measured_with": probe.method,
        "device": describe_device(device),
        "versions": versions(),
        "config": asdict(config),
        "noisy": any(p.call_seconds_slowest > _NOISE * p.call_seconds_fastest for p in points),
        "points": [asdict(point) for point in points],
        "missing": [{"strategy": strategy, "seconds": seconds} for strategy, seconds in asked[len(points) :]],
    }
