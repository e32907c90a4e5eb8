"""Registers an attention backend with diffusers, and selects it for one model within a `with` block.

diffusers identifies its backends by the members of an enum and selects one for the whole process. Here each set of
features becomes a member, which is set on the attentions of the one model.
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
_UNSET = object()  # marks a processor without an own value, which uses that of its class
_lock = threading.RLock()


class _EveryName:
    """A set that contains every argument name: diffusers silently drops arguments that the set lacks."""

    def __contains__(self, name: str) -> bool:
        return True

    def __iter__(self) -> Iterator[str]:
        return iter((*_ARGUMENTS, "_parallel_config"))


class _Backend:
    """The function of a backend: maps diffusers' call to `cross_attention` with given features."""

    def __init__(self, features: Mapping[str, Any]):
        self.features = features

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, _parallel_config: object = None, **arguments: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        op = "vidmem attention backend"
        if _parallel_config is not None:
            raise ValueError(f"{op}: the model must run without context parallelism, got {_parallel_config}")
        for name in arguments:
            if name not in _ARGUMENTS:
                raise ValueError(f"{op}: arguments must be among {', '.join(_ARGUMENTS)}, got {name!r}")
        return attend(op, query, key, value, features=self.features, **arguments)


def _ended(*args: object, **kwargs: object) -> None:
    raise ValueError(
        "vidmem attention backend: the `with attention_backend(...)` block must still be open, got a call after its end"
    )


def _register(value: str, function: Callable) -> AttentionBackendName:
    """Adds a member to diffusers' enum, which is closed, as cache-dit and others do."""
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
    _AttentionBackendRegistry._backends[member] = _ended  # a copy of the model may still refer to it


_members: dict[object, AttentionBackendName] = {}  # by name and features, so that compiled graphs can be reused
_numbers = iter(range(1, 1 << 62))


def register_attention_backend(name: str = "vidmem") -> None:
    """Registers `cross_attention` as an attention backend of diffusers; repeated calls have no effect.

    Afterwards `model.set_attention_backend(name)` selects it for the whole process, and `attention_backend` selects it
    for one model within a `with` block.

    Args:
        name: an identifier in lower case, as `set_attention_backend` requires.

    Raises:
        TypeError: `name` is not a string.
        ValueError: diffusers has another backend of that name, or it is not a lower-case identifier.
    """
    op = "register_attention_backend"
    if not isinstance(name, str):
        raise TypeError(f"{op}: name must be a str, got {type(name).__name__}")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"{op}: name must be a lower-case identifier, got {name!r}")
    with _lock:
        if (name, ()) in _members:
            return
        if name in AttentionBackendName._value2member_map_ or name.upper() in AttentionBackendName._member_map_:
            raise ValueError(f"{op}: name must not be a backend of diffusers already, got {name!r}")
        _members[name, ()] = _register(name, _Backend({}))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _member(name: str, features: Mapping[str, Any]) -> tuple[AttentionBackendName, bool]:
    """The enum member for a set of features, and whether to remove it with the block, so that no tensor is kept."""
    key = name, tuple((n, tuple(v) if isinstance(v, list) else v) for n, v in sorted(features.items()))
    lasting = all(map(_is_plain, features.values()))
    if lasting and key in _members:
        return _members[key], False
    member = _register(f"{name}_{next(_numbers)}", _Backend(dict(features)))
    if lasting:
        _members[key] = member
    return member, not lasting


class _Choices:
    """The backends chosen for a processor by `with` blocks that have not ended, and the one it had before."""

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
    """Ends the choice of a block. Blocks of several threads may end in any order: the last one still open applies."""
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
    """The processors that ask diffusers for a backend, including those that processors of this package wrap."""
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
    """Runs the attentions of one model by `vidmem_kernels.cross_attention` inside the `with` block.

    Only this model is affected, on any thread; at the end the previous backends of its attentions are restored. Blocks
    may be nested, in which case the innermost applies, and may end in any order.

    Masks over keys (B or 1, H or 1, 1, Lk), as in HunyuanVideo, and fewer key heads than query heads are supported.
    Dropout, causal masks, pairwise masks and context parallelism raise an error. With gradient checkpointing, run the
    backward pass inside the block too, because it runs the attentions again.

    Args:
        model: any diffusers model whose attention processors ask for a backend.
        name: name of the backend; registered if it is not yet.
        only: selects attentions: a part of their names ("attn1" is the self-attention of Wan) or a function of the
            name.
        **features: options of `cross_attention`: backend, block_index, block_size, k_time, key_bias, num_sinks, q_time,
            window. A callable value is called with (query, key) of each attention, e.g.
            block_index=lambda q, k: topk_blocks(q, k, block_size=(128, 64), topk=8).

    Yields:
        None.

    Raises:
        ValueError, TypeError: the model has no such attention, or a feature is unknown.
    """
    op = "attention_backend"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a module, got {type(model).__name__}")
    for feature in features:
        if feature not in FEATURES:
            raise TypeError(f"{op}: features must be among {', '.join(FEATURES)}, got {feature!r}")
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
