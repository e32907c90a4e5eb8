"""Radix select in Triton: finds the largest keys of each row.

The result is the cut: the last key chosen, and how many of the keys equal to it are chosen. For a row of up to _HELD
tiles of 32-bit keys, one program holds all keys in registers and bisects. Longer rows take one pass per digit, the
highest first, which counts the keys that share the digits known so far. Both also count the chosen keys of each tile,
so that tiles can proceed independently. All counts are integers, so the result is deterministic. No step waits for the
GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton_tiles import tile_of
from ._tuned import Tunable

TILE = 1024  # keys of a program
_HELD = 32  # tiles of a row that one program holds: 32 keys a thread
BISECT = Tunable(
    "_bisect_kernel",
    ("tiles",),
    default=lambda arch, tiles: {"num_warps": min(32, 2 * tiles)},
    candidates=lambda arch, tiles: [{"num_warps": warps} for warps in (4, 8, 16, 32) if warps >= tiles // 2],
)
# Values of a digit: fewer than TILE, for each program scans all of them and adds its counts to those in memory.
_BINS = tl.constexpr(256)


@triton.jit
def order_key(score):
    """int32 for float32, int64 for float64, in the same order; NaN counts as -inf, -0 as 0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0, 0.0, score)
    if score.dtype == tl.float64:
        bits = score.to(tl.int64, bitcast=True)
        return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFFFFFFFFFF)
    else:
        bits = score.to(tl.int32, bitcast=True)
        return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def _first_bin(prefix, digit):
    """The leading digits of the lowest key with this prefix; the highest digit is signed."""
    return tl.where(digit == 0, -_BINS // 2, prefix * _BINS)


@triton.jit
def _narrow(key, bins, batch, want, digits):
    """The leading digits of the `want`-th largest key, and how many of the keys that share them are wanted."""
    dtype: tl.constexpr = key.dtype.element_ty
    i = tl.arange(0, _BINS)
    bins += batch * (dtype.primitive_bitwidth // 8) * _BINS
    prefix, want = tl.full((), 0, dtype), tl.full((), want, tl.int32)
    for digit in range(digits):
        counts = tl.load(bins + digit * _BINS + i)
        at_least = tl.cumsum(counts, axis=0, reverse=True)
        here = tl.sum((at_least >= want).to(tl.int32), axis=0) - 1
        prefix = (_first_bin(prefix, digit) + here).to(dtype)
        want -= tl.sum(tl.where(i > here, counts, 0), axis=0)
    return prefix, want


@triton.jit(do_not_specialize=["digit"])
def _histogram_kernel(key, bins, N, want, digit, BLOCK: tl.constexpr):
    """Counts the values of a digit over the keys whose earlier digits equal those of the `want`-th largest key."""
    batch, n = tile_of(N, BLOCK)
    dtype: tl.constexpr = key.dtype.element_ty
    prefix, _ = _narrow(key, bins, batch, want, digit)
    value = tl.load(key + batch * N + n, n < N, other=0)
    shift = (dtype.primitive_bitwidth - 8 - 8 * digit).to(dtype)
    # Subtraction wraps for other prefixes, but never to a valid bin.
    at = (value >> shift) - _first_bin(prefix, digit).to(dtype)
    shares = (n < N) & (at >= 0) & (at < _BINS)
    found = tl.histogram(tl.where(shares, at, 0).to(tl.int32), _BINS, mask=shares)
    target = bins + (batch * (dtype.primitive_bitwidth // 8) + digit) * _BINS + tl.arange(0, _BINS)
    tl.atomic_add(target, found, found > 0, sem="relaxed")


@triton.jit
def _compare(key, last, N, BLOCK: tl.constexpr):
    """Which keys of a tile are above the last one chosen, and which are equal to it."""
    batch, n = tile_of(N, BLOCK)
    value = tl.load(key + batch * N + n, n < N, other=0)
    return ((n < N) & (value > last)).to(tl.int32), ((n < N) & (value == last)).to(tl.int32)


@triton.jit
def _count_kernel(key, bins, cut, counts, N, want, BLOCK: tl.constexpr):
    """Finds the cut, and counts per tile the keys above it and those equal to it."""
    batch = (tl.program_id(0) // tl.cdiv(N, BLOCK)).to(tl.int64)
    last, wanted = _narrow(key, bins, batch, want, key.dtype.element_ty.primitive_bitwidth // 8)
    above, equal = _compare(key, last, N, BLOCK)
    counts += tl.program_id(0).to(tl.int64) * 2
    tl.store(counts, tl.sum(above, axis=0))
    tl.store(counts + 1, tl.sum(equal, axis=0))
    is_first = tl.program_id(0) % tl.cdiv(N, BLOCK) == 0
    tl.store(cut + batch * 2, last, is_first)
    tl.store(cut + batch * 2 + 1, wanted.to(last.dtype), is_first)


@triton.jit
def _bisect_kernel(key, cut, counts, N, want, TILES: tl.constexpr, BLOCK: tl.constexpr):
    """Same as `_count_kernel`, for a row of up to TILES tiles of BLOCK int32 keys in one program."""
    batch = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    n = tile[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    key += batch * N
    value = tl.load(key + n, n < N, other=-(2**31))
    low, high = tl.min(tl.min(value, axis=1), axis=0), tl.max(tl.max(value, axis=1), axis=0)
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # rounded up; without overflow
        enough = tl.sum(tl.sum((value >= middle).to(tl.int32), axis=1), axis=0) >= want
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle - 1)
    above = tl.sum((value > low).to(tl.int32), axis=1)
    equal = tl.sum(((n < N) & (value == low)).to(tl.int32), axis=1)
    tiles = tl.cdiv(N, BLOCK)
    target = counts + (batch * tiles + tile) * 2
    tl.store(target, above, tile < tiles)
    tl.store(target + 1, equal, tile < tiles)
    tl.store(cut + batch * 2, low)
    tl.store(cut + batch * 2 + 1, want - tl.sum(above, axis=0))


@triton.jit
def chosen_of_tile(key, cut, counts, N, BLOCK: tl.constexpr):
    """Whether each key of a program's tile is among the largest, and how many such keys come before it.

    Of equal keys the first ones are chosen. `cut` and `counts` are from `find_cut`, BLOCK is TILE.
    """
    tiles = tl.cdiv(N, BLOCK)
    tile = tl.program_id(0) % tiles
    cut += (tl.program_id(0) // tiles).to(tl.int64) * 2
    wanted = tl.load(cut + 1).to(tl.int32)
    above, equal = _compare(key, tl.load(cut), N, BLOCK)
    counts += (tl.program_id(0) - tile).to(tl.int64) * 2
    above_before, equal_before = tl.zeros([BLOCK], dtype=tl.int32), tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, tile, BLOCK):
        i = first + tl.arange(0, BLOCK)
        above_before += tl.load(counts + i * 2, i < tile, other=0)
        equal_before += tl.load(counts + i * 2 + 1, i < tile, other=0)
    taken = tl.minimum(tl.sum(equal_before, axis=0), wanted)  # equal ones that are chosen of the tiles before
    chosen = above | (equal & (tl.cumsum(equal, axis=0) <= wanted - taken).to(tl.int32))
    return chosen > 0, tl.sum(above_before, axis=0) + taken + tl.cumsum(chosen, axis=0) - chosen


def programs(key: Tensor) -> tuple[int]:
    """The grid of a kernel with one program per tile of keys (B, N)."""
    return (key.shape[0] * triton.cdiv(key.shape[1], TILE),)


def find_cut(key: Tensor, want: int) -> tuple[Tensor, Tensor]:
    """The cut and counts that `chosen_of_tile` needs for contiguous keys (B, N), of which 1 <= want <= N are chosen."""
    batch, count = key.shape
    cut = torch.empty(batch, 2, dtype=key.dtype, device=key.device)
    counts = torch.empty(*programs(key), 2, dtype=torch.int32, device=key.device)
    if key.dtype == torch.int32 and count <= _HELD * TILE:
        tiles = 4 if count <= 4 * TILE else _HELD  # two sizes, whatever N is
        tile = BISECT.tile(key.device, tiles=tiles)
        _bisect_kernel[(batch,)](key, cut, counts, count, want, TILES=tiles, BLOCK=TILE, **tile)
        return cut, counts
    digits = key.element_size()
    bins = torch.zeros(batch, digits, _BINS.value, dtype=torch.int32, device=key.device)
    for digit in range(digits):
        _histogram_kernel[programs(key)](key, bins, count, want, digit, BLOCK=TILE)
    _count_kernel[programs(key)](key, bins, cut, counts, count, want, BLOCK=TILE)
    return cut, counts


# See sparse_gather.triton_gather.AOT.
_KEYS = ("i32", "i64")
AOT = {
    "_histogram_kernel": [({"key": f"*{key}", "bins": "*i32"}, {"BLOCK": TILE}, 4) for key in _KEYS],
    "_count_kernel": [
        ({"key": f"*{key}", "bins": "*i32", "cut": f"*{key}", "counts": "*i32"}, {"BLOCK": TILE}, 4) for key in _KEYS
    ],
    "_bisect_kernel": [
        ({"key": "*i32", "cut": "*i32", "counts": "*i32"}, {"TILES": tiles, "BLOCK": TILE}, (BISECT, {"tiles": tiles}))
        for tiles in (4, _HELD)
    ],
}
