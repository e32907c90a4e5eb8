"""Which tiles of keys a tile of queries needs, listed in torch before a kernel of cross-attention runs.

A window is compared as ranks of the key times, in the type that the reference compares them in. No step here waits for
a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .times import window_bounds

_NEVER = 2**31 - 1  # a rank that no window holds
_DROPPED = 2**63 - 1


@dataclass
class Tiles:
    """Entries 2 * tile + listed; those of row r of a lane are entries[begin:middle], where all is visible, and
    entries[middle:end]. `listed` is 0 where a block is there for its sinks alone.
    """

    entries: Tensor  # int32
    ranges: Tensor  # (lanes, rows, 3) int64: begin, middle, end
    batch_stride: int  # in lanes
    head_stride: int


def rank_times(q_time: Tensor, k_time: Tensor, window: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """rank (B|1, Lk), low and high (B|1, Lq), int32: key j is in query i's window iff low[i] <= rank[j] < high[i]."""
    first, last, keys = window_bounds(q_time, k_time, window)
    missing = keys != keys  # NaN
    keys = keys.masked_fill(missing, torch.inf) if keys.is_floating_point() else keys
    ordered = keys.sort(dim=1).values
    if ordered.shape[0] == 1:
        low, high = (torch.searchsorted(ordered[0], t, right=r) for t, r in ((first, False), (last, True)))
    else:
        first, last = (t.expand(ordered.shape[0], -1).contiguous() for t in (first, last))
        low, high = (torch.searchsorted(ordered, t, right=r) for t, r in ((first, False), (last, True)))
    rank = torch.searchsorted(ordered, keys.contiguous()).masked_fill(missing, _NEVER)
    low = low.masked_fill((first != first) | (last != last), _NEVER)
    return rank.int(), low.int(), high.int()


def _tiled(x: Tensor, size: int, block: int, fill: int) -> Tensor:
    """(B, L) as (B, tiles, block): tiles of blocks of `size`, the ends filled up."""
    batch, length = x.shape
    blocks, parts = triton.cdiv(length, size), triton.cdiv(size, block)
    x = F.pad(x, (0, blocks * size - length), value=fill).view(batch, blocks, size)
    return F.pad(x, (0, parts * block - size), value=fill).view(batch, blocks * parts, block)


