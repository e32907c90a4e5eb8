"""The whole model: text encoder, memory encoders and DiT in one module."""

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
    """Encodes a history to memory tokens, and generates latent frames from them.

    The VAE is not part of the model: `load_vae` loads it.

    Args:
        config: Configuration of all parts.
        text_path: Folder of the pretrained text encoder; required to encode prompts if `config.text.kind` is
            "transformers".
        transformer: Transformer of diffusers, if `config.dit.diffusers` is set; by default it is loaded from that
            folder.

    Attributes:
        config: Configuration of all parts.
        dit: The diffusion transformer.
        encoders: The memory encoders.
        text: The text encoder.
        extra: The dict that `save_model` stored with the model.
        vae_weights: Path of the VAE's weights beside the model file, or None.

    Raises:
        UserError: The folder of the text encoder, or the transformer, cannot be used.
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
        """Device of the weights."""
        return next(self.dit.parameters()).device

    def stored(self) -> set[str]:
        """Name the tensors that a model file stores: all but pretrained parts, which stay in their folders.

        Returns:
            Keys of the state dict.
        """
        apart = {f"dit.{name}" for name in getattr(self.dit, "pretrained", ())}
        return {name for name in self.state_dict() if name not in apart and not name.startswith("text.pretrained.")}

    def remember(self, history: History) -> MemoryTokens:
        """Encode a history with every encoder and concatenate their tokens.

        Args:
            history: Latents of the history, and for each encoder those of its low-resolution video.

        Returns:
            Memory tokens (B, M, D) and their positions (B or 1, M, 3).

        Raises:
            ValueError: `history.lows` does not have one entry for each encoder.
        """
        if len(history.lows) != len(self.encoders):
            count, got = len(self.encoders), len(history.lows)
            raise ValueError(f"remember: history.lows must have one entry for each encoder ({count}), got {got}")
        pairs = zip(self.encoders, history.lows, strict=True)
        made = [encoder(history.latents, low, self.dit.patch_embed) for encoder, low in pairs]
        batch = max(len(part.positions) for part in made)
        positions = [part.positions.expand(batch, -1, -1) for part in made]
        return MemoryTokens(torch.cat([part.tokens for part in made], 1), torch.cat(positions, 1))

    def predict(self, x: torch.Tensor, t: torch.Tensor, prompts: list[str], **given: Any) -> torch.Tensor:
        """Predict the velocity of noisy latents, as `DiT.forward` does, from prompts instead of text tokens.

        Args:
            x: (B, C, K, H, W), noisy latents.
            t: (B,) or (B, K), timesteps in [0, 1]; 1 is pure noise.
            prompts: B prompts.
            **given: frames, memory, window, window_frames, cache, memory_cross_attention: see `DiT.forward`.

        Returns:
            (B, C, K, H, W), the velocity noise - sample.
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
        """Generate latent frames from noise, by Euler steps along the predicted velocity.

        Args:
            memory: Result of `remember`, or None for no memory.
            frames: (B, K), positions of the frames in time, in latent frames.
            prompts: B prompts.
            steps: Number of denoising steps.
            generator: Random generator of the noise; it may be on another device.
            window: (B, C, W, H, W'), clean latents beside the memory, or None.
            window_frames: (B, W), their positions in time, in latent frames; required with `window`.
            shift: Timestep shift of flow matching; by default that of the configuration.
            size: Latent rows and columns; by default those of the configuration's frames.
            approximate: Reuse the history's keys and values of the first step in all steps even if this is not exact
                (`history_sees_video`): faster, with some loss of quality. If it is exact, they are always reused.

        Returns:
            float32 (B, C, K, H, W), scaled latents.

        Raises:
            ValueError: The sizes do not fit together.
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
