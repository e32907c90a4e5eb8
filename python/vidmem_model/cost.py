"""Time and peak memory of every part of a model against the length of the history it looks back on.

Five ways to let a diffusion transformer (DiT) of one size see a history are measured, at rising lengths:

- whole history: all its patch tokens are context, as clean latent frames;
- sliding window: the same of the last latent frames only;
- merged: the patch tokens merged to as many as a memory encoder would make;
- linear attention: the whole history, in a DiT whose self-attention is linear in all blocks;
- compressed memory: the tokens of the model's memory encoders.

Merged and compressed memory come with the clean latent frames that the model has beside them
(`DiTConfig.window`). The parts:

- VAE encode: the video of the history, chunk by chunk as it would arrive. The same for all strategies;
  the low-resolution branch's own small video is not in it;
- memory encode: latents of the history to memory tokens, at once;
- append: the same for one segment more, with what the encoder kept of the history. Merging keeps
  nothing: it reduces the segment alone;
- first step: a step of denoising one segment, which computes the history's tokens too and keeps their
  keys and values (or the linear state);
- next step: a later step, which reads what was kept. In a model whose history sees the video
  (`history_sees_video`) that is an approximation, and the exact step is the first one again.

Sizes alone count: weights, latents and tokens are random, batch 1. Peak memory is the highest level,
above the one with the weights in place, while the part's inputs exist and it runs: inputs, what is kept,
workspace and results. `held_bytes` is what stays for the next call, from the tensors' sizes. Time is the
median of repeated calls after a warm-up.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .dit import DiT, KVCache
from .encoder import MemoryEncoder, MemoryTokens, memory_grid
from .errors import UserError
from .measure import PeakMemory, describe_device, timed
from .model_config import ModelConfig
from .profile import DTYPES, free_bytes, is_noisy, repeated, versions
from .vae import PATCH, VideoCodec, load_vae

STRATEGIES = ("whole history", "sliding window", "merged", "linear attention", "compressed memory")
ENCODED = ("merged", "compressed memory")
PARTS = ("VAE encode", "memory encode", "append", "first step", "next step")
EVERY = "every strategy"
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0)

# What is expected of a point, from the one before, is multiplied by this before it is compared with
# what is free.
_MARGIN = 1.3


@dataclass(frozen=True)
class CostConfig:
    """What to measure.

    Args:
        model: sizes of all parts, the frames and their rate.
        lengths: seconds of history to measure at.
        segment: latent frames that are denoised, and appended, at a time.
        window_frames: latent frames that the sliding window keeps.
        depth: blocks of the DiT that is measured, or None for all of the model's. Times of the steps,
            and what they keep, grow with the blocks; the last block does a little less than the others.
        dtype: of weights and latents; "auto" is float32 on the CPU and bfloat16 elsewhere.
        most_seconds: points whose call is expected to take longer are left out.

    Raises:
        ValueError: a number is not positive, depth is beyond the model's, or the dtype unknown.
    """

    model: ModelConfig
    lengths: tuple[float, ...] = LENGTHS
    segment: int = 4
    window_frames: int = 8
    depth: int | None = None
    dtype: str = "auto"
    most_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.lengths or not all(math.isfinite(s) and s > 0 for s in self.lengths):
            raise ValueError(f"CostConfig: lengths must be positive seconds, got {list(self.lengths)}")
        for name in ("segment", "window_frames", "most_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"CostConfig: {name} must be positive, got {getattr(self, name)}")
        if self.depth is not None and not 1 <= self.depth <= self.model.dit.depth:
            raise ValueError(f"CostConfig: depth must be in [1, {self.model.dit.depth}], got {self.depth}")
        if self.dtype not in DTYPES:
            raise ValueError(f"CostConfig: dtype must be one of {DTYPES}, got {self.dtype!r}")

    def latent_frames(self, seconds: float) -> int:
        """Whole latent frames in so many seconds of video, at least one."""
        return max(1, round(seconds * self.model.fps / self.model.vae.stride[0]))

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns, padded to whole patches."""
        cells = [s * PATCH for s in self.model.vae.stride[1:]]
        size = (self.model.height, self.model.width)
        rows, columns = (-(-n // c) * PATCH for n, c in zip(size, cells, strict=True))
        return rows, columns

    @property
    def frame_tokens(self) -> int:
        """Patch tokens of a latent frame."""
        return math.prod(self.latent_size) // self.model.dit.patch**2

    def memory_tokens(self, frames: int) -> int:
        """Tokens that the model's encoders make of so many latent frames."""
        return sum(math.prod(memory_grid(each.rate, frames, *self.latent_size)) for each in self.model.encoders)

    def context_frames(self, strategy: str, frames: int) -> int:
        """Clean latent frames that a step reads."""
        if strategy in ENCODED:
            return min(frames, self.model.dit.window)
        return min(frames, self.window_frames) if strategy == "sliding window" else frames

    def context_tokens(self, strategy: str, frames: int) -> int:
        """Tokens that a step reads beside the noisy ones: of memory, and of clean latent frames."""
        memory = self.memory_tokens(frames) if strategy in ENCODED else 0
        return memory + self.context_frames(strategy, frames) * self.frame_tokens


@dataclass(frozen=True)
class CostPoint:
    """One measurement; the module docstring says what is counted.

    Attributes:
        part: one of PARTS.
        strategy: one of STRATEGIES, or "every strategy".
        seconds, latent_frames, history_tokens: length of the history; the last in uncompressed patch tokens.
        context_tokens: tokens that a step reads beside the noisy ones, or that the encoders make; 0 for the VAE.
        held_bytes: what stays for the next call.
        peak_bytes: highest level above that of the weights.
        call_seconds, call_seconds_fastest, call_seconds_slowest: time of a call; the first is the median.
        repeats: calls the median is of.
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


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in nested tuples, lists and dicts; those of a KVCache too."""
    if isinstance(kept, torch.Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, KVCache):
        kept = kept.blocks
    if isinstance(kept, dict):
        kept = tuple(kept.values())
    return sum(map(tensor_bytes, kept)) if isinstance(kept, (tuple, list)) else 0


class _Bench:
    """The parts of one strategy on the device, and what each part's inputs and call are.

    A part is a pair of functions: the first makes its inputs for a history of so many latent frames,
    the second runs it on them and returns what stays for the next call.
    """

    def __init__(self, config: CostConfig, strategy: str, device: torch.device) -> None:
        self.config, self.strategy, self.device = config, strategy, device
        self.dtype = getattr(torch, config.dtype)
        model = config.model
        depth = config.depth or model.dit.depth
        linear = range(depth) if strategy == "linear attention" else (b for b in model.dit.linear_blocks if b < depth)
        sizes = replace(model.dit, depth=depth, linear_blocks=tuple(linear))
        branches = {"branches": "merge"} if strategy == "merged" else {}
        with device:
            self.dit = DiT(sizes, model.vae.channels, model.text.dim)
            self.encoders = [
                MemoryEncoder(replace(each, **branches), sizes.dim, model.vae.channels)
                for each in (model.encoders if strategy in ENCODED else ())
            ]
        for part in (self.dit, *self.encoders):
            part.to(self.dtype).eval().requires_grad_(False)

    def parts(self) -> Iterator[tuple[str, Callable[[int], Any], Callable[[Any], Any]]]:
        """Name, inputs and call of each part that this strategy has."""
        if self.encoders:
            yield "memory encode", self._history, lambda given: self._append(given, [None] * len(self.encoders))[0]
            yield "append", self._encoded, lambda given: self._append(*given)[1]
        yield "first step", self._step_inputs, lambda given: self._step(given, KVCache())
        yield "next step", self._kept, lambda given: self._step(*given)

    def weights_bytes(self) -> dict[str, int]:
        """Bytes of the weights."""
        parts = {"DiT": [self.dit], "memory encoders": self.encoders}
        return {name: tensor_bytes([list(m.state_dict().values()) for m in ms]) for name, ms in parts.items()}

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def _history(self, frames: int) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Latents of a history, and for each encoder those of its low-resolution video."""
        channels, size = self.config.model.vae.channels, self.config.latent_size
        lows = []
        for encoder in self.encoders:
            t, h, w = encoder.grid(frames, *size)
            lows.append(self._random(1, channels, t, PATCH * h, PATCH * w) if encoder.reads_low else None)
        return self._random(1, channels, frames, *size), lows

    def _append(self, given: Any, states: list[Any]) -> tuple[list[MemoryTokens], list[Any]]:
        history, lows = given
        made = [
            encoder.append(history, low, self.dit.patch_embed, state)
            for encoder, low, state in zip(self.encoders, lows, states, strict=True)
        ]
        return [tokens for tokens, _ in made], [state for _, state in made]

    def _encoded(self, frames: int) -> tuple[Any, list[Any]]:
        """The segment to append, and the encoders' states after the history."""
        states = self._append(self._history(frames), [None] * len(self.encoders))[1]
        return self._history(self.config.segment), states

    def _step_inputs(self, frames: int) -> dict[str, Any]:
        """Arguments of a denoising step: the noisy segment, the text, and the strategy's context."""
        config, model = self.config, self.config.model
        channels, size = model.vae.channels, config.latent_size
        seen = config.context_frames(self.strategy, frames)
        at = torch.arange(frames + config.segment, device=self.device, dtype=torch.float32)[None]
        given = {
            "x": self._random(1, channels, config.segment, *size),
            "t": torch.full((1,), 0.5, device=self.device),
            "text": self._random(1, model.text.max_tokens, model.text.dim),
            "text_mask": torch.ones(1, model.text.max_tokens, dtype=torch.bool, device=self.device),
            "frames": at[:, frames:],
        }
        if seen:
            given["window"] = self._random(1, channels, seen, *size)
            given["window_frames"] = at[:, frames - seen : frames]
        if self.encoders:
            count = config.memory_tokens(frames)
            places = torch.rand(1, count, 3, device=self.device) * frames
            given["memory"] = MemoryTokens(self._random(1, count, model.dit.dim), places)
        return given

    def _step(self, given: dict[str, Any], cache: KVCache) -> KVCache:
        self.dit(**given, cache=cache)
        return cache

    def _kept(self, frames: int) -> tuple[dict[str, Any], KVCache]:
        given = self._step_inputs(frames)
        cache = self._step(given, KVCache())
        # As a generator would: with the keys and values at hand, the clean latents are not needed.
        keep = {"x", "t", "text", "text_mask", "frames"}
        if self.config.model.dit.memory_cross_attention:
            keep.add("memory")
        return {name: value for name, value in given.items() if name in keep}, cache


class _VAEBench:
    """The one part that all strategies share."""

    strategy = EVERY

    def __init__(self, config: CostConfig, device: torch.device) -> None:
        self.config = config
        self.vae = _new_vae(config, device)

    def parts(self) -> Iterator[tuple[str, Callable[[int], Any], Callable[[Any], Any]]]:
        """As _Bench.parts."""
        yield "VAE encode", self._video, self._encode

    def weights_bytes(self) -> dict[str, int]:
        """As _Bench.weights_bytes."""
        state = self.vae.state_dict() if isinstance(self.vae, torch.nn.Module) else {}
        return {"VAE": tensor_bytes(dict(state))}

    def _video(self, frames: int) -> list[torch.Tensor]:
        """uint8 chunks of one random tensor: reading video is not measured."""
        model, vae = self.config.model, self.vae
        chunk = torch.randint(0, 256, (vae.chunk * vae.stride[0], model.height, model.width, 3), dtype=torch.uint8)
        whole, rest = divmod(vae.video_frames(frames), len(chunk))
        return [chunk] * whole + ([chunk[:rest]] if rest else [])

    def _encode(self, video: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.vae.encode_chunks(video))


def _new_vae(config: CostConfig, device: torch.device) -> VideoCodec:
    sizes = config.model.vae
    if sizes.kind in ("wan", "hunyuan"):
        from .vae.diffusers_vae import new_diffusers_vae

        return new_diffusers_vae(sizes).to(device=device, dtype=getattr(torch, config.dtype))
    return load_vae(sizes).to(device)


def profile_model(
    config: CostConfig,
    name: str = "model",
    device: torch.device | str = "cpu",
    strategies: Sequence[str] = STRATEGIES,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every part of a model at every length; see the module docstring.

    Args:
        config: model, lengths and what else.
        name: what to call the model.
        device: where to measure.
        strategies: which of STRATEGIES.
        progress: called with (description, points done, points in all).

    Returns:
        What goes into the JSON file: format, what is measured, device, versions, config, bytes of the
        weights, points, those skipped with the reason, and `noisy` as for `profile.profile`.

    Raises:
        UserError: the weights do not fit the device's memory.
    """
    device = torch.device(device)
    if config.dtype == "auto":
        config = replace(config, dtype="float32" if device.type == "cpu" else "bfloat16")
    _check_weights(config, device)
    lengths = sorted(set(config.lengths))
    points: list[CostPoint] = []
    skipped: list[dict[str, Any]] = []
    weights: dict[str, int] = {}
    total = len(lengths) * sum(1 + 1 * (s in ENCODED) for s in strategies) * 2 + len(lengths)
    for strategy in (EVERY, *strategies):
        try:
            bench = _VAEBench(config, device) if strategy == EVERY else _Bench(config, strategy, device)
        except UserError as error:  # the VAE's package is missing
            skipped += [_skip("VAE encode", EVERY, seconds, str(error)) for seconds in lengths]
            continue
        for part, size in bench.weights_bytes().items():
            weights[part] = max(size, weights.get(part, 0))
        reasons: dict[float, str] = {}
        for part, inputs, call in bench.parts():
            # Parts come in pairs: the inputs of the second take a run of the first.
            before = reasons if part in ("append", "next step") else {}
            reasons = {}
            last = None
            for seconds in lengths:
                if progress:
                    progress(f"{part}, {strategy}, {seconds:g} s", len(points) + len(skipped), total)
                reason = before.get(seconds) or _too_much(config, part, strategy, last, seconds, device)
                if reason is None:
                    try:
                        last = _measure(config, part, strategy, seconds, inputs, call, device)
                        points.append(last)
                    except (RuntimeError, MemoryError) as error:
                        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and (
                            "allocate memory" not in str(error)
                        ):
                            raise
                        reason = "out of memory"
                if reason is not None:
                    reasons[seconds] = reason
                    skipped.append(_skip(part, strategy, seconds, reason))
        del bench, inputs, call
    if progress:
        progress("profile", total, total)
    with PeakMemory(device) as probe:
        pass
    return {
        "format": "vidmem.model_cost",
        "version": 1,
        "what": " ".join(__doc__.split()),
        "memory_measured_with": probe.method,
        "device": describe_device(device),
        "versions": versions(),
        "model": name,
        "config": asdict(config),
        "depth": config.depth or config.model.dit.depth,
        "depth_of_model": config.model.dit.depth,
        "next_step_is_exact": not config.model.dit.history_sees_video,
        "weights_bytes": weights,
        "noisy": is_noisy(points),
        "points": [asdict(point) for point in points],
        "skipped": skipped,
    }


def _skip(part: str, strategy: str, seconds: float, reason: str) -> dict[str, Any]:
    return {"part": part, "strategy": strategy, "seconds": seconds, "reason": reason}


def _check_weights(config: CostConfig, device: torch.device) -> None:
    """Raise UserError if the largest strategy's weights do not fit the device's free memory."""
    bench = _Bench(config, "compressed memory", torch.device("meta"))
    need, free = sum(bench.weights_bytes().values()), free_bytes(device)
    # They are made in float32.
    need *= 4 // getattr(torch, config.dtype).itemsize
    if need * _MARGIN > free:
        raise UserError(
            f"the weights of {config.depth or config.model.dit.depth} blocks take {need / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free on {device}; give a smaller --depth"
        )


def _measure(
    config: CostConfig,
    part: str,
    strategy: str,
    seconds: float,
    inputs: Callable[[int], Any],
    call: Callable[[Any], Any],
    device: torch.device,
) -> CostPoint:
    frames = config.latent_frames(seconds)
    kept: list[Any] = []
    with torch.inference_mode():
        # Thread pools and library workspaces, made by the first call, stay with the process.
        call(inputs(min(frames, config.segment)))
        with PeakMemory(device) as memory:
            given = inputs(frames)
            memory.restart()
            first = timed(lambda: kept.append(call(given)), device)
        held = tensor_bytes(kept)
        kept.clear()
        times = repeated(lambda: call(given), device, first)
    return CostPoint(
        part=part,
        strategy=strategy,
        seconds=seconds,
        latent_frames=frames,
        history_tokens=frames * config.frame_tokens,
        context_tokens=_tokens(config, part, strategy, frames),
        held_bytes=held,
        peak_bytes=memory.grown_bytes,
        call_seconds=statistics.median(times),
        call_seconds_fastest=min(times),
        call_seconds_slowest=max(times),
        repeats=len(times),
    )


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
    """Why a point is left out, judged by the one before it, or by the shapes where it is the first."""
    frames = config.latent_frames(seconds)
    is_step = part.endswith("step")
    read = config.context_tokens(strategy, frames) if is_step else frames * config.frame_tokens
    work = read + config.segment * config.frame_tokens
    if last is None:
        dit = config.model.dit
        kept = 2 * (config.depth or dit.depth) * dit.dim * is_step
        need = work * (kept + 8 * dit.dim + 2 * dit.mlp) * getattr(torch, config.dtype).itemsize
        expected = 0.0
    else:
        before = config.context_tokens(strategy, last.latent_frames) if is_step else last.history_tokens
        growth = work / (before + config.segment * config.frame_tokens)
        need = last.peak_bytes * growth
        # The history's tokens attend to each other.
        squared = part == "first step" and strategy != "linear attention"
        expected = last.call_seconds * (growth**2 if squared else growth)
    free = free_bytes(device)
    if need * _MARGIN > free:
        return f"takes about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
    if expected > config.most_seconds:
        return f"takes about {expected:,.0f} s a call, more than {config.most_seconds:g} s"
    return None
