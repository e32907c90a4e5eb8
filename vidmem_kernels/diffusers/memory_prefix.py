"""Adds memory tokens to the token sequence of diffusers' video models, as if the video were longer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_tensor
from .caches import forget_compiled, reset_caches
from .families import base_model, family_of
from .memory_slot import MemorySlot
from .video_rotary import FAMILIES, check_positions, rotary_tables


class _Held(NamedTuple):
    """A memory: tokens (B or 1, M, C), their rotary tables, (M, D) or (B or 1, M, D), and log sizes, (B or 1, M)."""

    tokens: Tensor
    cos: Tensor
    sin: Tensor
    log_size: Tensor | None

    def of(self, out: Tensor) -> Tensor:
        """The tokens, expanded to the batch of the video's and checked to have their dtype."""
        batch, tokens = out.shape[0], self.tokens
        if tokens.shape[0] not in (1, batch):
            got = f"{tokens.shape[0]} and {batch}"
            raise ValueError(f"MemoryPrefix: tokens must have batch 1 or that of the video, got {got}")
        if tokens.dtype != out.dtype:
            if not torch.is_autocast_enabled(out.device.type):
                got = f"{tokens.dtype} and {out.dtype}"
                raise ValueError(f"MemoryPrefix: tokens must have the dtype of the model's tokens, got {got}")
            tokens = tokens.to(out.dtype)
        return tokens.expand(batch, -1, -1)


