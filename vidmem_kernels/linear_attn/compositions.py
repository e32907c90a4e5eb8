"""Linear attention as users would compose it from PyTorch in half precision: the yardstick of its kernels there.

Features, scores and, in products, the state have the dtype of q; the state itself is float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .._numerics import accumulate_dtype
from ..testing import composition, product
from .reference import CHUNK, EPS, FEATURE_MAPS


def _heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).to(accumulate_dtype(x.dtype))


def _with_ones(v: Tensor) -> Tensor:
    """(B, H, L, Dv + 1): values with a column of ones, whose sums are the denominator."""
    return F.pad(_heads(v), (0, 1), value=1.0)


def _sums(keys: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
    pairs = zip(keys.split(CHUNK, 2), values.split(CHUNK, 2), strict=True)
    return sum(product(a.mT, b, dtype) for a, b in pairs)


def _initial_state(q: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None) -> Tensor:
    if S is None:
        return q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3] + 1, dtype=accumulate_dtype(q.dtype))
    return torch.cat([S, z.unsqueeze(3)], dim=3)


def _chunks(length: int, causal: bool, block_size: int, device) -> Iterator[tuple[slice, Tensor | None]]:
    """Slices of whole blocks, and which tokens see each other; None: all see the state that includes the slice."""
    block = block_size if causal else max(1, length)
    step = max(1, CHUNK // block) * block
    for start in range(0, length, step):
        index = torch.arange(start, min(start + step, length), device=device) // block
        yield slice(start, start + step), None if step == block else index.unsqueeze(1) >= index


@composition("linear_attention")
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    causal: bool,
    block_size: int,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    phi, _ = FEATURE_MAPS[feature_map]
    queries, keys, values = phi(_heads(q)), phi(_heads(k)), _with_ones(v)
    state = _initial_state(q, v, S, z)
    totals = [values[:, :, :0]]
    for chunk, sees in _chunks(q.shape[1], causal, block_size, q.device):
        some_q, some_k, some_v = (t[:, :, chunk] for t in (queries, keys, values))
        before, state = state, state + _sums(some_k, some_v, q.dtype)
        if sees is None:
            totals.append(product(some_q, state, q.dtype))
        else:
            scores = product(some_q, some_k.mT, q.dtype) * sees
            totals.append(product(some_q, before, q.dtype) + product(scores, some_v, q.dtype))
    total = torch.cat(totals, dim=2) * scale
    out = total[..., :-1]
    if normalize:
        out = out / (total[..., -1:] + EPS)
    return out.transpose(1, 2).to(v.dtype), state[..., :-1], state[..., -1]


@composition("linear_attention_backward")
def linear_attention_backward(
    grad_out: Tensor,
    grad_S: Tensor,
    grad_z: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    S: Tensor | None,
    z: Tensor | None,
    feature_map: str,
    causal: bool,
    block_size: int,
    normalize: bool,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = q.dtype
    phi, derivative = FEATURE_MAPS[feature_map]
    queries, keys, values, grad = phi(_heads(q)), phi(_heads(k)), _with_ones(v), _heads(grad_out)
    state = _initial_state(q, v, S, z)
    chunks = list(_chunks(q.shape[1], causal, block_size, q.device))
    grad_q, grad_k, grad_v = (torch.zeros_like(t) for t in (queries, keys, values))
    grad_total = F.pad(grad, (0, 1)) * scale
    for chunk, sees in chunks:
        some_q, some_k, some_v, some_grad = (t[:, :, chunk] for t in (queries, keys, values, grad_total))
        before, state = state, state + _sums(some_k, some_v, dtype)
        seen = state if sees is None else before
        if normalize:
            total = product(some_q, seen, dtype)
            if sees is not None:
                total = total + product(product(some_q, some_k.mT, dtype) * sees, some_v, dtype)
            total = total * scale
            inverse = 1 / (total[..., -1:] + EPS)
            along = (grad[:, :, chunk] * total[..., :-1]).sum(3, keepdim=True)
            some_grad.copy_(torch.cat([grad[:, :, chunk] * inverse, -along * inverse.square()], dim=3) * scale)
        grad_q[:, :, chunk] = product(some_grad, seen.mT, dtype)
        if sees is not None:
            grad_q[:, :, chunk] += product(product(some_grad, some_v.mT, dtype) * sees, some_k, dtype)
    grad_state = torch.cat([grad_S, grad_z.unsqueeze(3)], dim=3)
    for chunk, sees in reversed(chunks):
        some_q, some_k, some_v, some_grad = (t[:, :, chunk] for t in (queries, keys, values, grad_total))
        after, grad_state = grad_state, grad_state + _sums(some_q, some_grad, dtype)
        seen = grad_state if sees is None else after
        grad_k[:, :, chunk], grad_v[:, :, chunk] = product(some_v, seen.mT, dtype), product(some_k, seen, dtype)
        if sees is not None:
            grad_scores = product(some_grad, some_v.mT, dtype) * sees
            grad_k[:, :, chunk] += product(grad_scores.mT, some_q, dtype)
            scores = product(some_q, some_k.mT, dtype) * sees
            grad_v[:, :, chunk] += product(scores.mT, some_grad, dtype)
    grad_q, grad_k = grad_q * derivative(_heads(q)), grad_k * derivative(_heads(k))
    grads = (grad_q.transpose(1, 2), grad_k.transpose(1, 2), grad_v[..., :-1].transpose(1, 2))
    return *(g.to(dtype) for g in grads), grad_state[..., :-1], grad_state[..., -1]
