"""Layers of the memory encoder's high-resolution branch, each able to carry a stream from call to call.

Everything is causal in time and normalised position by position, so that a history encoded segment by
segment, with what the layers keep, gives the tokens of the history encoded whole.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from vidmem_kernels import cross_attention

from ..vae import PATCH
from ..vae.causal_layers import CausalConv3d, ChannelNorm
from .config import EncoderConfig

# Wavelengths of the rotary positions: 2 pi up to 2 pi times this, in memory tokens.
_LONGEST = 100.0


class KeptTokens(NamedTuple):
    """Keys and values (B, L, H, D) that later frames may see, and the frame (L,) of each, int64."""

    k: torch.Tensor
    v: torch.Tensor
    frame: torch.Tensor


class HighState(NamedTuple):
    """What the branch keeps of a stream: the last inputs of each convolution, and the attention's tokens."""

    inputs: list[torch.Tensor]
    tokens: KeptTokens | None


class Residual(nn.Module):
    """x + convolution(SiLU(norm(x)))."""

    def __init__(self, channels: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.conv = CausalConv3d(channels, channels, kernel)

    def forward(self, x: torch.Tensor, past: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """As CausalConv3d.forward."""
        change, past = self.conv(nn.functional.silu(self.norm(x)), past)
        return x + change, past


def _rotate(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotary positions of x (B, L, H, D) at `positions` (L, 3); pairs of channels take turns between the axes.

    Scores then depend on differences of positions alone. A last channel without a partner stays.
    """
    pairs = x.shape[-1] // 2
    place = torch.arange(pairs, device=x.device)
    frequency = _LONGEST ** (-(place // 3).to(torch.float32) / math.ceil(pairs / 3) if pairs else place)
    angle = (positions[:, place % 3] * frequency)[:, None]
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1).to(x.dtype)


class FrameAttention(nn.Module):
    """Residual self-attention over memory tokens: those of one's own frame and of earlier ones.

    Args:
        channels: of the tokens.
        heads: they are split into.
        window: how many earlier frames are seen; `math.inf` for all.
    """

    def __init__(self, channels: int, heads: int, window: float) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, channels // heads))
        self.out = nn.Linear(channels, channels)
        for layer in (self.qkv, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor, start: int, past: KeptTokens | None) -> tuple[torch.Tensor, KeptTokens]:
        """Attend.

        Args:
            x: (B, C, T, H, W), the frames from number `start` on.
            start: frames that came before.
            past: what was kept of them.

        Returns:
            x with what was read added, and what is to be kept.
        """
        axes = [torch.arange(n, device=x.device) for n in x.shape[2:]]
        positions = torch.cartesian_prod(axes[0] + start, *axes[1:])
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).unbind(2)
        q, k = (
            _rotate(nn.functional.rms_norm(part, part.shape[-1:], eps=1e-6) * scale, positions).to(v.dtype)
            for part, scale in zip((q, k), self.qk_scale, strict=True)
        )
        own = positions[:, 0].contiguous()
        seen = KeptTokens(k, v, own)
        if past is not None:
            seen = KeptTokens(
                *(torch.cat(pair, d) for d, pair in zip((1, 1, 0), zip(past, seen, strict=True), strict=True))
            )
        read = cross_attention(q, seen.k, seen.v, q_time=own, k_time=seen.frame, window=(self.window, 0.0))
        x = x + self.out(read.flatten(2)).transpose(1, 2).unflatten(2, x.shape[2:])
        # The next frame sees `window` frames, and those are the last ones.
        first = len(seen.frame) - min(self.window * x.shape[3] * x.shape[4], len(seen.frame))
        # Copies: views would keep the other frames, and v the fused projection.
        return x, KeptTokens(seen.k[:, first:].clone(), seen.v[:, first:].clone(), seen.frame[first:].clone())


class HighResolution(nn.Module):
    """Latents to one hidden token a box: convolutions that reduce time, then space, and an attention.

    The number of channels goes up a stage with every step and stays at the last; the last step goes to
    the last stage in any case. Only the kernels that cost little reach over time: the first, of few
    channels, those that reduce time, and the last, of few cells.

    Args:
        config: compression, channels and attention.
        latent_channels: of the VAE.
    """

    def __init__(self, config: EncoderConfig, latent_channels: int) -> None:
        super().__init__()
        time, height, width = (int(math.log2(n)) for n in config.compression)
        patch = int(math.log2(PATCH))
        height, width = height + patch, width + patch
        steps = [((3, 1, 1), (2, 1, 1))] * time
        for i in range(max(height, width)):
            stride = (1, 2 if i < height else 1, 2 if i < width else 1)
            steps.append((stride, stride))
        channels = [*config.channels[: len(steps)], config.channels[-1]]
        channels += [config.channels[-1]] * (len(steps) + 1 - len(channels))
        self.layers = nn.ModuleList(
            [CausalConv3d(latent_channels, channels[0], (3, 3, 3)), Residual(channels[0], (1, 3, 3))]
        )
        for i, (kernel, stride) in enumerate(steps):
            last = i == len(steps) - 1
            self.layers.append(CausalConv3d(channels[i], channels[i + 1], kernel, stride))
            self.layers.append(Residual(channels[i + 1], (3, 3, 3) if last else (1, 3, 3)))
        self.attention = None
        if config.attention != "none":
            window = math.inf if config.attention == "causal" else config.window
            self.attention = FrameAttention(channels[-1], config.heads, window)
        self.norm = ChannelNorm(channels[-1])

    def forward(self, x: torch.Tensor, start: int, state: HighState | None) -> tuple[torch.Tensor, HighState]:
        """Encode whole boxes.

        Args:
            x: latents (B, C, T, H, W) of whole boxes.
            start: boxes in time that came before.
            state: what was kept of them.

        Returns:
            (B, t * h * w, channels[-1]) of unit mean square, and what is to be kept.
        """
        past = state.inputs if state is not None else [None] * len(self.layers)
        inputs = []
        for layer, before in zip(self.layers, past, strict=True):
            x, kept = layer(x, before)
            inputs.append(kept)
        tokens = None
        if self.attention is not None:
            x, tokens = self.attention(x, start, state.tokens if state is not None else None)
        return self.norm(x).flatten(2).transpose(1, 2), HighState(inputs, tokens)
