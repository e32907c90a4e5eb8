"""The method learned: a trained model encodes a clip to memory tokens and reconstructs any frame from them."""

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
# Latent frames denoised together, if the model file does not give the number used in training.
_QUERIES = 4
_BATCH = 8


@dataclass(frozen=True)
class TrainingRecord(Checked):
    """The training settings in the header of a model file.

    Args:
        queries: Latent frames denoised together.
        history: Length of a history, in latent frames; None if the file does not say.
        data: Training videos.
    """

    queries: Annotated[int, positive(1_000_000)] = _QUERIES
    history: Annotated[int | None, positive(1_000_000)] = None
    data: DataConfig = DataConfig()

    @classmethod
    def read(cls, extra: dict[str, Any]) -> TrainingRecord:
        """Read it from the `extra` values of a model file.

        Raises:
            MemoryFormatError: A value is not a valid training setting.
        """
        try:
            training = _mapping(extra, "training")
            sampling, data = _mapping(training, "sampling"), _mapping(training, "data")
            given = {name: sampling[name] for name in ("queries", "history") if name in sampling}
            return build(cls, {**given, "data": {**data, "captions": None}})
        except ValueError as error:
            raise MemoryFormatError(f"the training settings of the model file are damaged ({error})") from error


def _mapping(values: dict[str, Any], name: str) -> dict[str, Any]:
    inside = values.get(name, {})
    require(isinstance(inside, dict), f"{name} must be a mapping of keys to values", inside)
    return inside


class TrainedModel:
    """A trained model with its VAE.

    Args:
        model: The trained model.
        vae: The VAE of its latents.
        digest: SHA-256 of the content of the model file, or "".
        vae_digest: SHA-256 of the content of the VAE file, or "".

    Attributes:
        queries: Latent frames denoised together, as in training.
        training: Training settings in the header of the model file.
        seconds: Training length of a history, in seconds; None if the file does not say.
        held_out: Parts [from, to] of the training video, in seconds, that were held out.
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
        """Load a model and the VAE beside it.

        Args:
            path: Model file or folder.

        Returns:
            The model with its VAE.

        Raises:
            UserError: A file is missing, damaged, or does not match the other.
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
        """Encode frames with the VAE to the latents that the memory encoders read.

        The last frame is repeated to fill a latent frame and a memory token of every encoder.

        Args:
            frames: uint8 (T, H, W, 3).

        Returns:
            The history, scaled latents (1, C, T', H', W').
        """
        encoders = self.model.config.encoders
        count = self.vae.video_frames(self.padded_latents(len(frames)))
        frames = torch.cat([frames, frames[-1:].expand(count - len(frames), -1, -1, -1)])
        lows = [encode_block(frames, self.vae, each.compression) if each.reads_low else None for each in encoders]
        return History(encode_block(frames, self.vae), lows).map(lambda latents: latents.float()[None])

    def padded_latents(self, frames: int) -> int:
        """Number of latent frames of `frames` video frames, padded to a memory token of every encoder."""
        whole = math.lcm(*(each.compression.time for each in self.model.config.encoders))
        return whole * -(-self.vae.latent_frames(frames) // whole)

    @torch.no_grad()
    def remember(self, history: History) -> MemoryTokens:
        """Encode latents from `encode` to memory tokens, rounded to float16 as in a memory file."""
        memory = self.model.remember(history)
        return MemoryTokens(memory.tokens.half().float(), memory.positions)

    @torch.no_grad()
    def retrieve(self, memory: MemoryTokens, frames: list[int], steps: int, seed: int = 0) -> torch.Tensor:
        """Reconstruct latent frames from the memory, a few at a time as in training.

        Args:
            memory: Memory tokens of one history, (1, M, D).
            frames: Numbers of the latent frames.
            steps: Number of denoising steps.
            seed: Random seed of the noise.

        Returns:
            Scaled latents (1, C, len(frames), H', W').
        """
        generator = torch.Generator().manual_seed(seed)
        # A group takes every k-th frame, so that its frames are spread out like the random ones of training.
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
            latents: Consecutive latent frames.
            size: Frames, rows and columns of the result.

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
    """SHA-256 of the bytes of the files, which memories of earlier versions store."""
    content = b"".join(path.read_bytes() for path in paths if path)
    return hashlib.sha256(content).hexdigest() if content else ""


@functools.lru_cache(maxsize=2)
def open_model(name: str) -> TrainedModel:
    """Load a shipped checkpoint.

    Raises:
        UserError: It is missing or damaged.
    """
    path = shipped(name)
    if path is None:
        raise UserError(f"the trained model {name!r} is not installed; use --method {listed(untrained(), 'or')}")
    return TrainedModel.load(path)


def compress(clip: Clip | EncodedClip, config: CompressorConfig, progress: Progress | None) -> Rows:
    """Encode a clip with a trained model; see `method.Implementation`.

    The clip should have the frame rate of the model. The header stores the name and the hash of the model.
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
        raise UserError(f"{len(frames)} frames do not fill a token of the trained model {name!r}; give more --seconds")
    meta = {"model": name, "model_sha256": trained.digest, "vae_sha256": trained.vae_digest}
    return Rows(tokens[0], positions[0], trained.vae, {}, meta)


def check(bank: MemoryBank, header: MemoryHeader) -> None:
    """Check that the model is installed and unchanged, and that the tokens match; see `method.Implementation`."""
    name = header.model
    if not name.isidentifier() or shipped(name) is None:
        raise MemoryFormatError(
            f"was made with the trained model {show(name)}, which this installation lacks; compress the video again"
        )
    trained = open_model(name)
    file, named = shipped(name), (header.model_sha256, header.vae_sha256)
    if named != (trained.digest, trained.vae_digest) and named != (
        _former_digest(*with_bases(file)),
        _former_digest(trained.model.vae_weights),
    ):
        raise MemoryFormatError(
            f"was made with another version of the trained model {name!r}; make the file again with `vidmem compress`"
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
    """Reconstruct one frame; the noise has a fixed seed, so that the result is always the same.

    Latent frames before that of the frame are reconstructed, too, because a causal VAE needs them to decode it. See
    `method.Implementation`.
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
