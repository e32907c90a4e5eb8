"""Cut videos into blocks of whole scenes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..model.config import Compression, ModelConfig
from ..model.encode import filled_frames, filled_latents
from ..model.encoder import History
from ..vae import VideoCodec
from ..video.clip import ClipSpec, remarks
from ..video.films import DataConfig
from ..video.read import iter_frames, probe, read_clip
from ..video.scenes import stretches
from .bundle import is_bundle, read_bundle


@dataclass(frozen=True)
class Block:
    """Consecutive scenes of a video and their latents.

    Attributes:
        film: Path of the video.
        start: Start of the block, in seconds of the video.
        frames: Number of video frames, whole latent frames.
        scenes: Number of scenes.
        split: "train" or "test".
        mirrored: Whether the frames are mirrored.
        zoom: Factor by which the frames are enlarged.
        latents: float16 (C, T, H, W), scaled.
        lows: For each compression float16 (C, T / time, ...), scaled latents of the low-resolution video.
    """

    film: Path
    start: float
    frames: int
    scenes: int
    split: str
    mirrored: bool
    zoom: float
    latents: torch.Tensor
    lows: dict[Compression, torch.Tensor]

    def read(self, start: int, length: int, compressions: Iterable[Compression | None]) -> History:
        """Return a part of the block as a history, without a batch dimension, in float32.

        Args:
            start: First latent frame, a multiple of the time of every compression.
            length: Number of latent frames.
            compressions: Compressions of the low-resolution latents; None for an encoder without.

        Returns:
            History of latents (C, length, H, W), with low-resolution latents for each compression.
        """
        lows = [
            None if each is None else self.lows[each][:, start // each.time :][:, : length // each.time].float()
            for each in compressions
        ]
        return History(self.latents[:, start : start + length].float(), lows)


def enlarged(row: dict[str, Any], model: ModelConfig) -> torch.Tensor:
    """Decode a block again, enlarged by the zoom of its row, and crop it to the frame size.

    Args:
        row: Row of the index; its name determines the place of the crop.
        model: Configuration with height, width and rate of the frames.

    Returns:
        uint8 (T, H, W, 3).
    """

    height, width = (round(row["zoom"] * n) for n in (model.height, model.width))
    spec = ClipSpec(height, width, model.fps, row["start"], row["frames"] / model.fps)
    frames = read_clip(row["film"], spec).frames
    generator = seeded(row["name"])
    top, left = (
        int(torch.randint(n - m + 1, (), generator=generator))
        for n, m in ((height, model.height), (width, model.width))
    )
    return frames[:, top : top + model.height, left : left + model.width]


def cut_films(
    config: DataConfig, films: list[Path], model: ModelConfig, vae: VideoCodec, only: str | None = None
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Decode videos and cut them into blocks of whole scenes.

    Warnings about a video (interlaced, mostly cropped) are printed on stderr.

    Args:
        config: Configuration of the data.
        films: Paths of videos, or of bundles (`bundle.write_bundle`), whose blocks are already cut.
        model: Configuration with height, width and rate of the frames.
        vae: VAE whose stride determines whole latent frames.
        only: "train" or "test" for the blocks of one split; parts of a video without such blocks are not decoded.

    Returns:
        Iterator over (row of the index, frames of the block, uint8 (T, H, W, 3)).
    """
    from ..progress import note

    number = -1
    for f, film in enumerate(films):
        if is_bundle(film):
            if config.zooms:
                raise UserError(f"{film}: data.zooms must be empty for a bundle, whose frames have a fixed size")
            for row, frames in read_bundle(film, model, vae, only):
                yield {**row, "name": f"{f:02d}-{row['name']}"}, frames
            continue
        note(remarks(film, probe(film), ClipSpec(model.height, model.width)))
        for first, seconds, split in config.parts():
            if only and split and split != only:
                continue
            chunks = iter_frames(film, ClipSpec(model.height, model.width, model.fps, first, seconds))
            for stretch in stretches(chunks, round(config.block_seconds * model.fps), config.cut_threshold):
                # All parts of a scene that was broken up go to the same split.
                number += 0 if stretch.continues else 1
                if filled_latents(len(stretch.frames), vae) < config.shortest:
                    continue
                start = first + stretch.start / model.fps
                by_number = "test" if number % config.test_every == config.test_every - 1 else "train"
                row = {
                    "name": f"{f:02d}-{round(start * model.fps):06d}",
                    "film": str(film),
                    "start": start,
                    "frames": filled_frames(len(stretch.frames), vae),
                    "scenes": len(stretch.cuts) + 1,
                    "split": split or by_number,
                    "mirrored": False,
                    "zoom": 1.0,
                }
                if only in (None, row["split"]):
                    yield row, torch.from_numpy(stretch.frames[: row["frames"]])


def seeded(*numbers: int | str) -> torch.Generator:
    """Make a random generator that depends only on the numbers, such as (seed, step, sample)."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
