"""Cross-attention in plain differentiable PyTorch: the reference for all other backends.

Queries are processed in chunks, each with its scores to all keys, so memory is linear in the sequence length.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._numerics import accumulate_dtype, check_index
from .times import window_bounds

SCORE_BYTES = 64 * 2**20  # scores of one chunk of queries


def _plain(*tensors: Tensor | None) -> list[Tensor | None]:
    """Gives empty tensors contiguous strides: PyTorch refuses some operations with the huge strides that they may
    have."""
    return [x.clone(memory_format=torch.contiguous_format) if x is not None and x.numel() == 0 else x for x in tensors]


def _read(x: Tensor) -> Tensor:
    """(B, L, H, D) as contiguous (B, H, L, D) in the accumulation dtype; otherwise matmul would copy it for each
    chunk."""
    return x.transpose(1, 2).to(accumulate_dtype(x.dtype)).contiguous()


def _finite(x: Tensor) -> Tensor:
    return x.masked_fill(~x.isfinite(), 0)


def _products(x: Tensor, y: Tensor, seen: Tensor | None) -> Tensor:
    """x @ y.mT. With `seen`, infinities and NaN of one row do not affect the gradient of another."""
    if seen is None:
        return x @ y.mT
    finite = _finite(x) @ _finite(y).mT
    exact = x.detach() @ y.detach().mT
    return finite + torch.where(exact == finite, 0, exact - finite).detach()


def _sums(weight: Tensor, x: Tensor, seen: Tensor | None) -> Tensor:
    """weight @ x, where weights are 0 if not `seen`; infinities and NaN of x that are not seen do not enter the sum."""
    if seen is None:
        return weight @ x
    total = weight @ _finite(x)
    # Seen infinities and NaN: the sum of their signs and their number. The result is infinite only if all signs agree.
    weight, x, seen = weight.detach(), x.detach(), seen.to(weight.dtype)
    signs = weight.sign() @ x.sign().masked_fill(~x.isinf(), 0)
    count = seen @ (~x.isfinite()).to(weight.dtype)
    special = torch.where(signs.abs() == count, signs * torch.inf, torch.nan)
    return total + torch.where(count > 0, special, 0)


class _Scores:
    """Scores of chunks of queries to all keys, with -inf for everything hidden."""

    def __init__(self, q, k, key_bias, num_sinks, q_time, k_time, window, block_index, block_size, scale):
        self.q, self.k, self.scale = q, k, scale
        self.num_sinks, self.window, self.block_index = num_sinks, window, block_index
        batch, _, heads, _ = q.shape
        self.length, self.keys = q.shape[1], k.shape[1]
        row_bytes = batch * heads * self.keys * accumulate_dtype(q.dtype).itemsize
        self.step = max(1, SCORE_BYTES // max(1, row_bytes))
        self.bias = self.gone = None
        if key_bias is not None:
            bias = key_bias if key_bias.dim() == 3 else key_bias.unsqueeze(1)
            self.bias = bias.to(accumulate_dtype(q.dtype)).unsqueeze(2)
            self.gone = self.bias == -torch.inf  # (B, H|1, 1, Lk)
        self.wide_k = self.there(_read(k))
        if window is not None:
            self.first, self.last, self.k_time = window_bounds(q_time, k_time, window)
        if block_index is not None:
            self.query_block, self.key_block = block_size
            self.key_blocks = -(-self.keys // self.key_block)
            check_index("cross_attention", "block_index", block_index, -1, self.key_blocks)

    def spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.length, self.step):
            yield start, min(start + self.step, self.length)

    def queries(self, start: int, stop: int) -> Tensor:
        return _read(self.q[:, start:stop])

    def there(self, x: Tensor) -> Tensor:
        """Rows of keys or values, (B, H, Lk, C), with zeros where a bias of -inf hides a key from all queries."""
        return x if self.gone is None else x.masked_fill(self.gone.mT, 0)

    def _in_window(self, start: int, stop: int) -> Tensor:
        """(B or 1, 1, n, Lk): which query of the chunk sees which key by its time."""
        first, last = (t[:, start:stop, None] for t in (self.first, self.last))
        keys = self.k_time[:, None]
        return ((first <= keys) & (keys <= last)).unsqueeze(1)

    def _in_blocks(self, start: int, stop: int) -> Tensor:
        """(B, H or 1, n, Lk): which query of the chunk sees which key by the block list."""
        row = torch.arange(start, stop, device=self.q.device) // self.query_block
        first = start // self.query_block
        index = self.block_index[:, :, first : (stop - 1) // self.query_block + 1].to(torch.int64)
        # -1 goes to an extra block, which is dropped.
        index = torch.where(index < 0, self.key_blocks, index)
        table = index.new_zeros(*index.shape[:3], self.key_blocks + 1, dtype=torch.bool)
        table = table.scatter(3, index, True)[..., : self.key_blocks]
        key = torch.arange(self.keys, device=self.q.device) // self.key_block
        return table[:, :, row - first][..., key]

    def visible(self, start: int, stop: int) -> Tensor | None:
        """Which query sees which key, broadcastable to (B, H, n, Lk); None if all see the same keys."""
        if self.window is None and self.block_index is None:
            return None
        if self.block_index is None:
            seen = self._in_window(start, stop)
        else:
            seen = self._in_blocks(start, stop)
            if self.window is not None:
                seen = seen & self._in_window(start, stop)
        seen = seen | (torch.arange(self.keys, device=self.q.device) < self.num_sinks)
        return seen if self.gone is None else seen & ~self.gone

    def hide(self, x: Tensor, seen: Tensor | None, value: float) -> Tensor:
        """`x` (B, H, n, Lk) with `value` where a key is hidden from the query, or from all queries."""
        hidden = self.gone if seen is None else ~seen
        return x if hidden is None else x.masked_fill(hidden, value)

    def of(self, start: int, stop: int, seen: Tensor | None) -> Tensor:
        """(B, H, n, Lk) scores, also of hidden keys."""
        scores = _products(self.queries(start, stop), self.wide_k, seen) * self.scale
        return scores if self.bias is None else scores + self.bias


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
    q, k, v, key_bias = _plain(q, k, v, key_bias)
    options = (num_sinks, q_time, k_time, window, block_index, block_size, scale)
    scores = _Scores(q, k, key_bias, *options)
    batch, length, heads, _ = q.shape
    wide_v = scores.there(_read(v))
    outs = [q.new_empty(batch, 0, heads, v.shape[3])]
    lses = [q.new_empty(batch, heads, 0, dtype=accumulate_dtype(q.dtype))]
    for start, stop in scores.spans():
        seen = scores.visible(start, stop)
        score = scores.of(start, stop, seen)
        if scores.keys == 0:
            largest = score.new_zeros(*score.shape[:3], 1)
        else:
            largest = scores.hide(score.detach(), seen, -torch.inf).amax(3, keepdim=True)
            largest = largest.masked_fill(largest == -torch.inf, 0)
        # Masked after the subtraction: -inf minus NaN would be NaN.
        weight = scores.hide(score - largest, seen, -torch.inf).exp()
        total = weight.sum(3, keepdim=True)
        empty = total == 0
        # A NaN sum needs no division, and a NaN divisor would make the gradient of every value NaN.
        divisor = total.masked_fill(empty | total.isnan(), 1)
        outs.append((_sums(weight, wide_v, seen) / divisor).transpose(1, 2).to(q.dtype))
        total = total.masked_fill(empty, 1)
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
    """Gradients of q, k, v and key_bias (empty without one); the weights are recomputed from lse."""
    grad_out, grad_lse, q, k, v, key_bias, out, lse = _plain(grad_out, grad_lse, q, k, v, key_bias, out, lse)
    options = (num_sinks, q_time, k_time, window, block_index, block_size, scale)
    scores = _Scores(q, k, key_bias, *options)
    wide_v = scores.there(_read(v))
    grads_q = [q[:, :0]]
    grad_k, grad_v = torch.zeros_like(scores.wide_k), torch.zeros_like(wide_v)
    grad_bias = grad_k.new_zeros(grad_k.shape[:3])
    for start, stop in scores.spans():
        base = lse[:, :, start:stop, None]
        base = base.masked_fill(base == -torch.inf, 0)  # no key is visible: all weights are 0
        seen = scores.visible(start, stop)
        weight = scores.hide((scores.of(start, stop, seen) - base).exp(), seen, 0)
        grad = _read(grad_out[:, start:stop])
        # d lse / d score is the weight, so grad_lse is subtracted from the term that all keys of a query share.
        shared = (grad * _read(out[:, start:stop])).sum(3, keepdim=True)
        if grad_lse is not None:
            shared = shared - grad_lse[:, :, start:stop, None]
        grad_score = scores.hide(weight * (_products(grad, wide_v, seen) - shared), seen, 0)
        if key_bias is not None:
            grad_bias = grad_bias + grad_score.sum(2)
        grads_q.append((_sums(grad_score, scores.wide_k, seen) * scale).transpose(1, 2).to(q.dtype))
        seeing = None if seen is None else seen.mT
        grad_v = grad_v + _sums(weight.mT, grad, seeing)
        grad_k = grad_k + _sums(grad_score.mT, scores.queries(start, stop), seeing)
    grad_k, grad_v = scores.there(grad_k), scores.there(grad_v)
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
    outs, lses = _plain(*outs), _plain(*lses)
    lse = torch.stack(lses)
    empty = lse.isinf()  # parts without a visible key; some libraries return +inf there
    largest = lse.detach().masked_fill(empty, -torch.inf).amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    weights = (lse - largest).masked_fill(empty, -torch.inf).exp()
    total = weights.sum(0)
    nothing = total == 0
    total = total.masked_fill(nothing, 1)
    merged = (largest + total.log()).masked_fill(nothing, -torch.inf)
    out = 0
    for part, weight, hidden in zip(outs, weights / total, empty, strict=True):
        out = out + _by_row(weight) * part.masked_fill(_by_row(hidden), 0)
    return out.to(outs[0].dtype), merged


def _by_row(x: Tensor) -> Tensor:
    """(B, H, L) as (B, L, H, 1)."""
    return x.transpose(1, 2).unsqueeze(3)


def merge_attention_states_backward(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor], lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of outs (n, B, L, H, D) and lses (n, B, H, L), stacked."""
    grad_out, grad_lse, lse = _plain(grad_out, grad_lse, lse)
    outs, lses = _plain(*outs), _plain(*lses)
    base = lse.masked_fill(lse == -torch.inf, 0)
    empty = [part.isinf() for part in lses]
    weights = [(part - base).exp().masked_fill(e, 0) for part, e in zip(lses, empty, strict=True)]
    along = [(grad_out * part.to(lse.dtype)).sum(3).transpose(1, 2) for part in outs]
    along = [a.masked_fill(e, 0) for a, e in zip(along, empty, strict=True)]
    shared = sum(w * a for w, a in zip(weights, along, strict=True))
    if grad_lse is not None:
        shared = shared - grad_lse
    grad_outs = [
        (_by_row(w) * grad_out).masked_fill(_by_row(e), 0).to(grad_out.dtype)
        for w, e in zip(weights, empty, strict=True)
    ]
    grad_lses = [(w * (a - shared)).masked_fill(e, 0) for w, a, e in zip(weights, along, empty, strict=True)]
    return torch.stack(grad_outs), torch.stack(grad_lses)
