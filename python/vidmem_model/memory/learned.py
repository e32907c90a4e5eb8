"""The method learned, a trained model: frames become memory tokens, and any frame is made from them again."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from vidmem_kernels import MemoryBank

from ..checks import Checked, build, positive, require, show
from ..errors import MemoryFormatError, UserError
from ..model.encode import encode_block
from ..model.encoder import History, MemoryTokens, memory_grid
from ..model.file import load_model, model_path
from ..model.lora import with_bases
from ..model.memory_model import MemoryModel
from ..shipped import shipped
from ..vae import PATCH, VideoCodec, frames_to_uint8, load_vae
from ..video import Clip
from ..video.films import DataConfig
from ..weights import content_digest
from . import listed, untrained
from .config import CompressorConfig
from .header import MemoryHeader, check_rows
from .method import EncodedClip, Progress, Rows

DEFAULT_STEPS = 8
# Latent frames that are made together, if the model's file does not say how many it was trained on.
_QUERIES = 4
_BATCH = 8


@dataclass(frozen=True)
class TrainingRecord(Checked):
    """What a model's file says of its training.

    Args:
        queries: latent frames that were made together.
        history: latent frames of a history, or None if the file does not say.
        data: the films.
    """

    queries: Annotated[int, positive(1_000_000)] = _QUERIES
    history: Annotated[int | None, positive(1_000_000)] = None
    data: DataConfig = DataConfig()

    @classmethod
    def read(cls, extra: dict[str, Any]) -> TrainingRecord:
        """Read it from what save_model kept beside the model.

        Raises:
            MemoryFormatError: a value in it is none of a training's.
        """
        try:
            training = _mapping(extra, "training")
            sampling, data = _mapping(training, "sampling"), _mapping(training, "data")
            given = {name: sampling[name] for name in ("queries", "history") if name in sampling}
            return build(cls, {**given, "data": {**data, "captions": None}})
        except ValueError as error:
            raise MemoryFormatError(f"what the model's file says of its training is damaged ({error})") from error


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    inside = values.get(name, {})
    require(isinstance(inside, dict), f"{name} must be a mapping of keys to values", inside)
    return inside


class TrainedModel:
    """A model with its VAE.

    Args:
        model: the trained model.
        vae: makes its latents.
        digest, vae_digest: SHA-256 of what their files say; empty where there is none.

    Attributes:
        queries: frames that are made together, as in training.
        training: what the model's file says of its training.
        seconds: length of the histories it was trained on, or None if its file does not say.
        held_out: stretches [from, to] of its film, in seconds, that it was not trained on.
    """

    def __init__(self, model: MemoryModel, vae: VideoCodec, digest: str = "", vae_digest: str = "") -> None:
        self.model, self.vae = model, vae
        self.digest, self.vae_digest = digest, vae_digest
        self.training = TrainingRecord.read(model.extra)
        self.queries, history = self.training.queries, self.training.history
        self.seconds = vae.video_frames(history) / model.config.fps if history else None
        self.held_out = list(self.training.data.test)

    @classmethod
    def load(cls, path: str | Path) -> TrainedModel:
        """Read a model and the VAE beside it.

        Args:
            path: the model's file or folder.

        Returns:
            TrainedModel.

        Raises:
            UserError: a file is missing, damaged, or does not fit.
        """
        model = load_model(path)
        vae = load_vae(model.config.vae, model.vae_weights)
        file = model_path(path)
        try:
            return cls(model, vae, _digest(*with_bases(file)), _digest(model.vae_weights))
        except MemoryFormatError as error:
            raise MemoryFormatError(f"{file}: {error}") from error

    @torch.no_grad()
    def encode(self, frames: torch.Tensor) -> History:
        """Make the latents that a history's memory is made of.

        The last frame is repeated until it fills a latent frame and a memory token of every encoder.

        Args:
            frames: uint8 (T, H, W, 3).

        Returns:
            History of scaled latents (1, C, T', H', W').
        """
        encoders = self.model.config.encoders
        count = self.vae.video_frames(self.padded_latents(len(frames)))
        frames = torch.cat([frames, frames[-1:].expand(count - len(frames), -1, -1, -1)])
        lows = [encode_block(frames, self.vae, each.compression) if each.reads_low else None for each in encoders]
        return History(encode_block(frames, self.vae), lows).map(lambda latents: latents.float()[None])

    def padded_latents(self, frames: int) -> int:
        """Latent frames of so many video frames, with those that fill a token of every encoder."""
        whole = math.lcm(*(each.compression.time for each in self.model.config.encoders))
        return whole * -(-self.vae.latent_frames(frames) // whole)

    @torch.no_grad()
    def remember(self, history: History) -> MemoryTokens:
        """Encode latents as `encode` gives them; the tokens are rounded to float16, as files hold them."""
        memory = self.model.remember(history)
        return MemoryTokens(memory.tokens.half().float(), memory.positions)

    @torch.no_grad()
    def retrieve(self, memory: MemoryTokens, frames: list[int], steps: int, seed: int = 0) -> torch.Tensor:
        """Make latent frames from the memory, a few at a time as in training.

        Args:
            memory: of one history, (1, M, D).
            frames: which latent frames.
            steps: of the sampler.
            seed: of its noise.

        Returns:
            Scaled latents (1, C, len(frames), H', W').
        """
        generator = torch.Generator().manual_seed(seed)
        # Every k-th frame to a group: frames of a group lie apart, as the random ones of training do.
        count = -(-len(frames) // self.queries)
        order = [i for start in range(count) for i in range(start, len(frames), count)]
        groups = [list(range(start, len(frames), count)) for start in range(count)]
        made = []
        for length in sorted({len(group) for group in groups}, reverse=True):
            same = [group for group in groups if len(group) == length]
            for part in (same[i : i + _BATCH] for i in range(0, len(same), _BATCH)):
                asked = torch.tensor([[float(frames[i]) for i in group] for group in part])
                given = MemoryTokens(*(x.expand(len(part), -1, -1) for x in memory))
                latents = self.model.retrieve(given, asked, [""] * len(part), steps, generator)
                made += latents.transpose(1, 2).flatten(0, 1).unbind(0)
        place = {index: n for n, index in enumerate(order)}
        return torch.stack([made[place[i]] for i in range(len(frames))], 1)[None]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
        """Decode scaled latents (1, C, T', H', W') as one stream.

        Args:
            latents: neighbouring latent frames, the first of a history first.
            size: frames, rows and columns to give.

        Returns:
            uint8 (T, H, W, 3).
        """
        raw = self.vae.unscale(latents)
        chunks = self.vae.decode_chunks(raw.split(2, 2), size)
        return torch.cat([frames_to_uint8(chunk) for chunk in chunks])


def _digest(*paths: Path | None) -> str:
    digests = [content_digest(path) for path in paths if path and path.is_file()]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if digests else ""


def _former_digest(*paths: Path | None) -> str:
    """SHA-256 of the files' bytes, which memories of earlier versions name their model by."""
    content = b"".join(path.read_bytes() for path in paths if path)
    return hashlib.sha256(content).hexdigest() if content else ""


@functools.lru_cache(maxsize=2)
def open_model(name: str) -> TrainedModel:
    """Load a checkpoint that comes with the package.

    Raises:
        UserError: it is not there, or damaged.
    """
    path = shipped(name)
    if path is None:
        raise UserError(
            f"the trained model {name!r} is not in this installation; use --method {listed(untrained(), 'or')}"
        )
    return TrainedModel.load(path)


def compress(clip: Clip | EncodedClip, config: CompressorConfig, progress: Progress | None) -> Rows:
    """Encode a clip with a trained model; see `method.Implementation`.

    At the model's frame rate it remembers what it was trained to. The header names the model and its hash.
    """
    require(isinstance(clip, Clip), "compress: the method learned takes frames, which its own VAE encodes", type(clip))
    frames = clip.frames
    name = config.model_name
    trained = open_model(name)
    own = trained.model.config
    if tuple(frames.shape[1:3]) != (own.height, own.width):
        raise UserError(
            f"the trained model {name!r} takes frames of {own.height}x{own.width}, "
            f"got {frames.shape[1]}x{frames.shape[2]}; leave --size out"
        )
    tokens, positions = trained.remember(trained.encode(frames))
    if tokens.shape[1] == 0:
        raise UserError(f"{len(frames)} frames fill no token of the trained model {name!r}; take more --seconds")
    meta = {"model": name, "model_sha256": trained.digest, "vae_sha256": trained.vae_digest}
    return Rows(tokens[0], positions[0], trained.vae, {}, meta)


def check(bank: MemoryBank, header: MemoryHeader) -> None:
    """Check that the model is at hand, the same, and the rows of its frames; see `method.Implementation`."""
    name = header.model
    if not name.isidentifier() or shipped(name) is None:
        raise MemoryFormatError(f"was made with the trained model {show(name)}, which is not in this installation")
    trained = open_model(name)
    file, named = shipped(name), (header.model_sha256, header.vae_sha256)
    if named != (trained.digest, trained.vae_digest) and named != (
        _former_digest(*with_bases(file)),
        _former_digest(trained.model.vae_weights),
    ):
        raise MemoryFormatError(
            f"was made with another version of the trained model {name!r}; make it anew with `vidmem compress`"
        )
    model = trained.model
    if bank.channels != model.config.dit.dim:
        raise ValueError(f"rows of {bank.channels} numbers, {model.config.dit.dim} of the model")
    if header.size[1:] != (model.config.height, model.config.width):
        raise ValueError(f"size {header.size}, the model's is {(model.config.height, model.config.width)}")
    frames, cells = trained.padded_latents(header.size[0]), model.config.latent_size
    rows = sum(math.prod(memory_grid(each.compression, frames, *cells)) for each in model.config.encoders)
    if rows != len(bank):
        raise ValueError(f"{len(bank)} rows, {rows} for size {header.size}")
    check_rows(bank, header, (frames, *(n // PATCH for n in cells)))


def read(bank: MemoryBank, frame: int, steps: int = DEFAULT_STEPS) -> torch.Tensor:
    """Make one frame from the memory, always the same one: the sampler's noise has a fixed seed.

    Latent frames before the frame's own are made with it, since a causal VAE decodes a frame
    from those before it. See `method.Implementation`.
    """
    trained = open_model(bank.metadata["model"])
    size = json.loads(bank.metadata["size"])
    stride, first = trained.vae.stride[0], trained.vae.first_frames
    position = 0 if frame < first else 1 + (frame - first) // stride
    asked = list(range(max(0, position - trained.queries + 1), position + 1))
    rows = bank.gather(torch.arange(len(bank)), out_dtype=torch.float32) * bank.extras["scale"]
    tokens = MemoryTokens(rows[None], bank.positions[None].clone())
    latents = trained.retrieve(tokens, asked, steps)
    count = trained.vae.video_frames(len(asked))
    frames = trained.decode(latents, (count, *size[1:]))
    before_last = count - (first if position == 0 else stride)
    offset = frame if position == 0 else (frame - first) % stride
    return frames[before_last + offset]
