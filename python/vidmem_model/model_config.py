"""Configurations of the trained model: VAE, text encoder, memory encoders, DiT, and presets of all."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any

from .config import _check, _is_count

VAES = ("causal", "dct", "wan", "hunyuan")
BRANCHES = ("both", "lr", "hr", "patchifier", "merge", "sparse")
ATTENTION = ("causal", "window", "none")


@dataclass(frozen=True)
class VAEConfig:
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

    kind: str = "causal"
    channels: int = 16
    stride: tuple[int, int, int] = (4, 8, 8)
    width: int = 128
    depth: int = 3

    def __post_init__(self) -> None:
        _check(self.kind in VAES, f"VAEConfig: kind must be one of {VAES}", self.kind)
        for name in ("channels", "width", "depth"):
            _check(_is_count(getattr(self, name)), f"VAEConfig: {name} must be positive", getattr(self, name))
        _check(
            len(self.stride) == 3 and all(_is_count(s) for s in self.stride),
            "VAEConfig: stride must be three positive integers (time, height, width)",
            self.stride,
        )


@dataclass(frozen=True)
class TextConfig:
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

    kind: str = "words"
    dim: int = 64
    max_tokens: int = 24
    vocabulary: int = 4096

    def __post_init__(self) -> None:
        _check(self.kind in ("words", "transformers"), "TextConfig: kind must be words or transformers", self.kind)
        for name in ("dim", "max_tokens", "vocabulary"):
            _check(_is_count(getattr(self, name)), f"TextConfig: {name} must be positive", getattr(self, name))


@dataclass(frozen=True)
class EncoderConfig:
    """A memory encoder.

    Args:
        rate: patch tokens that one memory token covers along height, width and time.
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

    Raises:
        ValueError: a value is out of range.
    """

    rate: tuple[int, int, int] = (4, 4, 2)
    branches: str = "both"
    channels: tuple[int, ...] = (64, 128, 256, 512)
    attention: str = "window"
    window: int = 4
    heads: int = 8
    shortcut: int = 0

    def __post_init__(self) -> None:
        _check(
            len(self.rate) == 3 and all(_is_count(r) and r & (r - 1) == 0 for r in self.rate),
            "EncoderConfig: rate must be three powers of two (height, width, time)",
            self.rate,
        )
        _check(self.branches in BRANCHES, f"EncoderConfig: branches must be one of {BRANCHES}", self.branches)
        _check(self.attention in ATTENTION, f"EncoderConfig: attention must be one of {ATTENTION}", self.attention)
        _check(
            len(self.channels) >= 1 and all(_is_count(c) for c in self.channels),
            "EncoderConfig: channels must be positive integers",
            self.channels,
        )
        _check(_is_count(self.heads), "EncoderConfig: heads must be positive", self.heads)
        for name in ("window", "shortcut"):
            value = getattr(self, name)
            _check(_is_count(value, 0), f"EncoderConfig: {name} must not be negative", value)
        _check(
            self.channels[-1] % self.heads == 0,
            f"EncoderConfig: the last of channels must be a multiple of heads ({self.heads})",
            self.channels,
        )


@dataclass(frozen=True)
class DiTConfig:
    """The diffusion transformer.

    Args:
        dim: inner width.
        depth: blocks.
        heads: attention heads; a head has dim / heads channels, an even number of at least 6.
        mlp: width of the gated MLP's hidden layer.
        patch: latent rows and columns a token covers.
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

    Raises:
        ValueError: a value is out of range.
    """

    dim: int = 384
    depth: int = 4
    heads: int = 6
    mlp: int = 1024
    patch: int = 2
    prediction: str = "velocity"
    position_features: bool = False
    unfold: int = 0
    history_sees_video: bool = True
    memory_cross_attention: bool = False
    linear_blocks: tuple[int, ...] = ()
    window: int = 3

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "heads", "mlp", "patch"):
            _check(_is_count(getattr(self, name)), f"DiTConfig: {name} must be positive", getattr(self, name))
        head = self.dim // self.heads
        _check(
            self.dim % self.heads == 0 and head % 2 == 0 and head >= 6,
            "DiTConfig: dim must be heads times an even number of at least 6",
            (self.dim, self.heads),
        )
        _check(
            self.prediction in ("velocity", "sample"),
            "DiTConfig: prediction must be velocity or sample",
            self.prediction,
        )
        _check(
            all(_is_count(b, 0) and b < self.depth for b in self.linear_blocks),
            f"DiTConfig: linear_blocks must be in [0, {self.depth})",
            self.linear_blocks,
        )
        for name in ("unfold", "window"):
            value = getattr(self, name)
            _check(_is_count(value, 0), f"DiTConfig: {name} must not be negative", value)


@dataclass(frozen=True)
class ModelConfig:
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
    encoders: tuple[EncoderConfig, ...] = (EncoderConfig(),)
    dit: DiTConfig = DiTConfig()
    height: int = 480
    width: int = 832
    fps: float = 16.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        _check(self.shift > 0, "ModelConfig: shift must be positive", self.shift)
        _check(
            not self.dit.unfold or self.encoders[0].branches not in ("merge", "sparse"),
            "ModelConfig: dit.unfold reads tokens of boxes, which the first encoder must make",
            self.encoders[0].branches,
        )

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


def build(kind: type, values: Any, where: str = "") -> Any:
    """Build a dataclass from plain dicts and lists, nested ones too.

    Args:
        kind: the dataclass.
        values: a dict of its fields.
        where: name of the place, for messages.

    Returns:
        An instance of `kind`.

    Raises:
        ValueError: a key is unknown, a value has another type than the field, or is out of range.
    """
    _check(isinstance(values, dict), f"{where or kind.__name__}: must be a mapping of keys to values", values)
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    for key in values:
        _check(key in names, f"{where or kind.__name__}: keys must be among {sorted(names)}", key)
    given = {k: _convert(hints[k], v, f"{where}.{k}".lstrip(".")) for k, v in values.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in given and f.default is f.default_factory is dataclasses.MISSING
    ]
    _check(not missing, f"{where or kind.__name__}: needs {missing}", sorted(values))
    return kind(**given)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        _check(isinstance(value, (list, tuple)), f"{where}: must be a list", value)
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        _check(len(kinds) == len(value), f"{where}: must have {len(kinds)} entries", value)
        return tuple(_convert(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if type(None) in inner:  # X | None
        return None if value is None else _convert(next(k for k in inner if k is not type(None)), value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type):
        right = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        _check(right, f"{where}: must be of type {hint.__name__}", value)
    return value


def _wan(dim: int, depth: int, heads: int, mlp: int) -> ModelConfig:
    return ModelConfig(
        vae=VAEConfig(kind="wan"),
        text=TextConfig(kind="transformers", dim=4096, max_tokens=512),
        dit=DiTConfig(dim=dim, depth=depth, heads=heads, mlp=mlp),
    )


# The demo's frames are a multiple of 64 pixels each way, so that boxes of rate 4x4 crop nothing.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        vae=VAEConfig(channels=8, width=16, depth=1),
        text=TextConfig(dim=16, max_tokens=8, vocabulary=64),
        encoders=(EncoderConfig(rate=(2, 2, 2), channels=(8, 16), heads=2),),
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
