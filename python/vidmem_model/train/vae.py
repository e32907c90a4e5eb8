"""Train the small causal VAE on the training blocks of the videos."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from ..checks import Checked, FileName, positive, require
from ..errors import UserError
from ..model.config import ModelConfig
from ..model.file import VAE_FILE
from ..skeleton import require_trainable
from ..vae.base import frames_to_float
from ..vae.causal import CausalVAE
from ..video.films import DataConfig, film_paths
from ..weights import write_tensors
from .blocks import cut_films
from .config import TrainConfig
from .distributed import first_then_others, processes, rank
from .loop import fit
from .run import run_folder, run_settings
from .vae_loss import SMALL, ClipSampler, Reconstruction, measure_latents


@dataclass(frozen=True)
class PretrainVAEConfig(Checked):
    """Configuration of a training run of the VAE.

    Args:
        model: Configuration of the model; its VAE, height, width and fps are used.
        output: Output folder of the run.
        data: Training videos.
        optimisation: Optimisation.
        frames: Length of a training clip, in video frames; a multiple of the VAE's time stride.

    Raises:
        ValueError: The VAE is not of kind causal, or a value is out of range.
    """

    model: ModelConfig
    output: FileName
    data: DataConfig = DataConfig()
    optimisation: TrainConfig = TrainConfig()
    frames: Annotated[int, positive(1_000_000)] = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.model.vae.kind == "causal", "PretrainVAEConfig: model.vae.kind must be causal", self.model.vae.kind
        )
        require(
            self.frames % self.model.vae.stride[0] == 0,
            f"PretrainVAEConfig: frames must be a multiple of {self.model.vae.stride[0]}",
            self.frames,
        )


def _check_frames(config: PretrainVAEConfig) -> None:
    """Check that frames consist of whole blocks of the VAE, also at the quarter size that some steps use.

    Raises:
        UserError: They do not, or the VAE has more channels than a block has numbers.
    """
    model, (_, *stride) = config.model, config.model.vae.stride
    rows, columns = (SMALL * s for s in stride)
    if model.height % rows or model.width % columns:
        raise UserError(
            f"to train a VAE, model.height must be a multiple of {rows} and model.width of {columns}, "
            f"got {model.height} and {model.width}"
        )
    numbers = 3 * math.prod(model.vae.stride)
    if model.vae.channels > numbers:
        raise UserError(
            f"model.vae.channels must be at most {numbers}, the numbers of a block of pixels, got {model.vae.channels}"
        )


def pretrain_vae(config: PretrainVAEConfig, restart: bool = False) -> Path | None:
    """Train the VAE, or resume from the last checkpoint.

    Args:
        config: Configuration of the run.
        restart: Discard a run in the output folder and start from step 0.

    Returns:
        Path of the VAE's weights; None in all processes but the first.

    Raises:
        Interrupted: A signal stopped the run; the same call resumes it.
        UserError: Something in the configuration cannot be used.
    """
    with processes(config.optimisation) as device, run_folder(config) as output:
        vae = config.model.vae
        require_trainable(lambda depth: CausalVAE(dataclasses.replace(vae, depth=depth)), vae.depth, device)
        _check_frames(config)
        films = first_then_others(lambda: film_paths(config.data))
        cut = cut_films(config.data, films, config.model, CausalVAE(config.model.vae), "train")
        blocks = [frames for _, frames in cut]
        longest = max(map(len, blocks), default=0)
        if longest < config.frames:
            raise UserError(
                f"no block of the videos has {config.frames} frames, the longest has {longest}; "
                "give fewer frames or longer data.block_seconds"
            )
        step = config.model.vae.stride[0]

        def build() -> CausalVAE:
            vae = CausalVAE(config.model.vae)
            # A sixth of the video is enough for the principal components.
            vae.start_from(
                torch.cat([frames_to_float(b[i : i + step]) for b in blocks for i in range(0, len(b), 6 * step)])
            )
            return vae

        batches = ClipSampler(blocks, CausalVAE(config.model.vae), config.frames, config.optimisation.seed)
        settings = run_settings(config)
        vae = fit(build, batches.draw, config.optimisation, output, settings, device, restart, Reconstruction)
        if rank() != 0:
            return None
        measure_latents(vae.to(device).eval(), blocks, config.frames)
        file = output / VAE_FILE
        write_tensors(file, vae.cpu().state_dict(), {})
        return file
