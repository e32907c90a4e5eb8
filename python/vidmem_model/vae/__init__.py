"""Video codecs and VAEs behind one interface, and the 2x2 patchify."""

from __future__ import annotations

from pathlib import Path

from ..errors import MemoryFormatError, UserError
from ..weights import WeightsFile
from .base import VideoCodec, frames_to_float, frames_to_uint8, pad_frames, rechunk
from .config import CodecConfig, VAEConfig
from .dct import DCTCodec, dct_matrix
from .patchify import PATCH, patchify, unpatchify

__all__ = [
    "PATCH",
    "DCTCodec",
    "VideoCodec",
    "dct_matrix",
    "frames_to_float",
    "frames_to_uint8",
    "load_vae",
    "pad_frames",
    "patchify",
    "rechunk",
    "unpatchify",
]


def load_vae(config: VAEConfig, weights: str | Path | None = None) -> VideoCodec:
    """Make the VAE that a model's latents come from, frozen and in evaluation mode.

    Args:
        config: kind and sizes.
        weights: for "causal" a safetensors file of its state, or None for new, untrained weights; for
            "wan" and "hunyuan" the folder that diffusers' save_pretrained wrote; none for "dct".

    Returns:
        VideoCodec on the CPU in float32; `to(device)` moves it.

    Raises:
        UserError: the weights are missing, not needed, or another VAE's.
        MemoryFormatError: the file is damaged.
    """
    path = None if weights is None else Path(weights)
    if config.kind == "dct":
        if path is not None:
            raise UserError(f"{path}: the codec dct has no weights; leave the path out")
        if config.stride != DCTCodec.stride:
            raise UserError(f"the codec dct has stride {DCTCodec.stride}, the model asks for {config.stride}")
        return DCTCodec(CodecConfig(config.channels))
    if config.kind != "causal":
        from .diffusers_vae import load_diffusers_vae

        return load_diffusers_vae(config, path)
    from .causal import CausalVAE

    state = None
    if path is not None:
        file = WeightsFile(path, advice="; give the VAE's safetensors file")
        try:
            file.check(lambda: CausalVAE(config), config.depth)
        except MemoryFormatError as error:
            reason = str(error).removeprefix(f"{path}: its weights do not fit its configuration ")
            raise UserError(f"{path}: not the weights of the VAE that the model asks for {reason}") from error
        state = file.read()
    vae = CausalVAE(config)
    if state is not None:
        vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
