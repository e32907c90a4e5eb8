"""Stage I: the memory of a history learns to give back any single frame of it (arXiv 2512.23851).

A few random frames Omega of the history stay clean, the others are masked with noise; the DiT is to
make the frames of Omega from noise, given the memory of the masked history.
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

# Noise of the masked frames, and times of the flow: logit-normal with this mean and deviation.
MASK_LEVEL = (0.2, 1.0)
TIME = (0.0, 1.0)
# Of the latents of a sample: history, noise, and what the layers make of them at the least.
_COPIES = 4


@dataclass(frozen=True)
class QueryConfig(Checked):
    """What a sample of Stage I is.

    Args:
        history: latent frames of a history.
        queries: frames of it that are to be made, in random places.
        mask_probability: how often the rest of the history is masked with noise; else all stays clean.
        mix_probability: how often two histories are added, with weights that keep the variance, to one
            that no film holds: a model that has seen its few films often can no longer answer from what
            it knows of them, and has to read the memory.
        roll: move every history round its frame's edges by a random number of low-resolution cells, so
            that what lies in one box of the memory is another each time.
        drop_prompt: how often a sample has no prompt.

    Raises:
        ValueError: a value is out of range.
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
    """A run of Stage I.

    Args:
        model: its sizes; in YAML a preset's name, or fields with `preset` among them.
        output: folder of the run.
        data, sampling, optimisation: films, samples, and how to optimise.
        vae: file of the VAE's weights; null for the codec without any.
        text: folder of the pretrained text encoder, for `model.text.kind` transformers.
        linear_start: histories of which linear_start.start_linearly finds where to begin; 0 to begin at
            random. Their boxes should be many times the numbers of a box (demo: 28,800 boxes, 2,048 numbers).
        lora_rank: of the adapters of a transformer of diffusers, whose own weights are not trained; 0 for none.

    Raises:
        ValueError: a value is out of range, or not for the model's transformer.
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
            "PretrainConfig: lora_rank must be 0 for a transformer that is trained itself",
            self.lora_rank,
        )
        require(
            not self.linear_start or not (pretrained or any(each.width for each in self.model.encoders)),
            "PretrainConfig: linear_start must be 0 for a transformer of diffusers or an encoder of its own width",
            self.linear_start,
        )


def low_compressions(encoders: Sequence[EncoderConfig]) -> list[Compression | None]:
    """Compression of the low-resolution latents that each encoder reads, or None."""
    return [each.compression if each.reads_low else None for each in encoders]


def alignment(encoders: Sequence[EncoderConfig]) -> int:
    """Latent frames that whole boxes of all encoders cover."""
    return max(each.compression.time for each in encoders)


class FrameQueries:
    """Samples of Stage I, a function of seed, step and number of the sample.

    Args:
        latents: blocks to take histories from.
        encoders: of the model; they say which low-resolution latents are needed.
        config: what a sample is.
        seed: of all choices.
        shift: of the flow's times towards the noise.

    Raises:
        UserError: no block is as long as a history.
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
        # Latent cells that a low-resolution cell covers; the same for encoders that read none.
        boxes = [each.compression for each in encoders]
        self.cell = [max(box.height for box in boxes), max(box.width for box in boxes)]

    def __call__(self, step: int, samples: Sequence[int]) -> Batch:
        """Return the batch of these samples of a step."""
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
    """The sum of two histories with weights that keep the variance."""
    pairs = zip((history.latents, *history.lows), (other.latents, *other.lows), strict=True)
    latents, *lows = (None if x is None else angle.cos() * x + angle.sin() * y for x, y in pairs)
    return History(latents, lows)


def low_levels(levels: torch.Tensor, omega: torch.Tensor, span: int) -> torch.Tensor:
    """Noise levels of the low-resolution latent frames, each of which covers `span` frames.

    Args:
        levels: (T,) of the history's frames.
        omega: indices of the frames that stay clean.
        span: frames that one covers.

    Returns:
        (T / span,): 0 where a frame of omega is covered, else the mean.
    """
    count = len(levels) // span
    boxes = levels[: count * span].view(count, span).mean(1)
    covering = omega // span
    boxes[covering[covering < count]] = 0.0
    return boxes


def mask(latents: torch.Tensor, levels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mix every frame of latents (C, T, H, W) with noise: (1 - s) x + s eps, s of `levels` (T,)."""
    s = levels.view(-1, 1, 1)
    return (1 - s) * latents + s * torch.randn(latents.shape, generator=generator)


def pretrain(config: PretrainConfig, restart: bool = False) -> Path | None:
    """Run Stage I, or go on with it.

    Args:
        config: of the run.
        restart: begin anew although the output folder holds a run.

    Returns:
        The model's file; None in all processes but the first.

    Raises:
        Interrupted: it was stopped; the same call goes on from there.
        UserError: something in the configuration cannot be used.
    """
    with processes(config.optimisation) as device, run_folder(config, config.vae, config.text) as output:
        require_encoder(config.model.text, config.text, "by the key text:")
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
    """Refuse a batch whose samples of so many latent frames do not fit into memory, let alone the work on them.

    Raises:
        UserError: there is too little memory.
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
