"""Evaluates the stages of `gpu_train.py` on held-out film: PSNR, and a picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch

from vidmem_model.evaluate.metrics import psnr
from vidmem_model.memory.learned import DEFAULT_STEPS, TrainedModel
from vidmem_model.model.config import ModelConfig
from vidmem_model.model.encode import encode_block
from vidmem_model.train.blocks import cut_films
from vidmem_model.train.continuation import ContinuationConfig
from vidmem_model.vae import VideoCodec, frames_to_uint8
from vidmem_model.video.films import DataConfig, film_paths
from vidmem_model.video.png import write_png

# A frame that is reproduced exactly, such as a black one, would have infinite PSNR.
_BEST = 60.0
_SHOWN = 6  # columns of the picture


class HeldOut:
    """Clips of held-out film, each as long as a history and what follows it.

    Args:
        data: films and their split.
        model: frame size and rate.
        vae: for its stride.
        sampling: latent frames of the history and after it.
        max_pieces: maximum number of clips, one per block.

    Attributes:
        pictures: rows of the picture by name, uint8 (H, W, 3) each, of the first clip.
    """

    def __init__(
        self, data: DataConfig, model: ModelConfig, vae: VideoCodec, sampling: ContinuationConfig, max_pieces: int = 4
    ) -> None:
        self.sampling = sampling
        self.history = vae.video_frames(sampling.history)
        length = vae.video_frames(sampling.history + sampling.targets)
        blocks = cut_films(data, film_paths(data), model, vae, "test")
        self.pieces = [frames[:length] for _, frames in blocks if len(frames) >= length][:max_pieces]
        self.pictures: dict[str, list[torch.Tensor]] = {}

    @torch.no_grad()
    def vae(self, vae: VideoCodec, device: torch.device) -> dict[str, float]:
        """PSNR of histories through the VAE alone."""
        vae = vae.to(device)
        made = [_decoded(vae, encode_block(p[: self.history], vae).float()[None], self.history, p) for p in self.pieces]
        self._show("history", [piece[: self.history] for piece in self.pieces])
        self._show("vae", made)
        return {"psnr": self._level(made, slice(0, self.history))}

    @torch.no_grad()
    def memory(self, folder: Path, device: torch.device) -> dict[str, float]:
        """PSNR of histories read back from their memory."""
        trained, made = _on(TrainedModel.load(folder), device), []
        for piece in self.pieces:
            encoded = trained.encode(piece[: self.history]).map(lambda latents: latents.to(device))
            read = trained.retrieve(trained.remember(encoded), list(range(self.sampling.history)), DEFAULT_STEPS)
            made.append(_decoded(trained.vae, read, self.history, piece))
        self._show("memory", made)
        return {"psnr": self._level(made, slice(0, self.history))}

    @torch.no_grad()
    def continuation(self, folder: Path, device: torch.device) -> dict[str, float]:
        """PSNR of the generated frames after histories, and of repeating the last frame of the history instead."""
        trained, made, config = _on(TrainedModel.load(folder), device), [], self.sampling
        asked = torch.arange(config.history, config.history + config.targets, device=device).float()[None]
        first = config.history - config.window
        for piece in self.pieces:
            encoded = trained.encode(piece[: self.history]).map(lambda latents: latents.to(device))
            window = encoded.latents[:, :, first : config.history]
            latents = trained.model.retrieve(
                trained.remember(encoded),
                asked,
                [""],
                DEFAULT_STEPS,
                torch.Generator().manual_seed(0),
                window=window,
                window_frames=torch.arange(first, config.history, device=device).float()[None],
            )
            whole = torch.cat([encoded.latents[:, :, : config.history], latents], 2)
            made.append(_decoded(trained.vae, whole, len(piece), piece)[self.history :])
        after = slice(self.history, None)
        self._show("future", [piece[after] for piece in self.pieces])
        self._show("continuation", made)
        still = [piece[self.history - 1].expand(piece[after].shape) for piece in self.pieces]
        return {"psnr": self._level(made, after), "psnr_of_the_last_frame": self._level(still, after)}

    def write_picture(self, path: Path) -> None:
        """Writes the rows of `pictures` as a PNG, with the frames of the first clip from left to right."""
        write_png(path, torch.cat([torch.cat(row, 1) for row in self.pictures.values()]))

    def describe(self) -> dict[str, Any]:
        """The report's entry on the clips and the picture."""
        return {"pieces": len(self.pieces), "history_frames": self.history, "picture_rows": list(self.pictures)}

    def _level(self, made: list[torch.Tensor], part: slice) -> float:
        pairs = (pair for m, piece in zip(made, self.pieces, strict=True) for pair in zip(m, piece[part], strict=True))
        return statistics.fmean(min(_BEST, psnr(*pair)) for pair in pairs)

    def _show(self, name: str, frames: list[torch.Tensor]) -> None:
        count = len(frames[0])
        self.pictures[name] = [frames[0][(2 * n + 1) * count // (2 * _SHOWN)] for n in range(_SHOWN)]


def _on(trained: TrainedModel, device: torch.device) -> TrainedModel:
    trained.model.to(device)
    trained.vae = trained.vae.to(device)
    return trained


def _decoded(vae: VideoCodec, latents: torch.Tensor, frames: int, like: torch.Tensor) -> torch.Tensor:
    """Frames of scaled latents (1, C, T, H, W), uint8 (frames, height, width of `like`, 3) on the CPU."""
    chunks = vae.decode_chunks(vae.unscale(latents.to(vae.device)).split(2, 2), (frames, *like.shape[1:3]))
    return torch.cat([frames_to_uint8(chunk).cpu() for chunk in chunks])
