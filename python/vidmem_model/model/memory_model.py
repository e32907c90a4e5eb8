"""The whole model: text encoder, memory encoders and DiT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import ModelConfig
from .diffusers_dit import DiffusersDiT, make_dit
from .dit import DiT, KVCache
from .encoder import History, MemoryEncoder, MemoryTokens
from .flow import sample
from .text import TextEncoder


class MemoryModel(nn.Module):
    """Remembers a history as a few tokens and makes latent frames from them.

    Args:
        config: of all parts. The VAE is not among them: it is frozen, and loaded apart.
        text_path: folder of a pretrained text encoder, for `config.text.kind` "transformers".
        transformer: of diffusers, for `config.dit.diffusers`; by default that of the folder named there.

    Attributes:
        extra: what save_model was given besides the model.
        vae_weights: the VAE's weights beside the file the model came from, or None.

    Raises:
        UserError: the text encoder's folder, or the transformer, cannot be used.
    """

    def __init__(
        self,
        config: ModelConfig,
        text_path: str | Path | None = None,
        transformer: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        channels, text = config.vae.channels, config.text
        if config.dit.diffusers is None:
            self.dit: DiT | DiffusersDiT = DiT(config.dit, channels, text.dim, config.encoders[0].compression)
        else:
            self.dit = make_dit(config.dit, channels, text.dim, text.max_tokens, transformer)
        self.encoders = nn.ModuleList(
            MemoryEncoder(each, config.dit.dim, config.vae.channels) for each in config.encoders
        )
        self.text = TextEncoder(config.text, text_path)
        self.extra: dict[str, Any] = {}
        self.vae_weights: Path | None = None

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return next(self.dit.parameters()).device

    def stored(self) -> set[str]:
        """Names of the state that a model's file holds: all but pretrained parts, which stay in their folders."""
        apart = {f"dit.{name}" for name in getattr(self.dit, "pretrained", ())}
        return {name for name in self.state_dict() if name not in apart and not name.startswith("text.pretrained.")}

    def remember(self, history: History) -> MemoryTokens:
        """Encode a history with every encoder, one after another.

        Args:
            history: its latents, and for each encoder those of its low-resolution video.

        Returns:
            MemoryTokens of all encoders: tokens (B, M, D), positions (B or 1, M, 3).

        Raises:
            ValueError: there are not as many lows as encoders.
        """
        if len(history.lows) != len(self.encoders):
            count, got = len(self.encoders), len(history.lows)
            raise ValueError(f"remember: history.lows must be as many as encoders ({count}), got {got}")
        pairs = zip(self.encoders, history.lows, strict=True)
        made = [encoder(history.latents, low, self.dit.patch_embed) for encoder, low in pairs]
        batch = max(len(part.positions) for part in made)
        positions = [part.positions.expand(batch, -1, -1) for part in made]
        return MemoryTokens(torch.cat([part.tokens for part in made], 1), torch.cat(positions, 1))

    def predict(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str], **given: Any) -> torch.Tensor:
        """Predict the velocity of noisy latents: DiT.forward with prompts in place of text tokens.

        Args:
            x: (B, C, K, H, W) noisy latents.
            t: (B,) or (B, K) times.
            prompts: B texts.
            given: frames, memory, window, window_frames, cache, memory_cross_attention; see DiT.forward.

        Returns:
            (B, C, K, H, W).
        """
        return self.dit(x, t, *self.text(prompts), **given)

    @torch.no_grad()
    def retrieve(
        self,
        memory: MemoryTokens | None,
        frames: torch.Tensor,
        prompts: list[str],
        steps: int,
        generator: torch.Generator | None = None,
        *,
        window: torch.Tensor | None = None,
        window_frames: torch.Tensor | None = None,
        shift: float | None = None,
        size: tuple[int, int] | None = None,
        approximate: bool = False,
    ) -> torch.Tensor:
        """Make latent frames from noise, Euler steps along the predicted velocity.

        Args:
            memory: what `remember` gave, or None.
            frames: (B, K) positions in time, in latent frames.
            prompts: B texts.
            steps: number of steps.
            generator: of the noise, on its own device.
            window, window_frames: (B, C, W, H, W') clean latents and (B, W) their positions in time.
            shift: of the steps' times towards the noise; by default the configuration's.
            size: latent rows and columns; by default those of the configuration's frames.
            approximate: keep the history's keys and values of the first step also where they would
                change (`history_sees_video`): faster, some quality lost. Where they do not change they
                are always kept.

        Returns:
            float32 (B, C, K, H, W) scaled latents.

        Raises:
            ValueError: sizes that do not fit.
        """
        height, width = size or self.config.latent_size
        b, k = frames.shape
        device = self.device
        noise = torch.randn(
            (b, self.config.vae.channels, k, height, width),
            generator=generator,
            device=generator.device if generator is not None else device,
        ).to(device)
        text = self.text(prompts)
        cache = KVCache() if approximate or not self.config.dit.history_sees_video else None
        given = {
            "frames": frames.to(device),
            "memory": memory,
            "window": window,
            "window_frames": window_frames,
            "cache": cache,
        }
        return sample(lambda x, t: self.dit(x, t, *text, **given), noise, steps, shift or self.config.shift)
