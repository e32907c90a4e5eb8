"""Configurations of VAEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..checks import MOST_WIDTH, Checked, OneOf, positive, require, within

VAES = ("causal", "dct", "wan", "hunyuan")


@dataclass(frozen=True)
class VAEConfig(Checked):
    """Configuration of the VAE.

    Args:
        kind: "causal" (the small 3D VAE that `vidmem pretrain-vae` trains), "dct" (the built-in DCT codec), "wan" or
            "hunyuan" (diffusers' AutoencoderKLWan and AutoencoderKLHunyuanVideo, from a local folder).
        channels: Latent channels.
        stride: Frames, rows and columns per latent cell; (4, 8, 8) or, for Wan 2.2, (4, 16, 16).
        width: Channels of the hidden layers, for kind "causal".
        depth: Residual blocks of the encoder, and of the decoder, for kind "causal".

    Raises:
        ValueError: A value is out of range.
    """

    kind: Annotated[str, OneOf(*VAES)] = "causal"
    channels: Annotated[int, positive(4096)] = 16
    stride: Annotated[tuple[int, int, int], positive(64)] = (4, 8, 8)
    width: Annotated[int, positive(MOST_WIDTH)] = 128
    depth: Annotated[int, positive(1000)] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.kind != "dct" or self.channels <= 768,
            "VAEConfig: channels must be at most 768 for kind dct",
            self.channels,
        )


@dataclass(frozen=True)
class CodecConfig(Checked):
    """Configuration of the built-in codec: an orthonormal DCT over blocks of 4 frames x 8 x 8 pixels x 3 colours.

    Args:
        channels: Number of DCT coefficients to keep of the 768 of a block, lowest frequencies first.

    Raises:
        ValueError: channels is outside [1, 768].
    """

    channels: Annotated[int, within(1, 768)] = 768
