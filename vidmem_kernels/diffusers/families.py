"""Describes video models to the adapters: where blocks and attentions are, how tokens are ordered, where the grid is.

`register_family` adds a user's model; all adapters of this package then accept it.

The attention processors of a block receive the rotary embedding, but not the (T, H, W) grid of the tokens. The grid is
therefore passed along as a third element of the rotary embedding, `(cos, sin, record)`. As an argument of the block it
is kept by gradient checkpointing for the recomputation, while state on the model could be changed by a later forward
pass. The third element is present only if an adapter asked for it (`Family.attach`); code that unpacks a rotary
embedding reads `cos, sin, *rest = rotary` and passes `rest` on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import (
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.utils.torch_utils import unwrap_module
from torch import Tensor, nn

Grid = tuple[int, int, int]


class Projections(NamedTuple):
    """Queries, keys and values of an attention, (B, L, H, D) each, normalised, before the rotary embedding.

    Attributes:
        query: queries of the tokens that have a rotary embedding.
        key: their keys.
        value: their values.
        text: (query, key, value) of the text tokens in the same attention, which have no rotary embedding; None if
            there are none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    text: tuple[Tensor, Tensor, Tensor] | None = None


class Block(NamedTuple):
    """A transformer block: its number in the order of the forward pass, its name in the model, and the module."""

    number: int
    name: str
    module: nn.Module


@dataclass(frozen=True)
class Family:
    """Describes how the models of one class are built.

    Attributes:
        name: name in errors and statistics.
        model_class: the class; subclasses belong to the family too.
        block_lists: attributes of the model that hold its blocks, in the order in which they run.
        self_attention: attribute of a block: the attention in which the video tokens are queries and keys. It calls its
            `processor` as diffusers does, with `(attn, hidden_states, encoder_hidden_states, attention_mask,
            rotary_emb)` in this order, or by name with `image_rotary_emb` as the last; `set_processor` replaces the
            processor.
        cross_attention: attribute of a block: the attention to the text; None if text and video share one attention.
        patch_embedding: attribute of the model: the module that makes tokens from latents.
        patch_size: function that returns the (t, h, w) patch size of a model.
        extra_tokens: "before" or "after": where tokens that have a rotary embedding but are not part of the video grid
            (history, memory) are placed relative to its T * H * W tokens.
        project: `(attn, hidden_states, encoder_hidden_states) -> Projections`.
        output: `(attn, out (B, L, H * D), encoder_hidden_states) -> result of the attention processor`.
        attach: `(model, make_record)`: makes each forward pass of the model pass `(cos, sin, make_record(grid))` to its
            blocks as rotary embedding. `make_record` must be picklable.
        detach: `(model)`: undoes `attach`.
    """

    name: str
    model_class: type[nn.Module]
    block_lists: tuple[str, ...]
    self_attention: str
    cross_attention: str | None
    patch_embedding: str
    patch_size: Callable[[nn.Module], Grid]
    extra_tokens: str
    project: Callable[[nn.Module, Tensor, Tensor | None], Projections]
    output: Callable[[nn.Module, Tensor, Tensor | None], object]
    attach: Callable[[nn.Module, Callable[[Grid], object]], None]
    detach: Callable[[nn.Module], None]

    def __reduce__(self) -> tuple:
        """Pickles a family as its name, for copies and pickles of models with adapters."""
        return _family_named, (self.name,)

    def blocks(self, model: nn.Module) -> Iterator[Block]:
        """Yields the transformer blocks in the order in which they run.

        Args:
            model: a model of the family.
        """
        number = 0
        for list_name in self.block_lists:
            for i, module in enumerate(getattr(model, list_name)):
                yield Block(number, f"{list_name}.{i}", module)
                number += 1

    def grid(self, model: nn.Module, latents: Tensor) -> Grid:
        """Returns the (T, H, W) grid of the tokens of latents; incomplete patches are cut off.

        Args:
            model: a model of the family.
            latents: (B, C, F, height, width).

        Returns:
            (T, H, W).
        """
        return grid_of(latents, self.patch_size(model))


