"""Cross-attention in plain differentiable torch: the oracle of every other backend.

Queries are taken a chunk at a time, with the scores of a chunk to all keys at once: memory is linear in L.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._numerics import accumulate_dtype, check_index

SCORE_BYTES = 64 * 2**20  # scores of one chunk of queries


def _read(x: Tensor) -> Tensor:
    """(B, L, H, D) as (B, H, L, D) in the dtype of the sums; contiguous, for matmul would copy it once a chunk."""
    return x.transpose(1, 2).to(accumulate_dtype(x.dtype)).contiguous()


class _Scores:
    """Scores of chunks of queries to all keys, with everything invisible at minus infinity."""

    def __init__(self, q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
        self.q, self.k, self.scale = q, k, scale
        self.num_sinks, self.window, self.block_index = num_sinks, window, block_index
        batch, _, heads, _ = q.shape
        self.length, self.keys = q.shape[1], k.shape[1]
        row_bytes = batch * heads * self.keys * accumulate_dtype(q.dtype).itemsize
        self.step = max(1, SCORE_BYTES // max(1, row_bytes))
        self.wide_k = _read(k)
        self.bias = None
        if key_bias is not None:
            bias = key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)
            self.bias = bias.to(accumulate_dtype(q.dtype)).unsqueeze(2)
        if window is not None:
            single = q_time.dtype == k_time.dtype == torch.float32
            dtype = torch.float32 if single else torch.float64
            self.q_time, self.k_time = (torch.atleast_2d(t.to(dtype)) for t in (q_time, k_time))
        if block_index is not None:
            self.query_block, self.key_block = block_size
            self.key_blocks = -(-self.keys // self.key_block)
            check_index("cross_attention", "block_index", block_index, -1, self.key_blocks)

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.step):
            yield start, min(start + self.step, self.length)

    def queries(self, start: int, stop: int) -> Tensor:
        return _read(self.q[:, start:stop])

    def _in_window(self, start: int, stop: int) -> Tensor:
        """(B|1, 1, n, Lk)"""
        left, right = self.window
        at, keys = self.q_time[:, start:stop, None], self.k_time[:, None]
        return ((at - left <= keys) & (keys <= at + right)).unsqueeze(1)

    def _in_blocks(self, start: int, stop: int) -> Tensor:
        """(B, H|1, n, Lk)"""
        row = torch.arange(start, stop, device=self.q.device) // self.query_block
        first = start // self.query_block
        index = self.block_index[:, :, first : (stop - 1) // self.query_block + 1].to(torch.int64)
        # -1 goes to one more block, dropped at once.
        index = torch.where(index < 0, self.key_blocks, index)
        table = index.new_zeros(*index.shape[:3], self.key_blocks + 1, dtype=torch.bool)
        table = table.scatter_(3, index, True)[..., : self.key_blocks]
        key = torch.arange(self.keys, device=self.q.device) // self.key_block
        return table[:, :, row - first][..., key]

    def visible(self, start: int, stop: int) -> Tensor | None:
        """Which query sees which key, broadcastable to (B, H, n, Lk); None if every one sees all."""
        if self.window is None and self.block_index is None:
            return None
        if self.block_index is None:
            seen = self._in_window(start, stop)
        else:
            seen = self._in_blocks(start, stop)
            if self.window is not None:
                seen = seen & self._in_window(start, stop)
        seen[..., : self.num_sinks] = True
        return seen

    def of(self, start: int, stop: int) -> Tensor:
        """(B, H, n, Lk)"""
        scores = self.queries(start, stop) @ self.wide_k.mT * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        seen = self.visible(start, stop)
        return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.cross_attention`; always returns lse."""
    options = (num_sinks, q_time, k_time, window, block_index, block_size, scale)
    scores = _Scores(q, k, key_bias, *options)
    batch, length, heads, _ = q.shape
    wide_v = _read(v)
    outs = [q.new_empty(batch, 0, heads, v.shape[3])]
    lses = [q.new_empty(batch, heads, 0, dtype=accumulate_dtype(q.dtype))]
    for start, stop in scores.spans():
        score = scores.of(start, stop)
        if scores.keys == 0:
            largest = score.new_zeros(*score.shape[:3], 1)
        else:
            largest = score.detach().amax(3, keepdim=True)
            largest = largest.masked_fill(largest == -torch.inf, 0)
        weight = (score - largest).exp()
        total = weight.sum(3, keepdim=True)
        empty = total == 0
        total = total.masked_fill(empty, 1)
        outs.append((weight @ wide_v / total).transpose(1, 2).to(q.dtype))
        lses.append((largest + total.log()).masked_fill(empty, -torch.inf).squeeze(3))
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def cross_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_sinks: int,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: list[float] | None,
    block_index: Tensor | None,
    block_size: list[int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and key_bias (no elements without one); probabilities are recomputed from lse."""
    options = (num_sinks, q_time, k_time, window, block_index, block_size, scale)
    scores = _Scores(q, k, key_bias, *options)
    wide_v = _read(v)
    grads_q = [q[:, :0]]
    grad_k, grad_v = torch.zeros_like(scores.wide_k), torch.zeros_like(wide_v)
    grad_bias = grad_k.new_zeros(grad_k.shape[:3])
    for start, stop in scores.spans():
        base = lse[:, :, start:stop, None]
        base = base.masked_fill(base == -torch.inf, 0)  # nothing is visible: every weight is 0
        weight = (scores.of(start, stop) - base).exp()
        grad = _read(grad_out[:, start:stop])
        # d lse / d score is the weight too, so grad_lse joins the term that all keys of a query share.
        shared = (grad * _read(out[:, start:stop])).sum(3, keepdim=True)
        if grad_lse is not None:
            shared = shared - grad_lse[:, :, start:stop, None]
        grad_v += weight.mT @ grad
        grad_score = weight.mul_(grad @ wide_v.mT - shared)
        if key_bias is not None:
            grad_bias += grad_score.sum(2)
        grads_q.append((grad_score @ scores.wide_k * scale).transpose(1, 2).to(q.dtype))
        grad_k += grad_score.mT @ scores.queries(start, stop)
    if key_bias is None:
        grad_bias = grad_bias.new_empty(0)
    elif key_bias.dim() == 2:
        grad_bias = grad_bias.sum(1)
    return (
        torch.cat(grads_q, dim=1),
        (grad_k * scale).transpose(1, 2).to(k.dtype),
        grad_v.transpose(1, 2).to(v.dtype),
        grad_bias if key_bias is None else grad_bias.to(key_bias.dtype),
    )


def merge_attention_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.merge_attention_states`."""
    lse = torch.stack(lses)
    largest = lse.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    total = (lse - largest).exp().sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    merged = (largest + total.log()).masked_fill(empty, -torch.inf)
    out = 0
    for part, part_lse in zip(outs, lses, strict=True):
        weight = ((part_lse - largest).exp() / total).transpose(1, 2).unsqueeze(3)
        out = out + weight * part
    return out.to(outs[0].dtype), merged


def merge_attention_states_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor], lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of outs (n, B, L, H, D) and lses (n, B, H, L), stacked."""
    base = lse.masked_fill(lse == -torch.inf, 0)
    weights = [(part - base).exp() for part in lses]
    along = [(grad_out * part.to(lse.dtype)).sum(3).transpose(1, 2) for part in outs]
    shared = sum(w * a for w, a in zip(weights, along, strict=True))
    if grad_lse is not None:
        shared = shared - grad_lse
    grad_outs = [(w.transpose(1, 2).unsqueeze(3) * grad_out).to(grad_out.dtype) for w in weights]
    grad_lses = [w * (a - shared) for w, a in zip(weights, along, strict=True)]
    return torch.stack(grad_outs), torch.stack(grad_lses)
