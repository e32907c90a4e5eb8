"""Measure time and peak memory of every part of a model against the length of the history.

Five strategies by which a diffusion transformer (DiT) of one size reads a history are measured, at several lengths:

- whole history: all patch tokens are context, as clean latent frames;
- sliding window: the same with the last latent frames only;
- merged: the patch tokens, merged to the number of tokens of a memory encoder;
- linear attention: the whole history, in a DiT with linear self-attention in all blocks;
- compressed memory: the tokens of the model's memory encoders.

Merged and compressed memory are read together with the clean latent frames of `DiTConfig.window`. The parts:

- VAE encode: encodes the video of the history, chunk by chunk. It is the same for all strategies, and does not include
  the small video of the low-resolution branch;
- memory encode: encodes the latents of the history to memory tokens, in one call;
- append: the same for one more segment, with the encoder's state of the history. Merging has no state: it reduces the
  segment only;
- first step: the first denoising step of a segment, which also computes the history's tokens and stores their keys and
  values (or the linear state);
- next step: a later denoising step, which reads them. In a model with `history_sees_video` this is an approximation;
  the exact step costs as much as the first.

Weights, latents and tokens are random, with batch size 1. Peak memory is the highest memory use during a part, above
that of the weights: inputs, stored state, workspace and results, without fragmentation of the heap. `held_bytes` is
what stays for the next call, computed from tensor sizes. Time is the median of repeated calls after a warm-up, or a
single call if it is slow.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..errors import UserError
from ..machine import describe_device, versions
from .parts import EVERY, STRATEGIES, CostConfig, StrategyBench, VAEBench, parts_of, tensor_bytes
from .peak import PeakMemory, timed
from .repeat import free_bytes, repeated

# Factor on the memory estimate of a point, which is extrapolated from the point before, to compare with free memory.
_MARGIN = 1.3
# A median above the fastest call by more than this factor suggests that the machine is busy with other work. (The
# slowest of many short calls would not tell.)
_NOISE = 1.5
# A call that takes longer needs no further warm-up.
_WARM_SECONDS = 1.0
# Numbers of glibc's malloc options (mallopt).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class CostPoint:
    """One measurement; the module docstring defines the quantities.

    Attributes:
        part: One of PARTS.
        strategy: One of STRATEGIES, or "every strategy".
        seconds: Length of the history, in seconds.
        latent_frames: Length of the history, in latent frames.
        history_tokens: Length of the history, in uncompressed patch tokens.
        context_tokens: Tokens that a step reads beside the noisy ones, or that the encoders make; 0 for the VAE.
        held_bytes: Bytes that stay for the next call.
        peak_bytes: Peak memory above that of the weights.
        call_seconds: Median time of a call, in seconds.
        call_seconds_fastest: Shortest time of a call, in seconds.
        call_seconds_slowest: Longest time of a call, in seconds.
        repeats: Number of timed calls.
    """

    part: str
    strategy: str
    seconds: float
    latent_frames: int
    history_tokens: int
    context_tokens: int
    held_bytes: int
    peak_bytes: int
    call_seconds: float
    call_seconds_fastest: float
    call_seconds_slowest: float
    repeats: int


def profile_model(
    config: CostConfig,
    name: str = "model",
    device: torch.device | str = "cpu",
    strategies: Sequence[str] = STRATEGIES,
    progress: Callable[[str, int, int], None] | None = None,
    interrupts: list[BaseException] | None = None,
) -> dict[str, Any]:
    """Measure every part of a model at every history length.

    Args:
        config: Model, lengths and limits.
        name: Name of the model in the result.
        device: Device to measure on.
        strategies: Some of STRATEGIES.
        progress: Called with (description, points done, points in total); memory and time of a point count as two.
        interrupts: List that an interrupt is appended to, so that the points measured so far are returned; without
            it, or before the first point, the interrupt is raised.

    Returns:
        The content of model_cost.json: format, description, device, versions, config, bytes of the weights, points,
        skipped points with the reason, `noisy` (whether times should not be trusted), and `missing` (memory or repeated
        time of the points that an interrupt left out).

    Raises:
        UserError: The weights do not fit into the memory of the device.
        ValueError: A strategy is unknown.
    """
    for strategy in strategies:
        if strategy not in STRATEGIES:
            raise ValueError(f"profile_model: strategies must be among {STRATEGIES}, got {strategy!r}")
    device = torch.device(device)
    if config.dtype == "auto":
        config = replace(config, dtype="float32" if device.type == "cpu" else "bfloat16")
    _check_weights(config, device)
    runs = _Runs(config, device, strategies, progress)
    try:
        with torch.inference_mode():
            with _no_holes():
                runs.measure_memory()
            runs.measure_time()
    except (KeyboardInterrupt, SystemExit) as stop:
        if interrupts is None or not runs.points:
            raise
        interrupts.append(stop)
    if progress and not interrupts:
        progress("profile", runs.told, runs.told)
    points = list(runs.points.values())
    with PeakMemory(device) as probe:
        pass
    return {
        "format": "vidmem.model_cost",
        "version": 2,
        "what": " ".join(__doc__.split()),
        "memory_measured_with": probe.method,
        "device": describe_device(device),
        "versions": versions(),
        "model": name,
        "config": asdict(config),
        "depth": config.depth or config.model.dit.depth,
        "depth_of_model": config.model.dit.depth,
        "next_step_is_exact": not config.model.dit.history_sees_video,
        "weights_bytes": runs.weights,
        "noisy": any(p.call_seconds > _NOISE * p.call_seconds_fastest for p in points),
        "points": [asdict(point) for point in points],
        "skipped": runs.skipped,
        "missing": runs.missing(),
    }


def _check_weights(config: CostConfig, device: torch.device) -> None:
    """Raise UserError if the weights of the largest strategy do not fit into the free memory of the device."""
    bench = StrategyBench(config, "compressed memory", torch.device("meta"))
    need, free = sum(bench.weights_bytes().values()), free_bytes(device)
    # Weights are initialised in float32.
    need *= 4 // getattr(torch, config.dtype).itemsize
    if need * _MARGIN > free:
        raise UserError(
            f"the weights of {config.depth or config.model.dit.depth} blocks take {need / 2**30:.1f} GiB, with a "
            f"margin {need * _MARGIN / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}; "
            "give a smaller --depth"
        )


@contextmanager
def _no_holes() -> Iterator[None]:
    """Let malloc allocate every large block from the system and free it at once, to avoid fragmentation.

    Otherwise small results between large temporary blocks leave holes that the next large block does not fit into: 20 s
    of video through a VAE grew the process by 180 MiB instead of 20 MiB, and by a different amount each time. This must
    start before there are holes, and slows calls down by half. Therefore memory is measured first for all points, and
    time afterwards.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 1 << 16)
    try:
        yield
    finally:
        # The value that malloc adapts to in a process that frees large blocks.
        mallopt(_MMAP_THRESHOLD, 32 << 20)
        mallopt(_TRIM_THRESHOLD, 64 << 20)


