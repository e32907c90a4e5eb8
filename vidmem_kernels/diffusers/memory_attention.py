"""Cross-attention to a memory in the blocks of diffusers' video models, saved in a separate file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from .._checks import check_int, check_tensor
from ..modules import MemoryCrossAttention
from ..rotary import Rotary
from . import memory_adapter_file
from .caches import reset_caches
from .families import Family, base_model, family_of
from .memory_slot import MemorySlot
from .video_rotary import FAMILIES, check_positions, rotary_tables
from .wrapping_processor import WrappingProcessor

Encoder = Callable[[Any], Tensor | tuple[Tensor | None, ...]]


class Held(NamedTuple):
    """A memory that is set.

    Attributes:
        memory: (B or 1, M, memory_dim) tokens.
        key_bias: (B or 1, M), added to the scores of each token.
        cos: (M, D) or (B or 1, M, D) cosines of their positions.
        sin: the sines, of the same shape.
    """

    memory: Tensor
    key_bias: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None


class MemoryAttnProcessor(WrappingProcessor):
    """An attention processor that adds what the video tokens read from the memory to the output of another processor.

    It is a processor, not a hook, because processors run inside diffusers' caches for attentions and blocks, whether
    these are added before or after it, and because torch.compile notices when a processor is replaced.

    Args:
        inner: the previous processor of the attention.
        reader: the cross-attention to the memory.
        slot: holds the memory.
        rope: whether queries and memory tokens get rotary embeddings.
    """

    def __init__(self, inner: Callable, reader: MemoryCrossAttention, slot: MemorySlot, rope: bool):
        super().__init__(inner)
        self.reader, self.slot, self.rope = reader, slot, rope
        self.noted: tuple | None = None

    def note_rotary(self, self_attention: nn.Module, args: tuple) -> None:
        """Hook before the self-attention of the block: in Wan only the self-attention receives the rotary embedding."""
        self.noted = args[3]

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        # diffusers' Attention passes only the arguments in the signature of __call__.
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    def forward(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        image_rotary_emb: tuple | None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Returns the output of `inner` (the video tokens, or a tuple that starts with them) plus what they read."""
        out = self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return self.add_to(out, hidden_states, encoder_hidden_states, image_rotary_emb)

    def add_to(
        self,
        out: Tensor | tuple[Tensor, ...],
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        image_rotary_emb: tuple | None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Adds what the video tokens read to an attention output, whatever computed it instead of `inner`."""
        held = self.slot.get(encoder_hidden_states if image_rotary_emb is None else image_rotary_emb[0])
        if held is None:
            return out
        positions = {}
        if self.rope:
            rotary = self.noted if image_rotary_emb is None else image_rotary_emb
            positions = {
                "q_rotary": Rotary(*map(_angles, rotary[:2])),
                "k_rotary": Rotary(*map(_angles, (held.cos, held.sin))),
            }
            self.noted = None
        read = self.reader.read(hidden_states, held.memory, key_bias=held.key_bias, **positions)
        return (out[0] + read, *out[1:]) if isinstance(out, tuple) else out + read


def _angles(table: Tensor) -> Tensor:
    """Every second column of a table (L, D), (B, L, D) or, in Wan, (B, L, 1, D), which has each column twice."""
    return (table.squeeze(2) if table.dim() == 4 else table)[..., ::2]


def _attention(family: Family, block: nn.Module) -> nn.Module:
    return getattr(block, family.cross_attention or family.self_attention)


def _is_note(hook: object) -> bool:
    return isinstance(getattr(hook, "__self__", None), MemoryAttnProcessor)


def _check_encoder(op: str, encoder: object) -> None:
    if encoder is not None and not callable(encoder):
        raise TypeError(f"{op}: encoder must be callable, got {type(encoder).__name__}")


def _replace(owner: nn.Module, name: str, processor: Callable) -> None:
    delattr(owner, name)  # otherwise nn.Module refuses to replace a module by a plain object
    setattr(owner, name, processor)


class MemoryAttention:
    """A handle on the memory attention of a model; made by `add_memory_attention` or `load_memory_adapter`.

    The added modules and the memory are stored in the model: a copy (deepcopy, pickle) has its own memory attention,
    with the memory that was set; `MemoryAttention(copy)` is a handle on it. As a context manager, the handle removes
    the memory attention at the end of the `with` block.

    Args:
        model: a model with memory attention.
        encoder: see `add_memory_attention`.

    Raises:
        TypeError: the model belongs to no known family.
        ValueError: the model has no memory attention.
    """

    def __init__(self, model: nn.Module, encoder: Encoder | None = None):
        _check_encoder("MemoryAttention", encoder)
        self.family, self.model, self.encoder = family_of(model), base_model(model), encoder
        self._attached("MemoryAttention")

    def _find(self) -> Iterator[tuple[str, nn.Module, nn.Module, MemoryAttnProcessor]]:
        """Yields (block name, attention, the attention or processor that holds our processor, our processor)."""
        for block in self.family.blocks(self.model):
            attn = _attention(self.family, block.module)
            holder, processor = attn, attn.processor
            while processor is not None and not isinstance(processor, MemoryAttnProcessor):
                holder, processor = (
                    processor,
                    getattr(processor, "inner", None),
                )  # skip a processor of an adapter added later
            if processor is not None:
                yield block.name, attn, holder, processor

    def _attached(self, op: str) -> list[tuple[str, nn.Module, nn.Module, MemoryAttnProcessor]]:
        found = list(self._find())
        if not found:
            raise ValueError(f"{op}: model must have memory attention, got one without, or from which it was removed")
        return found

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks that read the memory."""
        return [name for name, *_ in self._attached("MemoryAttention.blocks")]

    @property
    def memory_dim(self) -> int:
        """Channels of the memory tokens."""
        return self._attached("MemoryAttention.memory_dim")[0][3].reader.memory_dim

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the added parameters, named by their block, e.g. "blocks.3.q.weight"."""
        for name, *_, processor in self._attached("MemoryAttention.named_parameters"):
            for key, parameter in processor.reader.named_parameters():
                yield f"{name}.{key}", parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the added parameters, and none of the model, for an optimizer.

        PEFT's `add_adapter` freezes all parameters except its own; call `requires_grad_()` afterwards to train these.
        """
        return (parameter for _, parameter in self.named_parameters())

    def requires_grad_(self, requires_grad: bool = True) -> MemoryAttention:
        """Sets whether the added parameters are trained.

        Args:
            requires_grad: whether they require a gradient.

        Returns:
            The handle.
        """
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def set(self, memory: Tensor, key_bias: Tensor | None = None, positions: Tensor | None = None) -> MemoryAttention:
        """Sets the memory that the model reads, replacing the previous one, and empties diffusers' caches.

        Args:
            memory: (B or 1, M, memory_dim) tokens of the dtype and device of the model. A memory of batch 1 is read by
                all samples; with classifier-free guidance in one batch, by the conditional and the unconditional ones.
            key_bias: (B or 1, M) added to the scores, e.g. the log of the merged sizes of the tokens.
            positions: (M, 3) or (B or 1, M, 3): time, row and column of each token, in patches of the model; a negative
                time is before the video. Required with `rope`, not allowed otherwise.

        Returns:
            The handle.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or device.
        """
        op = "MemoryAttention.set"
        attached = self._attached(op)
        check_tensor(op, "memory", memory, "B, M, memory_dim")
        if memory.shape[2] != self.memory_dim:
            raise ValueError(f"{op}: memory must have shape (B, M, {self.memory_dim}), got {tuple(memory.shape)}")
        if key_bias is not None:
            check_tensor(op, "key_bias", key_bias, "B, M")
            if key_bias.shape[1] != memory.shape[1] or key_bias.shape[0] not in (1, memory.shape[0]):
                wanted = f"({memory.shape[0]} or 1, {memory.shape[1]}), as memory"
                raise ValueError(f"{op}: key_bias must have shape {wanted}, got {tuple(key_bias.shape)}")
        rope = attached[0][3].rope
        if rope != (positions is not None):
            wanted = "given if rope is True" if rope else "None if rope is False"
            raise ValueError(f"{op}: positions must be {wanted}, got {'some' if not rope else 'None'}")
        tables = ()
        if rope:
            check_positions(op, positions, memory, by_sample=True)
            tables = rotary_tables(self.model, positions)
        self._hold(attached, Held(memory, key_bias, *tables))
        return self

    def remember(self, frames: Any) -> MemoryAttention:
        """Sets the memory that the encoder makes from `frames`.

        Gradients flow back to the encoder, except under `torch.no_grad()`.

        Args:
            frames: the input of the encoder, which returns tokens (B or 1, M, memory_dim); (tokens, sizes) with merged
                sizes (B or 1, M), where a token of size n counts as n tokens; or (tokens, sizes or None, positions).

        Returns:
            The handle.

        Raises:
            ValueError, TypeError: there is no encoder, or `set` refuses its result.
        """
        if self.encoder is None:
            raise ValueError("MemoryAttention.remember: encoder must be given to add_memory_attention, got None")
        made = self.encoder(frames)
        memory, size, positions = (*(made if isinstance(made, tuple) else (made,)), None, None)[:3]
        return self.set(memory, None if size is None else size.float().log(), positions)

    def clear(self) -> None:
        """Removes the memory: the outputs of the model equal those before it was set, bit by bit."""
        self._hold(self._attached("MemoryAttention.clear"), None)

    def _hold(self, attached: list, held: Held | None) -> None:
        attached[0][3].slot.held = held  # all blocks share one slot
        reset_caches(self.model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the added weights and their configuration to a safetensors file for `load_memory_adapter`.

        The file at `path` is replaced atomically. It contains neither the weights of the model nor the memory.

        Args:
            path: file to create or replace.

        Raises:
            ValueError: the memory attention was removed.
            OSError: the folder is missing, full or not writable.
        """
        attached = self._attached("MemoryAttention.save")
        reader = attached[0][3].reader
        config = memory_adapter_file.Config(
            family=self.family.name, dim=reader.dim, memory_dim=reader.memory_dim, num_heads=reader.num_heads,
            rope=attached[0][3].rope, blocks=self.blocks,
        )  # fmt: skip
        weights = {f"{name}.{key}": x for name, *_, p in attached for key, x in p.reader.state_dict().items()}
        memory_adapter_file.write(path, config, weights)

    def remove(self) -> None:
        """Removes the memory attention and restores the previous processor of each attention.

        Raises:
            ValueError: it was removed before.
        """
        for _, attn, holder, processor in self._attached("MemoryAttention.remove"):
            _replace(holder, "processor" if holder is attn else "inner", processor.inner)
        for block in self.family.blocks(self.model):
            hooks = getattr(block.module, self.family.self_attention)._forward_pre_hooks
            for key in [key for key, hook in hooks.items() if _is_note(hook)]:
                del hooks[key]
        reset_caches(self.model)

    def __enter__(self) -> MemoryAttention:
        return self

    def __exit__(self, *exception: object) -> None:
        if any(self._find()):
            self.remove()


def _chosen(op: str, family: Family, model: nn.Module, blocks: Iterable[int] | None) -> list:
    everything = list(family.blocks(model))
    if blocks is None:
        return everything
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(f"{op}: blocks must be numbers of blocks, got {blocks!r}")
    numbers = list(blocks)
    for number in numbers:
        check_int(op, "blocks", number, 0, len(everything) - 1)
    if not numbers:
        raise ValueError(f"{op}: blocks must name at least one block, got none")
    return [everything[number] for number in sorted(set(numbers))]


def add_memory_attention(
    model: nn.Module,
    blocks: Iterable[int] | None = None,
    memory_dim: int | None = None,
    rope: bool = False,
    encoder: Encoder | None = None,
) -> MemoryAttention:
    """Adds gated cross-attention to a memory to a video model; before training, its outputs do not change.

    In Wan, what is read is added to the output of the cross-attention to the text. In HunyuanVideo and FramePack, where
    text and video share one attention, it is added to the video tokens of its output, before the modulation of the
    block scales them (and, in single-stream blocks, the output projection mixes them).

    Args:
        model: a WanTransformer3DModel, HunyuanVideoTransformer3DModel, HunyuanVideoFramepackTransformer3DModel, or a
            model of a family added by `register_family`; compiled or not.
        blocks: numbers of the blocks that read, in the order of the forward pass; default all. Each block adds about
            4 * C**2 parameters for C channels.
        memory_dim: channels of the memory tokens; default those of the model.
        rope: whether queries and memory tokens get the rotary embedding of the model by their positions, which `set`
            then requires.
        encoder: `frames -> tokens`, `(tokens, sizes)` or `(tokens, sizes, positions)`, for `remember`.

    Returns:
        A handle with `set`, `remember`, `clear`, `parameters`, `save` and `remove`.

    Raises:
        TypeError: the model belongs to no known family.
        ValueError: the model has memory attention already, or blocks or sizes are invalid.

    Examples:
        >>> m = add_memory_attention(model, memory_dim=64)
        >>> m.set(memory)  # before each video; then train m.parameters() or generate
        >>> m.save("memory.safetensors")
    """
    op = "add_memory_attention"
    family, inner = family_of(model), base_model(model)
    if not isinstance(rope, bool):
        raise TypeError(f"{op}: rope must be a bool, got {type(rope).__name__}")
    if rope and family.name not in FAMILIES:
        raise ValueError(f"{op}: rope must be False in families other than {', '.join(FAMILIES)}, got {family.name}")
    chosen = _chosen(op, family, inner, blocks)
    if memory_dim is not None:
        check_int(op, "memory_dim", memory_dim, 1)
    _check_encoder(op, encoder)
    if any(isinstance(module, MemoryAttnProcessor) for module in inner.modules()):
        raise ValueError(f"{op}: model must not have memory attention already, got one that has; call remove() first")
    slot = MemorySlot()
    for block in chosen:
        attn = _attention(family, block.module)
        reader = MemoryCrossAttention(
            attn.to_q.in_features, attn.heads, memory_dim=memory_dim, device=next(attn.parameters()).device,
            dtype=inner.dtype,
        )  # fmt: skip
        processor = MemoryAttnProcessor(attn.processor, reader, slot, rope)
        if rope and family.cross_attention:
            getattr(block.module, family.self_attention).register_forward_pre_hook(processor.note_rotary)
        _replace(attn, "processor", processor.train(attn.training))
    reset_caches(inner)
    return MemoryAttention(inner, encoder)


def load_memory_adapter(
    model: nn.Module, path: str | os.PathLike[str], encoder: Encoder | None = None
) -> MemoryAttention:
    """Adds the memory attention from a file that `MemoryAttention.save` wrote to a model.

    Args:
        model: a model of the family and width of the trained one, with the same blocks. The weights are converted to
            its dtype and device.
        path: the file.
        encoder: see `add_memory_attention`.

    Returns:
        A handle; see `add_memory_attention`.

    Raises:
        MemoryFileError: the file is not a memory adapter, or is damaged.
        ValueError, TypeError: the adapter does not fit the model, or the model has memory attention already.
        FileNotFoundError: the file does not exist; other OSErrors if it cannot be read.
    """
    op = "load_memory_adapter"
    family, inner = family_of(model), base_model(model)
    config, weights = memory_adapter_file.read(op, path)
    numbers = {block.name: block.number for block in family.blocks(inner)}
    width = _attention(family, next(family.blocks(inner)).module).to_q.in_features
    for what, wanted, got in (("be of family", config.family, family.name), ("have width", config.dim, width)):
        if wanted != got:
            raise ValueError(f"{op}: model must {what} {wanted}, as in {os.fspath(path)}, got {got}")
    missing = [name for name in config.blocks if name not in numbers]
    if missing:
        raise ValueError(f"{op}: model must have the blocks of {os.fspath(path)}, got one without {', '.join(missing)}")
    blocks = [numbers[name] for name in config.blocks]
    handle = add_memory_attention(inner, blocks, config.memory_dim, config.rope, encoder)
    for name, *_, processor in handle._attached(op):
        mine = {key: weights[f"{name}.{key}"] for key in processor.reader.state_dict()}
        processor.reader.load_state_dict(mine)
    return handle
