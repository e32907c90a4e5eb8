"""Training of the small causal VAE on the training blocks of films."""

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
    """A run that trains the VAE of `model`.

    Args:
        model: its VAE, and height, width and rate of the frames.
        output: folder of the run.
        data, optimisation: films, and how to optimise.
        frames: length of a clip in video frames.

    Raises:
        ValueError: the VAE is not the causal one, or a value is out of range.
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
    """Check that frames, and those of a quarter of the size that some steps see, are whole blocks of the VAE.

    Raises:
        UserError: they are not, or a block has fewer numbers than the VAE channels.
    """
    model, (_, *stride) = config.model, config.model.vae.stride
    rows, columns = (SMALL * s for s in stride)
    if model.height % rows or model.width % columns:
        raise UserError(
            f"training a VAE needs a model.height in multiples of {rows} and a model.width of {columns}, "
            f"got {model.height} and {model.width}"
        )
    numbers = 3 * math.prod(model.vae.stride)
    if model.vae.channels > numbers:
        raise UserError(
            f"model.vae.channels must be at most the {numbers} numbers of a block, got {model.vae.channels}"
        )


def pretrain_vae(config: PretrainVAEConfig, restart: bool = False) -> Path | None:
    """Train the VAE, or go on with it.

    Args:
        config: of the run.
        restart: begin anew although the output folder holds a run.

    Returns:
        The file of the VAE's weights; None in all processes but the first.

    Raises:
        Interrupted: it was stopped; the same call goes on from there.
        UserError: something in the configuration cannot be used.
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
                f"no block of the films has {config.frames} frames, the longest has {longest}; "
                "take fewer frames or longer data.block_seconds"
            )
        step = config.model.vae.stride[0]

        def build() -> CausalVAE:
            vae = CausalVAE(config.model.vae)
            # Every sixth latent frame's worth of film is plenty for the principal components.
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
