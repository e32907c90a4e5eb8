"""Video codecs and VAEs behind one interface, and the 2x2 patchify."""

from __future__ import annotations

from pathlib import Path

from ..config import CodecConfig
from ..errors import MemoryFormatError, UserError
from ..model_config import VAEConfig
from .base import VideoCodec, frames_to_float, frames_to_uint8, pad_frames, rechunk
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

    vae = CausalVAE(config)
    if path is not None:
        _load_state(vae, path)
    return vae.eval().requires_grad_(False)


def _load_state(vae, path: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..weights import unpack

    if not path.is_file():
        raise UserError(f"{path}: no such file; give the VAE's safetensors file")
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise MemoryFormatError(f"{path}: is damaged or not a safetensors file ({error})") from error
    try:
        vae.load_state_dict({k: v.to(torch.float32) for k, v in unpack(state).items()})
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the weights of the VAE that the model asks for ({reason})") from error
