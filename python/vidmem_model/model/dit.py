"""The diffusion transformer (DiT): denoises latent frames, given a history of memory tokens and clean frames.

Blocks are as in Wan (arXiv 2503.20314): adaLN with one time projection and a table per block, self-attention with
RMS-normalised queries and keys and 3D RoPE, cross-attention to the text, and an MLP (gated here). The history joins
self-attention at timestep 0 and is dropped before the output head (arXiv 2512.23851).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vidmem_kernels import LinearAttentionState, MemoryCrossAttention, cross_attention, linear_attention

from ..vae import PATCH, patchify, unpatchify
from .config import Compression, DiTConfig
from .encoder import MemoryTokens
from .flow import over_frames
from .rope import FEATURES, frame_positions, norm_rotate, position_features, rotary
from .unfold import Unfold

TIME_FEATURES = 256
# The velocity of a predicted sample is (x - sample) / t. Smaller t are clamped to this, so that the division does not
# amplify the error of the prediction.
LEAST_TIME = 0.05


class KVCache:
    """Cache of the history in self-attention: keys and values, or the state of linear attention.

    The first call of a DiT fills it; later calls compute the noisy tokens only. With `history_sees_video=False` the
    history is the same at every step, and the result is exact. Otherwise the cache keeps the history of the first
    step: faster, with some loss of quality.
    """

    def __init__(self) -> None:
        self.blocks: list[Kept | None] = []


class KeysAndValues(NamedTuple):
    """(B, L, H, D) each, of the history in softmax attention."""

    k: torch.Tensor
    v: torch.Tensor


Kept = LinearAttentionState | KeysAndValues


class Stream(NamedTuple):
    """Tokens of one kind (video or history) between blocks.

    Attributes:
        x: (B, F, N, D), F groups (frames) of tokens that share a timestep.
        time: (B or 1, F, 6, D), projected timestep of each group.
        rotation: (B or 1, F * N, head / 2), see `rope.rotary`.
    """

    x: torch.Tensor
    time: torch.Tensor
    rotation: torch.Tensor


def time_features(t: torch.Tensor) -> torch.Tensor:
    """Sines and cosines (..., TIME_FEATURES) of times (...) in [0, 1]."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angle = 1000 * t.to(torch.float32)[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """adaLN: normalise tokens (B, F, N, D), then scale and shift them by (B or 1, F, 1, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]), 1 + scale)


