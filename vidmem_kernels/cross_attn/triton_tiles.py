"""Tile sizes of cross_attention's Triton kernels, by architecture, dtype and head size."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Tile(NamedTuple):
    """What one launch of a kernel is compiled for; `hoist`: what a loop does not change is computed before it."""

    queries: int
    keys: int
    warps: int
    stages: int  # of the pipeline
    hoist: bool


# Tiles without spills, whatever the masks and bias. The forward of 128 with bias compiles to 250 registers and
# 90,624 bytes of shared memory on sm_80, 240 and 131,584 on sm_90, 204 and 132,128 on sm_100. On sm_90 its loop is
# HGMMA 64x64x16 (queries and keys from shared memory) and 64x128x16 (weights from registers): 32 FLOPs a byte of shared
# memory, as many as the SM can feed, where 64 x 64 has 26; 128 x 128 spills 128 bytes. sm_100 has UTCHMMA, LDTM, STTM.
# Half precision: kernel -> compute capability (major) -> head size at most -> queries, keys, warps, stages.
_HALF = {
    "fwd": {
        8: {64: (128, 64, 8, 3), 128: (64, 64, 4, 3), 256: (64, 64, 8, 2)},
        9: {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
        10: {64: (128, 128, 8, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    },
    "grad_q": {
        8: {64: (128, 32, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 1)},
        9: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 1)},
        10: {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (64, 32, 8, 1)},
    },
    "grad_kv": {
        8: {64: (32, 128, 8, 2), 128: (32, 64, 8, 2), 256: (64, 32, 8, 1)},
        9: {64: (64, 128, 8, 2), 128: (32, 128, 8, 2), 256: (32, 64, 8, 1)},
        10: {64: (64, 128, 8, 2), 128: (64, 128, 8, 2), 256: (64, 64, 8, 1)},
    },
}
# Where offsets kept from step to step would spill and are computed again; elsewhere it is the other way round.
_RECOMPUTED = {("fwd", 9), ("fwd", 10), ("grad_q", 9), ("grad_kv", 9), ("grad_kv", 10)}
# With a window, whose ranks and masks take registers, where those tiles would spill.
_WINDOWED = {
    ("fwd", 8, 128): (64, 32, 4, 3),
    ("fwd", 8, 256): (64, 32, 8, 2),
    ("grad_kv", 9, 128): (64, 64, 8, 2),
    ("grad_kv", 9, 256): (32, 32, 8, 1),
}
# Single precision has no tensor cores to feed: kernel -> head size at most -> the same on every architecture.
_SINGLE = {
    "fwd": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "grad_q": {64: (16, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 8, 1)},
    "grad_kv": {64: (16, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}


def tile_of(kernel: str, half: bool, major: int, size: int, split: bool, windowed: bool) -> Tile:
    """The entry of the smallest head size that holds `size`; of Ampere where an architecture has none.

    `split`: factors in two parts, for which a tile of queries has fewer registers left; likewise `windowed`.
    """
    major = major if major in _HALF[kernel] else 8
    table = _HALF[kernel][major] if half else _SINGLE[kernel]
    held = min(s for s in table if s >= size)
    queries, keys, warps, stages = table[held]
    if half and windowed and not split:
        queries, keys, warps, stages = _WINDOWED.get((kernel, major, held), table[held])
    if split and size > 128:
        queries = keys = 32
    elif split and kernel != "grad_kv":
        keys = max(32, keys // 2)
    recomputed = (kernel, major) in _RECOMPUTED if half else size > 128 and kernel != "fwd"
    return Tile(queries, keys, warps, stages, hoist=not recomputed)


@functools.cache
def _major(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 8


def pick(kernel: str, q: Tensor, v: Tensor, split: bool, windowed: bool) -> Tile:
    """The tile of a call."""
    size = max(q.shape[3], v.shape[3])
    return tile_of(kernel, q.dtype != torch.float32, _major(q.device), size, split, windowed)


def padded(size: int) -> int:
    """Width of a tile that holds rows of `size` elements."""
    return max(16, triton.next_power_of_2(size))


_NONE = ("bias", "rank", "low", "high", "ranges", "entries")
_LIST = {"ranges": "*i64", "entries": "*i32"}
_WINDOW = {"rank": "*i32", "low": "*i32", "high": "*i32", **_LIST}
# The calls that AOT tables hold: dtype, head size, features, architectures.
WANTED = (
    ("bf16", 64, "", (80,)),
    ("bf16", 64, "bias", (90, 100)),
    ("bf16", 128, "", (90,)),
    ("bf16", 128, "bias", (90,)),
    ("bf16", 128, "bias few", (90,)),
    ("bf16", 128, "blocks", (90,)),
    ("bf16", 128, "bias window sinks", (80, 90, 100)),
    ("bf16", 256, "", (80,)),
    ("bf16", 256, "bias", (90, 100)),
    ("fp32", 128, "", (90,)),
)


def variants(kernel: str, tensors: tuple[str, ...], others: dict[str, str], wanted: tuple) -> list:
    """Entries of an AOT table, of (dtype, head size, features, architectures), with the tile that `pick` gives."""
    entries: dict[tuple, list[int]] = {}
    for dtype, size, features, archs in wanted:
        for arch in archs:
            tile = tile_of(kernel, dtype != "fp32", arch // 10, size, "few" in features, "window" in features)
            entries.setdefault((dtype, size, features, tile), []).append(arch)
    return [_entry(tensors, others, *key, tuple(archs)) for key, archs in entries.items()]


def _entry(tensors, others, dtype, size, features, tile, archs):
    given = ({"bias": "*fp32"} if "bias" in features else {}) | (_WINDOW if "window" in features else {})
    given |= _LIST if "blocks" in features else {}
    even = size == padded(size)
    fixed = {
        **{name: None for name in _NONE if name not in given},
        **{f"{name}_stride_d": 1 for name in ("q", "k", "v", "grad") if name in tensors},
        "HAS_BLOCKS": "blocks" in features,
        "HAS_SINKS": "sinks" in features,
        "SPLIT": "few" in features,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "INTERPRET": False,
        "EVEN": even,
        "EVEN_V": even,
        "BLOCK_M": tile.queries,
        "BLOCK_N": tile.keys,
        "BLOCK_D": padded(size),
        "BLOCK_V": padded(size),
        "STAGES": tile.stages,
        "HOIST": tile.hoist,
    }
    return {**dict.fromkeys(tensors, f"*{dtype}"), **given, "SCALE": "fp32", **others}, fixed, tile.warps, archs