_FAMILIES: list[Family] = []


def _family_named(name: str) -> Family:
    for family in _FAMILIES:
        if family.name == name:
            return family
    raise LookupError(
        f"family_of: family {name!r} must be registered by register_family before its models are unpickled"
    )


def register_family(family: Family) -> None:
    """Registers a model class, so that all adapters of this package accept its models.

    Args:
        family: describes how the models are built. Later registrations take precedence, so that a subclass can have its
            own family.

    Raises:
        TypeError: `family` is not a `Family`.
        ValueError: a family of that name or for exactly that class is registered already.
    """
    if not isinstance(family, Family):
        raise TypeError(f"register_family: family must be a Family, got {type(family).__name__}")
    for known in _FAMILIES:
        if known.name == family.name or known.model_class is family.model_class:
            taken = f"{family.name} of {family.model_class.__name__}"
            raise ValueError(
                f"register_family: family must have a name and a class that are not registered yet, got {taken}"
            )
    _FAMILIES.insert(0, family)


def base_model(model: nn.Module) -> nn.Module:
    """Unwraps a model that torch.compile or `peft.get_peft_model` wrapped."""
    model = unwrap_module(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> Family:
    """Returns the family of a model.

    Args:
        model: a transformer, not a pipeline; it may be compiled or wrapped by PEFT.

    Returns:
        The `Family`.

    Raises:
        TypeError: the model belongs to no known family; the message lists the known ones.
    """
    inner = base_model(model) if isinstance(model, nn.Module) else model
    for family in _FAMILIES:
        if isinstance(inner, family.model_class):
            return family
    known = ", ".join(sorted(family.model_class.__name__ for family in _FAMILIES))
    raise TypeError(
        f"family_of: model must be one of {known} or of a family added by register_family, got {type(inner).__name__}"
    )


def grid_of(latents: Tensor, patch_size: Grid) -> Grid:
    """The (T, H, W) grid of the tokens of latents (B, C, F, height, width)."""
    _, _, frames, height, width = latents.shape
    return frames // patch_size[0], height // patch_size[1], width // patch_size[2]


# Hooks that pass the grid to the blocks. They are objects of module-level classes, because a closure could be neither
# pickled nor copied with the model.


class _RopeHook:
    """Forward hook of a `rope` that is called with the latents: appends the record to its output."""

    def __init__(self, patch_size: Grid, make_record: Callable[[Grid], object]):
        self.patch_size, self.make_record = patch_size, make_record

    def __call__(self, rope: nn.Module, args: tuple, output: tuple) -> tuple:
        return (*output, self.make_record(grid_of(args[0], self.patch_size)))


def _attach_to_rope(model: nn.Module, make_record: Callable[[Grid], object]) -> None:
    model.rope.register_forward_hook(_RopeHook(family_of(model).patch_size(model), make_record))


def _detach_from_rope(model: nn.Module) -> None:
    hooks = model.rope._forward_hooks  # not by a handle, which a copied model lacks
    for key in [key for key, hook in hooks.items() if isinstance(hook, _RopeHook)]:
        del hooks[key]


class _PackHistory:
    """Replaces FramePack's method that prepends the history, to append the record to its rotary embedding.

    A hook on `rope` would not work: FramePack calls it once for the video and once for each level of history.
    """

    def __init__(self, model: nn.Module, make_record: Callable[[Grid], object]):
        self.model, self.make_record = model, make_record

    def __call__(self, hidden_states: Tensor, *args: object) -> tuple[Tensor, tuple]:
        height, width = args[-2:]
        grid = hidden_states.shape[1] // (height * width), height, width
        packed, rotary = type(self.model)._pack_history_states(self.model, hidden_states, *args)
        return packed, (*rotary, self.make_record(grid))


def _attach_to_history(model: nn.Module, make_record: Callable[[Grid], object]) -> None:
    model._pack_history_states = _PackHistory(model, make_record)


def _detach_from_history(model: nn.Module) -> None:
    del model._pack_history_states


# Wan: attention of the video to itself, and another to the text.


def _wan_project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Projections:
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    query, key = attn.norm_q(query), attn.norm_k(key)
    return Projections(*(x.unflatten(2, (attn.heads, -1)) for x in (query, key, value)))


def _wan_patch_size(model: nn.Module) -> Grid:
    return tuple(model.config.patch_size)


def _wan_output(attn: nn.Module, out: Tensor, encoder_hidden_states: Tensor | None) -> Tensor:
    return attn.to_out[1](attn.to_out[0](out))


# HunyuanVideo and FramePack: one attention of video and text, with separate text projections in the first blocks.


def _hunyuan_project(attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None) -> Projections:
    def normed(projections: tuple[nn.Module, ...], norms: tuple[nn.Module | None, ...], x: Tensor) -> list[Tensor]:
        heads = [project(x).unflatten(2, (attn.heads, -1)) for project in projections]
        return [h if norm is None else norm(h) for h, norm in zip(heads, norms, strict=True)]

    video = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
    if encoder_hidden_states is None:
        return Projections(*normed(*video, hidden_states))
    if attn.add_q_proj is None:
        both = normed(*video, torch.cat([hidden_states, encoder_hidden_states], dim=1))
        length = hidden_states.shape[1]
        query, key, value = (x[:, :length] for x in both)
        return Projections(query, key, value, text=tuple(x[:, length:] for x in both))
    text = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k, None)
    return Projections(*normed(*video, hidden_states), text=tuple(normed(*text, encoder_hidden_states)))


