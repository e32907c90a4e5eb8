"""Modules for linear attention and for cross-attention to a memory: projections around the functions of this package.

Their parameters depend on neither backend nor device: a state_dict loads wherever the sizes agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_finite, check_int, check_same_dtype, check_tensor
from ._dispatch import check_backend
from .cross_attn.api import cross_attention
from .linear_attn.api import FEATURE_MAPS, LinearAttentionState, linear_attention
from .rotary import Rotary, apply_rotary

QK_NORMS = (None, "rms_norm", "rms_norm_across_heads")
_NORM_EPS = 1e-6  # as in Wan and HunyuanVideo


def _check_choices(module: str, backend: str | None, name: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(f"{module}: {name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    if backend is not None:
        check_backend(backend, f"{module}: backend")


def _head_size(module: str, name: str, dim: int, num_heads: int, size: int | None) -> int:
    """The channels of a head: `size`, or dim // num_heads if it is None."""
    for what, value in (("dim", dim), ("num_heads", num_heads), (name, 1 if size is None else size)):
        check_int(module, what, value, 1)
    if size is None and dim % num_heads:
        raise ValueError(f"{module}: num_heads must divide dim {dim}, got {num_heads}")
    return dim // num_heads if size is None else size


def _check_tokens(module: nn.Module, name: str, tokens: Tensor, dim: int, length: str) -> None:
    shape, op = f"B, {length}, {dim}", type(module).__name__
    check_tensor(op, name, tokens, shape)
    if tokens.shape[2] != dim:
        raise ValueError(f"{op}: {name} must have shape ({shape}), got {tuple(tokens.shape)}")


