"""Configurations of the trained model: VAE, text encoder, memory encoders, DiT, and presets of all."""

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
# Fields of DiTConfig that say what the transformer of this package is made of, and no other.
OWN_LAYERS = ("prediction", "position_features", "unfold", "history_sees_video", "linear_blocks")


@dataclass(frozen=True)
class TextConfig(Checked):
    """How a prompt becomes tokens.

    Args:
        kind: "words" (a table of hashed words, trained with the model) or "transformers" (a frozen
            encoder such as UMT5, from a local folder).
        dim: width of the text tokens.
        max_tokens: longest prompt; what follows is cut off.
        vocabulary: rows of the table of words.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Annotated[str, OneOf("words", "transformers")] = "words"
    dim: Annotated[int, positive(MOST_WIDTH)] = 64
    max_tokens: Annotated[int, positive(MOST_WIDTH)] = 24
    vocabulary: Annotated[int, positive(1 << 24)] = 4096


@dataclass(frozen=True)
class Compression(Checked):
    """How many patch tokens one token of memory stands for, along each axis.

    Args:
        time, height, width: patch tokens of the box that becomes one memory token.
    """

    time: Annotated[int, positive(128)] = 2
    height: Annotated[int, positive(128)] = 4
    width: Annotated[int, positive(128)] = 4

    def __iter__(self) -> Iterator[int]:
        """Iterate over time, height and width, the order of every grid."""
        return iter((self.time, self.height, self.width))

    def __str__(self) -> str:
        """Write it as the paper does, height x width x time: "4x4x2"."""
        return f"{self.height}x{self.width}x{self.time}"

    @property
    def count(self) -> int:
        """Patch tokens that one memory token stands for."""
        return math.prod(self)

    @classmethod
    def of_rate(cls, rate: Any) -> dict[str, int]:
        """The fields of what earlier versions wrote as the list `rate`: height, width, time.

        Raises:
            ValueError: it is no list of three such numbers.
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
    """A memory encoder.

    Args:
        compression: patch tokens that one memory token stands for, along time, height and width; powers of two.
        branches: "both", "lr" (only the low-resolution branch), "hr" (without it), "patchifier" (one
            large patch projection), "merge" (token merging) or "sparse" (the strongest tokens).
        channels: of the high-resolution branch's stages; time is reduced first, then space.
        attention: over the tokens of the high-resolution branch: "causal" (all frames up to one's
            own), "window" (the last `window` frames of memory and one's own) or "none".
        window: frames of memory, in units of memory frames, for attention "window".
        heads: of that attention.
        shortcut: channels of a linear path beside the convolutions of the high-resolution branch, from the
            whole box to the token, so that they learn what is missing in that; 0 for none. With it a small
            model learns sooner. If it is smaller than the token's width by the numbers of a patch token, what
            the low-resolution branch tells has directions of its own.
        width: of the encoder's own tokens, which it then projects to the transformer's width; 0 makes them of
            that width at once, the low-resolution branch with the transformer's first projection.

    Raises:
        ValueError: a value is out of range.
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
        """Whether it reads the low-resolution video."""
        return self.branches in ("both", "lr")


def _only_patch(patch: Any) -> None:
    if patch != PATCH:
        raise ValueError(f"must be {PATCH}: a patch token is {PATCH} x {PATCH} latent cells, got {show(patch)}")


@dataclass(frozen=True)
class DiTConfig(Checked):
    """The diffusion transformer.

    Args:
        dim: inner width.
        depth: blocks.
        heads: attention heads; a head has dim / heads channels, an even number of at least 6.
        mlp: width of the gated MLP's hidden layer.
        prediction: what the last layer gives: "velocity" (noise - sample) or "sample", from which the
            velocity follows; the loss is on the velocity either way.
        position_features: add features of a token's absolute position to it. A small model trained
            from nothing reads its memory much sooner with them; a pretrained one needs none.
        unfold: channels that a patch token reads of the memory token whose box it is in, by a linear map
            of its own for each place in the box, besides by attention; at least as many as a patch token
            has. With prediction "sample" the first of them are a first answer, which the transformer
            corrects; frames beyond the memory read its last one, and of a window the newest clean frame is
            the first answer for those after it. In 1,800 steps a small model trained from nothing did not
            find such maps by attention. 0 for a pretrained model.
        history_sees_video: whether memory and clean frames attend to the noisy frames too. If not,
            their keys and values are the same at every step, and the KV cache is exact.
        memory_cross_attention: read the memory by cross-attention in every block as well, through a
            gate that starts closed.
        linear_blocks: indices of blocks whose self-attention is linear attention.
        window: clean latent frames before the ones to be made.
        diffusers: folder of a pretrained transformer of diffusers that stands in this one's place
            (diffusers_dit.DiffusersDiT), or the name of its class where it is given in Python. Its weights stay
            frozen and in their folder; `dit_config` reads dim, depth, heads and mlp from there.
        memory_in_sequence: whether the memory's tokens join those of the video in self-attention; False, which needs
            `memory_cross_attention`, for a transformer of diffusers only.
        lora_rank: rank of the updates of its layers that a model's file holds; training sets it.

    Raises:
        ValueError: a value is out of range.
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
            "DiTConfig: lora_rank must be 0 for a transformer whose weights are stored themselves",
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
    """A whole model.

    Args:
        vae, text, dit: the parts.
        encoders: one memory encoder, or several whose tokens are put one after another.
        height, width: of the frames it is made for, in pixels.
        fps: frames per second it is made for.
        shift: of the flow's times towards the noise, in training and in sampling.

    Raises:
        ValueError: the shift is not positive, or `dit.unfold` has no boxes to read.
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
            "ModelConfig: dit.unfold reads tokens of boxes, which the first encoder must make",
            self.encoders[0].branches,
        )

    @property
    def latent_size(self) -> tuple[int, int]:
        """Latent rows and columns of the frames, padded up to whole patches."""
        rows, columns = (
            -(-n // (stride * PATCH)) * PATCH
            for n, stride in zip((self.height, self.width), self.vae.stride[1:], strict=True)
        )
        return rows, columns

    def require_boxes(self) -> None:
        """Refuse frames that fill no box of an encoder, before they are encoded.

        Raises:
            UserError: they are too small.
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
        """The same with so many blocks of softmax attention, for counting weights; a folder's stay as they are."""
        if self.dit.diffusers is not None:
            return self
        return dataclasses.replace(self, dit=dataclasses.replace(self.dit, depth=depth, linear_blocks=()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dicts, numbers and strings, as JSON and YAML hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Undo to_dict.

        Raises:
            ValueError: a key is unknown or a value is out of range; the message names the key.
        """
        return build(cls, values)


def _wan(dim: int, depth: int, heads: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        vae=VAEConfig(kind="wan"),
        text=TextConfig(kind="transformers", dim=4096, max_tokens=512),
        dit=DiTConfig(dim=dim, depth=depth, heads=heads, mlp=mlp),
    )


# The demo's frames are a multiple of 64 pixels each way, so that boxes of 4x4 crop nothing.
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
    # Widths, depths and heads of the published models; the MLP here is gated, so its hidden layer is
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
