"""A trained model as a memory: frames become memory tokens, and any frame is made from them again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from .encoder import MemoryTokens, low_resolution
from .model import MemoryModel, load_model, model_path
from .vae import VideoCodec, frames_to_float, frames_to_uint8, load_vae

# Latent frames that are made together, if the model's file does not say how many it was trained on.
_QUERIES = 4
_BATCH = 8


class LearnedMemory:
    """A model with its VAE.

    Args:
        model: the trained model.
        vae: makes its latents.
        digest, vae_digest: SHA-256 of their files; empty where there is none.
    """

    def __init__(self, model: MemoryModel, vae: VideoCodec, digest: str = "", vae_digest: str = "") -> None:
        self.model, self.vae = model, vae
        self.digest, self.vae_digest = digest, vae_digest
        self.queries = int(model.extra.get("queries", _QUERIES))

    @classmethod
    def load(cls, path: str | Path) -> LearnedMemory:
        """Read a model and the VAE beside it.

        Args:
            path: the model's file or folder.

        Returns:
            LearnedMemory.

        Raises:
            UserError: a file is missing, damaged, or does not fit.
        """
        model = load_model(path)
        vae = load_vae(model.config.vae, model.vae_weights)
        return cls(model, vae, _digest(model_path(path)), _digest(model.vae_weights))

    @torch.inference_mode()
    def encode(self, frames: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Make the latents that a history's memory is made of.

        Args:
            frames: uint8 (T, H, W, 3).

        Returns:
            Scaled latents (1, C, T', H', W') and, for each encoder, those of its low-resolution video,
            or None where it reads none.
        """
        chunks = self.vae.encode_chunks(frames.split(2 * self.vae.stride[0]))
        history = self.vae.scale(torch.cat(list(chunks), 2))
        lows: list[torch.Tensor | None] = []
        for config in self.model.config.encoders:
            if config.branches not in ("both", "lr"):
                lows.append(None)
                continue
            small = frames_to_uint8(low_resolution(frames_to_float(frames), config.rate))
            low = torch.cat(list(self.vae.encode_chunks(small.split(2 * self.vae.stride[0]))), 2)
            lows.append(self.vae.scale(low))
        return history, lows

    @torch.inference_mode()
    def remember(self, history: torch.Tensor, lows: list[torch.Tensor | None]) -> MemoryTokens:
        """Encode latents as `encode` gives them; the tokens are rounded to float16, as files hold them."""
        memory = self.model.remember(history, lows)
        return MemoryTokens(memory.tokens.half().float(), memory.positions)

    @torch.inference_mode()
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

    @torch.inference_mode()
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


def _digest(path: Path | None) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path else ""
