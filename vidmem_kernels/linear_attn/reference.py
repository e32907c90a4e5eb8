"""Linear attention in plain differentiable PyTorch: the reference for all other backends.

The values get a column of ones, so that S and z form one state (B, H, D, Dv + 1) and the denominator is one more column
of the numerator; normalisation and `scale` then affect only results and their gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._numerics import accumulate_dtype

EPS = 1e-10  # added to the denominator, as in flash-linear-attention
CHUNK = 128  # tokens per chunk, which bounds the scores and the float32 copies of inputs

Span = tuple[int, int]


def _elu1(x: Tensor) -> Tensor:
    # exp(x) for x <= 0, because expm1(x) + 1 cancels.
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


# name: (map, its derivative)
FEATURE_MAPS = {
    "relu": (F.relu, lambda x: (x > 0).to(x.dtype)),
    "elu1": (_elu1, lambda x: x.clamp(max=0).exp()),
    "identity": (lambda x: x, torch.ones_like),
}


def _spans(start: int, stop: int, step: int) -> list[Span]:
    return [(a, min(a + step, stop)) for a in range(start, stop, step)]


class _Sequence:
    """Spans of q, k and v as (B, H, n, ...) in the accumulation dtype, and which tokens see each other.

    `groups` are the spans of whole blocks that share a state. With `mask`, a group holds many small blocks: its tokens
    see the state before it and, by the mask, one another. Without, they all see the state that includes the group.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, feature_map: str, causal: bool, block_size: int):
        self.q, self.k, self.v = q, k, v
        self.phi, self.derivative = FEATURE_MAPS[feature_map]
        # Without channels nothing is read or written, so an expanded tensor may have any length.
        length = q.shape[1] if q.shape[0] * q.shape[2] * (q.shape[3] + v.shape[3]) else 0
        blocks = max(1, CHUNK // block_size)
        self.groups = _spans(0, length, blocks * block_size) if causal else [(0, length)]
        self.mask = None
        if causal and blocks > 1:
            block = torch.arange(min(length, blocks * block_size), device=q.device) // block_size
            self.mask = block.unsqueeze(1) >= block

    @staticmethod
    def read(x: Tensor, span: Span) -> Tensor:
        return x[:, span[0] : span[1]].transpose(1, 2).to(accumulate_dtype(x.dtype))

    def queries(self, span: Span) -> Tensor:
        return self.phi(self.read(self.q, span))

    def keys(self, span: Span) -> Tensor:
        return self.phi(self.read(self.k, span))

    def values(self, span: Span) -> Tensor:
        return F.pad(self.read(self.v, span), (0, 1), value=1.0)

    def visible(self, scores: Tensor) -> Tensor:
        n = scores.shape[2]
        return scores * self.mask[:n, :n]

    def sums(self, span: Span, state: Tensor) -> Tensor:
        """Numerator and, in the last column, denominator of a span that sees `state`."""
        queries = self.queries(span)
        sums = queries @ state
        if self.mask is not None:
            scores = self.visible(queries @ self.keys(span).mT)
            sums = sums + scores @ self.values(span)
        return sums


def _initial_state(q: Tensor, v: Tensor, S: Tensor | None, z: Tensor | None) -> Tensor:
    batch, _, heads, size = q.shape
    if S is None:
        return q.new_zeros(batch, heads, size, v.shape[3] + 1, dtype=accumulate_dtype(q.dtype))
    return torch.cat([S, z.unsqueeze(3)], dim=3)


def _split_state(state: Tensor) -> tuple[Tensor, Tensor]:
    return state[..., :-1].clone(), state[..., -1].clone()


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    """Concatenates spans (B, H, n, D) to one (B, L, H, D), with the shape and dtype of `like`."""
    if not parts:
        return like.clone(memory_format=torch.contiguous_format)  # empty
    return torch.cat([p.transpose(1, 2).to(like.dtype) for p in parts], dim=1)


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
    """See `vidmem_kernels.linear_attention`."""
    seq = _Sequence(q, k, v, feature_map, causal, block_size)
    state = _initial_state(q, v, S, z)
    outs = []
    for group in seq.groups:
        spans = _spans(*group, CHUNK)
        before, state = state, state + sum(seq.keys(s).mT @ seq.values(s) for s in spans)
        for span in spans:
            sums = seq.sums(span, state if seq.mask is None else before) * scale
            out = sums[..., :-1]
            outs.append((out / (sums[..., -1:] + EPS) if normalize else out).to(v.dtype))
    return _join(outs, v), *_split_state(state)


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
    """Gradients of q, k, v, S and z; between the two passes only two numbers per token and head are kept."""
    seq = _Sequence(q, k, v, feature_map, causal, block_size)
    factors: dict[Span, tuple[Tensor, Tensor]] = {}

    def grad_sums(span: Span) -> Tensor:
        """Gradient of numerator and denominator."""
        inverse, grad_denominator = factors[span]
        return torch.cat([seq.read(grad_out, span) * inverse, grad_denominator], dim=3)

    # Forward pass over the tokens: gradient of q, which needs the state up to each token.
    grads_q = []
    state = _initial_state(q, v, S, z)
    for group in seq.groups:
        spans = _spans(*group, CHUNK)
        before, state = state, state + sum(seq.keys(s).mT @ seq.values(s) for s in spans)
        seen = state if seq.mask is None else before
        for span in spans:
            grad = seq.read(grad_out, span)
            if normalize:
                sums = seq.sums(span, seen)
                inverse = scale / (sums[..., -1:] * scale + EPS)
                along = (grad * sums[..., :-1]).sum(3, keepdim=True)
                factors[span] = inverse, -along * inverse.square()
            else:
                zero = grad.new_zeros(*grad.shape[:3], 1)
                factors[span] = zero + scale, zero
            grad_phi = grad_sums(span) @ seen.mT
            if seq.mask is not None:
                grad_scores = seq.visible(grad_sums(span) @ seq.values(span).mT)
                grad_phi = grad_phi + grad_scores @ seq.keys(span)
            grads_q.append((grad_phi * seq.derivative(seq.read(q, span))).to(q.dtype))

    # Backward pass: gradients of k and v, which need the gradient of the state from each token on.
    grads_k, grads_v = [], []
    grad_state = torch.cat([grad_S, grad_z.unsqueeze(3)], dim=3)
    for group in reversed(seq.groups):
        spans = _spans(*group, CHUNK)
        after, grad_state = (
            grad_state,
            grad_state + sum(seq.queries(s).mT @ grad_sums(s) for s in spans),
        )
        seen = grad_state if seq.mask is None else after
        for span in reversed(spans):
            keys, values = seq.keys(span), seq.values(span)
            grad_phi, grad_values = values @ seen.mT, keys @ seen
            if seq.mask is not None:
                queries, grad = seq.queries(span), grad_sums(span)
                grad_phi = grad_phi + seq.visible(grad @ values.mT).mT @ queries
                grad_values = grad_values + seq.visible(queries @ keys.mT).mT @ grad
            grads_k.append((grad_phi * seq.derivative(seq.read(k, span))).to(k.dtype))
            grads_v.append(grad_values[..., :-1].to(v.dtype))

    return (
        _join(grads_q, q),
        _join(grads_k[::-1], k),
        _join(grads_v[::-1], v),
        *_split_state(grad_state),
    )
