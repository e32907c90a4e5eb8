"""Configurations of the trained model (VAE, text encoder, memory encoders, DiT), and named presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from ..checks import (
    MOST_PIXELS,
    MOST_WIDTH,
    Checked,
    Entries,
    FileName,
    Former,
    OneOf,
    build,
    not_negative,
    positive,
    require,
    show,
)
from ..errors import UserError
from ..vae import PATCH
from ..vae.config import VAEConfig

BRANCHES = ("both", "lr", "hr", "patchifier", "merge", "sparse")
ATTENTION = ("causal", "window", "none")
# Fields of DiTConfig that only apply to the transformer of this package, not to one of diffusers.
OWN_LAYERS = ("prediction", "position_features", "unfold", "history_sees_video", "linear_blocks")


@dataclass(frozen=True)
class TextConfig(Checked):
    """Configuration of the text encoder.

    Args:
        kind: "words" (an embedding table of hashed words, trained with the model) or "transformers" (a frozen
            pretrained encoder such as UMT5, loaded from a local folder).
        dim: Channels of a text token.
        max_tokens: Maximum length of a prompt, in tokens; the rest is cut off.
        vocabulary: Rows of the embedding table, for kind "words".

    Raises:
        ValueError: A value is out of range.
    """

    kind: Annotated[str, OneOf("words", "transformers")] = "words"
    dim: Annotated[int, positive(MOST_WIDTH)] = 64
    max_tokens: Annotated[int, positive(MOST_WIDTH)] = 24
    vocabulary: Annotated[int, positive(1 << 24)] = 4096


@dataclass(frozen=True)
class Compression(Checked):
    """Compression rate: the box of patch tokens that becomes one memory token.

    Args:
        time: Patch tokens of the box along time, 1 to 128.
        height: Patch tokens of the box along rows, 1 to 128.
        width: Patch tokens of the box along columns, 1 to 128.

    Raises:
        ValueError: A number is out of range.
    """

    time: Annotated[int, positive(128)] = 2
    height: Annotated[int, positive(128)] = 4
    width: Annotated[int, positive(128)] = 4

    def __iter__(self) -> Iterator[int]:
        """Iterate over time, height and width, in the axis order of every grid."""
        return iter((self.time, self.height, self.width))

    def __str__(self) -> str:
        """Format as the paper does, height x width x time: "4x4x2"."""
        return f"{self.height}x{self.width}x{self.time}"

    @property
    def count(self) -> int:
        """Patch tokens per memory token."""
        return math.prod(self)

    @classmethod
    def of_rate(cls, rate: Any) -> dict[str, int]:
        """Convert the former field `rate`, a list (height, width, time), to the fields of this class.

        Args:
            rate: The list.

        Returns:
            The fields by name.

        Raises:
            ValueError: It is not a list of three numbers from 1 to 128.
        """
        try:
            height, width, time = rate
            return dataclasses.asdict(cls(time, height, width))
        except (TypeError, ValueError):
            raise ValueError(f"must have 3 entries (height, width, time) of 1 to 128, got {show(rate)}") from None


def _powers_of_two(rate: Any) -> dict[str, int]:
    compression = Compression.of_rate(rate)
    require(all(n & (n - 1) == 0 for n in compression.values()), "must be powers of two of at most 128", rate)
    return compression


@dataclass(frozen=True)
class EncoderConfig(Checked):
    """Configuration of a memory encoder.

    Args:
        compression: Patch tokens per memory token along time, height and width; powers of two.
        branches: "both", "lr" (low-resolution branch only), "hr" (high-resolution branch only), "patchifier" (one
            large patch projection), "merge" (token merging) or "sparse" (the tokens with the largest norm).
        channels: Channels of each stage of the high-resolution branch; early stages reduce time, later ones space.
        attention: Attention between the tokens of the high-resolution branch: "causal" (a frame attends to itself
            and all earlier frames), "window" (to itself and the `window` frames before) or "none".
        window: Number of earlier memory frames that attention "window" reads.
        heads: Heads of this attention.
        shortcut: Channels of a linear shortcut around the convolutions of the high-resolution branch, from the whole
            box to the memory token; 0 for none. A small model learns faster with it. If it leaves as many channels
            of the token free as a patch token has, the low-resolution branch has these channels for itself.
        width: Channels of the encoder's tokens before a projection to the transformer's width; 0 for no projection:
            tokens have the transformer's width, and the low-resolution branch uses its patch embedding.

    Raises:
        ValueError: A value is out of range.
    """

    FORMER: ClassVar[dict[str, Former]] = {"rate": Former("compression", _powers_of_two)}

    compression: Compression = Compression()
    branches: Annotated[str, OneOf(*BRANCHES)] = "both"
    channels: Annotated[tuple[int, ...], Entries(1, 32), positive(MOST_WIDTH)] = (64, 128, 256, 512)
    attention: Annotated[str, OneOf(*ATTENTION)] = "window"
    window: Annotated[int, not_negative(1 << 20)] = 4
    heads: Annotated[int, positive(1024)] = 8
    shortcut: Annotated[int, not_negative(MOST_WIDTH)] = 0
    width: Annotated[int, not_negative(MOST_WIDTH)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            all(n & (n - 1) == 0 for n in self.compression),
            "EncoderConfig: compression must be powers of two",
            tuple(self.compression),
        )
        require(
            self.channels[-1] % self.heads == 0,
            f"EncoderConfig: the last of channels must be a multiple of heads ({self.heads})",
            self.channels,
        )
        require(
            not self.width or self.branches not in ("merge", "sparse"),
            "EncoderConfig: width must be 0 for branches that keep the transformer's own tokens",
            self.width,
        )

    @property
    def reads_low(self) -> bool:
        """Whether the encoder reads the low-resolution video."""
        return self.branches in ("both", "lr")


def _only_patch(patch: Any) -> None:
    if patch != PATCH:
        raise ValueError(f"must be {PATCH}: a patch token is {PATCH} x {PATCH} latent cells, got {show(patch)}")


@dataclass(frozen=True)
class DiTConfig(Checked):
    """Configuration of the diffusion transformer (DiT).

    Args:
        dim: Hidden size, in channels.
        depth: Number of transformer blocks.
        heads: Attention heads; a head has dim / heads channels, an even number of at least 6.
        mlp: Hidden size of the gated MLP.
        prediction: What the last layer predicts: "velocity" (noise - sample) or "sample", which is converted to the
            velocity. The loss is on the velocity in both cases.
        position_features: Add features of its absolute position to each token. A small model trained from scratch
            learns to read its memory much faster with them; a pretrained one does not need them.
        unfold: Channels that a patch token reads, besides by attention, from the memory token of its box: by one
            linear map for each place in the box. At least the channels of a patch token; 0 turns it off, as
            for a pretrained model. With prediction "sample" the first of these channels are an initial estimate
            that the transformer corrects. Frames after the memory read its last memory frame; if there is a window
            of clean frames, its last frame is the initial estimate of the frames after it. A small model
            trained from scratch did not learn such maps by attention in 1,800 steps.
        history_sees_video: Whether memory tokens and clean frames also attend to the noisy frames. If not, their keys
            and values are the same at every denoising step, and the KV cache is exact.
        memory_cross_attention: Also read the memory by cross-attention in every block, through a gate that is zero
            at the start of training.
        linear_blocks: Indices of the blocks that use linear attention as self-attention.
        window: Number of clean latent frames before the frames to generate.
        diffusers: Folder of a pretrained diffusers transformer to use instead of this DiT (see
            diffusers_dit.DiffusersDiT), or its class name if the transformer is passed in Python. Its weights are
            frozen and stay in this folder; `dit_config` reads dim, depth, heads and mlp from there.
        memory_in_sequence: Whether memory tokens join the video's tokens in self-attention. False is allowed only for
            a diffusers transformer, and requires `memory_cross_attention`.
        lora_rank: Rank of the LoRA updates in the model file; training sets it.

    Raises:
        ValueError: A value is out of range.
    """

    FORMER: ClassVar[dict[str, Former]] = {"patch": Former(None, _only_patch)}

    dim: Annotated[int, positive(MOST_WIDTH)] = 384
    depth: Annotated[int, positive(10_000)] = 4
    heads: Annotated[int, positive(4096)] = 6
    mlp: Annotated[int, positive(4 * MOST_WIDTH)] = 1024
    prediction: Annotated[str, OneOf("velocity", "sample")] = "velocity"
    position_features: bool = False
    unfold: Annotated[int, not_negative(MOST_WIDTH)] = 0
    history_sees_video: bool = True
    memory_cross_attention: bool = False
    linear_blocks: Annotated[tuple[int, ...], Entries(0, 10_000), not_negative(10_000)] = ()
    window: Annotated[int, not_negative(1 << 20)] = 3
    diffusers: FileName | None = None
    memory_in_sequence: bool = True
    lora_rank: Annotated[int, not_negative(MOST_WIDTH)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        head = self.dim // self.heads
        require(
            self.dim % self.heads == 0 and head % 2 == 0 and head >= 6,
            "DiTConfig: dim must be heads times an even number of at least 6",
            (self.dim, self.heads),
        )
        require(
            all(block < self.depth for block in self.linear_blocks),
            f"DiTConfig: linear_blocks must be in [0, {self.depth})",
            self.linear_blocks,
        )
        require(
            self.diffusers is not None or not self.lora_rank,
            "DiTConfig: lora_rank must be 0 unless dit.diffusers is set",
            self.lora_rank,
        )
        require(
            self.memory_in_sequence or (self.diffusers is not None and self.memory_cross_attention),
            "DiTConfig: memory_in_sequence must be True without memory_cross_attention and a transformer of diffusers",
            self.memory_in_sequence,
        )
        for name in OWN_LAYERS if self.diffusers is not None else ():
            value, plain = getattr(self, name), getattr(DiTConfig, name)
            require(value == plain, f"DiTConfig: {name} must be {plain!r} for a transformer of diffusers", value)


@dataclass(frozen=True)
class ModelConfig(Checked):
    """Configuration of a whole model.

    Args:
        vae: The VAE.
        text: The text encoder.
        encoders: One memory encoder or several, whose tokens are concatenated.
        dit: The diffusion transformer.
        height: Rows of a frame, in pixels.
        width: Columns of a frame, in pixels.
        fps: Frames per second.
        shift: Timestep shift of flow matching, in training and in sampling; above 1 moves timesteps towards the noise.

    Raises:
        ValueError: A value is out of range, or `dit.unfold` is set and the first encoder makes no tokens of boxes.
    """

    vae: VAEConfig = VAEConfig()
    text: TextConfig = TextConfig()
    encoders: Annotated[tuple[EncoderConfig, ...], Entries(1, 16)] = (EncoderConfig(),)
    dit: DiTConfig = DiTConfig()
    height: Annotated[int, positive(MOST_PIXELS)] = 480
    width: Annotated[int, positive(MOST_PIXELS)] = 832
    fps: Annotated[float, positive(1000)] = 16.0
    shift: Annotated[float, positive(1000)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.dit.unfold or self.encoders[0].branches not in ("merge", "sparse"),
            "ModelConfig: dit.unfold requires a first encoder whose branches are not merge or sparse",
            self.encoders[0].branches,
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns of a frame, padded to whole patches."""
        rows, columns = (
            -(-n // (stride * PATCH)) * PATCH
            for n, stride in zip((self.height, self.width), self.vae.stride[1:], strict=True)
        )
        return rows, columns

    def require_boxes(self) -> None:
        """Check that a frame fills at least one box of every encoder.

        Raises:
            UserError: The frames are too small.
        """
        for i, each in enumerate(self.encoders):
            cells = [PATCH * stride for stride in self.vae.stride[1:]]
            _, *box = each.compression
            sizes = zip((self.height, self.width), cells, box, strict=True)
            if any(-(-n // cell) < least for n, cell, least in sizes):
                raise UserError(
                    f"height and width of the model must fill a box of encoders[{i}], {box[0]} x {box[1]} "
                    f"patch tokens of {cells[0]} x {cells[1]} pixels, got {self.height} and {self.width}"
                )

    def with_depth(self, depth: int) -> ModelConfig:
        """Return a copy with `depth` blocks of softmax attention, to count weights; unchanged for diffusers."""
        if self.dit.diffusers is not None:
            return self
        return dataclasses.replace(self, dit=dataclasses.replace(self.dit, depth=depth, linear_blocks=()))

    def to_dict(self) -> dict[str, Any]:
        """Convert to dicts, lists, numbers and strings, for JSON and YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Make a configuration from the result of `to_dict`.

        Args:
            values: The fields by name; former names are accepted.

        Returns:
            The configuration.

        Raises:
            ValueError: A key is unknown or a value is out of range; the message names the key.
        """
        return build(cls, values)


def _wan(dim: int, depth: int, heads: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        vae=VAEConfig(kind="wan"),
        text=TextConfig(kind="transformers", dim=4096, max_tokens=512),
        dit=DiTConfig(dim=dim, depth=depth, heads=heads, mlp=mlp),
    )


# The demo's height and width are multiples of 64 pixels, so that boxes of 4x4 patch tokens crop nothing.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vae=VAEConfig(channels=8, width=16, depth=1),
        text=TextConfig(dim=16, max_tokens=8, vocabulary=64),
        encoders=(EncoderConfig(compression=Compression(2, 2, 2), channels=(8, 16), heads=2),),
        dit=DiTConfig(dim=48, depth=2, heads=2, mlp=64, position_features=True, history_sees_video=False),
        height=32,
        width=64,
        fps=8.0,
    ),
    "demo": ModelConfig(
        vae=VAEConfig(width=128, depth=3),
        text=TextConfig(dim=64),
        encoders=(EncoderConfig(channels=(32, 64, 128, 192), heads=4, shortcut=704),),
        dit=DiTConfig(
            dim=768,
            depth=2,
            heads=12,
            mlp=512,
            prediction="sample",
            unfold=128,
            position_features=True,
            history_sees_video=False,
        ),
        height=128,
        width=192,
        fps=12.0,
        shift=6.0,
    ),
    # dim, depth and heads are those of the published models. The MLP here is gated, so that its hidden size is
    # two thirds of theirs for the same number of weights.
    "wan-1.3b": _wan(1536, 30, 12, 5973),
    "wan-14b": _wan(5120, 40, 40, 9216),
    "hunyuan": ModelConfig(
        vae=VAEConfig(kind="hunyuan"),
        text=TextConfig(kind="transformers", dim=4096, max_tokens=256),
        dit=DiTConfig(dim=3072, depth=40, heads=24, mlp=8192),
        fps=24.0,
    ),
}
