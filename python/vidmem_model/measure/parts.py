"""The parts of a model that `model.profile_model` measures, with random weights, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch

from ..checks import MOST_SECONDS, Checked, Lengths, OneOf, positive, require
from ..model.config import ModelConfig
from ..model.dit import DiT, KVCache
from ..model.encoder import History, MemoryEncoder, MemoryTokens, memory_grid
from ..vae import PATCH, VideoCodec, load_vae
from .attention import DTYPES

STRATEGIES = ("whole history", "sliding window", "merged", "linear attention", "compressed memory")
ENCODED = ("merged", "compressed memory")
PARTS = ("VAE encode", "memory encode", "append", "first step", "next step")
EVERY = "every strategy"
LENGTHS = (1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class CostConfig(Checked):
    """Configuration of a model profile.

    Args:
        model: Configuration of the model.
        lengths: History lengths to measure, in seconds.
        segment: Latent frames that are denoised, and appended, together.
        window_frames: Latent frames of the sliding window.
        depth: Number of DiT blocks to measure; None for all. Time and held memory of a step grow linearly with the
            blocks; the last block does slightly less work than the others.
        dtype: Dtype of weights and latents; "auto" is float32 on the CPU and bfloat16 on a GPU.
        max_seconds: Points whose call is expected to take longer are skipped, in seconds.

    Raises:
        ValueError: A number is not positive, depth is above that of the model, or the dtype is unknown.
    """

    model: ModelConfig
    lengths: Lengths = LENGTHS
    segment: Annotated[int, positive(100_000)] = 4
    window_frames: Annotated[int, positive(1_000_000)] = 8
    depth: Annotated[int | None, positive(10_000)] = None
    dtype: Annotated[str, OneOf(*DTYPES)] = "auto"
    max_seconds: Annotated[float, positive(MOST_SECONDS)] = 60.0

    def __post_init__(self) -> None:
        super().__post_init__()
        most = self.model.dit.depth
        require(self.depth is None or 1 <= self.depth <= most, f"CostConfig: depth must be in [1, {most}]", self.depth)

    def latent_frames(self, seconds: float) -> int:
        """Number of whole latent frames in `seconds` of video, at least one."""
        return max(1, round(seconds * self.model.fps / self.model.vae.stride[0]))

    @property
    def frame_tokens(self) -> int:
        """Patch tokens of a latent frame."""
        return math.prod(self.model.latent_size) // PATCH**2

    def memory_tokens(self, frames: int) -> int:
        """Number of memory tokens of `frames` latent frames."""
        return sum(
            math.prod(memory_grid(each.compression, frames, *self.model.latent_size)) for each in self.model.encoders
        )

    def context_frames(self, strategy: str, frames: int) -> int:
        """Number of clean latent frames that a step reads."""
        if strategy in ENCODED:
            return min(frames, self.model.dit.window)
        return min(frames, self.window_frames) if strategy == "sliding window" else frames

    def context_tokens(self, strategy: str, frames: int) -> int:
        """Number of tokens that a step reads beside the noisy ones: memory and clean latent frames."""
        memory = self.memory_tokens(frames) if strategy in ENCODED else 0
        return memory + self.context_frames(strategy, frames) * self.frame_tokens

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the keys and values of so many tokens in all blocks that are measured; the dtype must be chosen."""
        dit = self.model.dit
        return 2 * (self.depth or dit.depth) * dit.dim * tokens * getattr(torch, self.dtype).itemsize


def parts_of(strategy: str) -> tuple[str, ...]:
    """Names of the parts of a strategy."""
    return PARTS[:1] if strategy == EVERY else PARTS[1:] if strategy in ENCODED else PARTS[3:]


def tensor_bytes(kept: Any) -> int:
    """Bytes of all tensors in nested tuples, lists, dicts and KVCaches."""
    if isinstance(kept, torch.Tensor):
        return kept.numel() * kept.element_size()
    if isinstance(kept, KVCache):
        kept = kept.blocks
    if isinstance(kept, dict):
        kept = tuple(kept.values())
    return sum(map(tensor_bytes, kept)) if isinstance(kept, (tuple, list)) else 0


class StrategyBench:
    """The parts of one strategy on a device.

    A part is a pair of functions: the first makes inputs for a history of a number of latent frames, the second runs
    the part on them and returns what stays for the next call.
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
        """Name, input function and call of each part of this strategy."""
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

    def _history(self, frames: int) -> History:
        """Random latents of `frames` latent frames."""
        channels, size = self.config.model.vae.channels, self.config.model.latent_size
        lows = []
        for encoder in self.encoders:
            t, h, w = encoder.grid(frames, *size)
            lows.append(self._random(1, channels, t, PATCH * h, PATCH * w) if encoder.config.reads_low else None)
        return History(self._random(1, channels, frames, *size), lows)

    def _append(self, history: History, states: list[Any]) -> tuple[list[MemoryTokens], list[Any]]:
        made = [
            encoder.append(history.latents, low, self.dit.patch_embed, state)
            for encoder, low, state in zip(self.encoders, history.lows, states, strict=True)
        ]
        return [tokens for tokens, _ in made], [state for _, state in made]

    def _encoded(self, frames: int) -> tuple[History, list[Any]]:
        """A segment to append, and the states of the encoders after the history."""
        states = self._append(self._history(frames), [None] * len(self.encoders))[1]
        return self._history(self.config.segment), states

    def _step_inputs(self, frames: int) -> dict[str, Any]:
        """Arguments of a denoising step: noisy segment, text and context of the strategy."""
        config, model = self.config, self.config.model
        channels, size = model.vae.channels, model.latent_size
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
        # As in generation: with cached keys and values, the clean latents are not needed.
        keep = {"x", "t", "text", "text_mask", "frames"}
        if self.config.model.dit.memory_cross_attention:
            keep.add("memory")
        return {name: value for name, value in given.items() if name in keep}, cache


class VAEBench:
    """VAE encoding, the part that all strategies share."""

    strategy = EVERY

    def __init__(self, config: CostConfig, device: torch.device) -> None:
        self.config = config
        self.vae = _new_vae(config, device)

    def parts(self) -> Iterator[tuple[str, Callable[[int], Any], Callable[[Any], Any]]]:
        """As StrategyBench.parts."""
        yield "VAE encode", self._video, self._encode

    def weights_bytes(self) -> dict[str, int]:
        """As StrategyBench.weights_bytes."""
        state = self.vae.state_dict() if isinstance(self.vae, torch.nn.Module) else {}
        return {"VAE": tensor_bytes(dict(state))}

    def _video(self, frames: int) -> list[torch.Tensor]:
        """uint8 chunks of one random tensor, because reading video is not measured."""
        model, vae = self.config.model, self.vae
        chunk = torch.randint(0, 256, (vae.chunk * vae.stride[0], model.height, model.width, 3), dtype=torch.uint8)
        whole, rest = divmod(vae.video_frames(frames), len(chunk))
        return [chunk] * whole + ([chunk[:rest]] if rest else [])

    def _encode(self, video: list[torch.Tensor]) -> list[torch.Tensor]:
        return list(self.vae.encode_chunks(video))


def _new_vae(config: CostConfig, device: torch.device) -> VideoCodec:
    sizes = config.model.vae
    if sizes.kind in ("wan", "hunyuan"):
        from ..vae.diffusers_vae import new_diffusers_vae

        return new_diffusers_vae(sizes).to(device=device, dtype=getattr(torch, config.dtype))
    return load_vae(sizes).to(device)
