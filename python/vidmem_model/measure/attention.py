"""Measure memory and time of one attention layer against the length of the history it reads.

Four strategies by which the queries of one new latent frame read the history are measured, at several lengths:

- whole history: cross-attention over the keys and values of every history token;
- sliding window: the same over the last 8 latent frames;
- linear attention: a state (S, z) of fixed size holds the history; the call adds the newest history frame to the
  state and reads it;
- compressed memory: cross-attention over the memory tokens at a compression of 4x4x2.

Memory is in bytes, for one layer and batch size 1:

- held: what a generator keeps between calls: keys and values, or the state and the keys and values of the newest
  frame. It is computed from the shapes, and measured;
- peak: the highest memory use during a call, above that before anything was allocated: held + workspace + output.
  The queries exist before and are not counted.

On the CPU this is the resident memory of the process (see `peak.PeakMemory`; resolution about 0.5 MiB), on CUDA that
of torch's allocator. Time is the median of several calls after a warm-up, or a single call if it is slow. Building
keys, values or the state is not timed.
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

# Repeats that differ by more than this factor suggest that the machine is busy with other work.
_NOISE = 3.0
# Memory for a call, as a multiple of the K/V; the second number if they are copied to float32.
_HEADROOM, _HEADROOM_COPIED = 1.5, 3.5


@dataclass(frozen=True)
class ProfileConfig(Checked):
    """An attention layer and the video history that it reads; the defaults are those of Wan 1.3B.

    Args:
        lengths: History lengths to measure, in seconds.
        heads: Attention heads.
        head_dim: Channels per head.
        grid: Patch tokens of a latent frame, (rows, columns); 480x832 pixels (height x width) give (30, 52).
        fps: Video frames per second.
        frames_per_latent: Video frames per latent frame.
        compression: Patch tokens per memory token.
        window_frames: Latent frames of the sliding window.
        dtype: Dtype of queries, keys and values. "auto" is float32 on the CPU, where lower precisions are computed
            in float32 copies, and bfloat16 on a GPU.

    Raises:
        ValueError: A number is not positive, or the dtype is unknown.
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
        """Return a copy with "auto" replaced by the dtype of a device."""
        if self.dtype != "auto":
            return self
        return replace(self, dtype="float32" if torch.device(device).type == "cpu" else "bfloat16")

    @property
    def frame_tokens(self) -> int:
        """Patch tokens of a latent frame."""
        return self.grid[0] * self.grid[1]

    def latent_frames(self, seconds: float) -> int:
        """Number of latent frames of a history of `seconds`, at least one."""
        return max(1, round(seconds * self.fps / self.frames_per_latent))

    def compressed_tokens(self, frames: int) -> int:
        """Number of memory tokens: rows and columns are rounded down, time is rounded up."""
        time, height, width = self.compression
        rows, columns = max(1, self.grid[0] // height), max(1, self.grid[1] // width)
        return rows * columns * -(-frames // time)

    def held_tokens(self, strategy: str, frames: int) -> int:
        """Number of tokens whose keys and values are held for a history of `frames` latent frames."""
        if strategy == "whole history":
            return frames * self.frame_tokens
        if strategy == "sliding window":
            return min(frames, self.window_frames) * self.frame_tokens
        if strategy == "linear attention":
            return self.frame_tokens
        return self.compressed_tokens(frames)

    def held_bytes(self, strategy: str, frames: int) -> int:
        """Bytes held between calls, computed from the shapes; the dtype must not be "auto"."""
        width = self.heads * self.head_dim * getattr(torch, self.dtype).itemsize
        state = self.heads * self.head_dim * (self.head_dim + 1) * torch.float32.itemsize
        kept = 2 * self.held_tokens(strategy, frames) * width
        return kept + (state if strategy == "linear attention" and frames > 1 else 0)


@dataclass(frozen=True)
class Point:
    """One measurement; the module docstring defines the quantities.

    Attributes:
        strategy: One of STRATEGIES.
        seconds: Length of the history, in seconds.
        latent_frames: Length of the history, in latent frames.
        context_tokens: Length of the history, in uncompressed patch tokens.
        held_tokens: Tokens whose keys and values are held.
        held_bytes_computed: Bytes held between calls, from the shapes.
        held_bytes_measured: Bytes held between calls, measured.
        peak_bytes: Peak memory: held, workspace and output.
        call_seconds: Median time of a call, in seconds.
        call_seconds_fastest: Shortest time of a call, in seconds.
        call_seconds_slowest: Longest time of a call, in seconds.
        repeats: Number of timed calls.
        backend: Backend that ran the call.
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

    They are written in place, so that no temporary memory is counted.
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
    """Build what is held; return the arguments of the call after the query, and its keywords."""
    tokens = config.held_tokens(strategy, frames)
    key, value = (_filled(config, tokens, query.device) for _ in range(2))
    if strategy != "linear attention":
        return (key, value), {}
    state = None
    for _ in range(frames - 1):
        _, state = linear_attention(query, key, value, state=state, return_state=True)
    return (key, value), {"state": state}


def measure_point(strategy: str, config: ProfileConfig, seconds: float, device: torch.device | str = "cpu") -> Point:
    """Measure one strategy at one history length.

    Args:
        strategy: One of STRATEGIES.
        config: Layer and video.
        seconds: Length of the history, in seconds.
        device: Device to measure on.

    Returns:
        The measurement.

    Raises:
        ValueError: The strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"measure_point: strategy must be one of {STRATEGIES}, got {strategy!r}")
    device = torch.device(device)
    config = config.on(device)
    frames = config.latent_frames(seconds)
    attention = linear_attention if strategy == "linear attention" else cross_attention
    query = _filled(config, config.frame_tokens, device)
    with torch.inference_mode():
        # A first small call makes thread pools and library workspaces, which stay allocated and must not be counted.
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
    """Raise UserError if the longest history does not fit into the free memory of the device."""
    device = torch.device(device)
    config = config.on(device)
    longest = max(config.lengths)
    need = config.held_bytes("whole history", config.latent_frames(longest))
    copied = device.type == "cpu" and config.dtype != "float32"
    room = need * (_HEADROOM_COPIED if copied else _HEADROOM)
    free = free_bytes(device)
    if room > free:
        raise UserError(
            f"the keys and values of {longest:g} s take {need / 2**30:.1f} GiB, with workspace "
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
    """Measure memory and time of every strategy at every history length.

    Args:
        config: Layer, video and lengths.
        device: Device to measure on.
        strategies: Some of STRATEGIES.
        progress: Called with (description, points done, points in total).
        interrupts: List that an interrupt is appended to, so that the points measured so far are returned; without
            it, or before the first point, the interrupt is raised.

    Returns:
        The content of memory_vs_context.json: format, description, device, versions, config, points, `noisy` (whether
        repeats of a call differed so much that times should not be trusted), and `missing` (points that an interrupt
        left out).

    Raises:
        UserError: The longest history does not fit into the memory of the device.
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