class Block(nn.Module):
    """Self-attention over history and video, cross-attention to the text, gated MLP.

    Args:
        config: Configuration of the DiT.
        linear: Whether self-attention is linear attention.
        last: Whether this is the last block, which need not compute the history's tokens.
    """

    # Layers that read the prompt get gradients of few tokens, and orthogonalising them would take a fifth of Muon's
    # time.
    TRAINED_AS = {
        "table": "no_decay",
        "text_q": "adamw",
        "text_kv": "adamw",
        "text_scale": "adamw",
        "text_out": "adamw",
    }

    def __init__(self, config: DiTConfig, linear: bool, last: bool) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.linear, self.last = linear, last
        self.history_sees_video = config.history_sees_video
        # shift, scale and gate of self-attention, then of the MLP. Gates start at 1, so that a small model trained from
        # scratch learns in every block from the first step. Gates of 0 would stabilise a deep model, but a block
        # learns only after its gate has opened.
        self.table = nn.Parameter(torch.zeros(6, dim))
        with torch.no_grad():
            self.table[[2, 5]] = 1.0
        self.qkv = nn.Linear(dim, 3 * dim)
        self.qk_scale = nn.Parameter(torch.ones(2, 1, dim // config.heads))
        self.out = nn.Linear(dim, dim)
        self.text_norm = nn.LayerNorm(dim)
        self.text_q = nn.Linear(dim, dim)
        self.text_kv = nn.Linear(dim, 2 * dim)
        self.text_scale = nn.Parameter(torch.ones(2, dim // config.heads))
        self.text_out = nn.Linear(dim, dim)
        self.memory_attention = MemoryCrossAttention(dim, config.heads) if config.memory_cross_attention else None
        self.up = nn.Linear(dim, 2 * config.mlp)
        self.down = nn.Linear(config.mlp, dim)

    def forward(
        self,
        video: Stream,
        history: Stream | None,
        kept: Kept | None,
        text: torch.Tensor,
        text_bias: torch.Tensor,
        memory: torch.Tensor | None,
        keep: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, Kept | None]:
        """Run the block.

        Args:
            video: Noisy tokens.
            history: Memory tokens and tokens of clean frames, or None.
            kept: Cache entry of the history from an earlier call, instead of `history`.
            text: (B, S, D), text tokens.
            text_bias: float (B, S), 0, or -inf for padding.
            memory: (B, M, D), tokens for cross-attention to the memory, or None.
            keep: Whether to return a cache entry of the history.

        Returns:
            x of the video, x of the history (None after the last block), and the cache entry or None.
        """
        own = self._qkv(video)
        if history is None:
            attended = self._attend(*own, kept)
        else:
            past = self._qkv(history)
            past_attended = None
            if self.last or not self.history_sees_video:
                # The video attends to all tokens; the history, if still needed, to itself only.
                if not self.last:
                    past_attended = self._attend(*past, None)
                kept = self._keep(*past[1:])
                attended = self._attend(*own, kept)
            else:
                joined = self._attend(*(torch.cat(pair, 1) for pair in zip(past, own, strict=True)), None)
                past_attended, attended = joined.split([past[0].shape[1], own[0].shape[1]], 1)
                kept = self._keep(*past[1:])
        text_k, text_v = self.text_kv(text).unflatten(2, (2, self.heads, -1)).unbind(2)
        text_k = norm_rotate(text_k, self.text_scale[1])
        text = (text_k.to(text_v.dtype), text_v, text_bias)
        passed = None
        if history is not None and not self.last:
            passed = self._finish(history, past_attended, text, None)
        # Copies: views of the fused projection would also keep the queries in memory.
        kept = type(kept)(*map(torch.Tensor.contiguous, kept)) if keep and kept is not None else None
        return self._finish(video, attended, text, memory), passed, kept

    def _times(self, stream: Stream) -> tuple[torch.Tensor, ...]:
        return (stream.time + self.table).unsqueeze(3).unbind(2)

    def _qkv(self, stream: Stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shift, scale = self._times(stream)[:2]
        qkv = self.qkv(modulate(stream.x, shift, scale)).flatten(1, 2).unflatten(2, (3, self.heads, -1))
        qk, v = qkv[:, :, :2], qkv[:, :, 2]
        # Linear attention computes its features from rotated queries and keys. If features were rotated instead, they,
        # and the normaliser, could become negative; without rotation the block would not know positions. The scores
        # then do not depend on the offset only, but still contain it.
        q, k = norm_rotate(qk, self.qk_scale, stream.rotation).unbind(2)
        return q, k, v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept | None) -> torch.Tensor:
        if self.linear:
            return linear_attention(q, k, v, state=kept)
        if kept is not None:
            k, v = torch.cat([kept.k, k], 1), torch.cat([kept.v, v], 1)
        return cross_attention(q, k, v)

    def _keep(self, k: torch.Tensor, v: torch.Tensor) -> Kept:
        return linear_attention(k, k, v, return_state=True)[1] if self.linear else KeysAndValues(k, v)

    def _finish(
        self, stream: Stream, attended: torch.Tensor, text: tuple[torch.Tensor, ...], memory: torch.Tensor | None
    ) -> torch.Tensor:
        x = stream.x
        gate, shift, scale, mlp_gate = self._times(stream)[2:]
        x = x + gate * self.out(attended.flatten(2)).view_as(x)
        k, v, bias = text
        q = self.text_q(self.text_norm(x)).flatten(1, 2).unflatten(2, (self.heads, -1))
        q = norm_rotate(q, self.text_scale[0])
        x = x + self.text_out(cross_attention(q, k, v, key_bias=bias).flatten(2)).view_as(x)
        if memory is not None:
            x = self.memory_attention(x.flatten(1, 2), memory).view_as(x)
        gated, value = self.up(modulate(x, shift, scale)).chunk(2, -1)
        return x + mlp_gate * self.down(F.silu(gated) * value)


class DiT(nn.Module):
    """Predicts the velocity of noisy latent frames, given text and history.

    Args:
        config: Configuration.
        latent_channels: Channels of the VAE.
        text_dim: Channels of a text token.
        compression: Compression of the memory, for `config.unfold`; by default 4x4x2.

    Raises:
        ValueError: `config.unfold` is smaller than the channels of a patch token.
    """

    TRAINED_AS = {"blocks": "muon", "patch_projection": "fitted", "unfold": "fitted", "head_table": "no_decay"}

    def __init__(
        self, config: DiTConfig, latent_channels: int, text_dim: int, compression: Compression | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.channels = latent_channels
        dim, cell = config.dim, latent_channels * PATCH**2
        self.patch_projection = nn.Linear(cell, dim)
        self.unfold = self.unfold_projection = None
        if config.unfold:
            if config.unfold < cell:
                raise ValueError(
                    f"DiT: unfold must be at least the {cell} numbers of a patch token, got {config.unfold}"
                )
            self.unfold = Unfold(dim, config.unfold, compression or Compression())
            self.unfold_projection = nn.Linear(config.unfold, dim)
        self.position_projection = nn.Linear(FEATURES, dim) if config.position_features else None
        self.text_projection = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(TIME_FEATURES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            Block(config, i in config.linear_blocks, i == config.depth - 1) for i in range(config.depth)
        )
        self.head_table = nn.Parameter(torch.zeros(2, dim))
        self.head = nn.Linear(dim, cell)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        with torch.no_grad():
            for block in self.blocks:
                # Keys are initialised like queries, so that a token first attends to similar tokens at its own position
                # in the memory. With random videos a small model learned to retrieve a frame in about half the steps.
                # (Mimetic initialisation, arXiv 2305.09828)
                block.qkv.weight[dim : 2 * dim] = block.qkv.weight[:dim]
        # The initial prediction is 0, the mean of the target, at all timesteps.
        for layer in (self.time_projection, self.head):
            nn.init.zeros_(layer.weight)
        if self.unfold is not None:
            for parameter in self.unfold.projection.parameters():
                nn.init.zeros_(parameter.data.unflatten(0, (self.unfold.places, -1))[:, :cell])

    def lora_layers(self) -> list[str]:
        """Names of the layers that get adapters: all linear layers."""
        return [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]

    def added(self) -> list[nn.Parameter]:
        """Parameters that are trained besides adapters: none."""
        return []

    def patch_embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Project latents (B, C, T, H, W) to tokens (B, T * H/2 * W/2, D), frame by frame.

        Raises:
            ValueError: The channels are not those of the model, or H or W is not a multiple of 2.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels:
            raise ValueError(
                f"DiT.patch_embed: latents must be (B, {self.channels}, T, H, W), got {tuple(latents.shape)}"
            )
        tokens, _ = patchify(latents)
        return self.patch_projection(tokens.to(self.patch_projection.weight.dtype))

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        *,
        frames: torch.Tensor,
        memory: MemoryTokens | None = None,
        window: torch.Tensor | None = None,
        window_frames: torch.Tensor | None = None,
        cache: KVCache | None = None,
        memory_cross_attention: bool | None = None,
    ) -> torch.Tensor:
        """Predict the velocity noise - sample.

        Args:
            x: (B, C, K, H, W), noisy latents.
            t: (B,) or (B, K), timesteps in [0, 1]; 1 is pure noise.
            text: (B, S, text_dim), text tokens.
            text_mask: bool (B, S), False for padding; a prompt may have no tokens.
            frames: (B, K), positions of the noisy frames in time, in latent frames.
            memory: Memory tokens (B, M, D) with positions (B or 1, M, 3), or None.
            window: (B, C, W, H', W'), clean latents, or None.
            window_frames: (B, W), their positions in time; required with `window`.
            cache: Filled by the first call, read by later calls with the same history. Later calls need `window` only
                for `unfold`, and `memory` only for `unfold` and `memory_cross_attention`.
            memory_cross_attention: Whether the memory is also read by cross-attention; by default if the model has it.

        Returns:
            (B, C, K, H, W), of the dtype of x.

        Raises:
            ValueError: The sizes do not fit together.
        """
        check_inputs(self.config, x, t, text, text_mask, frames, memory, window, window_frames, memory_cross_attention)
        b, k = x.shape[0], x.shape[2]
        grid = (k, x.shape[3] // PATCH, x.shape[4] // PATCH)
        times = t.to(torch.float32).view(b, -1).expand(b, k)
        # One more row than frames: the history is at timestep 0.
        rows = torch.cat([times.reshape(-1), times.new_zeros(1)])
        dtype = self.patch_projection.weight.dtype
        embedded = self.time_embedding(time_features(rows).to(dtype))
        projected = self.time_projection(F.silu(embedded)).to(dtype).unflatten(1, (6, -1))
        places = frame_positions(frames, *grid[1:])
        tokens = self.patch_embed(x)
        unfolded = self._first_answer(places, memory, x.shape, frames, window, window_frames)
        if unfolded is not None:
            tokens = tokens + self.unfold_projection(unfolded)
        video = self._stream(*self._place(tokens, places), projected[:-1].unflatten(0, (b, k)))

        crosses = self.config.memory_cross_attention and memory_cross_attention is not False
        filled = cache is not None and bool(cache.blocks)
        reads = memory if crosses or not filled else None
        reads = self._place(*reads) if reads is not None else None
        history = None if filled else self._history(b, reads, window, window_frames, projected[-1:, None])
        read = reads[0] if reads is not None and crosses else None

        text = self.text_projection(text.to(dtype))
        bias = torch.zeros(text_mask.shape, device=x.device).masked_fill_(~text_mask, -math.inf)
        fill = cache is not None and not filled
        for i, block in enumerate(self.blocks):
            kept = cache.blocks[i] if filled else None
            out, past, kept = block(video, history, kept, text, bias, read, fill)
            video = video._replace(x=out)
            history = history._replace(x=past) if past is not None else None
            if fill:
                cache.blocks.append(kept)

        shift, scale = (self.head_table + embedded[:-1].to(dtype).view(b, k, 1, -1)).unsqueeze(3).unbind(2)
        cells = self.head(modulate(video.x, shift, scale)).flatten(1, 2)
        if unfolded is not None and self.config.prediction == "sample":
            cells = cells + unfolded[..., : cells.shape[-1]]
        predicted = unpatchify(cells.to(torch.float32), grid)
        if self.config.prediction == "sample":
            predicted = (x.to(torch.float32) - predicted) / over_frames(times).clamp(min=LEAST_TIME)
        return predicted.to(x.dtype)

    def _first_answer(
        self,
        places: torch.Tensor,
        memory: MemoryTokens | None,
        shape: torch.Size,
        frames: torch.Tensor,
        window: torch.Tensor | None,
        window_frames: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Input (B, K * N, unfold) of patch tokens by `unfold`, or None: from their box or the last clean frame."""
        if self.unfold is None:
            return None
        read = self.unfold(memory, places) if memory is not None else None
        if window is None or not window.shape[2] or (window.shape[1], *window.shape[3:]) != (shape[1], *shape[3:]):
            return read
        if read is None:
            read = self.unfold_projection.weight.new_zeros(*places.shape[:2], self.config.unfold)
        newest, at = window_frames.max(1)
        clean, _ = patchify(window[torch.arange(len(window), device=at.device), :, at].unsqueeze(2))
        follows = (frames > newest[:, None]).repeat_interleave(clean.shape[1], 1)[..., None]
        first, rest = read.split([clean.shape[2], read.shape[2] - clean.shape[2]], 2)
        return torch.cat([torch.where(follows, clean.repeat(1, shape[2], 1).to(read.dtype), first), rest], 2)

    def _place(self, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add position features, if the model has them; the residual stream has the dtype of the weights."""
        if self.position_projection is not None:
            tokens = tokens + self.position_projection(position_features(positions).to(self.head_table.dtype))
        return tokens.to(self.head_table.dtype), positions

    def _stream(self, tokens: torch.Tensor, positions: torch.Tensor, time: torch.Tensor) -> Stream:
        head = self.config.dim // self.config.heads
        return Stream(tokens.unflatten(1, (time.shape[1], -1)), time, rotary(positions, head))

    def _history(
        self,
        batch: int,
        memory: tuple[torch.Tensor, torch.Tensor] | None,
        window: torch.Tensor | None,
        window_frames: torch.Tensor | None,
        time: torch.Tensor,
    ) -> Stream | None:
        """Memory tokens, then tokens of the clean frames, all at timestep 0; None if there are none."""
        parts = [memory] if memory is not None and memory[0].shape[1] else []
        if window is not None and window.shape[2]:
            size = [n // PATCH for n in window.shape[3:]]
            parts.append(self._place(self.patch_embed(window), frame_positions(window_frames, *size)))
        if not parts:
            return None
        tokens = torch.cat([part[0] for part in parts], 1)
        positions = torch.cat([part[1].expand(batch, -1, -1) for part in parts], 1)
        return self._stream(tokens, positions, time)


def check_inputs(
    config: DiTConfig,
    x: torch.Tensor,
    t: torch.Tensor,
    text: torch.Tensor,
    text_mask: torch.Tensor,
    frames: torch.Tensor,
    memory: MemoryTokens | None,
    window: torch.Tensor | None,
    window_frames: torch.Tensor | None,
    memory_cross_attention: bool | None,
) -> None:
    """Check the arguments of `DiT.forward`.

    Raises:
        ValueError: The sizes do not fit together.
    """
    if memory_cross_attention and not config.memory_cross_attention:
        raise ValueError("DiT: memory_cross_attention must be False or None for a model without it, got True")
    if x.ndim != 5:
        raise ValueError(f"DiT: x must be (B, C, K, H, W), got {tuple(x.shape)}")
    b, k = x.shape[0], x.shape[2]
    _check_shape("frames", frames, (b, k))
    _check_shape("t", t, (b, k) if t.ndim == 2 else (b,))
    _check_shape("text_mask", text_mask, tuple(text.shape[:2]))
    if (window is None) != (window_frames is None):
        raise ValueError("DiT: window and window_frames must be given together, got one of them")
    if window is not None:
        _check_shape("window_frames", window_frames, (b, window.shape[2]))
    if memory is not None:
        _check_shape("memory.tokens", memory.tokens, (b, memory.tokens.shape[1], config.dim))


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"DiT: {name} must be of shape {shape}, got {tuple(tensor.shape)}")
