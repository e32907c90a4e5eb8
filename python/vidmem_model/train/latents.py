"""Training data: blocks of films encoded once, and what is drawn from them."""

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
    """The latents of all films.

    Attributes:
        blocks: in the order of the films.
        seconds_per_latent: length of a latent frame.
        captions: prompts of moments of the film, or none.
    """

    blocks: tuple[Block, ...]
    seconds_per_latent: float
    captions: tuple[Caption, ...] = ()

    def split(self, name: str) -> Latents:
        """Return the blocks of "train" or of "test" only."""
        return dataclasses.replace(self, blocks=tuple(b for b in self.blocks if b.split == name))

    def prompt(self, block: Block, frame: int) -> str:
        """Return the prompt of latent frame number `frame` of a block, "" where there is none."""
        moment = block.start + (frame + 0.5) * self.seconds_per_latent
        return next((c.prompt for c in self.captions if c.start <= moment < c.end), "")


def prepare(
    config: DataConfig,
    model: ModelConfig,
    vae: VideoCodec,
    compressions: Iterable[Compression] = (),
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Latents:
    """Decode films, cut them into blocks and encode each block, or read what an earlier call encoded.

    The cache folder is named by a hash of everything the latents depend on. Every file in it is written
    whole or not at all, so that an interrupted call loses one block at most.

    Args:
        config: which films and how they are cut.
        model: height, width and rate of the frames.
        vae: makes the latents.
        compressions: of the encoders whose low-resolution latents are wanted too.
        progress: called with (what is done, video frames done, None).

    Returns:
        Latents of all blocks, train and test.

    Raises:
        UserError: a film or the captions cannot be read, or the cache cannot be written.
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
                rows = _read_index(folder, compressions)  # another process may have encoded meanwhile
                if rows is None:
                    rows = list(_encode_films(folder, config, films, model, vae, compressions, progress))
                    with written(folder / _INDEX) as part:
                        part.write_text(json.dumps(rows, indent=1))
        blocks = tuple(_load(folder, row, compressions, model, vae) for row in rows)
    except OSError as error:
        why = reason(error, folder)
        raise UserError(f"{folder}: the latents cannot be kept there ({why}); make room or set data.cache") from error
    return Latents(blocks, vae.stride[0] / model.fps, captions)


def _fingerprint(config: DataConfig, films: list[Path], model: ModelConfig, vae: VideoCodec) -> str:
    """Hash of all that the latents depend on; adding a compression or captions changes none of them."""
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
    """Rows of all blocks, or None where not all of them are encoded or the index cannot be used."""
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
    """Yield the index's row of every block, encoding those of which a file is missing."""
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
    """Encode a block to those of its files that are missing."""
    for each in (None, *compressions):
        file = _file(folder, row, each)
        if not file.exists():
            latent = filled_latents(len(frames), vae)
            if each is not None and latent < each.time:
                raise UserError(
                    f"{shorten(row['film'])}: a block of {latent} latent frames fills no box of {each.time} of an "
                    "encoder; give more data.shortest or data.block_seconds"
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
    """Stretches of latent frames of one length, all equally probable.

    Args:
        latents: blocks to take them from.
        length: latent frames of a stretch.
        align: stretches begin at multiples of this, so that boxes of every encoder are whole.
        fits: whether a block's stretch from a latent frame on may be taken; all by default.

    Raises:
        UserError: no block is long enough, or no stretch fits.
    """

    def __init__(
        self, latents: Latents, length: int, align: int, fits: Callable[[Block, int], bool] | None = None
    ) -> None:
        starts = [(b, start) for b in latents.blocks for start in range(0, b.latents.shape[1] - length + 1, align)]
        if not starts:
            longest = max((b.latents.shape[1] for b in latents.blocks), default=0)
            raise UserError(
                f"no block of the films has {length} latent frames, the longest has {longest}; "
                "take a shorter history or longer data.block_seconds"
            )
        self.starts = [each for each in starts if fits is None or fits(*each)]
        if not self.starts:
            raise UserError(f"none of the {len(starts)} stretches of {length} latent frames fits what is asked of them")

    def draw(self, generator: torch.Generator) -> tuple[Block, int]:
        """Return a block and the first latent frame of a stretch in it."""
        return self.starts[int(torch.randint(len(self.starts), (), generator=generator))]