def _hunyuan_output(attn: nn.Module, out: Tensor, encoder_hidden_states: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if encoder_hidden_states is None:
        return out, None
    length = out.shape[1] - encoder_hidden_states.shape[1]
    out, text = out[:, :length], out[:, length:]
    if getattr(attn, "to_out", None) is not None:
        out = attn.to_out[1](attn.to_out[0](out))
    if getattr(attn, "to_add_out", None) is not None:
        text = attn.to_add_out(text)
    return out, text


def _hunyuan_patch_size(model: nn.Module) -> Grid:
    return model.config.patch_size_t, model.config.patch_size, model.config.patch_size


WAN = Family(
    name="wan",
    model_class=WanTransformer3DModel,
    block_lists=("blocks",),
    self_attention="attn1",
    cross_attention="attn2",
    patch_embedding="patch_embedding",
    patch_size=_wan_patch_size,
    extra_tokens="before",
    project=_wan_project,
    output=_wan_output,
    attach=_attach_to_rope,
    detach=_detach_from_rope,
)
HUNYUAN = Family(
    name="hunyuan-video",
    model_class=HunyuanVideoTransformer3DModel,
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    self_attention="attn",
    cross_attention=None,
    patch_embedding="x_embedder",
    patch_size=_hunyuan_patch_size,
    extra_tokens="after",  # token_replace treats the first tokens as those of the first frame
    project=_hunyuan_project,
    output=_hunyuan_output,
    attach=_attach_to_rope,
    detach=_detach_from_rope,
)
FRAMEPACK = Family(
    name="framepack",
    model_class=HunyuanVideoFramepackTransformer3DModel,
    block_lists=("transformer_blocks", "single_transformer_blocks"),
    self_attention="attn",
    cross_attention=None,
    patch_embedding="x_embedder",
    patch_size=_hunyuan_patch_size,
    extra_tokens="before",  # the model keeps the last tokens of its blocks' output
    project=_hunyuan_project,
    output=_hunyuan_output,
    attach=_attach_to_history,
    detach=_detach_from_history,
)
for _family in (FRAMEPACK, HUNYUAN, WAN):
    register_family(_family)
