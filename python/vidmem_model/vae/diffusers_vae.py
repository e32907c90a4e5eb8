"""Adapters for diffusers' AutoencoderKLWan and AutoencoderKLHunyuanVideo, loaded from a local folder.

The first latent frame covers one video frame, each later one four. Latents are the mode (the mean) of the posterior;
nothing is sampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..diffusers_folder import diffusers_class, part_folder, read_config, read_weights
from ..errors import UserError
from .base import VideoCodec
from .config import VAEConfig

CLASSES = {"wan": "AutoencoderKLWan", "hunyuan": "AutoencoderKLHunyuanVideo"}


class DiffusersVAE(nn.Module, VideoCodec):
    """Base of both adapters; the diffusers model is frozen and in evaluation mode.

    Args:
        vae: The diffusers model.
        channels: Latent channels.
        stride: Frames, rows and columns per latent cell.

    Attributes:
        latent_mean: (channels,), mean for `scale`.
        latent_std: (channels,), standard deviation for `scale`.
    """

    first_frames = 1

    def __init__(self, vae: nn.Module, channels: int, stride: tuple[int, int, int]) -> None:
        super().__init__()
        self.vae = vae.requires_grad_(False)
        self.channels = channels
        self.stride = stride
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        self.eval()

    def encode(self, frames: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Encode frames (B, 3, T, H, W) in [-1, 1] to the posterior's mode (B, C, T', H', W'), float32.

        Args:
            frames: 1 + 4k frames, or 4k in the continuation of a stream, with whole latent rows and columns.
            cache: State of a stream: pass the same dict to every call, empty at first.

        Raises:
            ValueError: The frames do not have 3 colours, or have another number or size.
        """
        t, h, w = self.stride
        start = 0 if cache else self.first_frames
        if (
            frames.ndim != 5
            or frames.shape[1] != 3
            or frames.shape[2] < max(1, start)
            or (frames.shape[2] - start) % t
            or frames.shape[3] % h
            or frames.shape[4] % w
        ):
            wanted = f"1 + {t}k" if start else f"{t}k"
            raise ValueError(
                f"{type(self).__name__}.encode: frames must be (B, 3, {wanted}, multiple of {h}, multiple of {w}), "
                f"got {tuple(frames.shape)}"
            )
        dtype = next(self.vae.parameters()).dtype
        return self._encode(frames.to(dtype), cache).to(torch.float32)

    def decode(self, latents: torch.Tensor, cache: dict | None = None) -> torch.Tensor:
        """Decode latents (B, C, T', H', W') to float32 frames (B, 3, T, H, W).

        Args:
            latents: Raw latents, from `encode`.
            cache: As for `encode`, but another dict.

        Raises:
            ValueError: The latents do not have the VAE's channels, or are empty.
        """
        if latents.ndim != 5 or latents.shape[1] != self.channels or latents.shape[2] < 1:
            raise ValueError(
                f"{type(self).__name__}.decode: latents must be (B, {self.channels}, T, H, W), "
                f"got {tuple(latents.shape)}"
            )
        dtype = next(self.vae.parameters()).dtype
        return self._decode(latents.to(dtype), cache).to(torch.float32)

    def scale(self, latents: torch.Tensor) -> torch.Tensor:
        """Scale raw latents (B, C, T, H, W) to about zero mean and unit variance, with the VAE's published values."""
        return (latents - self.latent_mean.view(-1, 1, 1, 1)) / self.latent_std.view(-1, 1, 1, 1)

    def unscale(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo `scale`."""
        return latents * self.latent_std.view(-1, 1, 1, 1) + self.latent_mean.view(-1, 1, 1, 1)


class WanVAE(DiffusersVAE):
    """AutoencoderKLWan of Wan 2.1 (stride 4x8x8) or Wan 2.2 (4x16x16).

    The model is causal. It processes one frame, then groups of four, with a cache of the last frames for every
    convolution. diffusers discards this cache after each call. Here it is passed on from call to call, so that a stream
    gives the same result as a single call, however it is cut.

    Args:
        vae: The diffusers model.
    """

    name = "wan"

    def __init__(self, vae: nn.Module) -> None:
        config = vae.config
        space = config.scale_factor_spatial
        super().__init__(vae, config.z_dim, (config.scale_factor_temporal, space, space))
        self.latent_mean.copy_(torch.tensor(config.latents_mean))
        self.latent_std.copy_(torch.tensor(config.latents_std))

    def _encode(self, frames: torch.Tensor, cache: dict | None) -> torch.Tensor:
        if cache is None:
            return self.vae.encode(frames).latent_dist.mode()
        from diffusers.models.autoencoders.autoencoder_kl_wan import patchify

        fresh = not cache
        states = cache.setdefault("states", _empty_states(self.vae.encoder))
        if self.vae.config.patch_size is not None:
            frames = patchify(frames, self.vae.config.patch_size)
        groups = frames[:, :, int(fresh) :].split(self.stride[0], 2) if frames.shape[2] > int(fresh) else ()
        groups = (frames[:, :, :1], *groups) if fresh else groups
        parts = [self.vae.encoder(group, feat_cache=states, feat_idx=[0]) for group in groups]
        mean, _ = self.vae.quant_conv(torch.cat(parts, 2)).chunk(2, 1)
        return mean

    def _decode(self, latents: torch.Tensor, cache: dict | None) -> torch.Tensor:
        if cache is None:
            return self.vae.decode(latents).sample
        from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

        fresh = not cache
        states = cache.setdefault("states", _empty_states(self.vae.decoder))
        cells = self.vae.post_quant_conv(latents)
        parts = [
            self.vae.decoder(cell, feat_cache=states, feat_idx=[0], first_chunk=fresh and i == 0)
            for i, cell in enumerate(cells.split(1, 2))
        ]
        frames = torch.cat(parts, 2)
        if self.vae.config.patch_size is not None:
            frames = unpatchify(frames, self.vae.config.patch_size)
        return frames.clamp(-1.0, 1.0)


def _empty_states(part: nn.Module) -> list[Any]:
    """The initial cache of Wan's encoder or decoder: one entry per causal convolution."""
    return [None] * sum(isinstance(module, type(part.conv_in)) for module in part.modules())


class HunyuanVAE(DiffusersVAE):
    """AutoencoderKLHunyuanVideo.

    Its group norms and attention read all frames of a call, so that a stream cannot give the result of a single call;
    diffusers itself cuts clips of more than 16 frames into overlapping tiles and blends them. Here each piece is
    encoded (decoded) together with the last `overlap` latent frames before it, whose output is dropped. The first piece
    equals a single call; for later ones no bound on the difference is promised.

    Args:
        vae: The diffusers model.
        overlap: Latent frames of context.
    """

    name = "hunyuan"

    def __init__(self, vae: nn.Module, overlap: int = 2) -> None:
        config = vae.config
        space = config.spatial_compression_ratio
        super().__init__(vae, config.latent_channels, (config.temporal_compression_ratio, space, space))
        self.overlap = overlap
        self.latent_std.fill_(1.0 / config.scaling_factor)

    def _encode(self, frames: torch.Tensor, cache: dict | None) -> torch.Tensor:
        if cache is None:
            return self.vae.encode(frames).latent_dist.mode()
        frames, before = self._behind(frames, cache, self.video_frames(self.overlap))
        return self.vae.encode(frames).latent_dist.mode()[:, :, self.latent_frames(before) :]

    def _decode(self, latents: torch.Tensor, cache: dict | None) -> torch.Tensor:
        if cache is None:
            return self.vae.decode(latents).sample
        latents, before = self._behind(latents, cache, self.overlap)
        return self.vae.decode(latents).sample[:, :, self.video_frames(before) :]

    @staticmethod
    def _behind(piece: torch.Tensor, cache: dict, keep: int) -> tuple[torch.Tensor, int]:
        """Prepend the last frames of the piece before; return the result and their number, and update the cache."""
        if "before" in cache:
            piece = torch.cat([cache["before"].to(piece), piece], 2)
        before = cache["before"].shape[2] if "before" in cache else 0
        cache["before"] = piece[:, :, max(0, piece.shape[2] - keep) :].clone()
        return piece, before


def load_diffusers_vae(config: VAEConfig, folder: Path | None) -> DiffusersVAE:
    """Load a VAE from a local folder that save_pretrained wrote; nothing is downloaded.

    Args:
        config: Configuration of kind "wan" or "hunyuan", with the channels and stride of the VAE.
        folder: Folder with config.json and the weights, or a pipeline folder with a subfolder `vae`.

    Returns:
        The adapter, on the CPU in float32.

    Raises:
        UserError: diffusers is not installed, or the folder holds no such VAE.
    """
    name = CLASSES[config.kind]
    if folder is None:
        raise UserError(f"the model's VAE is {name}; give the folder of its weights")
    folder = part_folder(folder, "vae")
    found = read_config(folder, "VAE").get("_class_name")
    if found != name:
        raise UserError(f"{folder}: must hold the VAE {name}, got {found or 'a model without a class name'}")
    vae = read_weights(name, folder)
    return _adapt(config, vae, str(folder))


def new_diffusers_vae(config: VAEConfig) -> DiffusersVAE:
    """Make the VAE in its published size with random weights, to measure time and memory.

    Raises:
        UserError: diffusers is not installed, or the published VAE has other channels or another stride.
    """
    name = CLASSES[config.kind]
    return _adapt(config, diffusers_class(name)(), name)


def _adapt(config: VAEConfig, vae: nn.Module, source: str) -> DiffusersVAE:
    adapter = WanVAE(vae) if config.kind == "wan" else HunyuanVAE(vae)
    if (adapter.channels, adapter.stride) != (config.channels, tuple(config.stride)):
        raise UserError(
            f"{source}: has {adapter.channels} channels and stride {adapter.stride}, "
            f"the model asks for {config.channels} and {tuple(config.stride)}"
        )
    return adapter
