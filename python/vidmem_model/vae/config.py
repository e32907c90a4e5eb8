"""Configurations of VAEs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..checks import MOST_WIDTH, Checked, OneOf, positive, require, within

VAES = ("causal", "dct", "wan", "hunyuan")


@dataclass(frozen=True)
class VAEConfig(Checked):
    """Which VAE makes the latents.

    Args:
        kind: "causal" (the small 3D VAE trained here), "dct" (the embedded codec), "wan" or "hunyuan"
            (diffusers' AutoencoderKLWan and AutoencoderKLHunyuanVideo from a local folder).
        channels: latent channels.
        stride: frames, rows and columns a latent cell covers; (4, 8, 8) or, for Wan 2.2, (4, 16, 16).
        width: channels of the causal VAE's hidden layers.
        depth: residual blocks of the causal VAE's encoder and, again, of its decoder.

    Raises:
        ValueError: a value is out of range.
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
            "VAEConfig: channels of the codec dct must be at most 768, those of a block",
            self.channels,
        )


@dataclass(frozen=True)
class CodecConfig(Checked):
    """The embedded codec: an orthonormal DCT over blocks of 4 frames x 8 x 8 pixels x 3 colours.

    Args:
        channels: coefficients kept of a block's 768, lowest frequencies first.

    Raises:
        ValueError: channels is outside [1, 768].
    """

    channels: Annotated[int, within(1, 768)] = 768
