"""An attention backend of diffusers, for one model and one block of code.

diffusers knows its backends by the members of an enum and chooses one for the whole process. Here each set of features
becomes a member, and the member is set on the attentions of the one model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from ..foreign_attention import FEATURES, attend
from .families import base_model

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "return_lse")
_UNSET = object()  # the class's own value counts
_lock = threading.RLock()


class _EveryName:
    """Names of arguments that diffusers may hand over: all, or it would drop without a word what it does not find."""

    def __contains__(self, name: str) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter((*_ARGUMENTS, "_parallel_config"))


class _Backend:
    """The function of a backend: diffusers' call, by `cross_attention` with these features."""

    def __init__(self, features: Mapping[str, Any]):
        self.features = features

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, _parallel_config: object = None, **arguments: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = "vidmem attention backend"
        if _parallel_config is not None:
            raise ValueError(f"{op}: a model must run without context parallelism, got {_parallel_config}")
        for name in arguments:
            if name not in _ARGUMENTS:
                raise ValueError(f"{op}: arguments must be {', '.join(_ARGUMENTS)}, got {name!r}")
        return attend(op, query, key, value, features=self.features, **arguments)


def _ended(*args: object, **kwargs: object) -> None:
    raise ValueError("vidmem attention backend: the block of attention_backend must not have ended; enter another")


def _register(value: str, function: Callable) -> AttentionBackendName:
    """Adds a member to diffusers' enum, which is closed; as cache-dit and others do."""
    member = str.__new__(AttentionBackendName, value)
    member._name_, member._value_ = value.upper(), value
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[value] = member
    AttentionBackendName._member_names_.append(member._name_)
    _AttentionBackendRegistry._backends[member] = function
    _AttentionBackendRegistry._constraints[member] = []
    _AttentionBackendRegistry._supported_arg_names[member] = _EveryName()
    return member


def _unregister(member: AttentionBackendName) -> None:
    del AttentionBackendName._member_map_[member.name]
    del AttentionBackendName._value2member_map_[member.value]
    AttentionBackendName._member_names_.remove(member.name)
    _AttentionBackendRegistry._backends[member] = _ended  # a copy of the model may still name it


_members: dict[object, AttentionBackendName] = {}  # by name and features; compiled graphs know a member again
_numbers = iter(range(1, 1 << 62))


def register_attention_backend(name: str = "vidmem") -> None:
    """Makes `cross_attention` an attention backend of diffusers under a name; a second time does nothing.

    After that `model.set_attention_backend(name)` takes it, for the whole process as diffusers has it, and
    `attention_backend` for one model and block of code.

    Args:
        name: of lower case, as `set_attention_backend` asks for.

    Raises:
        TypeError: no text.
        ValueError: diffusers has another backend of that name, or it is not of lower case.
    """
    op = "register_attention_backend"
    if not isinstance(name, str):
        raise TypeError(f"{op}: name must be a str, got {type(name).__name__}")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"{op}: name must be an identifier of lower case, got {name!r}")
    with _lock:
        if (name, ()) in _members:
            return
        if name in AttentionBackendName._value2member_map_ or name.upper() in AttentionBackendName._member_map_:
            raise ValueError(f"{op}: name must be new to diffusers, got {name!r}, which has a backend")
        _members[name, ()] = _register(name, _Backend({}))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _member(name: str, features: Mapping[str, Any]) -> tuple[AttentionBackendName, bool]:
    """The member for a set of features, and whether it ends with the block: tensors are not kept."""
    key = name, tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in sorted(features.items()))
    lasting = all(map(_is_plain, features.values()))
    if lasting and key in _members:
        return _members[key], False
    member = _register(f"{name}_{next(_numbers)}", _Backend(dict(features)))
    if lasting:
        _members[key] = member
    return member, not lasting


class _Choices:
    """What was chosen for a processor by blocks of code that have not ended, and what it had before them."""

    def __init__(self, before: object):
        self.before = before
        self.chosen: list[list] = []


_choices: WeakKeyDictionary[object, _Choices] = WeakKeyDictionary()


def _choose(processor: object, choice: list) -> None:
    if processor not in _choices:
        _choices[processor] = _Choices(vars(processor).get("_attention_backend", _UNSET))
    _choices[processor].chosen.append(choice)
    processor._attention_backend = choice[0]


def _undo(processor: object, choice: list) -> None:
    """Blocks of several threads may end in any order: the last that is still open counts."""
    choices = _choices[processor]
    choices.chosen = [each for each in choices.chosen if each is not choice]
    if choices.chosen:
        processor._attention_backend = choices.chosen[-1][0]
        return
    del _choices[processor]
    if choices.before is _UNSET:
        del processor._attention_backend
    else:
        processor._attention_backend = choices.before


def _processors(model: nn.Module, only: Callable[[str], bool] | str | None) -> list[object]:
    """The processors that ask diffusers for a backend; behind those of this package, which pass it on."""
    found = {}
    for name, module in model.named_modules():
        processor = getattr(module, "processor", None)
        while isinstance(getattr(type(processor), "_attention_backend", None), property):
            processor = processor.inner
        wanted = only is None or (only(name) if callable(only) else only in name.split("."))
        if wanted and hasattr(processor, "_attention_backend"):
            found[id(processor)] = processor
    return list(found.values())


@contextmanager
def attention_backend(
    model: nn.Module, name: str = "vidmem", *, only: Callable[[str], bool] | str | None = None, **features: Any
) -> Iterator[None]:
    """Runs the attentions of one model by `vidmem_kernels.cross_attention` while the block of code runs.

    Only this model is concerned, in whatever thread it runs; what its attentions had before is restored exactly. Blocks
    may be nested, the innermost counts, and may end in any order.

    Masks over keys, (B or 1, H or 1, 1, Lk), as HunyuanVideo's, are taken, and fewer heads of keys; dropout, causal
    masks, masks of pairs and context parallelism raise where an attention asks for them. With gradient checkpointing
    the backward belongs into the block of code, too: it runs the attentions again.

    Args:
        model: any diffusers model whose attention processors ask for a backend.
        name: as registered; registered here where it is not.
        only: which attentions: a part of their names ("attn1": the self-attention of Wan) or a function of the name.
        **features: options of `cross_attention`: backend, block_index, block_size, k_time, key_bias, num_sinks, q_time,
            window. A value that is callable is called with (query, key) of each attention, e.g.
            block_index=lambda q, k: topk_blocks(q, k, block_size=(128, 64), topk=8).

    Raises:
        ValueError, TypeError: a model without such attentions, an unknown feature.
    """
    op = "attention_backend"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a module, got {type(model).__name__}")
    for feature in features:
        if feature not in FEATURES:
            raise TypeError(f"{op}: features must be of {', '.join(FEATURES)}, got {feature!r}")
    register_attention_backend(name)
    processors = _processors(base_model(model), only)
    if not processors:
        raise ValueError(
            f"{op}: model must have attentions that ask diffusers for a backend, got {type(model).__name__} with none"
            + ("" if only is None else f" that is {only!r}")
        )
    with _lock:
        member, ends = _member(name, features)
        choice = [member]
        for processor in processors:
            _choose(processor, choice)
    try:
        yield
    finally:
        with _lock:
            for processor in processors:
                _undo(processor, choice)
            if ends:
                _unregister(member)
