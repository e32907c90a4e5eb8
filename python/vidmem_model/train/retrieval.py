"""Stage I: train the memory to reconstruct any single frame of a history (arXiv 2512.23851).

A few random frames Omega of the history stay clean, the others are masked with noise. The DiT denoises the frames of
Omega, given the memory of the masked history.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist

from ..checks import Checked, FileName, not_negative, positive, require, within
from ..model.config import Compression, EncoderConfig, ModelConfig
from ..model.diffusers_dit import empty_transformer
from ..model.encoder import History
from ..model.flow import logit_normal, shift_timesteps
from ..model.lora import MOST_RANK, add_lora, merge_lora
from ..model.memory_model import MemoryModel
from ..model.text import require_encoder
from ..skeleton import require_room, require_trainable
from ..vae import load_vae
from ..video.films import DataConfig
from .blocks import Block, seeded
from .config import TrainConfig
from .distributed import processes
from .latents import Latents, Spans
from .linear_start import start_linearly
from .loop import Batch, fit
from .run import finish, prepare_latents, run_folder, run_settings

# Noise levels of the masked frames, and timesteps: logit-normal with this mean and standard deviation.
MASK_LEVEL = (0.2, 1.0)
TIME = (0.0, 1.0)
# Memory of a batch, in copies of its latents: history, noise, and at least two for activations.
_COPIES = 4


@dataclass(frozen=True)
class QueryConfig(Checked):
    """Configuration of the training samples of Stage I.

    Args:
        history: Length of a history, in latent frames.
        queries: Number of random latent frames of the history to denoise.
        mask_probability: Probability that the other frames of a history are masked with noise.
        mix_probability: Probability that two histories are added, with weights that keep the variance. Such a
            mixture is in no training video, so that a model that has memorised its few videos must read the memory.
        roll: Whether every history is shifted cyclically by a random number of low-resolution cells along rows and
            columns, so that the boxes of the memory cover different content each time.
        drop_prompt: Probability that a sample has an empty prompt, for classifier-free guidance.

    Raises:
        ValueError: A value is out of range.
    """

    history: Annotated[int, positive(1_000_000)] = 24
    queries: Annotated[int, positive(1_000_000)] = 2
    mask_probability: Annotated[float, within(0, 1)] = 1.0
    mix_probability: Annotated[float, within(0, 1)] = 0.0
    roll: bool = False
    drop_prompt: Annotated[float, within(0, 1)] = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.queries <= self.history,
            f"QueryConfig: queries must be in [1, {self.history}]",
            self.queries,
        )


@dataclass(frozen=True)
class PretrainConfig(Checked):
    """Configuration of a training run of Stage I.

    Args:
        model: Configuration of the model. In a recipe the name of a preset, or fields that may include `preset`.
        output: Output folder of the run.
        data: Training videos.
        sampling: Training samples.
        optimisation: Optimisation.
        vae: File of the VAE's weights; null for `model.vae.kind` dct, which has none.
        text: Folder of the pretrained text encoder; required for `model.text.kind` transformers.
        linear_start: Number of histories that `linear_start.start_linearly` initialises the model from; 0 for a random
            initialisation. They should have many times more boxes than a box has numbers (demo: 28,800 boxes of
            2,048 numbers).
        lora_rank: Rank of the LoRA adapters of a diffusers transformer, whose weights are frozen; 0 for none.

    Raises:
        ValueError: A value is out of range, or not allowed for the model's transformer.
    """

    model: ModelConfig
    output: FileName
    data: DataConfig = DataConfig()
    sampling: QueryConfig = QueryConfig()
    optimisation: TrainConfig = TrainConfig()
    vae: FileName | None = None
    text: FileName | None = None
    linear_start: Annotated[int, not_negative(1_000_000)] = 0
    lora_rank: Annotated[int, not_negative(MOST_RANK)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        pretrained = self.model.dit.diffusers is not None
        require(
            pretrained or not self.lora_rank,
            "PretrainConfig: lora_rank must be 0 unless model.dit.diffusers is set",
            self.lora_rank,
        )
        require(
            not self.linear_start or not (pretrained or any(each.width for each in self.model.encoders)),
            "PretrainConfig: linear_start must be 0 if model.dit.diffusers or the width of an encoder is set",
            self.linear_start,
        )


def low_compressions(encoders: Sequence[EncoderConfig]) -> list[Compression | None]:
    """Compression of the low-resolution latents that each encoder reads, or None."""
    return [each.compression if each.reads_low else None for each in encoders]


def alignment(encoders: Sequence[EncoderConfig]) -> int:
    """Smallest number of latent frames that is a whole number of boxes of every encoder."""
    return max(each.compression.time for each in encoders)


class FrameQueries:
    """Training samples of Stage I, determined by seed, step and sample number.

    Args:
        latents: Blocks that histories are drawn from.
        encoders: Memory encoders of the model; they determine which low-resolution latents are needed.
        config: Configuration of the samples.
        seed: Random seed.
        shift: Timestep shift of flow matching.

    Raises:
        UserError: No block is as long as a history.
    """

    def __init__(
        self,
        latents: Latents,
        encoders: Sequence[EncoderConfig],
        config: QueryConfig,
        seed: int = 0,
        shift: float = 1.0,
    ) -> None:
        self.latents, self.config, self.seed, self.shift = latents, config, seed, shift
        self.compressions = low_compressions(encoders)
        self.spans = Spans(latents, config.history, alignment(encoders))
        # Latent cells per low-resolution cell; also used for encoders that read no low-resolution video.
        boxes = [each.compression for each in encoders]
        self.cell = [max(box.height for box in boxes), max(box.width for box in boxes)]

    def __call__(self, step: int, samples: Sequence[int]) -> Batch:
        """Return the batch of these samples at a step."""
        drawn = [self._sample(seeded(self.seed, step, number)) for number in samples]
        history, target, noise, t, frames, prompts = zip(*drawn, strict=True)
        return Batch(
            history=History.stack(history),
            target=torch.stack(target),
            noise=torch.stack(noise),
            t=torch.stack(t),
            frames=torch.stack(frames),
            prompts=list(prompts),
        )

    def clean(self, count: int) -> Iterator[History]:
        """Draw histories (1, C, T, H, W) without noise."""
        for number in range(count):
            *_, history = self._draw(seeded(self.seed, "clean", number))
            yield history.map(lambda latents: latents[None])

    def _sample(self, generator: torch.Generator) -> tuple:
        config = self.config
        block, start, history = self._draw(generator)
        if torch.rand((), generator=generator) < config.mix_probability:
            angle = 2 * math.pi * torch.rand((), generator=generator)
            *_, other = self._draw(generator)
            history = _mixed(history, other, angle)
        omega = torch.randperm(config.history, generator=generator)[: config.queries].sort().values
        target = history.latents[:, omega]
        levels = torch.zeros(config.history)
        if torch.rand((), generator=generator) < config.mask_probability:
            levels = logit_normal((config.history,), *MASK_LEVEL, generator)
            levels[omega] = 0.0
        lows = [
            None if each is None else mask(low, low_levels(levels, omega, each.time), generator)
            for each, low in zip(self.compressions, history.lows, strict=True)
        ]
        noise = torch.randn(target.shape, generator=generator)
        t = shift_timesteps(logit_normal((), *TIME, generator), self.shift)
        dropped = torch.rand((), generator=generator) < config.drop_prompt
        prompt = "" if dropped else self.latents.prompt(block, start + int(omega[0]))
        masked = History(mask(history.latents, levels, generator), lows)
        return masked, target, noise, t, omega.float(), prompt

    def _draw(self, generator: torch.Generator) -> tuple[Block, int, History]:
        """Draw a block and the first latent frame of a history in it, and the history."""
        block, start = self.spans.draw(generator)
        history = block.read(start, self.config.history, self.compressions)
        if not self.config.roll:
            return block, start, history
        shifts = [
            cell * int(torch.randint(-(-size // cell), (), generator=generator))
            for cell, size in zip(self.cell, history.latents.shape[2:], strict=True)
        ]
        lows = [
            None if each is None else low.roll([shifts[0] // each.height, shifts[1] // each.width], (2, 3))
            for each, low in zip(self.compressions, history.lows, strict=True)
        ]
        return block, start, History(history.latents.roll(shifts, (2, 3)), lows)


def _mixed(history: History, other: History, angle: torch.Tensor) -> History:
    """Add two histories with weights that keep the variance."""
    pairs = zip((history.latents, *history.lows), (other.latents, *other.lows), strict=True)
    latents, *lows = (None if x is None else angle.cos() * x + angle.sin() * y for x, y in pairs)
    return History(latents, lows)


def low_levels(levels: torch.Tensor, omega: torch.Tensor, span: int) -> torch.Tensor:
    """Noise levels of the low-resolution latent frames, each of which covers `span` latent frames.

    Args:
        levels: (T,), noise levels of the history's latent frames.
        omega: Indices of the latent frames that stay clean.
        span: Latent frames per low-resolution latent frame.

    Returns:
        (T / span,): 0 if a frame of omega is covered, else the mean.
    """
    count = len(levels) // span
    boxes = levels[: count * span].view(count, span).mean(1)
    covering = omega // span
    boxes[covering[covering < count]] = 0.0
    return boxes


def mask(latents: torch.Tensor, levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mix every frame of latents (C, T, H, W) with noise: (1 - s) x + s eps, s from `levels` (T,)."""
    s = levels.view(-1, 1, 1)
    return (1 - s) * latents + s * torch.randn(latents.shape, generator=generator)


