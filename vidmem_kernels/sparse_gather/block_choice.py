"""`topk_blocks` of blocks of their own lengths, with a mask of keys, blocks that are always there, and causal order.

Means are taken of blocks that are gathered into places of one length, and chosen among by the op itself, as blocks of
one row. Causal order alone has an op of its own, which holds the scores of some query blocks at a time.
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
    """Checks what a user gave as such; at most `most` blocks of a list have a place."""
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
    """(B, blocks, H, D) means of blocks of rows that the mask has; (B|1, blocks) whether a block has any."""
    batch, length, heads, channels = x.shape
    if sizes is None:
        sizes = block_sizes_of(length, size, x.device)
    rows = padded_rows(sizes, size).unsqueeze(0)
    if mask is not None:
        with_none = torch.cat([mask, mask.new_zeros(mask.shape[0], 1)], dim=1)  # which is what row -1 finds
        rows = torch.where(with_none[:, rows[0]], rows, -1)
    shape = (sizes.shape[0], size)
    count = (rows >= 0).unflatten(1, shape).sum(2)
    rows = rows.expand(batch, -1)
    taken = call("gather_tokens", x.flatten(2), rows, None, None, backend=backend)
    sums = taken.view(batch, *shape, heads, channels).sum(2, dtype=accumulate_dtype(x.dtype))
    return sums / count.clamp(min=1).unsqueeze(2).unsqueeze(3), count > 0


def _always(always: Sequence[int] | Tensor, blocks: Tensor) -> Tensor:
    """(nq|1, nk) mask of the blocks that a user wants always."""
    if not isinstance(always, Tensor):
        always = torch.tensor(always, dtype=torch.int64, device=blocks.device)
    return always if always.dtype == torch.bool else (always.unsqueeze(1) == blocks).any(0, keepdim=True)


def _best(q: Tensor, k: Tensor, present: Tensor, topk: int, backend: str | None) -> Tensor:
    """(B, H, nq, topk) blocks of the best scores; -1 where no more are present."""
    # The op knows no mask, but NaN counts as -inf, and of equal scores the first ones are taken: the others go last.
    order = (~present).sort(dim=1, stable=True).indices
    hidden = ~present.gather(1, order)
    k = k.gather(1, order.unsqueeze(2).unsqueeze(3).expand(k.shape)).masked_fill(
        hidden.unsqueeze(2).unsqueeze(3), torch.nan
    )
    index = call("topk_blocks", q, k, 1, 1, topk, backend=backend).long()
    order = order.masked_fill(hidden, -1).unsqueeze(1).unsqueeze(2)
    return order.expand(*index.shape[:3], -1).gather(3, index)


def _put_first(index: Tensor, priority: Tensor) -> Tensor:
    """The list with the blocks of a priority (B|1, nq|1, nk) above 0 before all others, whose order stays."""
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
    """See `vidmem_kernels.topk_blocks`; arguments as checked there, q and k of one dtype and of batch or 1."""
    q, k = q.detach(), k.detach()
    if key_mask is not None and not is_one(key_mask.shape[0]):
        k = k.expand(batch, *k.shape[1:])
    offset = k.shape[1] - q.shape[1]  # of causal order
    if causal:
        rows = q_sizes if q_sizes is not None else block_sizes_of(q.shape[1], block_size[0], q.device)
        columns = k_sizes if k_sizes is not None else block_sizes_of(k.shape[1], block_size[1], k.device)
        own = block_of(rows.cumsum(0) - 1 + offset, columns).unsqueeze(0)
    q, _ = _means(q, q_sizes, block_size[0], None, backend)
    k, present = _means(k, k_sizes, block_size[1], key_mask, backend)
    q, k = (x.expand(batch, *x.shape[1:]) for x in (q, k))
    blocks = torch.arange(k.shape[1], device=k.device)
    if causal:
        # Plain torch on every backend: no other has this op.
        index = call("topk_blocks_causal", q, k, own, present, topk, backend="auto").long()
    else:
        index = _best(q, k, present, topk, backend)
    if causal or always is not None:
        # Its own block first, then by number.
        wanted = blocks >= blocks.shape[0] if always is None else _always(always, blocks)
        priority = torch.where(wanted, blocks.shape[0] - blocks, 0)
        if causal:
            own = own.squeeze(0).unsqueeze(1)
            priority = priority.masked_fill(blocks > own, 0).masked_fill(blocks == own, blocks.shape[0] + 1)
        priority = torch.where(present.unsqueeze(1), priority, 0)
        index = _put_first(index, priority)
    return index.to(torch.int32)
