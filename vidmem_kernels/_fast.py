"""The fast path: repeats an earlier call by launching its kernel directly.

A table maps everything that determines how a call runs (op, devices, dtypes, sizes, strides, options, environment) to
the kernel and to where its arguments come from. A hit skips the argument checks and PyTorch's Python dispatcher, which
take most of the time of an op on small tensors. Calls that need the dispatcher do not use the fast path: autocast,
dispatch and function modes, transforms, forward-mode gradients, tracing, `explain`, tensor subclasses.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import Parameter

from . import _dispatch, _env, _extension
from ._op import Op

MAX_REMEMBERED = 4096  # calls per function; then the table is cleared

Runner = Callable[[Sequence[Tensor]], Any]
F = TypeVar("F", bound=Callable[..., Any])

# Short names, because looking up torch._C.x takes as long as calling it.
_transform_depth = torch._C._functorch.get_dynamic_layer_stack_depth
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_autocast, _jit_trace = torch._C._is_any_autocast_enabled, torch._C._get_tracing_state
_has_dispatch_key = torch._C._dispatch_tls_is_dispatch_key_included
_grad, _inference = torch.is_grad_enabled, torch.is_inference_mode_enabled
_deterministic = torch._C._get_deterministic_algorithms
_deterministic_warns = torch._C._get_deterministic_algorithms_warn_only
_cudnn_sdpa, _flash_sdpa = torch._C._get_cudnn_sdp_enabled, torch._C._get_flash_sdp_enabled
_compiling = torch.compiler.is_compiling
_SCALARS = frozenset({int, float, bool, str, type(None), torch.dtype})
_VMAP_MODE = torch._C._parse_dispatch_key("VmapMode")  # of torch.autograd.grad(is_grads_batched=True)
_watch = threading.local()  # .calls: the op calls of the public function that is being recorded


def _is_plain() -> bool:
    """Whether nothing is active on this thread that needs the dispatcher."""
    return not (
        _transform_depth()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or _function_modes()
        or _autocast()
        or _jit_trace()
        or _has_dispatch_key(_VMAP_MODE)
        or _dispatch.is_recording()
        or getattr(_watch, "calls", None) is not None
    )


def _surroundings() -> list[Any]:
    """The state besides the arguments that determines how a call runs: the start of a key."""
    module = _extension.module
    return [
        _grad(),
        _inference(),
        _deterministic(),
        _deterministic_warns(),
        _env.dispatch_state(),
        _dispatch.of_this_thread(),
        module and module.cpu_capability(),
        _cudnn_sdpa(),
        _flash_sdpa(),
    ]


def _describe(values: Sequence[Any], key: list[Any], tensors: list[Tensor]) -> bool:
    """Adds what determines how these arguments run to a key; returns False if one of them is not a plain value."""
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            tensors.append(value)
            key += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        elif kind in _SCALARS:
            key += (kind, value)
        elif isinstance(value, tuple | list):
            key += (kind, len(value))
            if not _describe(value, key, tensors):
                return False
        else:
            return False
    return True


def _key(values: Sequence[Any], tensors: list[Tensor]) -> tuple[Any, ...] | None:
    key = _surroundings()
    try:
        if not _describe(values, key, tensors):
            return None
    except RuntimeError:  # sparse and nested tensors have no strides
        return None
    places = {id(tensor): place for place, tensor in enumerate(tensors)}
    if len(places) < len(tensors):  # some are the same object, and an entry distinguishes its tensors by identity
        key += [places[id(tensor)] for tensor in tensors]
    return tuple(key)


def fast(function: F) -> F:
    """Decorator for a public function that calls one op by `_call.call`: repeats its calls by the fast path."""
    remembered: dict[tuple[Any, ...], Runner | None] = {}
    _tables.append(remembered)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if _compiling() or not _is_plain():
            return function(*args, **kwargs)
        tensors: list[Tensor] = []
        key = _key((len(args), *args, *kwargs, *kwargs.values()), tensors)
        run = remembered.get(key, _UNKNOWN)
        if run is None or key is None:
            return function(*args, **kwargs)
        if run is not _UNKNOWN:
            return run(tensors)
        _watch.calls = []
        try:
            results = function(*args, **kwargs)
            calls = _watch.calls
        finally:
            _watch.calls = None
        if len(remembered) >= MAX_REMEMBERED:
            remembered.clear()
        remembered[key] = _runner(*calls[0], tensors, results) if len(calls) == 1 else None
        return results

    return wrapper


_UNKNOWN = object()
_tables: list[dict] = []


def call_op(op: Op, args: tuple[Any, ...], backend: str) -> Any:
    """Calls an op as torch.ops.vidmem does, for backward passes, where no gradient is recorded."""
    if _compiling() or _grad() or not _is_plain():
        return op.overload(*args, backend)
    tensors: list[Tensor] = []
    key = _key((*args, backend), tensors)
    kernel = op.remembered.get(key, _UNKNOWN)
    if kernel is _UNKNOWN:
        one_device = key is not None and len({t.device for t in tensors}) == 1
        served = one_device and tensors[0].device.type in _dispatch.LADDERS
        kernel = _dispatch.bind(op, args, backend) if served else None
        if len(op.remembered) >= MAX_REMEMBERED:
            op.remembered.clear()
        op.remembered[key] = kernel
    return op.overload(*args, backend) if kernel is None else kernel(*args)


def watch(op: Op, args: Sequence[Any], backend: str, raw: Any) -> None:
    """Reports an op call and its result to the public function that is being recorded."""
    calls = getattr(_watch, "calls", None)
    if calls is not None:
        calls.append((op, args, backend, raw))


def _pick(value: Any, tensors: Sequence[Tensor]) -> Callable[[Sequence[Tensor]], Any] | None:
    """Makes a function that rebuilds `value` from other tensors in the same places; None if a tensor of it is not
    there."""
    if isinstance(value, Tensor):
        place = next((i for i, t in enumerate(tensors) if t is value), None)
        return None if place is None else operator.itemgetter(place)
    if not isinstance(value, tuple | list):
        return lambda found: value
    parts = [_pick(v, tensors) for v in value]
    if None in parts:
        return None
    make = type(value)._make if hasattr(value, "_make") else type(value)
    if any(isinstance(v, tuple | list) for v in value) or len(value) < 2:
        return lambda found: make([part(found) for part in parts])
    # Flat, the usual case: one pass over tensors and constants.
    constants = [v for v in value if not isinstance(v, Tensor)]
    places, n = [], len(tensors)
    for v in value:
        is_tensor = isinstance(v, Tensor)
        places.append(next(i for i, t in enumerate(tensors) if t is v) if is_tensor else n)
        n += not is_tensor
    take = operator.itemgetter(*places)
    if make is tuple:
        return lambda found: take((*found, *constants))
    return lambda found: make(take((*found, *constants)))


def _runner(
    op: Op, args: Sequence[Any], backend: str, raw: Any, tensors: Sequence[Tensor], results: Any
) -> Runner | None:
    """The function that a hit runs: it calls the op's kernel and builds the public results; None if that is
    impossible."""
    devices = {t.device for t in tensors}
    if len(devices) != 1 or next(iter(devices)).type not in _dispatch.LADDERS:
        return None
    arguments = _pick(tuple(args), tensors)
    shape = _pick(results, raw if isinstance(raw, tuple) else (raw,))
    kernel = _dispatch.bind(op, tuple(args), backend) if arguments and shape else None
    if kernel is None:
        return None
    if results is raw:
        return lambda tensors: kernel(*arguments(tensors))
    return lambda tensors: shape(kernel(*arguments(tensors)))
