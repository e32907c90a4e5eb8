"""Use a pretrained diffusers transformer (Wan or HunyuanVideo) as the DiT of a model.

The transformer is frozen. Trained are the memory encoder, whose tokens have the transformer's width, and LoRA adapters
or cross-attention to the memory. Memory tokens and tokens of clean frames join the sequence of self-attention at their
own positions, as in `dit.DiT`; in Wan they have timestep 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import show
from ..diffusers_folder import diffusers_class, part_folder, read_config, read_weights
from ..errors import UserError
from ..skeleton import skeleton
from ..vae import PATCH
from .config import OWN_LAYERS, DiTConfig
from .dit import KVCache, check_inputs
from .encoder import MemoryTokens
from .rope import frame_positions, rotary

if TYPE_CHECKING:
    from vidmem_kernels.diffusers import Family

_TIMES = 1000.0  # diffusers uses timesteps from 0 to 1000


class DiffusersDiT(nn.Module):
    """A diffusers transformer with the interface of `dit.DiT`.

    Args:
        transformer: Transformer of diffusers. It is frozen and modified in place: use it for one model only.
        config: Configuration with the sizes of the transformer, from `dit_config`.
        latent_channels: Channels of the VAE.
        text_dim: Channels of a text token.
        text_tokens: Maximum length of a prompt, in tokens.

    Attributes:
        pretrained: Names in the state dict that a model file leaves out, because these weights stay in their folder.

    Raises:
        UserError: A width is not that of the transformer.
    """

    memory_time: ClassVar[str]  # timestep of memory tokens, see vidmem_kernels.diffusers.MemoryPrefix
    one_rotation: ClassVar[bool]  # whether all samples of a batch must have the same positions

    def __init__(
        self, transformer: nn.Module, config: DiTConfig, latent_channels: int, text_dim: int, text_tokens: int
    ) -> None:
        super().__init__()
        _require_widths(transformer.config, config, latent_channels, text_dim)
        from vidmem_kernels.diffusers import MemoryPrefix, add_memory_attention

        self.config, self.text_tokens = config, text_tokens
        self.transformer = transformer.requires_grad_(False)
        self.pretrained = frozenset(f"transformer.{name}" for name in transformer.state_dict())
        self.positions: torch.Tensor | None = None
        transformer.rope.register_forward_hook(self._rotate)
        self.sequence = MemoryPrefix(transformer, time=self.memory_time)
        self.cross = add_memory_attention(transformer) if config.memory_cross_attention else None
        for name in self.lora_layers() if config.lora_rank else ():
            layer = self.get_submodule(name)
            out, inside = layer.weight.shape
            layer.register_buffer("update_A", layer.weight.new_zeros(config.lora_rank, inside))
            layer.register_buffer("update_B", layer.weight.new_zeros(out, config.lora_rank))

    @property
    def family(self) -> Family:
        """Names of the transformer's parts."""
        from vidmem_kernels.diffusers import family_of

        return family_of(self.transformer)

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks; FSDP gathers their weights one block at a time."""
        return [block.module for block in self.family.blocks(self.transformer)]

    def lora_layers(self) -> list[str]:
        """Names of the layers that get adapters: the linear layers of the transformer's blocks."""
        layers = [name for name, layer in self.named_modules() if isinstance(layer, nn.Linear)]
        blocks = tuple(f"transformer.{name}." for name in self.family.block_lists)
        return [name for name in layers if name.startswith(blocks) and f"{name}.weight" in self.pretrained]

    def added(self) -> list[nn.Parameter]:
        """Parameters that are trained besides adapters: the cross-attention to the memory."""
        # Adapters rename the layer that they wrap to base_layer.
        names = {name: p for name, p in self.named_parameters() if ".lora_" not in name}
        return [p for name, p in names.items() if name.replace(".base_layer.", ".") not in self.pretrained]

    def keep_update(self, name: str, b: torch.Tensor, a: torch.Tensor) -> None:
        """Record that the product b @ a was added to the weight of a layer; a model file stores b and a only.

        Args:
            name: Name of the layer.
            b: (out, rank).
            a: (rank, in); the updates of all layers have one rank.
        """
        layer = self.get_submodule(name)
        if hasattr(layer, "update_A"):
            a, b = torch.cat([layer.update_A, a]), torch.cat([layer.update_B, b], 1)
        layer.register_buffer("update_A", a)
        layer.register_buffer("update_B", b)
        self.config = dataclasses.replace(self.config, lora_rank=len(a))

    @torch.no_grad()
    def add_updates(self) -> None:
        """Add the updates that were read from a model file to the weights of their layers."""
        for name in self.lora_layers() if self.config.lora_rank else ():
            layer = self.get_submodule(name)
            layer.weight += layer.update_B @ layer.update_A

    def patch_embed(self, latents: torch.Tensor) -> torch.Tensor:
        """Project latents (B, C, T, H, W) to tokens (B, T * H/2 * W/2, D), frame by frame.

        Raises:
            ValueError: The channels are not those of the model, or H or W is not a multiple of 2.
        """
        channels = self.transformer.config.in_channels
        if latents.ndim != 5 or latents.shape[1] != channels or any(n % PATCH for n in latents.shape[3:]):
            wanted = f"(B, {channels}, T, H, W) with even H and W"
            raise ValueError(f"DiT.patch_embed: latents must be {wanted}, got {tuple(latents.shape)}")
        from vidmem_kernels.diffusers import patch_tokens

        return patch_tokens(self.transformer, latents.to(self._dtype))[0]

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
        """Predict the velocity noise - sample; arguments and result are those of `DiT.forward`.

        Raises:
            ValueError: Sizes do not fit together, each frame has its own time, or a cache is given.
        """
        check_inputs(self.config, x, t, text, text_mask, frames, memory, window, window_frames, memory_cross_attention)
        if t.ndim != 1:
            raise ValueError(f"DiT: t must be (B,) for a transformer of diffusers, got {tuple(t.shape)}")
        if cache is not None:
            raise ValueError("DiT: cache must be None for a transformer of diffusers, got a KVCache")
        crosses = memory is not None and self.cross is not None and memory_cross_attention is not False
        # Positions in time start at the first noisy frame: pretrained transformers know videos that start at 0 only. If
        # text tokens without rotation share the attention, as in Hunyuan, later positions would change the result.
        first = frames.amin(1, keepdim=True)
        frames, window_frames = frames - first, None if window_frames is None else window_frames - first
        tokens, positions = memory or (None, None)
        if positions is not None:
            positions = positions - F.pad(first.to(positions), (0, 2))[:, None]
        given = (x, t, text, text_mask, frames, tokens, positions, window, window_frames)
        if self.one_rotation and not all(_alike(part) for part in (frames, positions, window_frames)):
            each = (
                [part if part is None or len(part) == 1 else part[i : i + 1] for part in given] for i in range(len(x))
            )
            return torch.cat([self._predict(crosses, *one) for one in each])
        return self._predict(crosses, *given)

    def _predict(
        self,
        crosses: bool,
        x: torch.Tensor,
        t: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        frames: torch.Tensor,
        memory: torch.Tensor | None,
        positions: torch.Tensor | None,
        window: torch.Tensor | None,
        window_frames: torch.Tensor | None,
    ) -> torch.Tensor:
        parts = []
        if memory is not None and memory.shape[1] and self.config.memory_in_sequence:
            parts.append((memory.to(self._dtype), positions))
        if window is not None and window.shape[2]:
            places = frame_positions(window_frames, *(n // PATCH for n in window.shape[3:]))
            parts.append((self.patch_embed(window), places))
        if self.cross is not None and crosses and memory.shape[1]:
            self.cross.set(memory.to(self._dtype))
        elif self.cross is not None:
            self.cross.clear()
        try:
            self.positions = frame_positions(frames, *(n // PATCH for n in x.shape[3:]))
            if parts:
                tokens, places = zip(*parts, strict=True)
                places = torch.cat([each.expand(len(x), -1, -1) for each in places], 1)
                self.sequence.set(torch.cat(tokens, 1), places[0] if self.one_rotation else places)
            given = self._text(text.to(self._dtype), text_mask)
            return self.transformer(x.to(self._dtype), _TIMES * t, **given, return_dict=False)[0].to(x.dtype)
        finally:
            self.sequence.clear()
            self.positions = None

    @property
    def _dtype(self) -> torch.dtype:
        return next(getattr(self.transformer, self.family.patch_embedding).parameters()).dtype

    def _rotate(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Replace the rotations of positions 0, 1, 2, … by those of the frames' positions."""
        # Entries after cosines and sines come from other adapters.
        return output if self.positions is None else (*self._angles(self.positions), *output[2:])

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines at positions (B, N, 3), in the format of the transformer's rope."""
        raise NotImplementedError

    def _text(self, text: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """Arguments of the transformer for the prompts."""
        raise NotImplementedError


class WanDiT(DiffusersDiT):
    """WanTransformer3DModel for text-to-video, of Wan 2.1 and 2.2."""

    memory_time = "zero"
    one_rotation = False

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turn = rotary(positions, self.transformer.config.attention_head_dim).unsqueeze(2)
        return turn.real.repeat_interleave(2, -1), turn.imag.repeat_interleave(2, -1)

    def _text(self, text: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor | None]:
        # Wan was trained with zero-padded prompts, and attends to the padding.
        text = text.masked_fill(~mask[..., None], 0)
        return {"encoder_hidden_states": F.pad(text, (0, 0, 0, max(0, self.text_tokens - text.shape[1])))}


class HunyuanDiT(DiffusersDiT):
    """HunyuanVideoTransformer3DModel for text-to-video.

    The second, pooled embedding of the prompt is zero. The guidance input of the distilled model is the default of its
    pipeline.
    """

    memory_time = "step"  # one modulation for all tokens
    one_rotation = True
    guidance = 6.0

    def _angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = self.transformer.config
        turn = rotary(positions[0], sizes.attention_head_dim, sizes.rope_axes_dim, sizes.rope_theta)
        return turn.real.repeat_interleave(2, -1), turn.imag.repeat_interleave(2, -1)

    def _text(self, text: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor | None]:
        sizes = self.transformer.config
        return {
            "encoder_hidden_states": text,
            "encoder_attention_mask": mask,
            "pooled_projections": text.new_zeros(len(text), sizes.pooled_projection_dim),
            "guidance": text.new_full((len(text),), _TIMES * self.guidance) if sizes.guidance_embeds else None,
        }


CLASSES: dict[str, type[DiffusersDiT]] = {
    "WanTransformer3DModel": WanDiT,
    "HunyuanVideoTransformer3DModel": HunyuanDiT,
}


def dit_config(source: str | Path | nn.Module, **changes: Any) -> DiTConfig:
    """Make the configuration of a DiT that is a diffusers transformer.

    Args:
        source: The transformer, its folder, or the folder of a pipeline with it.
        **changes: Further fields, such as memory_cross_attention.

    Returns:
        The configuration.

    Raises:
        UserError: The folder holds no such transformer.
        ValueError: A field is not allowed for diffusers transformers.
    """
    return DiTConfig(**{**dit_fields(source), **changes})


def dit_fields(source: str | Path | nn.Module) -> dict[str, Any]:
    """Fields of DiTConfig that a diffusers transformer determines.

    Raises:
        UserError: The folder holds no such transformer.
    """
    if isinstance(source, nn.Module):
        name = type(source).__name__
        if name not in CLASSES:
            raise UserError(f"the transformer must be one of {', '.join(CLASSES)}, got {name}")
        sizes = source.config
    else:
        name, sizes, _ = _described(Path(source))
    heads, dim = sizes["num_attention_heads"], sizes["num_attention_heads"] * sizes["attention_head_dim"]
    plain = {field: getattr(DiTConfig, field) for field in OWN_LAYERS}
    return plain | {
        "dim": dim,
        "depth": sizes["num_layers"] + sizes.get("num_single_layers", 0),
        "heads": heads,
        "mlp": sizes.get("ffn_dim") or round(dim * sizes.get("mlp_ratio", 4)),
        "diffusers": name if isinstance(source, nn.Module) else str(source),
    }


def make_dit(
    config: DiTConfig, latent_channels: int, text_dim: int, text_tokens: int, transformer: nn.Module | None = None
) -> DiffusersDiT:
    """Make the DiT of a model with a diffusers transformer.

    Args:
        config: Configuration with `diffusers`.
        latent_channels: Channels of the VAE.
        text_dim: Channels of a text token.
        text_tokens: Maximum length of a prompt, in tokens.
        transformer: The transformer; by default it is loaded from the folder `config.diffusers`.

    Raises:
        UserError: diffusers is not installed, or the transformer cannot be used.
    """
    if transformer is None:
        name, _, folder = _described(Path(config.diffusers))
        transformer = read_weights(name, folder, torch_dtype=torch.float32).eval()
    return CLASSES[type(transformer).__name__](transformer, config, latent_channels, text_dim, text_tokens)


def empty_transformer(config: DiTConfig, transformer: nn.Module | None = None) -> nn.Module | None:
    """Make the transformer of a configuration, or one like `transformer`, without weights; None without `diffusers`."""
    if config.diffusers is None:
        return None
    if transformer is not None:
        kind, sizes = type(transformer), dict(transformer.config)
    else:
        name, sizes, _ = _described(Path(config.diffusers))
        kind = diffusers_class(name)
    return skeleton(lambda: kind.from_config(sizes))


def _described(folder: Path) -> tuple[str, Mapping[str, Any], Path]:
    """Class, sizes and folder of the transformer in a folder or pipeline."""
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; give the folder of the transformer, or copy it to the folder `transformer` "
            "beside the model file"
        )
    folder = part_folder(folder, "transformer")
    sizes = read_config(folder, "transformer")
    name = sizes.get("_class_name")
    if name not in CLASSES:
        found = name or "model without a class name"
        raise UserError(f"{folder}: the transformer must be one of {', '.join(CLASSES)}, got {found}")
    for key in ("num_attention_heads", "attention_head_dim", "num_layers"):
        if type(sizes.get(key)) is not int or sizes[key] < 1:
            file = folder / "config.json"
            raise UserError(f"{file}: {key} must be a positive whole number, got {show(sizes.get(key))}")
    return name, sizes, folder


def _require_widths(sizes: Mapping[str, Any], config: DiTConfig, latent_channels: int, text_dim: int) -> None:
    """Check that the widths of a transformer match the model.

    Raises:
        UserError: A width differs.
    """
    time, *cell = sizes["patch_size"] if "patch_size_t" not in sizes else (sizes["patch_size_t"], sizes["patch_size"])
    wanted = {
        "dit.dim": (config.dim, sizes["num_attention_heads"] * sizes["attention_head_dim"]),
        "dit.heads": (config.heads, sizes["num_attention_heads"]),
        "vae.channels": (latent_channels, sizes["in_channels"]),
        "text.dim": (text_dim, sizes["text_dim"] if "text_dim" in sizes else sizes["text_embed_dim"]),
        "patches": ((1, PATCH), (time, cell[0])),
    }
    for key, (ours, theirs) in wanted.items():
        if ours != theirs:
            raise UserError(f"model.{key} must be {theirs} as in the transformer {config.diffusers}, got {ours}")


def _alike(rows: torch.Tensor | None) -> bool:
    """Whether all samples have the same positions."""
    return rows is None or bool((rows == rows[:1]).all())
