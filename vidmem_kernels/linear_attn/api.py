"""Public functions of linear attention: they check the arguments and call the ops."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

from torch import Tensor

from .._call import call
from .._checks import check_finite, check_int, check_same, check_same_dtype, check_tensor
from .._fast import fast
from .._numerics import accumulate_dtype
from .._symbolic import saveable
from .normalizer import attend_normalized
from .reference import FEATURE_MAPS

__all__ = [
    "LinearAttentionState",
    "linear_attention",
]


@saveable
class LinearAttentionState(NamedTuple):
    """The running sums over all tokens so far; their size does not depend on the sequence length.

    Attributes:
        S: (B, H, D, Dv) float32 (float64 for float64 inputs), the sum of phi(k) vᵀ.
        z: (B, H, D) of the same dtype, the sum of phi(k).
    """

    S: Tensor
    z: Tensor


def _check_normalizer(op: str, normalizer: object, q: Tensor, normalize: bool) -> None:
    if not isinstance(normalizer, tuple | list) or len(normalizer) != 2:
        raise TypeError(f"{op}: normalizer must be a pair (q2, k2), got {type(normalizer).__name__}")
    if not normalize:
        raise ValueError(f"{op}: normalizer requires normalize=True, got normalize=False")
    for name, x in zip(("normalizer[0]", "normalizer[1]"), normalizer, strict=True):
        check_tensor(op, name, x, "B, L, H, D")
        check_same(op, f"q and {name} must have the same shape", tuple(q.shape), tuple(x.shape))
        check_same_dtype(op, q=q, **{name: x})
        check_same(op, f"q and {name} must be on the same device", q.device, x.device)


@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str = ..., causal: bool = ..., block_size: int = ...,
    normalize: bool = ..., state: LinearAttentionState | None = ..., return_state: Literal[False] = ...,
    scale: float | None = ..., normalizer: tuple[Tensor, Tensor] | None = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str = ..., causal: bool = ..., block_size: int = ...,
    normalize: bool = ..., state: LinearAttentionState | None = ..., return_state: Literal[True],
    scale: float | None = ..., normalizer: tuple[Tensor, Tensor] | None = ..., backend: str | None = ...,
) -> tuple[Tensor, LinearAttentionState]: ...  # fmt: skip
@overload
def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, feature_map: str = ..., causal: bool = ..., block_size: int = ...,
    normalize: bool = ..., state: LinearAttentionState | None = ..., return_state: bool, scale: float | None = ...,
    normalizer: tuple[Tensor, Tensor] | None = ..., backend: str | None = ...,
) -> Tensor | tuple[Tensor, LinearAttentionState]: ...  # fmt: skip
@fast
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    feature_map: str = "relu",
    causal: bool = False,
    block_size: int = 1,
    normalize: bool = True,
    state: LinearAttentionState | None = None,
    return_state: bool = False,
    scale: float | None = None,
    normalizer: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, LinearAttentionState]:
    """Computes attention in time and memory linear in the length L: out_i = phi(q_i)·S / (phi(q_i)·z).

    S = Σ phi(k_j) v_jᵀ and z = Σ phi(k_j) are sums over the keys that query i sees.

    Args:
        q: (B, L, H, D) float queries.
        k: (B, L, H, D) keys, of the dtype of q.
        v: (B, L, H, Dv) values, of the dtype of q; Dv may differ from D.
        feature_map: phi: "relu", "elu1" (elu + 1) or "identity".
        causal: each token sees the tokens of its own block of `block_size` tokens and of all earlier blocks. Default:
            each token sees all tokens.
        block_size: tokens per block, e.g. those of a frame; 1 is causal token by token. Blocks are counted from the
            first token of this call; the last block may be partial. Used only with `causal`.
        normalize: divide by scale·phi(q_i)·z + 1e-10. A query with denominator 0 gets 0.
        state: sums over earlier tokens, which every query sees: S (B, H, D, Dv) and z (B, H, D), float32 (float64 for
            float64).
        return_state: also return the state after all tokens of this call.
        scale: a finite number that multiplies phi(q), as in flash-linear-attention; default 1. It is applied to the
            float32 sums (float64 for float64), whereas `q * scale` would first round a bfloat16 q. The state does not
            depend on it. With `normalize` it cancels, except relative to the 1e-10; scale 0 gives 0.
        normalizer: (q2, k2), each of the shape and dtype of q and k. The denominator is then scale·phi(q2_i)·z + 1e-10
            with z = Σ phi(k2_j) over the same keys as S, and z of `state` is the sum over k2. Use it as in SANA-Video,
            where only the numerator has rotary embedding: q and k are the rotated features, q2 and k2 the features
            before rotation, and phi is "identity". The numerator may be nonzero where the denominator is 0; it is then
            divided by 1e-10. In half precision both sums are computed from float32 copies, since neither may be rounded
            before the division; this reads twice the bytes and holds a float32 copy of q, k, v, q2 and k2.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, L, H, Dv) of the dtype of the inputs; with `return_state` also the `LinearAttentionState`. If a sequence is
        split at a block boundary and the state is passed on, the results and gradients equal those of one call. Sums
        are computed in float32.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.

    Equivalent PyTorch:
        see = block[:, None] >= block if causal else ones(L, L)     # block = arange(L) // block_size
        weight = einsum("blhd,bmhd->bhlm", scale * phi(q), phi(k)) * see
        denominator = weight.sum(-1, keepdim=True)                  # with normalizer: of the weight from q2 and k2
        out = einsum("bhlm,bmhd->blhd", weight / (denominator + 1e-10), v)    # normalize=True

    Source: Katharopoulos et al., "Transformers are RNNs", 2020 (arXiv 2006.16236), where phi is elu + 1; relu as in
    EfficientViT (arXiv 2205.14756); the epsilon as in flash-linear-attention; a separate normalizer as in SANA-Video
    (arXiv 2509.24695).
    """
    op = "linear_attention"
    check_tensor(op, "q", q, "B, L, H, D")
    check_tensor(op, "k", k, "B, L, H, D")
    check_tensor(op, "v", v, "B, L, H, Dv")
    check_same(op, "q and k must have the same shape", tuple(q.shape), tuple(k.shape))
    check_same(op, "q and v must have the same first three sizes", tuple(q.shape[:3]), tuple(v.shape[:3]))
    dtype = check_same_dtype(op, q=q, k=k, v=v)
    check_same(op, "q and k must be on the same device", q.device, k.device)
    check_same(op, "q and v must be on the same device", q.device, v.device)
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{op}: feature_map must be one of {', '.join(FEATURE_MAPS)}, got {feature_map!r}")
    check_int(op, "block_size", block_size, 1)
    scale = 1.0 if scale is None else scale
    check_finite(op, "scale", scale)
    S = z = None
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            raise TypeError(f"{op}: state must be a LinearAttentionState (S, z), got {type(state).__name__}")
        S, z = state
        wide = accumulate_dtype(dtype)
        check_tensor(op, "state.S", S, "B, H, D, Dv", (wide,))
        check_tensor(op, "state.z", z, "B, H, D", (wide,))
        sizes = (q.shape[0], q.shape[2], q.shape[3])
        check_same(
            op,
            "state.S must have shape (B, H, D, Dv) of q and v",
            (*sizes, v.shape[3]),
            tuple(S.shape),
        )
        check_same(op, "state.z must have shape (B, H, D) of q", sizes, tuple(z.shape))
        check_same(op, "q and state.S must be on the same device", q.device, S.device)
        check_same(op, "q and state.z must be on the same device", q.device, z.device)
    options = feature_map, causal, block_size
    if normalizer is None:
        out, S, z = call("linear_attention", q, k, v, S, z, *options, normalize, float(scale), backend=backend)
    else:
        _check_normalizer(op, normalizer, q, normalize)
        q2, k2 = normalizer
        out, S, z = attend_normalized(q, k, v, q2, k2, S, z, *options, float(scale), dtype, backend)
    return (out, LinearAttentionState(S, z)) if return_state else out
