"""`topk_blocks` with blocks of different lengths, a key mask, blocks that are always chosen, and causal order.

The means are computed from blocks padded to one length; the op then chooses among the means as blocks of one row.
Causal order has its own op, which holds the scores of only some query blocks at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._blocks import block_of, block_sizes_of, check_values, padded_rows
from .._call import call
from .._checks import INDEX_DTYPES, check_int, check_same, check_tensor, is_one
from .._numerics import accumulate_dtype


def check_always(op: str, always: Sequence[int] | Tensor, q: Tensor, blocks_q: int, blocks_k: int, most: int) -> None:
    """Checks the user's `always`; a list may have at most `most` blocks."""
    if isinstance(always, Tensor):
        check_same(op, "q and always must be on the same device", q.device, always.device)
        if always.dtype == torch.bool:
            check_tensor(op, "always", always, "blocks of q, blocks of k", (torch.bool,))
            wanted = blocks_q, blocks_k
            check_same(op, "always must have shape (blocks of q, blocks of k)", wanted, tuple(always.shape))
            return
        check_tensor(op, "always", always, "blocks", INDEX_DTYPES)
        check_values(op, "always", always, 0, blocks_k)
        count = always.shape[0]
    elif isinstance(always, tuple | list):
        for i, block in enumerate(always):
            check_int(op, f"always[{i}]", block, 0, blocks_k - 1)
        count = len(set(always))
    else:
        raise TypeError(f"{op}: always must be block numbers or a bool mask, got {type(always).__name__}")
    check_int(op, "the number of blocks in always", count, 0, most)


def _means(
    x: Tensor, sizes: Tensor | None, size: int, mask: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """(B, blocks, H, D) means over the rows that the mask keeps; (B or 1, blocks) whether a block has such rows."""
    batch, length, heads, channels = x.shape
    if sizes is None:
        sizes = block_sizes_of(length, size, x.device)
    rows = padded_rows(sizes, size).unsqueeze(0)
    if mask is not None:
        with_none = torch.cat([mask, mask.new_zeros(mask.shape[0], 1)], dim=1)  # for row -1
        rows = torch.where(with_none[:, rows[0]], rows, -1)
    shape = (sizes.shape[0], size)
    count = (rows >= 0).unflatten(1, shape).sum(2)
    rows = rows.expand(batch, -1)
    taken = call("gather_tokens", x.flatten(2), rows, None, None, backend=backend)
    sums = taken.view(batch, *shape, heads, channels).sum(2, dtype=accumulate_dtype(x.dtype))
    return sums / count.clamp(min=1).unsqueeze(2).unsqueeze(3), count > 0


def _always(always: Sequence[int] | Tensor, blocks: Tensor) -> Tensor:
    """(query blocks or 1, key blocks) mask of the blocks that are always chosen."""
    if not isinstance(always, Tensor):
        always = torch.tensor(always, dtype=torch.int64, device=blocks.device)
    return always if always.dtype == torch.bool else (always.unsqueeze(1) == blocks).any(0, keepdim=True)


def _best(q: Tensor, k: Tensor, present: Tensor, topk: int, backend: str | None) -> Tensor:
    """(B, H, query blocks, topk) blocks with the best scores; -1 if fewer are present."""
    # The op has no mask, but it treats NaN as -inf and takes the first of equal scores: hidden blocks come last.
    order = (~present).sort(dim=1, stable=True).indices
    hidden = ~present.gather(1, order)
    k = k.gather(1, order.unsqueeze(2).unsqueeze(3).expand(k.shape)).masked_fill(
        hidden.unsqueeze(2).unsqueeze(3), torch.nan
    )
    index = call("topk_blocks", q, k, 1, 1, topk, backend=backend).long()
    order = order.masked_fill(hidden, -1).unsqueeze(1).unsqueeze(2)
    return order.expand(*index.shape[:3], -1).gather(3, index)


def _put_first(index: Tensor, priority: Tensor) -> Tensor:
    """Moves blocks of positive priority (B or 1, query blocks or 1, key blocks) to the front, the highest first."""
    topk = index.shape[3]
    found = priority.topk(topk, dim=2)
    first = found.indices.masked_fill(found.values == 0, -1).unsqueeze(1)
    first = first.expand(index.shape)
    chosen = priority.unsqueeze(1).expand(*index.shape[:3], -1).gather(3, index.clamp(min=0)) > 0
    index = index.masked_fill(chosen, -1)
    both = torch.cat([first, index], dim=3)
    return both.gather(3, (both < 0).sort(dim=3, stable=True).indices[..., :topk])


def choose_blocks(
    q: Tensor,
    k: Tensor,
    batch: int,
    block_size: tuple[int, int],
    topk: int,
    q_sizes: Tensor | None,
    k_sizes: Tensor | None,
    key_mask: Tensor | None,
    always: Sequence[int] | Tensor | None,
    causal: bool,
    backend: str | None,
) -> Tensor:
    """See `vidmem_kernels.topk_blocks`; takes checked arguments, q and k of one dtype and of the batch or batch 1."""
    q, k = q.detach(), k.detach()
    if key_mask is not None and not is_one(key_mask.shape[0]):
        k = k.expand(batch, *k.shape[1:])
    offset = k.shape[1] - q.shape[1]  # aligns queries to the end of the keys
    if causal:
        rows = q_sizes if q_sizes is not None else block_sizes_of(q.shape[1], block_size[0], q.device)
        columns = k_sizes if k_sizes is not None else block_sizes_of(k.shape[1], block_size[1], k.device)
        own = block_of(rows.cumsum(0) - 1 + offset, columns).unsqueeze(0)
    q, _ = _means(q, q_sizes, block_size[0], None, backend)
    k, present = _means(k, k_sizes, block_size[1], key_mask, backend)
    q, k = (x.expand(batch, *x.shape[1:]) for x in (q, k))
    blocks = torch.arange(k.shape[1], device=k.device)
    if causal:
        # Plain PyTorch on every backend: no other implements this op.
        index = call("topk_blocks_causal", q, k, own, present, topk, backend="auto").long()
    else:
        index = _best(q, k, present, topk, backend)
    if causal or always is not None:
        # The query block's own block first, then by number.
        wanted = blocks >= blocks.shape[0] if always is None else _always(always, blocks)
        priority = torch.where(wanted, blocks.shape[0] - blocks, 0)
        if causal:
            own = own.squeeze(0).unsqueeze(1)
            priority = priority.masked_fill(blocks > own, 0).masked_fill(blocks == own, blocks.shape[0] + 1)
        priority = torch.where(present.unsqueeze(1), priority, 0)
        index = _put_first(index, priority)
    return index.to(torch.int32)