class LinearAttention(nn.Module):
    """Self-attention in time and memory linear in the sequence length, with a state that carries earlier tokens.

    Args:
        dim: channels of the tokens.
        num_heads: number of heads.
        head_dim: channels of the queries and keys of a head; default dim // num_heads.
        value_head_dim: channels of the values of a head; default dim // num_heads.
        feature_map: see `vidmem_kernels.linear_attention`.
        causal: see `vidmem_kernels.linear_attention`.
        block_size: see `vidmem_kernels.linear_attention`.
        normalize: see `vidmem_kernels.linear_attention`.
        scale: see `vidmem_kernels.linear_attention`.
        qkv_bias: whether the projections q, k and v have a bias.
        out_bias: whether the projection o has a bias.
        backend: see `vidmem_kernels.use_backend`; None follows it.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError, TypeError: a size or option is invalid.

    Equivalent PyTorch:
        q, k, v = (p(x).unflatten(2, (num_heads, -1)) for p in (self.q, self.k, self.v))
        out = self.o(linear_attention(q, k, v, ...).flatten(2))

    Source: Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv 2006.16236).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        feature_map: str = "relu",
        causal: bool = False,
        block_size: int = 1,
        normalize: bool = True,
        scale: float | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        check_int(name, "block_size", block_size, 1)
        if scale is not None:
            check_finite(name, "scale", scale)
        _check_choices(name, backend, "feature_map", feature_map, tuple(FEATURE_MAPS))
        size = _head_size(name, "head_dim", dim, num_heads, head_dim)
        value_size = _head_size(name, "value_head_dim", dim, num_heads, value_head_dim)
        self.dim, self.num_heads = dim, num_heads
        self.feature_map, self.causal, self.block_size = feature_map, causal, block_size
        self.normalize, self.scale, self.backend = normalize, scale, backend
        factory = {"device": device, "dtype": dtype}
        self.q = nn.Linear(dim, num_heads * size, bias=qkv_bias, **factory)
        self.k = nn.Linear(dim, num_heads * size, bias=qkv_bias, **factory)
        self.v = nn.Linear(dim, num_heads * value_size, bias=qkv_bias, **factory)
        self.o = nn.Linear(num_heads * value_size, dim, bias=out_bias, **factory)

    def extra_repr(self) -> str:
        names = ["dim", "num_heads", "feature_map", "causal", "block_size", "normalize", "backend"]
        names += ["scale"] if self.scale is not None else []
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(
        self, x: Tensor, state: LinearAttentionState | None = None, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LinearAttentionState]:
        """Attends among the tokens x and, with `state`, to all tokens that the state has seen.

        Args:
            x: (B, L, dim) tokens.
            state: state from an earlier call.
            return_state: also return the state after the tokens of this call.

        Returns:
            (B, L, dim); with `return_state` also the `LinearAttentionState`. With `causal`, calls on the parts of a
            sequence that is split at block boundaries give the same results as one call on the whole sequence.

        Raises:
            ValueError, TypeError: x or the state has a wrong shape or dtype.
        """
        _check_tokens(self, "x", x, self.dim, "L")
        q, k, v = (project(x).unflatten(2, (self.num_heads, -1)) for project in (self.q, self.k, self.v))
        out, state = linear_attention(
            q, k, v, feature_map=self.feature_map, causal=self.causal, block_size=self.block_size,
            normalize=self.normalize, scale=self.scale, state=state, return_state=True, backend=self.backend,
        )  # fmt: skip
        out = self.o(out.flatten(2))
        return (out, state) if return_state else out


class MemoryCrossAttention(nn.Module):
    """Gated cross-attention to a memory: x + tanh(gate) * o(cross_attention(x, memory)).

    The gate starts at zero, so a trained model is unchanged when this module is added; the first training step opens
    the gate, and from the second step on all parameters learn. The gate has one factor per channel, not one per layer
    as in
    Flamingo: the channels of a trained model differ in scale, some should stay closed, and LayerScale found this
    freedom decisive. tanh bounds what is added to a channel. The projection o has no bias, so that a token that sees
    nothing, or an empty memory, adds nothing after training either.

    Args:
        dim: channels of the video tokens.
        num_heads: number of heads.
        memory_dim: channels of the memory tokens; default dim.
        head_dim: channels of a head; default dim // num_heads.
        qk_norm: RMS norm of queries and keys: "rms_norm" within each head (HunyuanVideo), "rms_norm_across_heads" over
            all heads at once (Wan), or None. The default bounds the scores whatever the scale of the memory and of x,
            which is not normalised here.
        qkv_bias: whether the projections q, k and v have a bias.
        backend: see `vidmem_kernels.use_backend`; None follows it.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError, TypeError: a size or option is invalid.

    Equivalent PyTorch:
        q, k, v = (t.unflatten(2, (num_heads, -1)).mT for t in (self.q(x), self.k(memory), self.v(memory)))
        out = scaled_dot_product_attention(rms_norm(q), rms_norm(k), v)    # .mT: transpose(1, 2)
        return x + self.gate.tanh() * self.o(out.mT.flatten(2))

    Source: gate: Flamingo, Alayrac et al., 2022 (arXiv 2204.14198). One factor per channel: LayerScale, Touvron et al.,
    2021 (arXiv 2103.17239). Norm of queries and keys: Dehghani et al., 2023 (arXiv 2302.05442).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        memory_dim: int | None = None,
        head_dim: int | None = None,
        qk_norm: str | None = "rms_norm",
        qkv_bias: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        name = type(self).__name__
        size = _head_size(name, "head_dim", dim, num_heads, head_dim)
        memory_dim = dim if memory_dim is None else memory_dim
        check_int(name, "memory_dim", memory_dim, 1)
        _check_choices(name, backend, "qk_norm", qk_norm, QK_NORMS)
        self.dim, self.memory_dim, self.num_heads = dim, memory_dim, num_heads
        self.qk_norm, self.backend = qk_norm, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * size
        self.q = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.k = nn.Linear(memory_dim, inner, bias=qkv_bias, **factory)
        self.v = nn.Linear(memory_dim, inner, bias=qkv_bias, **factory)
        self.o = nn.Linear(inner, dim, bias=False, **factory)
        normed = size if qk_norm == "rms_norm" else inner
        self.norm_q = nn.RMSNorm(normed, eps=_NORM_EPS, **factory) if qk_norm else None
        self.norm_k = nn.RMSNorm(normed, eps=_NORM_EPS, **factory) if qk_norm else None
        self.gate = nn.Parameter(torch.empty(dim, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Closes the gate; the submodules have their own `reset_parameters`."""
        nn.init.zeros_(self.gate)

    def extra_repr(self) -> str:
        names = ("dim", "num_heads", "memory_dim", "qk_norm", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _heads(self, tokens: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """Reshapes (B, L, H * D) to (B, L, H, D) and applies the norm."""
        if norm is not None:
            groups = tokens.unflatten(2, (-1, *norm.normalized_shape))
            # Under autocast, projections have a narrower dtype than the weight, for which RMSNorm has no fused kernel.
            tokens = norm(groups.to(norm.weight.dtype)).flatten(2)
        return tokens.unflatten(2, (self.num_heads, -1))

    def read(
        self,
        x: Tensor,
        memory: Tensor,
        *,
        q_rotary: Rotary | None = None,
        k_rotary: Rotary | None = None,
        key_bias: Tensor | None = None,
        num_sinks: int = 0,
        q_time: Tensor | None = None,
        k_time: Tensor | None = None,
        window: tuple[float, float] | None = None,
        block_index: Tensor | None = None,
        block_size: tuple[int, int] = (128, 64),
    ) -> Tensor:
        """Computes what the tokens x read from `memory`: the term that `forward` adds to x.

        Args:
            x: (B, L, dim) video tokens.
            memory: (B or 1, M, memory_dim) memory tokens; M may be 0. A memory of batch 1 is projected once.
            q_rotary: positions of the L video tokens, from `vidmem_kernels.rotary` with head_dim channels; with the
                batch of x, batch 1 or none. Given together with `k_rotary`.
            k_rotary: positions of the M memory tokens; with the batch of the memory, batch 1 or none.
            key_bias: (B or 1, M) or (B or 1, H, M), e.g. the log of the merged sizes of the tokens (proportional
                attention).
            num_sinks: see `vidmem_kernels.cross_attention`.
            q_time: see `vidmem_kernels.cross_attention`.
            k_time: see `vidmem_kernels.cross_attention`.
            window: see `vidmem_kernels.cross_attention`.
            block_index: see `vidmem_kernels.cross_attention`.
            block_size: see `vidmem_kernels.cross_attention`.

        Returns:
            (B, L, dim) of the dtype of x, also under autocast; zeros while the gate is closed.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
            IndexError: a block index is out of range.

        Equivalent PyTorch:
            self(x, memory, ...) - x
        """
        _check_tokens(self, "x", x, self.dim, "L")
        _check_tokens(self, "memory", memory, self.memory_dim, "M")
        check_same_dtype(type(self).__name__, x=x, memory=memory)
        if memory.shape[0] not in (1, x.shape[0]):
            name, batch = type(self).__name__, x.shape[0]
            raise ValueError(f"{name}: memory must have batch 1 or that of x, {batch}, got {memory.shape[0]}")
        if (q_rotary is None) != (k_rotary is None):
            given = "q_rotary" if k_rotary is None else "k_rotary"
            raise ValueError(f"{type(self).__name__}: q_rotary and k_rotary must be given together, got {given}")
        q, k = self._heads(self.q(x), self.norm_q), self._heads(self.k(memory), self.norm_k)
        if q_rotary is not None and k_rotary is not None:
            q, k = apply_rotary(q, q_rotary), apply_rotary(k, k_rotary)
        out = cross_attention(
            q, k, self._heads(self.v(memory)), key_bias=key_bias, num_sinks=num_sinks, q_time=q_time, k_time=k_time,
            window=window, block_index=block_index, block_size=block_size, backend=self.backend,
        )  # fmt: skip
        return (self.gate.tanh() * self.o(out.flatten(2))).to(x.dtype)

    def forward(self, x: Tensor, memory: Tensor, **options: Any) -> Tensor:
        """Adds to the tokens x what they read from `memory`.

        Args:
            x: (B, L, dim) video tokens.
            memory: (B or 1, M, memory_dim) memory tokens.
            **options: the other arguments of `read`.

        Returns:
            (B, L, dim) of the dtype of x, also under autocast. While the gate is closed, the result equals x bit by
            bit, except that -0 becomes 0.

        Raises:
            ValueError, TypeError, IndexError: see `read`.
        """
        return x + self.read(x, memory, **options)
