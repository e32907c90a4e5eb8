"""Training data: films cut into scenes, blocks of scenes encoded once, and what is drawn from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from . import yaml_file
from .checks import (
    MOST_SECONDS,
    Checked,
    Entries,
    FileName,
    OneOf,
    PathName,
    Text,
    at_least,
    build,
    more_than,
    not_negative,
    parse_json,
    positive,
    require,
    shorten,
    within,
)
from .config import ClipSpec
from .encoder import low_resolution
from .errors import MemoryFormatError, UserError
from .files import locked, reason, written
from .model_config import ModelConfig
from .scenes import stretches
from .vae import PATCH, VideoCodec, frames_to_float, pad_frames
from .weights import WeightsFile, save_file

Rate = tuple[int, int, int]
SAMPLE = "sample"
_INDEX = "index.json"
_FORMAT = 3


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which films are trained on and how they are cut.

    Args:
        videos: paths of videos; "sample" is the sample film, fetched the first time.
        start: first moment of each video, in seconds.
        seconds: length to take of each video; null for all.
        block_seconds: whole consecutive scenes are grouped to about this length.
        test_every: every so many blocks one is for testing; what is tested is never trained on.
        test: the stretches [from, to] of each video that are for testing instead, in its seconds,
            ascending. Their ends should be cuts.
        cut_threshold: mean change of luma, of 255, at which a new scene begins.
        shortest: blocks of fewer latent frames (a video's end, or a short video) are left out.
        mirror: train on every block's mirror image too.
        zooms: train on every block enlarged by these factors too, a window of the frame's size from a place
            of the enlarged frames that is another for every block.
        captions: a YAML list of {start, end, prompt}, in seconds of the video; for one video.
        cache: folder of the latents; by default one in the cache folder of this program.

    Raises:
        ValueError: a value is out of range.
    """

    videos: Annotated[tuple[str, ...], Entries(1, 100_000), PathName()] = (SAMPLE,)
    start: Annotated[float, not_negative(MOST_SECONDS)] = 0.0
    seconds: Annotated[float | None, positive(MOST_SECONDS)] = None
    block_seconds: Annotated[float, within(0.01, 36_000)] = 24.0
    test_every: Annotated[int, at_least(2, 1_000_000)] = 6
    test: Annotated[tuple[tuple[float, float], ...], Entries(0, 10_000), not_negative(MOST_SECONDS)] = ()
    cut_threshold: Annotated[float, positive(1e6)] = 20.0
    shortest: Annotated[int, positive(1_000_000)] = 16
    mirror: bool = False
    zooms: Annotated[tuple[float, ...], Entries(0, 64), more_than(1, 16)] = ()
    captions: FileName | None = None
    cache: FileName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = [self.start, *(moment for part in self.test for moment in part)]
        require(
            all(a <= b for a, b in zip(ends, ends[1:], strict=False)),
            "DataConfig: test must be ascending stretches [from, to] after start",
            self.test,
        )
        require(
            self.captions is None or len(self.videos) == 1,
            "DataConfig: captions belong to one video",
            self.videos,
        )

    def parts(self) -> list[tuple[float, float | None, str | None]]:
        """Return (first second, seconds or None for the rest, split or None) of the parts of a video.

        Without `test` that is one part, whose blocks are split by number.
        """
        if not self.test:
            return [(self.start, self.seconds, None)]
        end = None if self.seconds is None else self.start + self.seconds
        parts: list[tuple[float, float | None, str | None]] = []
        at = self.start
        for first, last in self.test:
            parts += [(at, first - at, "train"), (first, last - first, "test")]
            at = last
        parts.append((at, None if end is None else end - at, "train"))
        return [part for part in parts if part[1] is None or part[1] > 0]


@dataclass(frozen=True)
class Caption(Checked):
    """What is to be seen from `start` to `end`, in seconds of the film."""

    start: Annotated[float, not_negative(MOST_SECONDS)]
    end: Annotated[float, not_negative(MOST_SECONDS)]
    prompt: Annotated[str, Text(10_000)]


