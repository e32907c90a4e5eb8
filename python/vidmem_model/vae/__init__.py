"""VAEs and codecs with one interface, and 2x2 patchify."""

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
    """Load a VAE, frozen and in evaluation mode.

    Args:
        config: Kind and sizes of the VAE, such as `model.config.vae`.
        weights: For kind "causal" a safetensors file, or None for random weights; for "wan" and "hunyuan" the folder
            that diffusers' save_pretrained wrote; None for "dct".

    Returns:
        The VAE, on the CPU in float32; its method `to(device)` moves it.

    Raises:
        UserError: The weights are missing, not needed, or those of another VAE.
        MemoryFormatError: The file is damaged.
    """
    path = None if weights is None else Path(weights)
    if config.kind == "dct":
        if path is not None:
            raise UserError(f"{path}: the codec dct has no weights; leave out the path of the VAE")
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
            raise UserError(f"{path}: does not hold the weights of this model's VAE {reason}") from error
        state = file.read()
    vae = CausalVAE(config)
    if state is not None:
        vae.load_state_dict(state)
    return vae.eval().requires_grad_(False)