class _Prefix:
    """The hooks of a model with memory tokens; copied and pickled with the model, whose modules hold them.

    No hook is on a block, so diffusers' caches and gradient checkpointing, which wrap blocks, see the longer sequence.
    """

    def __init__(self, model: nn.Module, time: str):
        self.time = time
        self.slot = MemorySlot()

    @property
    def held(self) -> _Held | None:
        """The memory that is set; hooks on attentions, which checkpointing runs again, read the slot instead."""
        return self.slot.held

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        """(module, "forward" or "pre", hook) of each hook."""
        raise NotImplementedError

    def weigh(self, attn: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-hook of an attention: adds the log of each memory token's size to the scores of its key."""
        named = "image_rotary_emb" in kwargs
        held = self.slot.get((kwargs["image_rotary_emb"] if named else args[3])[0])
        if held is None or held.log_size is None:
            return None
        x, text, mask = (kwargs.get(n) if named else args[i] for i, n in enumerate(_ARGUMENTS))
        bias = self.beside(held.log_size.float(), x.shape[1] - held.log_size.shape[1])
        bias = torch.nn.functional.pad(bias, (0, 0 if text is None else text.shape[1]))[:, None, None]
        if mask is not None:
            bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask
        if named:
            return args, kwargs | {_ARGUMENTS[2]: bias}
        return (*args[:2], bias, *args[3:]), kwargs

    def beside(self, log_size: Tensor, video: int) -> Tensor:
        """Log sizes of all tokens: 0 for those of the video."""
        raise NotImplementedError

    def cut(self, norm_out: nn.Module, args: tuple) -> tuple | None:
        """Pre-hook of the output norm: keeps only the video tokens."""
        if self.held is None:
            return None
        return self.without(args[0], self.held.tokens.shape[1]), *args[1:]

    def without(self, hidden_states: Tensor, length: int) -> Tensor:
        raise NotImplementedError


class _WanPrefix(_Prefix):
    """Puts the memory before the video tokens, each of which may have its own timestep (Wan 2.2-5B)."""

    batched_positions = takes_size = True

    def __init__(self, model: nn.Module, time: str):
        super().__init__(model, time)
        self.video_length = 0  # of the current forward pass

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        hooks = [
            (model.rope, "forward", self.turn),
            (model.patch_embedding, "forward", self.put),
            (model.condition_embedder, "forward", self.modulate),
            (model.norm_out, "pre", self.cut),
        ]
        if self.time == "zero":
            hooks += [(model, "pre", self.time_of_tokens), (model.condition_embedder, "pre", self.time_of_memory)]
        return hooks

    def turn(self, rope: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        if self.held is None:
            return None
        tables = []
        for mine, theirs in zip((self.held.cos, self.held.sin), output[:2], strict=True):
            mine = (mine if mine.dim() == 3 else mine.unsqueeze(0)).unsqueeze(2)
            tables.append(torch.cat([mine, theirs.expand(mine.shape[0], -1, -1, -1)], dim=1))
        return *tables, *output[2:]

    def put(self, embedding: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if self.held is None:
            return None
        video = output.flatten(2).transpose(1, 2)
        self.video_length = video.shape[1]
        return torch.cat([self.held.of(video), video], dim=1).transpose(1, 2)  # the model flattens from axis 2 on

    def time_of_tokens(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Expands one timestep per sample to one per token, which requires equal times in a sample."""
        if self.held is None:
            return None
        if "timestep" in kwargs:
            kwargs = kwargs | {"timestep": _as_column(kwargs["timestep"])}
        else:
            args = (args[0], _as_column(args[1]), *args[2:])
        return args, kwargs

    def time_of_memory(self, embedder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Prepends one more timestep for each sample: that of clean tokens."""
        if self.held is None:
            return None
        length = kwargs["timestep_seq_len"]
        times = torch.nn.functional.pad(args[0].unflatten(0, (-1, length)), (1, 0))
        return (times.flatten(), *args[1:]), kwargs | {"timestep_seq_len": length + 1}

    def modulate(self, embedder: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        """The modulation of each token, the memory tokens first."""
        length = kwargs.get("timestep_seq_len")
        if self.held is None or length is None:  # None: all tokens of a sample have the same timestep
            return None
        temb, projected, *rest = output
        if self.time == "zero":
            memory, temb, projected = projected[:, :1], temb[:, 1:], projected[:, 1:]
            if projected.shape[1] == 1:
                projected = projected.expand(-1, self.video_length, -1)
        else:  # "step": use the timestep of the noisiest token
            noisiest = args[0].unflatten(0, (-1, length)).argmax(1).reshape(-1, 1, 1)
            memory = projected.gather(1, noisiest.expand(-1, 1, projected.shape[2]))
        memory = memory.expand(-1, self.held.tokens.shape[1], -1)
        return temb, torch.cat([memory, projected], dim=1), *rest

    def without(self, hidden_states: Tensor, length: int) -> Tensor:
        return hidden_states[:, length:]

    def beside(self, log_size: Tensor, video: int) -> Tensor:
        return torch.nn.functional.pad(log_size, (0, video))


def _as_column(timestep: Tensor) -> Tensor:
    return timestep.unsqueeze(1) if timestep.dim() == 1 else timestep


class _HunyuanPrefix(_Prefix):
    """Puts the memory after the video tokens: with token_replace, the first tokens must be those of the given frame."""

    batched_positions, takes_size = False, True

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        return [
            (model.rope, "forward", self.turn),
            (model.x_embedder, "forward", self.put),
            (model.norm_out, "pre", self.cut),
        ]

    def turn(self, rope: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        if self.held is None:
            return None
        cos, sin, *rest = output
        return torch.cat([cos, self.held.cos], dim=0), torch.cat([sin, self.held.sin], dim=0), *rest

    def put(self, embedder: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        return None if self.held is None else torch.cat([output, self.held.of(output)], dim=1)

    def without(self, hidden_states: Tensor, length: int) -> Tensor:
        return hidden_states[:, : hidden_states.shape[1] - length]

    def beside(self, log_size: Tensor, video: int) -> Tensor:
        return torch.nn.functional.pad(log_size, (video, 0))


class _FramePackPrefix(_Prefix):
    """Puts the memory before the history's clean frames, which precede the video tokens; the model cuts all these
    off."""

    batched_positions = takes_size = False  # an attention cannot tell where its tokens are in the history

    def __init__(self, model: nn.Module, time: str):
        super().__init__(model, time)
        if model.clean_x_embedder is None:
            raise ValueError("MemoryPrefix: model must have a clean_x_embedder, which FramePack requires, got None")
        self.clean_is_next = False

    def hooks(self, model: nn.Module) -> list[tuple[nn.Module, str, Callable]]:
        return [
            (model.x_embedder, "forward", self.begin),
            (model.clean_x_embedder, "forward", self.put),
            (model.rope, "forward", self.turn),
        ]

    def begin(self, embedder: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        self.clean_is_next = False  # also after a forward pass that raised an exception

    def put(self, embedder: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        if self.held is None:
            return None
        clean, *rest = output
        if clean is None:
            raise ValueError("MemoryPrefix: FramePack must be called with latents_clean, got None")
        self.clean_is_next = True
        return torch.cat([self.held.of(clean), clean], dim=1), *rest

    def turn(self, rope: nn.Module, args: tuple, kwargs: dict, output: tuple) -> tuple | None:
        """Appends to the history's rotary embedding: the model calls `rope` once for the video, then for each history
        level."""
        if not self.clean_is_next:
            return None
        self.clean_is_next = False
        return tuple(torch.cat(pair, dim=0) for pair in zip((self.held.cos, self.held.sin), output, strict=True))


_KINDS = {"wan": _WanPrefix, "hunyuan-video": _HunyuanPrefix, "framepack": _FramePackPrefix}
_TIMES = ("step", "zero")
_ARGUMENTS = ("hidden_states", "encoder_hidden_states", "attention_mask")  # arguments of an attention, in this order


def _hook_tables(model: nn.Module) -> Iterator[tuple[dict, dict]]:
    for module in model.modules():
        yield module._forward_hooks, module._forward_hooks_with_kwargs
        yield module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs


def _prefix_of(model: nn.Module) -> _Prefix | None:
    for hooks, _ in _hook_tables(model):
        for hook in hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Prefix):
                return owner
    return None


class MemoryPrefix:
    """Adds memory tokens with rotary positions to the token sequence of a video model, without training.

    The tokens are placed before the video tokens (Wan, FramePack) or after them (HunyuanVideo), take part in every
    block, and are cut off at the output. With the patch tokens of a longer video as memory (see `patch_tokens`), the
    outputs of the other tokens equal those of the longer video. In HunyuanVideo the text has no positions and acts as
    if at position 0, where the video starts, so there the equality holds only for frames after the video. Without a
    memory, the outputs equal those of the original model, bit by bit.

    The hooks and the memory are stored in the model: a copy (deepcopy, pickle) has its own memory;
    `MemoryPrefix.of(copy)` is a handle on it. As a context manager, the handle removes the hooks at the end of the
    `with` block.

    Args:
        model: a WanTransformer3DModel, HunyuanVideoTransformer3DModel or HunyuanVideoFramepackTransformer3DModel;
            compiled or not.
        time: the noise level that the model assumes for the memory. "step": that of the video (in Wan 2.2-5B: of its
            noisiest token), as FramePack treats its history. "zero": clean; this requires one modulation per token and
            so is possible only in Wan, where (B, N, 6, C) modulations are then held at once, as Wan 2.2-5B always does.

    Raises:
        TypeError: the model belongs to no known family.
        ValueError: the family is not supported, `time` is not possible in it, or the model has a memory prefix already.

    Examples:
        >>> p = MemoryPrefix(model)
        >>> p.set(*patch_tokens(model, past_latents, start=-past_latents.shape[2]))
    """

    def __init__(self, model: nn.Module, time: str = "step"):
        op, family, self.model = "MemoryPrefix", family_of(model), base_model(model)
        if family.name not in FAMILIES:
            raise ValueError(f"{op}: model must be of family {', '.join(FAMILIES)}, got {family.name}")
        if time not in _TIMES:
            raise ValueError(f"{op}: time must be one of {', '.join(_TIMES)}, got {time!r}")
        if time == "zero" and family.name != "wan":
            raise ValueError(
                f"{op}: time must be step in {family.name}, whose blocks modulate all tokens equally, got zero"
            )
        if _prefix_of(self.model) is not None:
            raise ValueError(
                f"{op}: model must not have a memory prefix already, got one that has; call remove() first"
            )
        prefix = _KINDS[family.name](self.model, time)
        hooks = prefix.hooks(self.model)
        if prefix.takes_size:
            attentions = (getattr(block.module, family.self_attention) for block in family.blocks(self.model))
            hooks += [(attn, "pre", prefix.weigh) for attn in attentions]
        for module, kind, hook in hooks:
            if kind == "forward":
                module.register_forward_hook(hook, with_kwargs=True)
            else:
                module.register_forward_pre_hook(hook, with_kwargs=hook != prefix.cut)
        self._changed()

    @classmethod
    def of(cls, model: nn.Module) -> MemoryPrefix:
        """Returns a handle on the memory prefix that a model has, such as a copy of a model.

        Args:
            model: a model with a memory prefix.

        Returns:
            The handle.

        Raises:
            ValueError: the model has no memory prefix.
        """
        handle = object.__new__(cls)
        handle.model = base_model(model)
        handle._prefix("of")
        return handle

    def _prefix(self, op: str) -> _Prefix:
        prefix = _prefix_of(self.model)
        if prefix is None:
            raise ValueError(
                f"MemoryPrefix.{op}: model must have a memory prefix, got one without, or from which it was removed"
            )
        return prefix

    def _changed(self) -> None:
        reset_caches(self.model)
        forget_compiled(self.model)

    def set(self, tokens: Tensor, positions: Tensor, size: Tensor | None = None) -> MemoryPrefix:
        """Sets the memory of the model, replacing the previous one, and empties diffusers' caches.

        Args:
            tokens: (B or 1, M, C) of the width, dtype and device of the model's tokens, from `patch_tokens` or from a
                trained encoder. A memory of batch 1 serves all samples.
            positions: (M, 3), in Wan also (B or 1, M, 3): time, row and column of each token, in patches; fractional
                positions are allowed, a negative time is before the video. The video has times 0, 1, … (in FramePack,
                its `indices_latents`).
            size: (B or 1, M) positive: a token of size n counts as n tokens, for merged tokens. The attentions then get
                a float mask, which diffusers' native backend and "vidmem" accept and flash backends refuse. Not in
                FramePack.

        Returns:
            The handle.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or device.
        """
        op, prefix = "MemoryPrefix.set", self._prefix("set")
        check_tensor(op, "tokens", tokens, "B, M, C")
        width = self.model.config.num_attention_heads * self.model.config.attention_head_dim
        if tokens.shape[2] != width:
            raise ValueError(f"{op}: tokens must have shape (B, M, {width}), got {tuple(tokens.shape)}")
        check_positions(op, positions, tokens, by_sample=prefix.batched_positions)
        if size is not None:
            if not prefix.takes_size:
                raise ValueError(f"{op}: size must be None in FramePack, got {type(size).__name__}")
            check_tensor(op, "size", size, "B, M")
            if size.shape[0] not in (1, tokens.shape[0]) or size.shape[1] != tokens.shape[1]:
                wanted = f"({tokens.shape[0]} or 1, {tokens.shape[1]})"
                raise ValueError(f"{op}: size must have shape {wanted}, got {tuple(size.shape)}")
        log_size = None if size is None else size.float().log()
        prefix.slot.held = _Held(tokens, *rotary_tables(self.model, positions), log_size)
        reset_caches(self.model)
        return self

    def clear(self) -> None:
        """Removes the memory: the outputs equal those of the original model, bit by bit."""
        self._prefix("clear").slot.held = None
        reset_caches(self.model)

    def remove(self) -> None:
        """Removes the hooks from the model.

        Raises:
            ValueError: they were removed before.
        """
        prefix = self._prefix("remove")
        for hooks, with_kwargs in _hook_tables(self.model):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is prefix]:
                del hooks[key]
                with_kwargs.pop(key, None)
        self._changed()

    def __enter__(self) -> MemoryPrefix:
        return self

    def __exit__(self, *exception: object) -> None:
        if _prefix_of(self.model) is not None:
            self.remove()


def patch_tokens(model: nn.Module, latents: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    """Computes the tokens that a model makes of latents, and their positions: a memory for `MemoryPrefix.set`.

    Args:
        model: a model that `MemoryPrefix` supports, with or without a memory prefix.
        latents: (B, channels, frames, height, width), with the channels of the model.
        start: time position, in patches, of the first frame; negative for frames before the video.

    Returns:
        (tokens, positions): tokens (B, M, C) and positions (M, 3) int64.

    Raises:
        ValueError, TypeError: the family is not supported, or the latents have a wrong shape or dtype.
    """
    op, family, model = "patch_tokens", family_of(model), base_model(model)
    if family.name not in FAMILIES:
        raise ValueError(f"{op}: model must be of family {', '.join(FAMILIES)}, got {family.name}")
    check_tensor(op, "latents", latents, "B, channels, frames, height, width")
    frames, height, width = family.grid(model, latents)
    tokens = getattr(model, family.patch_embedding).forward(latents)  # without the hooks, which would add the memory
    if tokens.dim() == 5:
        tokens = tokens.flatten(2).transpose(1, 2)
    axes = (torch.arange(n, device=latents.device) for n in (frames, height, width))
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    return tokens, positions + torch.tensor([start, 0, 0], device=latents.device)