@dataclass
class Visibility:
    """What hides keys: ranks of times or a block index (or both), with sinks."""

    queries: int
    keys: int
    sinks: int
    ranks: tuple[Tensor, Tensor, Tensor] | None
    block_index: Tensor | None  # int64
    size_q: int
    size_k: int

    def tiles(self, block_m: int, block_n: int, by_key: bool) -> Tiles:
        """The tiles of keys of every tile of queries; `by_key` the tiles of queries of every tile of keys."""
        parts_k = triton.cdiv(self.size_k, block_n)
        tiles_q = triton.cdiv(self.queries, self.size_q) * triton.cdiv(self.size_q, block_m)
        tiles_k = triton.cdiv(self.keys, self.size_k) * parts_k
        tile, listed, kept = self._candidates(tiles_q, tiles_k, parts_k)
        start = tile // parts_k * self.size_k + tile % parts_k * block_n
        stop = ((tile // parts_k + 1) * self.size_k).clamp(max=self.keys)
        every = some = listed
        if self.ranks is not None:
            in_full, in_part = self._in_window(tile, block_m, block_n)
            every, some = every & in_full, some & in_part
        full = (start + block_n <= stop) & (every | (start + block_n <= self.sinks))
        kept = kept & (start < stop) & (some | (start < self.sinks))
        batch, heads = kept.shape[:2]
        lane = torch.arange(batch * heads, device=kept.device).view(batch, heads, 1, 1)
        query = torch.arange(tiles_q, device=kept.device).view(-1, 1)
        rows, row, others, other = (tiles_k, tile, tiles_q, query) if by_key else (tiles_q, query, tiles_k, tile)
        order = (((lane * rows + row) * 2 + ~full) * others + other) * 2 + listed
        order = order.masked_fill(~kept, _DROPPED).flatten().sort().values
        bounds = torch.arange(batch * heads * rows * 2 + 1, device=kept.device) * (2 * others)
        at = torch.searchsorted(order, bounds)
        ranges = torch.stack([at[:-1:2], at[1::2], at[2::2]], dim=1)
        entries = (order % max(1, 2 * others)).int()
        return Tiles(entries, ranges, heads if batch > 1 else 0, 1 if heads > 1 else 0)

    def _candidates(self, tiles_q: int, tiles_k: int, parts_k: int) -> tuple[Tensor, Tensor, Tensor]:
        """(B|1, H|1, tiles of queries, candidates): tile of keys, whether its block is listed, whether it counts."""
        if self.block_index is None:
            rank, low, _ = self.ranks
            tile = torch.arange(tiles_k, device=rank.device)
            tile = tile.expand(max(rank.shape[0], low.shape[0]), 1, tiles_q, tiles_k)
            return tile, torch.ones_like(tile, dtype=torch.bool), torch.ones_like(tile, dtype=torch.bool)
        index = self.block_index
        sinks = torch.arange(triton.cdiv(self.sinks, self.size_k), device=index.device) * 2 + 1
        # A listed block sorts before the same one as a sink's; the first of equal ones is kept.
        codes = torch.cat([index.masked_fill(index < 0, _NEVER) * 2, sinks.expand(*index.shape[:3], -1)], dim=3)
        codes = codes.sort(dim=3).values
        block, listed = codes >> 1, codes % 2 == 0
        kept = block != _NEVER
        kept[..., 1:] &= block[..., 1:] != block[..., :-1]
        block = block.masked_fill(~kept, 0)
        tile = block[..., None] * parts_k + torch.arange(parts_k, device=index.device)
        each = [t[..., None].expand_as(tile).flatten(3) for t in (listed, kept)]
        rows = index.shape[2]
        row = torch.arange(tiles_q, device=index.device) // (tiles_q // rows if rows else 1)
        return tile.flatten(3)[:, :, row], each[0][:, :, row], each[1][:, :, row]

    def _in_window(self, tile: Tensor, block_m: int, block_n: int) -> tuple[Tensor, Tensor]:
        """Whether all queries of a tile see all its keys, and whether any may see one."""
        rank, low, high = self.ranks
        low_most = _tiled(low, self.size_q, block_m, -1).amax(2)[:, None, :, None]
        high_least = _tiled(high, self.size_q, block_m, _NEVER).amin(2)[:, None, :, None]
        least = _tiled(rank, self.size_k, block_n, _NEVER).amin(2)
        most = _tiled(rank, self.size_k, block_n, -1).amax(2)
        least, most = (
            t[:, None, None].expand(*tile.shape[:1], *tile.shape[1:3], -1).gather(3, tile) for t in (least, most)
        )
        full = (least >= low_most) & (most < high_least)
        # Of the windows that begin by the last of the keys, the one that ends last. Those of a tile may leave a gap.
        begins, order = _tiled(low, self.size_q, block_m, _NEVER).sort(2)
        ends = _tiled(high, self.size_q, block_m, -1).gather(2, order).cummax(2).values
        ends = F.pad(ends, (1, 0), value=-1)
        shape = (most.shape[0], *begins.shape[1:])
        begun = torch.searchsorted(
            begins.expand(shape)[:, None].expand(-1, most.shape[1], -1, -1).contiguous(), most, right=True
        )
        last = ends.expand(shape[0], -1, -1)[:, None].expand(-1, most.shape[1], -1, -1).gather(3, begun)
        return full, last > least


@dataclass
class Call:
    """Arguments of one call, as the kernels want them."""

    queries: int
    keys: int
    key_bias: Tensor | None  # (B, H|1, Lk) float32
    visibility: Visibility | None
    sinks: int

    @classmethod
    def of(cls, q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size) -> Call:
        if key_bias is not None:
            key_bias = key_bias.to(torch.float32)
            key_bias = key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)
        queries, keys = q.shape[1], k.shape[1]
        if (window is None and block_index is None) or 0 in (queries, keys):
            return cls(queries, keys, key_bias, None, 0)
        size_q, size_k = queries, keys
        ranks = None if window is None else rank_times(q_time, k_time, window)
        if block_index is not None:
            size_q, size_k = min(size_q, block_size[0]), min(size_k, block_size[1])
            block_index = block_index.to(torch.int64)
        seen = Visibility(queries, keys, num_sinks, ranks, block_index, size_q, size_k)
        return cls(queries, keys, key_bias, seen, num_sinks)

    @property
    def windowed(self) -> bool:
        return self.visibility is not None and self.visibility.ranks is not None

    def limits(self, block_m: int, block_n: int) -> tuple[int, int]:
        """Tile sizes of at most these that waste least on the blocks of queries and keys."""
        if self.visibility is None:
            return block_m, block_n
        sizes = (self.visibility.size_q, self.visibility.size_k)
        return tuple(min(b, max(16, triton.next_power_of_2(s))) for b, s in zip((block_m, block_n), sizes, strict=True))

    def query_tiles(self, block: int) -> int:
        """Tiles of queries, each in one block."""
        size = max(1, self.queries) if self.visibility is None else self.visibility.size_q
        return triton.cdiv(self.queries, size) * triton.cdiv(size, block)

    def key_tiles(self, block: int) -> int:
        """Tiles of keys, each in one block."""
        size = max(1, self.keys) if self.visibility is None else self.visibility.size_k
        return triton.cdiv(self.keys, size) * triton.cdiv(size, block)

    def arguments(self, block_m: int, block_n: int, by_key: bool) -> dict[str, object]:
        """Those that all kernels share."""
        found = dict.fromkeys(("bias", "rank", "low", "high", "ranges", "entries"))
        names = ("bias_stride_b", "bias_stride_h", "bias_stride_k", "rank_stride_b", "low_stride_b")
        found |= dict.fromkeys((*names, "tiles_stride_b", "tiles_stride_h"), 0)
        found |= {"SIZE_Q": 1, "SIZE_K": 1, "SINKS": self.sinks, "HAS_SINKS": self.sinks > 0, "HAS_BLOCKS": False}
        if self.key_bias is not None:
            batch, head, key = self.key_bias.stride()
            found |= {"bias": self.key_bias, "bias_stride_b": batch, "bias_stride_k": key}
            found["bias_stride_h"] = head if self.key_bias.shape[1] > 1 else 0
        seen = self.visibility
        if seen is not None:
            tiles = seen.tiles(block_m, block_n, by_key)
            found |= {"ranges": tiles.ranges, "entries": tiles.entries}
            found |= {"tiles_stride_b": tiles.batch_stride, "tiles_stride_h": tiles.head_stride}
            found |= {"SIZE_Q": seen.size_q, "SIZE_K": seen.size_k, "HAS_BLOCKS": seen.block_index is not None}
            if seen.ranks is not None:
                rank, low, high = (t.contiguous() for t in seen.ranks)
                found |= {"rank": rank, "low": low, "high": high}
                found["rank_stride_b"] = rank.shape[1] if rank.shape[0] > 1 else 0
                found["low_stride_b"] = low.shape[1] if low.shape[0] > 1 else 0
        return found