@dataclass(frozen=True)
class Block:
    """Consecutive scenes of a film and their latents.

    Attributes:
        film: path of the video.
        start: second of the film at which the block begins.
        frames: video frames, a multiple of what a latent frame covers.
        scenes: number of scenes.
        split: "train" or "test".
        mirrored: whether these are the mirror images of the frames.
        zoom: how much the frames are enlarged.
        latents: float16 (C, T, H, W), scaled.
        lows: rate -> float16 (C, T / rate_t, ...), scaled latents of the low-resolution video.
    """

    film: Path
    start: float
    frames: int
    scenes: int
    split: str
    mirrored: bool
    zoom: float
    latents: torch.Tensor
    lows: dict[Rate, torch.Tensor]

    def read(
        self, start: int, length: int, rates: Iterable[Rate | None]
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Return a history in float32.

        Args:
            start: its first latent frame, a multiple of every rate's time.
            length: its latent frames.
            rates: of low-resolution latents, or None for none.

        Returns:
            Latents (C, length, H, W), and for each rate the low-resolution latents or None.
        """
        lows = [
            None if rate is None else self.lows[rate][:, start // rate[2] :][:, : length // rate[2]].float()
            for rate in rates
        ]
        return self.latents[:, start : start + length].float(), lows


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
    rates: Iterable[Rate] = (),
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Latents:
    """Decode films, cut them into blocks and encode each block, or read what an earlier call encoded.

    The cache folder is named by a hash of everything the latents depend on. Every file in it is written
    whole or not at all, so that an interrupted call loses one block at most.

    Args:
        config: which films and how they are cut.
        model: height, width and rate of the frames.
        vae: makes the latents.
        rates: of the low-resolution branches whose latents are wanted too.
        progress: called with (what is done, video frames done, None).

    Returns:
        Latents of all blocks, train and test.

    Raises:
        UserError: a film or the captions cannot be read, or the cache cannot be written.
    """
    from . import data

    rates = sorted(set(rates))
    captions = read_captions(Path(config.captions)) if config.captions else ()
    films = film_paths(config)
    root = Path(config.cache) if config.cache else data.cache_dir() / "latents"
    folder = root / _fingerprint(config, films, model, vae)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows = _read_index(folder, rates)
        if rows is None:
            with locked(folder / ".lock", folder, waiting=True):
                rows = _read_index(folder, rates)  # another process may have encoded meanwhile
                if rows is None:
                    rows = list(_encode_films(folder, config, films, model, vae, rates, progress))
                    with written(folder / _INDEX) as part:
                        part.write_text(json.dumps(rows, indent=1))
        blocks = tuple(_load(folder, row, rates, model, vae) for row in rows)
    except OSError as error:
        why = reason(error, folder)
        raise UserError(f"{folder}: the latents cannot be kept there ({why}); make room or set data.cache") from error
    return Latents(blocks, vae.stride[0] / model.fps, captions)


def film_paths(config: DataConfig) -> list[Path]:
    """Paths of the videos, the sample film fetched if it is among them."""
    from . import data

    return [data.fetch_sample_clip() if name == SAMPLE else Path(name) for name in config.videos]


def read_captions(path: Path) -> tuple[Caption, ...]:
    """Read a YAML list of {start, end, prompt}.

    Raises:
        UserError: the file is missing, is no such list, or an entry is wrong; the message numbers it.
    """
    try:
        rows, lines = yaml_file.load(yaml_file.read_text(path), str(path), "cannot be read as captions")
    except OSError as error:
        raise UserError(f"{path}: cannot be read as captions ({error.strerror or error})") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: must be a list of {{start, end, prompt}}")
    captions = []
    for i, row in enumerate(rows):
        try:
            captions.append(build(Caption, row, f"caption {i + 1}"))
        except ValueError as error:
            raise UserError(f"{path}:{lines[f'[{i}]']}: {error}") from error
    return tuple(captions)


def _fingerprint(config: DataConfig, films: list[Path], model: ModelConfig, vae: VideoCodec) -> str:
    """Hash of all that the latents depend on; adding a rate or captions changes none of them."""
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


@dataclass(frozen=True)
class _Row(Checked):
    """A row of the index: what the name of a block's files is, and how a Block came about."""

    name: FileName
    film: FileName
    start: Annotated[float, not_negative(MOST_SECONDS)]
    frames: Annotated[int, positive(1 << 31)]
    scenes: Annotated[int, positive(1 << 31)]
    split: Annotated[str, OneOf("train", "test")]
    mirrored: bool
    zoom: Annotated[float, at_least(1, 16)]

    def __post_init__(self) -> None:
        super().__post_init__()
        require(Path(self.name).name == self.name, "_Row: name must be that of a file", self.name)


def _read_index(folder: Path, rates: list[Rate]) -> list[dict[str, Any]] | None:
    """Rows of all blocks, or None where not all of them are encoded or the index cannot be used."""
    try:
        rows = parse_json((folder / _INDEX).read_text(), "the index")
        rows = [dataclasses.asdict(build(_Row, row)) for row in rows]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return rows if all(_file(folder, row, rate).exists() for row in rows for rate in (None, *rates)) else None


def _file(folder: Path, row: dict[str, Any], rate: Rate | None) -> Path:
    low = "" if rate is None else ".low-" + "x".join(map(str, rate))
    return folder / f"{row['name']}{low}.safetensors"


def _encode_films(
    folder: Path,
    config: DataConfig,
    films: list[Path],
    model: ModelConfig,
    vae: VideoCodec,
    rates: list[Rate],
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
            _encode_row(folder, view, taken, vae, rates)
            yield view
            if config.mirror and row["split"] == "train":
                view = {**view, "name": view["name"] + "-mirrored", "mirrored": True}
                _encode_row(folder, view, taken.flip(2), vae, rates)
                yield view
        done += len(frames)
        if progress:
            progress("encoding", done, None)


def enlarged(row: dict[str, Any], model: ModelConfig) -> torch.Tensor:
    """Decode a block once more, enlarged by its row's zoom, and cut out a window of the frame's size.

    Args:
        row: of the index; its name chooses the window's place.
        model: height, width and rate of the frames.

    Returns:
        uint8 (T, H, W, 3).
    """
    from . import data

    height, width = (round(row["zoom"] * n) for n in (model.height, model.width))
    spec = ClipSpec(height, width, model.fps, row["start"], row["frames"] / model.fps)
    frames = data.read_clip(row["film"], spec).frames
    generator = seeded(row["name"])
    top, left = (
        int(torch.randint(n - m + 1, (), generator=generator))
        for n, m in ((height, model.height), (width, model.width))
    )
    return frames[:, top : top + model.height, left : left + model.width]


def cut_films(
    config: DataConfig, films: list[Path], model: ModelConfig, vae: VideoCodec, only: str | None = None
) -> Iterator[tuple[dict[str, Any], torch.Tensor]]:
    """Decode films and cut them into blocks of whole scenes.

    What somebody may want to know of a film (it is interlaced, most of it is cropped) is said on stderr.

    Args:
        config: how they are cut.
        films: paths of videos.
        model: height, width and rate of the frames.
        vae: its stride says which frames fill whole latent frames.
        only: "train" or "test", for the blocks of one split; parts of a film that cannot hold any are not
            decoded.

    Returns:
        Iterator over the index's row of a block and its frames, uint8 (T, H, W, 3).
    """
    from . import data
    from .cli.options import note

    number = -1
    for f, film in enumerate(films):
        note(data.remarks(film, data.probe(film), ClipSpec(model.height, model.width)))
        for first, seconds, split in config.parts():
            if only and split and split != only:
                continue
            chunks = data.iter_frames(film, ClipSpec(model.height, model.width, model.fps, first, seconds))
            for stretch in stretches(chunks, round(config.block_seconds * model.fps), config.cut_threshold):
                # A scene that had to be broken stays on one side of the split.
                number += 0 if stretch.continues else 1
                if _latent_frames(len(stretch.frames), vae) < config.shortest:
                    continue
                start = first + stretch.start / model.fps
                by_number = "test" if number % config.test_every == config.test_every - 1 else "train"
                row = {
                    "name": f"{f:02d}-{round(start * model.fps):06d}",
                    "film": str(film),
                    "start": start,
                    "frames": _whole(len(stretch.frames), vae),
                    "scenes": len(stretch.cuts) + 1,
                    "split": split or by_number,
                    "mirrored": False,
                    "zoom": 1.0,
                }
                if only in (None, row["split"]):
                    yield row, torch.from_numpy(stretch.frames[: row["frames"]])


def _encode_row(folder: Path, row: dict[str, Any], frames: torch.Tensor, vae: VideoCodec, rates: list[Rate]) -> None:
    """Encode a block to those of its files that are missing."""
    for rate in (None, *rates):
        file = _file(folder, row, rate)
        if not file.exists():
            latent = _latent_frames(len(frames), vae)
            if rate is not None and latent < rate[2]:
                raise UserError(
                    f"{shorten(row['film'])}: a block of {latent} latent frames fills no box of {rate[2]}, the rate of "
                    "an encoder; give more data.shortest or data.block_seconds"
                )
            latents = encode_block(frames, vae, rate)
            with written(file) as part:
                save_file({"latents": latents}, part, metadata={"block": json.dumps(row)})


@torch.no_grad()
def encode_block(frames: torch.Tensor, vae: VideoCodec, rate: Rate | None = None) -> torch.Tensor:
    """Encode consecutive frames as one stream, or their low-resolution video.

    Args:
        frames: uint8 (T, H, W, 3), as many as whole latent frames cover.
        vae: makes the latents.
        rate: of the low-resolution branch; None for the frames themselves.

    Returns:
        float16 (C, T', H', W'), scaled; for a rate T' is what is left of the latent frames of the
        frames themselves when those that fill no box are cropped.
    """
    if rate is None:
        pieces = (frames_to_float(piece) for piece in _pieces(frames, vae))
        return _stream(pieces, vae)
    boxes = _latent_frames(len(frames), vae) // rate[2]
    if not boxes:
        raise ValueError(f"encode_block: frames must fill a box of rate {rate}, got {len(frames)}")
    # Pieces begin at multiples of rate_t, so that the frames which are kept are those of one call for all.
    small = [low_resolution(frames_to_float(p), rate)[0] for p in frames.split(8 * rate[2])]
    low = torch.cat(small, dim=1).transpose(0, 1)
    pieces = (piece.transpose(0, 1)[None] for piece in _pieces(low[: _whole(len(low), vae)], vae))
    return _stream(pieces, vae)[:, :boxes]


def _stream(pieces: Iterable[torch.Tensor], vae: VideoCodec) -> torch.Tensor:
    cache: dict = {}
    _, h, w = vae.stride
    latents = [_scaled(pad_frames(x, (1, h * PATCH, w * PATCH)), vae, cache) for x in pieces]
    return torch.cat(latents, dim=2)[0].contiguous()


def _scaled(frames: torch.Tensor, vae: VideoCodec, cache: dict) -> torch.Tensor:
    return vae.scale(vae.encode(frames.to(vae.device), cache)).to("cpu", torch.float16)


def _pieces(frames: torch.Tensor, vae: VideoCodec) -> tuple[torch.Tensor, ...]:
    """Cut frames (T, ...) into pieces that are encoded one after another in bounded memory."""
    first = min(len(frames), vae.first_frames + vae.stride[0])
    return frames[:first], *(piece for piece in frames[first:].split(2 * vae.stride[0]) if len(piece))


def _latent_frames(frames: int, vae: VideoCodec) -> int:
    """Latent frames that `frames` video frames fill."""
    return max(0, 1 + (frames - vae.first_frames) // vae.stride[0])


def _whole(frames: int, vae: VideoCodec) -> int:
    """Video frames that whole latent frames cover, of `frames`."""
    latent = _latent_frames(frames, vae)
    return vae.first_frames + (latent - 1) * vae.stride[0] if latent else 0


def _load(folder: Path, row: dict[str, Any], rates: list[Rate], model: ModelConfig, vae: VideoCodec) -> Block:
    def read(rate: Rate | None) -> torch.Tensor:
        file = _file(folder, row, rate)
        height, width, time = rate or (1, 1, 1)
        cells = [s * PATCH for s in vae.stride[1:]]
        sizes = (model.height // height, model.width // width)
        space = [-(-n // cell) * PATCH for n, cell in zip(sizes, cells, strict=True)]
        shape = (vae.channels, _latent_frames(row["frames"], vae) // time, *space)
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
        lows={rate: read(rate) for rate in rates},
    )


def seeded(*numbers: int | str) -> torch.Generator:
    """A generator of its own for each tuple, such as (seed, step, sample), whatever was drawn before."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Spans:
    """Stretches of latent frames of one length, all equally probable.

    Args:
        latents: blocks to take them from.
        length: latent frames of a stretch.
        align: stretches begin at multiples of this, so that boxes of every rate are whole.
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