def pretrain(config: PretrainConfig, restart: bool = False) -> Path | None:
    """Run Stage I, or resume it from the last checkpoint.

    Args:
        config: Configuration of the run.
        restart: Discard a run in the output folder and start from step 0.

    Returns:
        Path of the model file; None in all processes but the first.

    Raises:
        Interrupted: A signal stopped the run; the same call resumes it.
        UserError: Something in the configuration cannot be used.
    """
    with processes(config.optimisation) as device, run_folder(config, config.vae, config.text) as output:
        require_encoder(config.model.text, config.text, "with the key `text` of the recipe")
        config.model.require_boxes()
        dit = config.model.dit
        require_trainable(
            lambda depth: MemoryModel(config.model.with_depth(depth), transformer=empty_transformer(dit)),
            dit.depth,
            device,
        )
        vae = load_vae(config.model.vae, Path(config.vae) if config.vae else None)
        encoders = config.model.encoders
        compressions = [each for each in low_compressions(encoders) if each]
        latents = prepare_latents(config.data, config.model, vae.to(device), compressions)
        require_batch(latents, config.optimisation.batch, config.sampling.history)
        seed, shift = config.optimisation.seed, config.model.shift
        batches = FrameQueries(latents.split("train"), encoders, config.sampling, seed, shift)
        model = fit(
            lambda: _fresh(config, batches),
            batches,
            config.optimisation,
            output,
            run_settings(config),
            device,
            restart,
        )
        if config.lora_rank:
            merge_lora(model)
        return finish(output, model, config, config.vae)


def require_batch(latents: Latents, batch: int, frames: int) -> None:
    """Check that a batch of samples of `frames` latent frames fits into memory.

    Raises:
        UserError: There is not enough memory.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    cells = max((block.latents[:, 0].numel() for block in latents.blocks), default=0)
    need = 4.0 * _COPIES * batch * frames * cells / world
    require_room(need, f"a batch of {batch:,} samples", "choose a smaller optimisation.batch or sampling.history")


def _fresh(config: PretrainConfig, batches: FrameQueries) -> MemoryModel:
    model = MemoryModel(config.model, config.text)
    if config.linear_start:
        start_linearly(model, lambda: batches.clean(config.linear_start))
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    return model
