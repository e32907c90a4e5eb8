"""Tile sizes of cross_attention's Triton kernels: the defaults, and the candidates for tuning."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._tuned import Tile, Tunable, dtype_name

FEW = 256  # number of terms of a sum from which rounding errors of half precision average out
_SIZES = (64, 128, 256)  # head sizes in the tables

# Tiles: queries, keys, warps, stages of the pipeline. Half precision: kernel -> architecture -> largest head size. They
# spill no registers, with any masks and bias. sm_89 and sm_120 have Ampere's tensor cores and 101,376 bytes of shared
# memory; without an own entry, they use Ampere's.
_HALF = {
    "fwd": {
        80: {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2)},
        90: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        100: {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    },
    "grad_q": {
        80: {64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        90: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
        100: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
    },
    "grad_kv": {
        80: {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (64, 32, 8, 1)},
        90: {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 1)},
        100: {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1)},
    },
}
# Tiles for which offsets kept from step to step would spill, so they are recomputed; for others, recomputing spills.
_RECOMPUTED = {("fwd", 90), ("fwd", 100), ("grad_q", 90), ("grad_kv", 90), ("grad_kv", 100)}
# With a window, whose times and masks take registers, for tiles that would spill otherwise.
_WINDOWED = {
    ("fwd", 80, 128): (64, 32, 4, 3),
    ("fwd", 80, 256): (64, 32, 8, 2),
    ("grad_kv", 90, 128): (64, 64, 8, 2),
    ("grad_kv", 90, 256): (32, 32, 8, 1),
}
# With 8-bit keys and values, which are converted in registers, for tiles that would spill otherwise.
_ROWS8 = {
    ("fwd", 80, 64): (64, 32, 4, 3),
    ("fwd", 80, 128): (64, 64, 8, 3),
    ("fwd", 80, 256): (64, 32, 8, 2),
    ("fwd", 90, 256): (64, 32, 8, 2),
    ("fwd", 100, 256): (64, 32, 8, 2),
}
# Single precision does not use tensor cores: kernel -> largest head size -> the same tile on every architecture.
_SINGLE = {
    "fwd": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "grad_q": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
    "grad_kv": {64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}
# Candidates for tuning in half precision besides the default: good ones of a sweep on an H200, and their neighbours.
_TRIED = {
    "fwd": [
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 128, 8, 2),
        (128, 128, 8, 3),
    ],
    "grad_q": [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 1), (64, 128, 4, 1), (64, 32, 4, 2)],
    "grad_kv": [(32, 64, 4, 2), (32, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 1), (64, 64, 8, 2)],
}
_ONE_PASS = [(32, 128, 8, 1), (64, 128, 8, 1), (64, 64, 8, 1), (32, 64, 4, 1), (64, 128, 8, 2)]
SPECIALISED = (90, 100, 103)  # architectures that support specialised warps


def _tile(numbers: tuple[int, int, int, int], hoist: bool) -> Tile:
    queries, keys, warps, stages = numbers
    return {"BLOCK_M": queries, "BLOCK_N": keys, "STAGES": stages, "HOIST": hoist, "num_warps": warps}


def _base(kernel: str, arch: int) -> int:
    """The architecture whose tiles another one uses."""
    return 100 if arch == 103 else arch if arch in _HALF[kernel] else 80


def _default(kernel: str, arch: int, dtype: str, size: int, features: str) -> Tile:
    """The default tile.

    `features`: "few" terms have factors in two parts, which leaves fewer registers for a tile of queries; "rows8": keys
    and values are 8-bit.
    """
    half, few, base = dtype != "fp32", "few" in features, _base(kernel, arch)
    numbers = _HALF[kernel][base][size] if half else _SINGLE[kernel][size]
    if half and "window" in features and not few:
        numbers = _WINDOWED.get((kernel, base, size), numbers)
    if half and "rows8" in features:
        numbers = _ROWS8.get((kernel, base, size), numbers)
    queries, keys, warps, stages = numbers
    if few and size > 128:
        queries = keys = 32
    elif few and kernel != "grad_kv":
        keys = max(32, keys // 2)
    recomputed = (kernel, base) in _RECOMPUTED if half else size > 128 and kernel != "fwd"
    return _tile((queries, keys, warps, stages), hoist=not recomputed)


def _tried(kernel: str, arch: int, dtype: str, size: int, features: str) -> list[Tile]:
    if dtype == "fp32" or "few" in features:
        return []
    if size > 128:
        return [_tile(numbers, hoist) for numbers in ((64, 32, 4, 1), (64, 64, 8, 1)) for hoist in (True, False)]
    return [_tile(numbers, hoist) for numbers in _TRIED[kernel] for hoist in (True, False)]


def _fwd_default(arch: int, **fields: Any) -> Tile:
    return _default("fwd", arch, **fields) | {"WARP_SPECIALIZE": False}


def _fwd_tried(arch: int, dtype: str, size: int, features: str) -> list[Tile]:
    tried = [t | {"WARP_SPECIALIZE": False} for t in _tried("fwd", arch, dtype, size, features)]
    if arch in SPECIALISED and tried and size <= 128 and not {"window", "rows8"} & set(features.split()):
        # Specialised warps were compiled but never run: tuning selects them only if they are correct and faster.
        # sm_100 spills with 4 warps, and 128 keys need 360 bytes more shared memory than it has.
        warps, held = (4, (128, 64)) if arch == 90 else (8, (64,))
        tried += [
            _tile((128, keys, warps, 2), True) | {"WARP_SPECIALIZE": True}
            for keys in held
            if keys == 64 or "blocks" not in features
        ]
    return tried


def _grad_kv_default(arch: int, order: str, **fields: Any) -> Tile:
    return _default("grad_kv", arch, **fields) | {"ONE_PASS": False}


def _grad_kv_tried(arch: int, order: str, dtype: str, size: int, features: str) -> list[Tile]:
    tried = [t | {"ONE_PASS": False} for t in _tried("grad_kv", arch, dtype, size, features)]
    if tried and size <= 128 and order == "any":
        tried += [_tile(numbers, False) | {"ONE_PASS": True} for numbers in _ONE_PASS]
    return tried


_FIELDS = ("dtype", "size", "features")
FORWARD = Tunable("_cross_attention_fwd_kernel", _FIELDS, default=_fwd_default, candidates=_fwd_tried)
GRAD_Q = Tunable(
    "_cross_attention_grad_q_kernel",
    _FIELDS,
    default=lambda arch, **fields: _default("grad_q", arch, **fields),
    candidates=lambda arch, **fields: _tried("grad_q", arch, **fields),
)
# order: "any" if the gradient of a query may be summed in any order, else "fixed".
GRAD_KV = Tunable(
    "_cross_attention_grad_kv_kernel", (*_FIELDS, "order"), default=_grad_kv_default, candidates=_grad_kv_tried
)


def fields_of(q: Tensor, v: Tensor, features: str, few: bool) -> dict[str, Any]:
    """The fields that the tile of a call depends on; `few`: its sums have few terms."""
    size = min(s for s in _SIZES if s >= max(q.shape[3], v.shape[3]))
    words = [features, "few"] if few and q.dtype != torch.float32 else [features]
    return {"dtype": dtype_name(q.dtype), "size": size, "features": " ".join(w for w in words if w)}


def padded(size: int) -> int:
    """Width of a tile that holds rows of `size` elements."""
    return max(16, triton.next_power_of_2(size))


_NONE = ("bias", "when", "low", "high", "ranges", "entries")
_LIST = {"ranges": "*i64", "entries": "*i32"}
_WINDOW = {"when": "*i64", "low": "*i64", "high": "*i64", **_LIST}
_EVERY = (80, 89, 90, 100, 120)
_LARGE = (80, 90, 100)  # architectures with enough shared memory for D = 256
# The calls in AOT tables: dtype, head size, features, architectures.
WANTED = (
    ("bf16", 64, "", (80,)),
    ("bf16", 64, "bias", _EVERY),
    ("bf16", 128, "", (90,)),
    ("bf16", 128, "bias", _EVERY),
    ("bf16", 128, "bias few", (90,)),
    ("bf16", 128, "blocks", (90,)),
    ("bf16", 128, "window", (90,)),
    ("bf16", 128, "bias window sinks", _EVERY),
    ("bf16", 256, "", (80,)),
    ("bf16", 256, "bias", _LARGE),
    ("fp32", 128, "", (89, 90)),
)


def variants(
    tunable: Tunable, tensors: tuple[str, ...], others: dict[str, str], wanted: tuple = WANTED, **constants: object
) -> list:
    """AOT entries for the calls in `wanted`; `others` are the types of further arguments."""
    return [_entry(tunable, tensors, others, constants, *call) for call in wanted]


def _entry(tunable, tensors, others, constants, dtype, size, features, archs):
    given = ({"bias": "*fp32"} if "bias" in features else {}) | (_WINDOW if "window" in features else {})
    given |= _LIST if "blocks" in features else {}
    even = size == padded(size)
    fixed = {
        **constants,
        **{name: None for name in _NONE if name not in given},
        **{f"{name}_stride_d": 1 for name in ("q", "k", "v", "grad") if name in tensors},
        "HAS_BLOCKS": "blocks" in features,
        "HAS_SINKS": "sinks" in features,
        "SPLIT": "few" in features,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "INTERPRET": False,
        "EVEN": even,
        "EVEN_V": even,
        "BLOCK_D": padded(size),
        "BLOCK_V": padded(size),
    }
    words = " ".join(w for w in features.split() if w != "sinks")
    fields = {"dtype": dtype, "size": size, "features": words}
    if "order" in tunable.fields:
        fields["order"] = "any"
    given = {**dict.fromkeys(tensors, f"*{dtype}"), **given, "SCALE": "fp32", **others}
    return given, fixed, (tunable, fields), archs