class _Runs:
    """Measures the points of a profile: first the memory of all points, then their times.

    Attributes:
        points: Points by (strategy, part, seconds).
        skipped: Skipped points with the reason.
        weights: Bytes of the weights of each part.
    """

    def __init__(
        self,
        config: CostConfig,
        device: torch.device,
        strategies: Sequence[str],
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.config, self.device, self.progress = config, device, progress
        self.lengths = sorted(set(config.lengths))
        self.strategies = (EVERY, *strategies)
        self.points: dict[tuple[str, str, float], CostPoint] = {}
        self.skipped: list[dict[str, Any]] = []
        self.weights: dict[str, int] = {}
        self.timed: set[tuple[str, str, float]] = set()
        self.told = 0

    def measure_memory(self) -> None:
        """Measure the memory, and roughly the time, of every point within the limits."""
        for strategy in self.strategies:
            try:
                bench = self._bench(strategy)
            except UserError as error:  # the package of the VAE is not installed
                for seconds in self.lengths:
                    self._skip("VAE encode", strategy, seconds, str(error))
                continue
            for part, size in bench.weights_bytes().items():
                self.weights[part] = max(size, self.weights.get(part, 0))
            before: dict[float, str] = {}
            for part, inputs, call in bench.parts():
                last = None
                reasons: dict[float, str] = {}
                for seconds in self.lengths:
                    self._tell("memory", part, strategy, seconds)
                    # The inputs of these parts come from a run of the part before.
                    reason = before.get(seconds) if part in ("append", "next step") else None
                    if reason is None and last is None and reasons:
                        reason = "a shorter history was too much"
                    reason = reason or _too_much(self.config, part, strategy, last, seconds, self.device)
                    if reason is None:
                        try:
                            reason = self._warm_up(part, seconds, inputs, call) if last is None else None
                            if reason is None:
                                last = self._memory(part, strategy, seconds, inputs, call)
                                self.points[strategy, part, seconds] = last
                        except (RuntimeError, MemoryError) as error:
                            if not _is_out_of_memory(error):
                                raise
                            reason = "ran out of memory"
                    if reason is not None:
                        reasons[seconds] = reason
                        self._skip(part, strategy, seconds, reason)
                before = reasons

    def measure_time(self) -> None:
        """Measure the time of every point whose memory is measured."""
        for strategy in dict.fromkeys(key[0] for key in self.points):
            for part, inputs, call in self._bench(strategy).parts():
                for seconds in self.lengths:
                    self._tell("time", part, strategy, seconds)
                    point = self.points.get((strategy, part, seconds))
                    if point is not None:
                        self.points[strategy, part, seconds] = self._time(point, inputs, call)
                        self.timed.add((strategy, part, seconds))

    def missing(self) -> list[dict[str, Any]]:
        """Points that are neither measured nor skipped."""
        skipped = {(each["strategy"], each["part"], each["seconds"]) for each in self.skipped}
        return [
            {"what": what, "part": part, "strategy": strategy, "seconds": seconds}
            for what, done in (("memory", self.points.keys()), ("time", self.timed))
            for strategy in self.strategies
            for part in parts_of(strategy)
            for seconds in self.lengths
            if (strategy, part, seconds) not in done and (strategy, part, seconds) not in skipped
        ]

    def _bench(self, strategy: str) -> StrategyBench | VAEBench:
        if strategy == EVERY:
            return VAEBench(self.config, self.device)
        return StrategyBench(self.config, strategy, self.device)

    def _warm_up(
        self, part: str, seconds: float, inputs: Callable[[int], Any], call: Callable[[Any], Any]
    ) -> str | None:
        """Run a part on a short history; return the reason to skip its points if that took too long.

        The first call makes thread pools and library workspaces, which stay allocated and must not be counted.
        """
        frames = self.config.latent_frames(seconds)
        few = min(frames, 2)
        given = inputs(few)
        passed = timed(lambda: call(given), self.device)
        expected = passed * frames / few if part.endswith(" encode") else passed
        if expected <= self.config.max_seconds:
            return None
        return f"takes about {expected:,.0f} s per call, more than the limit of {self.config.max_seconds:g} s"

    def _memory(
        self, part: str, strategy: str, seconds: float, inputs: Callable[[int], Any], call: Callable[[Any], Any]
    ) -> CostPoint:
        config = self.config
        frames = config.latent_frames(seconds)
        kept: list[Any] = []
        with PeakMemory(self.device) as memory:
            given = inputs(frames)
            memory.restart()
            passed = timed(lambda: kept.append(call(given)), self.device)
        return CostPoint(
            part=part,
            strategy=strategy,
            seconds=seconds,
            latent_frames=frames,
            history_tokens=frames * config.frame_tokens,
            context_tokens=_tokens(config, part, strategy, frames),
            held_bytes=tensor_bytes(kept),
            peak_bytes=memory.grown_bytes,
            call_seconds=passed,
            call_seconds_fastest=passed,
            call_seconds_slowest=passed,
            repeats=1,
        )

    def _time(self, point: CostPoint, inputs: Callable[[int], Any], call: Callable[[Any], Any]) -> CostPoint:
        given = inputs(point.latent_frames)
        if point.call_seconds < _WARM_SECONDS:
            call(given)
        times = repeated(lambda: call(given), self.device, timed(lambda: call(given), self.device))
        return replace(
            point,
            call_seconds=statistics.median(times),
            call_seconds_fastest=min(times),
            call_seconds_slowest=max(times),
            repeats=len(times),
        )

    def _skip(self, part: str, strategy: str, seconds: float, reason: str) -> None:
        self.skipped.append({"part": part, "strategy": strategy, "seconds": seconds, "reason": reason})

    def _tell(self, what: str, part: str, strategy: str, seconds: float) -> None:
        if self.progress:
            rows = sum(len(parts_of(s)) for s in self.strategies)
            self.progress(f"{what}: {part}, {strategy}, {seconds:g} s", self.told, 2 * rows * len(self.lengths))
            self.told += 1


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _tokens(config: CostConfig, part: str, strategy: str, frames: int) -> int:
    if part == "VAE encode":
        return 0
    if part == "memory encode":
        return config.memory_tokens(frames)
    if part == "append":
        return config.memory_tokens(frames + config.segment) - config.memory_tokens(frames)
    return config.context_tokens(strategy, frames)


def _too_much(
    config: CostConfig, part: str, strategy: str, last: CostPoint | None, seconds: float, device: torch.device
) -> str | None:
    """The reason to skip a point, estimated from the point before or, for the first, from the shapes; or None."""
    frames = config.latent_frames(seconds)
    is_step = part.endswith("step")
    read = config.context_tokens(strategy, frames) if is_step else frames * config.frame_tokens
    work = read + config.segment * config.frame_tokens
    if last is None:
        dit = config.model.dit
        need = work * (8 * dit.dim + 2 * dit.mlp) * getattr(torch, config.dtype).itemsize
        need += config.kv_bytes(work) * is_step
        expected = 0.0
    else:
        before = config.context_tokens(strategy, last.latent_frames) if is_step else last.history_tokens
        growth = work / (before + config.segment * config.frame_tokens)
        need = last.peak_bytes * growth
        # The history's tokens attend to each other: quadratic cost.
        squared = part == "first step" and strategy != "linear attention"
        expected = last.call_seconds * (growth**2 if squared else growth)
    free = free_bytes(device)
    if need * _MARGIN > free:
        return (
            f"takes about {need / 2**30:.1f} GiB, with a margin of {_MARGIN - 1:.0%} "
            f"{need * _MARGIN / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        )
    if expected > config.max_seconds:
        return f"takes about {expected:,.0f} s per call, more than the limit of {config.max_seconds:g} s"
    return None
