"""Training data: latents of video blocks, encoded once and cached, and spans drawn from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..checks import build, parse_json, shorten
from ..errors import MemoryFormatError, UserError
from ..files import locked, reason, written
from ..model.config import Compression, ModelConfig
from ..model.encode import encode_block, filled_latents
from ..vae import PATCH, VideoCodec
from ..video.films import Caption, DataConfig, film_paths, read_captions
from ..video.sample import cache_dir
from ..weights import WeightsFile, save_file
from .blocks import Block, cut_films, enlarged
from .bundle import Row

_INDEX = "index.json"
_FORMAT = 3


@dataclass(frozen=True)
class Latents:
    """The latents of all videos.

    Attributes:
        blocks: Blocks in the order of the videos.
        seconds_per_latent: Length of a latent frame, in seconds.
        captions: Prompts of parts of the video; may be empty.
    """

    blocks: tuple[Block, ...]
    seconds_per_latent: float
    captions: tuple[Caption, ...] = ()

    def split(self, name: str) -> Latents:
        """Return the blocks of the split "train" or "test"."""
        return dataclasses.replace(self, blocks=tuple(b for b in self.blocks if b.split == name))

    def prompt(self, block: Block, frame: int) -> str:
        """Return the prompt of latent frame `frame` of a block, "" if there is none."""
        moment = block.start + (frame + 0.5) * self.seconds_per_latent
        return next((c.prompt for c in self.captions if c.start <= moment < c.end), "")


def prepare(
    config: DataConfig,
    model: ModelConfig,
    vae: VideoCodec,
    compressions: Iterable[Compression] = (),
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Latents:
    """Decode videos, cut them into blocks and encode each block, or read the latents from the cache.

    The name of the cache folder is a hash of everything that the latents depend on. Files are written atomically, so
    that an interrupted call loses at most one block.

    Args:
        config: Configuration of the data.
        model: Configuration with height, width and rate of the frames.
        vae: The VAE.
        compressions: Compressions of the encoders that read low-resolution latents.
        progress: Called with (description, video frames done, None).

    Returns:
        Latents of all blocks, train and test.

    Raises:
        UserError: A video or the captions cannot be read, or the cache cannot be written.
    """

    compressions = list(dict.fromkeys(compressions))
    captions = read_captions(Path(config.captions)) if config.captions else ()
    films = film_paths(config)
    root = Path(config.cache) if config.cache else cache_dir() / "latents"
    folder = root / _fingerprint(config, films, model, vae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = _read_index(folder, compressions)
        if rows is None:
            with locked(folder / ".lock", folder, waiting=True):
                rows = _read_index(folder, compressions)  # another process may have encoded them meanwhile
                if rows is None:
                    rows = list(_encode_films(folder, config, films, model, vae, compressions, progress))
                    with written(folder / _INDEX) as part:
                        part.write_text(json.dumps(rows, indent=1))
        blocks = tuple(_load(folder, row, compressions, model, vae) for row in rows)
    except OSError as error:
        why = reason(error, folder)
        raise UserError(
            f"{folder}: cannot write the latent cache ({why}); make room or set data.cache to another folder"
        ) from error
    return Latents(blocks, vae.stride[0] / model.fps, captions)


def _fingerprint(config: DataConfig, films: list[Path], model: ModelConfig, vae: VideoCodec) -> str:
    """Hash of everything that the latents depend on; compressions and captions are not part of it."""
    settings: dict[str, Any] = {
        "format": _FORMAT,
        "films": [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] if f.is_file() else str(f) for f in films],
        "raster": [model.height, model.width, model.fps],
        "vae": [vae.name, vae.channels, list(vae.stride)],
    }
    settings |= {k: v for k, v in dataclasses.asdict(config).items() if k not in ("videos", "captions", "cache")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    if isinstance(vae, torch.nn.Module):
        for name, tensor in sorted(vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read_index(folder: Path, compressions: list[Compression]) -> list[dict[str, Any]] | None:
    """Rows of all blocks, or None if some are not encoded or the index cannot be used."""
    try:
        rows = parse_json((folder / _INDEX).read_text(), "the index")
        rows = [dataclasses.asdict(build(Row, row)) for row in rows]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return rows if all(_file(folder, row, each).exists() for row in rows for each in (None, *compressions)) else None


def _file(folder: Path, row: dict[str, Any], compression: Compression | None) -> Path:
    low = "" if compression is None else f".low-{compression}"
    return folder / f"{row['name']}{low}.safetensors"


def _encode_films(
    folder: Path,
    config: DataConfig,
    films: list[Path],
    model: ModelConfig,
    vae: VideoCodec,
    compressions: list[Compression],
    progress: Callable[[str, int, int | None], None] | None,
) -> Iterator[dict[str, Any]]:
    """Yield the row of every block, and encode blocks with missing files."""
    done = 0
    for row, frames in cut_films(config, films, model, vae):
        views = [(row, frames)]
        if row["split"] == "train":
            views += [({**row, "name": f"{row['name']}-x{z:g}", "zoom": z}, None) for z in config.zooms]
        for view, taken in views:
            taken = enlarged(view, model) if taken is None else taken
            _encode_row(folder, view, taken, vae, compressions)
            yield view
            if config.mirror and row["split"] == "train":
                view = {**view, "name": view["name"] + "-mirrored", "mirrored": True}
                _encode_row(folder, view, taken.flip(2), vae, compressions)
                yield view
        done += len(frames)
        if progress:
            progress("encoding", done, None)


def _encode_row(
    folder: Path, row: dict[str, Any], frames: torch.Tensor, vae: VideoCodec, compressions: list[Compression]
) -> None:
    """Write the missing files of a block."""
    for each in (None, *compressions):
        file = _file(folder, row, each)
        if not file.exists():
            latent = filled_latents(len(frames), vae)
            if each is not None and latent < each.time:
                raise UserError(
                    f"{shorten(row['film'])}: a block of {latent} latent frames is shorter than a box of {each.time}; "
                    "increase data.shortest or data.block_seconds"
                )
            latents = encode_block(frames, vae, each)
            with written(file) as part:
                save_file({"latents": latents}, part, metadata={"block": json.dumps(row)})


def _load(
    folder: Path, row: dict[str, Any], compressions: list[Compression], model: ModelConfig, vae: VideoCodec
) -> Block:
    def read(compression: Compression | None) -> torch.Tensor:
        file = _file(folder, row, compression)
        time, height, width = compression or (1, 1, 1)
        cells = [s * PATCH for s in vae.stride[1:]]
        sizes = (model.height // height, model.width // width)
        space = [-(-n // cell) * PATCH for n, cell in zip(sizes, cells, strict=True)]
        shape = (vae.channels, filled_latents(row["frames"], vae) // time, *space)
        try:
            if WeightsFile(file).shapes != {"latents": shape}:
                raise KeyError("latents")
            latents = load_file(file)["latents"]
        except (SafetensorError, KeyError, MemoryFormatError) as error:
            raise UserError(f"{file}: is damaged; delete it and run again") from error
        if latents.dtype != torch.float16 or not latents.isfinite().all():
            raise UserError(f"{file}: is damaged; delete it and run again")
        return latents

    return Block(
        film=Path(row["film"]),
        start=row["start"],
        frames=row["frames"],
        scenes=row["scenes"],
        split=row["split"],
        mirrored=row["mirrored"],
        zoom=row["zoom"],
        latents=read(None),
        lows={each: read(each) for each in compressions},
    )


class Spans:
    """Draws spans of latent frames of one length, with equal probability.

    Args:
        latents: Blocks to draw from.
        length: Latent frames of a span.
        align: Spans start at multiples of this, so that boxes of every encoder are whole.
        fits: Function (block, first latent frame) -> whether a span is allowed; by default all are.

    Raises:
        UserError: No block is long enough, or no span is allowed.
    """

    def __init__(
        self, latents: Latents, length: int, align: int, fits: Callable[[Block, int], bool] | None = None
    ) -> None:
        starts = [(b, start) for b in latents.blocks for start in range(0, b.latents.shape[1] - length + 1, align)]
        if not starts:
            longest = max((b.latents.shape[1] for b in latents.blocks), default=0)
            raise UserError(
                f"no block of the videos has {length} latent frames, the longest has {longest}; "
                "give a shorter sampling.history or longer data.block_seconds"
            )
        self.starts = [each for each in starts if fits is None or fits(*each)]
        if not self.starts:
            raise UserError(
                f"none of the {len(starts)} spans of {length} latent frames is without a cut; raise sampling.max_change"
            )

    def draw(self, generator: torch.Generator) -> tuple[Block, int]:
        """Draw a block and the first latent frame of a span in it."""
        return self.starts[int(torch.randint(len(self.starts), (), generator=generator))]
