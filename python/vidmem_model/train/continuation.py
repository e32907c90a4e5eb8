"""Stage II: train the pretrained model to continue a video from its memory (arXiv 2512.23851).

The history is clean. The DiT, with new LoRA adapters, denoises the frames after it, given the memory and, in some
steps, the last frames of the history uncompressed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import torch

from ..checks import Checked, FileName, Former, not_negative, positive, require, within
from ..model.config import EncoderConfig
from ..model.encoder import History
from ..model.file import files_of, load_model
from ..model.flow import logit_normal, shift_timesteps
from ..model.lora import LORA_FILE, MOST_RANK, add_lora, merge_lora, save_lora
from ..model.memory_model import MemoryModel
from ..model.text import require_encoder
from ..vae import load_vae
from ..video.films import DataConfig
from .blocks import Block, seeded
from .config import TrainConfig
from .distributed import processes, rank
from .latents import Latents, Spans
from .loop import Batch, fit
from .retrieval import TIME, alignment, low_compressions, require_batch
from .run import finish, prepare_latents, run_extra, run_folder, run_settings


@dataclass(frozen=True)
class ContinuationConfig(Checked):
    """Configuration of the training samples of Stage II.

    Args:
        history: Length of a history, in latent frames.
        targets: Number of latent frames after the history to denoise.
        window: Number of last latent frames of the history that the DiT also reads uncompressed.
        window_probability: Probability that a step has such a window.
        empty_probability: Probability that a step has no history, as at the start of a video.
        drop_prompt: Probability that a sample has an empty prompt, for classifier-free guidance.
        max_change: Maximum mean squared difference between neighbouring latent frames (whose variance is about 1)
            within a shot. Targets with a larger change in or right before them have an unpredictable cut and are
            not used. None uses all targets.

    Raises:
        ValueError: A value is out of range.
    """

    FORMER: ClassVar[dict[str, Former]] = {"most_change": Former("max_change")}

    history: Annotated[int, positive(1_000_000)] = 24
    targets: Annotated[int, positive(1_000_000)] = 6
    window: Annotated[int, positive(1_000_000)] = 3
    window_probability: Annotated[float, within(0, 1)] = 0.5
    empty_probability: Annotated[float, within(0, 1)] = 0.1
    drop_prompt: Annotated[float, within(0, 1)] = 0.1
    max_change: Annotated[float | None, positive(1e9)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.window <= self.history,
            f"ContinuationConfig: window must be in [1, {self.history}]",
            self.window,
        )


@dataclass(frozen=True)
class FinetuneConfig(Checked):
    """Configuration of a training run of Stage II.

    Args:
        start: Model of Stage I, a file or its folder. In a recipe the key is `from`.
        output: Output folder of the run.
        data: Training videos.
        sampling: Training samples.
        optimisation: Optimisation.
        vae: File of the VAE's weights; by default the one beside the model of Stage I.
        text: Folder of the pretrained text encoder; required if the model uses one.
        lora_rank: Rank of the LoRA adapters; 0 trains all weights of the DiT.
        freeze_encoder: Whether the memory encoders and the text encoder stay frozen. Then Stage II trains the
            adapters only, and also writes them to lora.safetensors.
    """

    start: FileName
    output: FileName
    data: DataConfig = DataConfig()
    sampling: ContinuationConfig = ContinuationConfig()
    optimisation: TrainConfig = TrainConfig()
    vae: FileName | None = None
    text: FileName | None = None
    lora_rank: Annotated[int, not_negative(MOST_RANK)] = 32
    freeze_encoder: bool = False


class Continuations:
    """Training samples of Stage II, determined by seed, step and sample number.

    Args:
        latents: Blocks that histories and targets are drawn from.
        encoders: Memory encoders of the model; they determine which low-resolution latents are needed.
        config: Configuration of the samples.
        seed: Random seed.
        shift: Timestep shift of flow matching.

    Raises:
        UserError: No block is as long as a history and its targets, or all targets contain cuts.
    """

    def __init__(
        self,
        latents: Latents,
        encoders: Sequence[EncoderConfig],
        config: ContinuationConfig,
        seed: int = 0,
        shift: float = 1.0,
    ) -> None:
        self.latents, self.config, self.seed, self.shift = latents, config, seed, shift
        self.compressions = low_compressions(encoders)
        self.spans = Spans(latents, config.history + config.targets, alignment(encoders), self._goes_on)

    def __call__(self, step: int, samples: Sequence[int]) -> Batch:
        """Return the batch of these samples at a step."""
        config = self.config
        drawn = [self._sample(seeded(self.seed, step, number)) for number in samples]
        history, target, noise, t, prompts = zip(*drawn, strict=True)
        batch = Batch(
            history=History.stack(history),
            target=torch.stack(target),
            noise=torch.stack(noise),
            t=torch.stack(t),
            frames=torch.arange(config.history, config.history + config.targets).float().expand(len(drawn), -1),
            prompts=list(prompts),
        )
        # One choice for the whole step, so that all samples of a batch have one length.
        generator = seeded(self.seed, step)
        windowed = torch.rand((), generator=generator) < config.window_probability
        if torch.rand((), generator=generator) < config.empty_probability:
            return batch._replace(
                history=batch.history.map(lambda latents: latents[:, :, :0]),
                frames=batch.frames - config.history,
            )
        if not windowed:
            return batch
        first = config.history - config.window
        return batch._replace(
            window=batch.history.latents[:, :, first:],
            window_frames=torch.arange(first, config.history).float().expand(len(drawn), -1),
        )

    def _goes_on(self, block: Block, start: int) -> bool:
        """Whether the targets of a span are in the same shot as the end of its history."""
        config = self.config
        if config.max_change is None:
            return True
        last = start + config.history - 1
        frames = block.latents[:, last : last + config.targets + 1].float()
        return bool(frames.diff(dim=1).square().mean((0, 2, 3)).max() <= config.max_change)

    def _sample(self, generator: torch.Generator) -> tuple:
        config = self.config
        block, start = self.spans.draw(generator)
        end = start + config.history
        history = block.read(start, config.history, self.compressions)
        target = block.latents[:, end : end + config.targets].float()
        noise = torch.randn(target.shape, generator=generator)
        t = shift_timesteps(logit_normal((), *TIME, generator), self.shift)
        dropped = torch.rand((), generator=generator) < config.drop_prompt
        return history, target, noise, t, "" if dropped else self.latents.prompt(block, end)


def finetune(config: FinetuneConfig, restart: bool = False) -> Path | None:
    """Run Stage II, or resume it from the last checkpoint.

    Args:
        config: Configuration of the run.
        restart: Discard a run in the output folder and start from step 0.

    Returns:
        Path of the model file, with the adapters merged; None in all processes but the first.

    Raises:
        Interrupted: A signal stopped the run; the same call resumes it.
        UserError: Something in the configuration cannot be used.
    """
    read = (*files_of(config.start), config.vae, config.text)
    with processes(config.optimisation) as device, run_folder(config, *read) as output:
        start = load_model(config.start, config.text)
        require_encoder(start.config.text, config.text, "with the key `text` of the recipe")
        start.config.require_boxes()
        weights = Path(config.vae) if config.vae else start.vae_weights
        vae = load_vae(start.config.vae, weights)
        encoders = start.config.encoders
        compressions = [each for each in low_compressions(encoders) if each]
        latents = prepare_latents(config.data, start.config, vae.to(device), compressions)
        require_batch(latents, config.optimisation.batch, config.sampling.history + config.sampling.targets)
        seed, shift = config.optimisation.seed, start.config.shift
        batches = Continuations(latents.split("train"), encoders, config.sampling, seed, shift)
        model = fit(
            lambda: adapted(config),
            batches,
            config.optimisation,
            output,
            run_settings(config),
            device,
            restart,
        )
        if config.lora_rank:
            # Only if nothing but adapters was trained.
            if config.freeze_encoder and rank() == 0 and not model.dit.added():
                save_lora(output / LORA_FILE, model, run_extra(output, config))
            merge_lora(model)
        return finish(output, model, config, weights)


def adapted(config: FinetuneConfig) -> MemoryModel:
    """Load the model of Stage I, add the adapters and freeze what is not trained."""
    model = load_model(config.start, config.text)
    if config.freeze_encoder:
        model.encoders.requires_grad_(False)
        model.text.requires_grad_(False)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    return model
