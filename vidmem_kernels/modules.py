"""Linear attention and cross-attention to a memory as modules: projections around the functions of this package.

Their parameters depend on neither the backend nor the device: a state_dict loads wherever the sizes agree.
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
    """Size of a head: `size`, else an equal share of `dim`."""
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
    """Self-attention in time and memory linear in the length, with a state that carries earlier tokens.

    Args:
        dim: channels of the tokens.
        num_heads: heads.
        head_dim, value_head_dim: channels of a head's queries and keys, and of its values; default dim // num_heads.
        feature_map, causal, block_size, normalize, scale: see `vidmem_kernels.linear_attention`.
        qkv_bias, out_bias: whether the projections q, k and v have a bias, and whether o has one.
        backend: see `vidmem_kernels.use_backend`; None follows it.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes or options that do not fit.

    Equivalent PyTorch:
        q, k, v = (p(x).unflatten(2, (num_heads, -1)) for p in (self.q, self.k, self.v))
        out = self.o(linear_attention(q, k, v, ...).flatten(2))

    Source:
        Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv:2006.16236).
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
        """Attends among the tokens x and, with `state`, to all tokens that went into it.

        Args:
            x: (B, L, dim) tokens.
            state: what an earlier call returned.
            return_state: also return the state with the tokens of this call in it.

        Returns:
            (B, L, dim); with `return_state` also the state. When `causal`, calls on the parts of a sequence that is
            split at block boundaries equal one call on all of it.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit.
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
    """Adds what video tokens read from a memory: x + tanh(gate) * o(cross_attention(x, memory)).

    The gate starts at zero, so that a trained model into which this is put starts unchanged; the first step opens the
    gate, from the second on all parameters learn. It has a factor per channel, not the one per layer of Flamingo:
    channels of a trained model differ in scale, some should stay closed, and LayerScale found that freedom decisive.
    tanh bounds what a channel can be given. The projection o has no bias, so that a token that sees nothing, or
    an empty memory, adds nothing after training either.

    Args:
        dim, memory_dim: channels of the video tokens, and of the memory's; default dim.
        num_heads, head_dim: heads, and channels of a head; default dim // num_heads.
        qk_norm: RMS norm of queries and keys: "rms_norm" in each head (HunyuanVideo), "rms_norm_across_heads" over all
            heads at once (Wan), or None. The default keeps scores bounded whatever the scale of x, which is not
            normalised here, and of the memory.
        qkv_bias: whether the projections q, k and v have a bias.
        backend: see `vidmem_kernels.use_backend`; None follows it.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: sizes or options that do not fit.

    Equivalent PyTorch:
        q, k, v = (t.unflatten(2, (num_heads, -1)).mT for t in (self.q(x), self.k(memory), self.v(memory)))
        out = scaled_dot_product_attention(rms_norm(q), rms_norm(k), v)    # .mT: transpose(1, 2)
        return x + self.gate.tanh() * self.o(out.mT.flatten(2))

    Source:
        Gate: Flamingo, Alayrac et al., 2022 (arXiv:2204.14198). A factor per channel: LayerScale, Touvron et al., 2021
        (arXiv:2103.17239). Norm of queries and keys: Dehghani et al., 2023 (arXiv:2302.05442).
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
        """Closes the gate; the submodules have a `reset_parameters` of their own."""
        nn.init.zeros_(self.gate)

    def extra_repr(self) -> str:
        names = ("dim", "num_heads", "memory_dim", "qk_norm", "backend")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _heads(self, tokens: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """(B, L, H * D) as (B, L, H, D), normalised."""
        if norm is not None:
            groups = tokens.unflatten(2, (-1, *norm.normalized_shape))
            # Under autocast the projections are narrower than the weight, for which RMSNorm has no fused kernel.
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
        """What the tokens x read from `memory`: the addition of `forward` alone, for a sum that is made elsewhere.

        Args:
            x: (B, L, dim) video tokens.
            memory: (B or 1, M, memory_dim) tokens of the memory; M may be 0. One of batch 1 is projected once.
            q_rotary, k_rotary: positions of the L tokens and of the M of the memory, from `vidmem_kernels.rotary`, or
                neither; of head_dim channels, with the batch of x and of the memory, of 1, or none.
            key_bias: (B or 1, M) or (B or 1, H, M), e.g. the log of the tokens' merged sizes: proportional attention.
            num_sinks, q_time, k_time, window, block_index, block_size: which token of the memory a token sees; see
                `vidmem_kernels.cross_attention`.

        Returns:
            (B, L, dim) of the dtype of x, also under autocast; zeros while the gate is closed.

        Raises:
            ValueError, TypeError: shapes, dtypes or options that do not fit.
            IndexError: a block index out of range.

        Equivalent PyTorch:
            self(x, memory, ...) - x
        """
        _check_tokens(self, "x", x, self.dim, "L")
        _check_tokens(self, "memory", memory, self.memory_dim, "M")
        check_same_dtype(type(self).__name__, x=x, memory=memory)
        if memory.shape[0] not in (1, x.shape[0]):
            got = f"{x.shape[0]}, got {memory.shape[0]}"
            raise ValueError(f"{type(self).__name__}: memory must have batch 1 or that of x, {got}")
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
            x, memory, **options: see `read`.

        Returns:
            (B, L, dim) of the dtype of x, also under autocast. While the gate is closed, x to the bit, but 0 for -0.

        Raises:
            ValueError, TypeError, IndexError: see `read`.
        """
        return x + self.read(x, memory, **options)
