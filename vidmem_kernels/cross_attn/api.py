"""Public functions of cross-attention: they check the arguments and call the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from .._blocks import check_pair_of_sizes
from .._call import call
from .._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    QUANTIZED_DTYPES,
    check_int,
    check_number,
    check_same,
    check_same_dtype,
    check_tensor,
    is_number,
    is_one,
    names,
)
from .._fast import fast
from .._numerics import accumulate_dtype
from .._symbolic import require, require_same
from .attend import Attention
from .causal_sinks import UNBOUNDED, attend_causal_sinks
from .groups import attend_groups
from .shared import harmless, masked_bias, spread, spread_times
from .tiled import attend_blocks

__all__ = [
    "cross_attention",
    "merge_attention_states",
]

_TIME_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)


def _batch(x: Tensor, q: Tensor) -> int:
    """The batch that x must have: that of q, or 1 if x has batch 1 and is shared by the whole batch."""
    return 1 if is_one(x.shape[0]) else q.shape[0]


def _check_pair(op: str, name: str, value: object) -> None:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{op}: {name} must be a pair, got {value!r}")


def _check_window(
    op: str,
    q: Tensor,
    k: Tensor,
    q_time: Tensor | None,
    k_time: Tensor | None,
    window: tuple[float, float] | None,
) -> list[float] | None:
    if (window is None, q_time is None, k_time is None) not in ((True,) * 3, (False,) * 3):
        given = {"q_time": q_time, "k_time": k_time, "window": window}
        named = [name for name, value in given.items() if value is not None]
        raise ValueError(f"{op}: q_time, k_time and window must be given together, got {' and '.join(named)}")
    if window is None:
        return None
    _check_pair(op, "window", window)
    for side in window:
        if not is_number(side):
            raise TypeError(f"{op}: window must hold two numbers, got {window!r}")
        if not side >= 0:  # NaN too; math.isnan takes no number that torch.compile leaves open
            raise ValueError(f"{op}: window must hold two numbers of at least 0, got {window}")
    for name, time, x, length in (("q_time", q_time, q, "Lq"), ("k_time", k_time, k, "Lk")):
        if not isinstance(time, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(time).__name__}")
        shape = f"{length}" if time.dim() == 1 else f"B, {length}"
        check_tensor(op, name, time, shape, _TIME_DTYPES)
        expected = (x.shape[1],) if time.dim() == 1 else (_batch(time, q), x.shape[1])
        check_same(op, f"{name} must have shape ({shape})", expected, tuple(time.shape))
        check_same(op, f"q and {name} must be on the same device", q.device, time.device)
    if torch.compiler.is_exporting():
        # AOTInductor writes constants as JSON, which has no infinity.
        return [UNBOUNDED if side == float("inf") else side for side in window]
    return list(window)


def _check_blocks(
    op: str, q: Tensor, key_heads: int, block_index: Tensor | None, block_size: tuple[int, int], blocks: int | None
) -> None:
    _check_pair(op, "block_size", block_size)
    check_int(op, "block_size[0]", block_size[0], 1)
    check_int(op, "block_size[1]", block_size[1], 1)
    if block_index is None:
        return
    check_tensor(op, "block_index", block_index, "B, H|1, ceil(Lq/bq), topk", INDEX_DTYPES)
    batch, heads, rows, _ = block_index.shape
    blocks = -(-q.shape[1] // block_size[0]) if blocks is None else blocks
    require_same(
        (batch, heads, rows),
        (_batch(block_index, q), heads if heads == 1 or heads == key_heads else q.shape[2], blocks),
        lambda: (
            f"{op}: block_index must have shape ({q.shape[0]}, {q.shape[2]} or 1, {blocks}, topk), "
            f"got {tuple(block_index.shape)}"
        ),
    )
    check_same(op, "q and block_index must be on the same device", q.device, block_index.device)


def _check_keys(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("k", k), ("v", v)):
        shape = "B, Lk, H, D" if name == "k" else "B, Lk, H, Dv"
        check_tensor(op, name, x, shape, FLOAT_DTYPES + QUANTIZED_DTYPES)
    heads, key_heads = q.shape[2], k.shape[2]
    require_same(
        (q.shape[0], q.shape[3]),
        (q.shape[0] if is_one(k.shape[0]) else k.shape[0], k.shape[3]),
        lambda: (
            f"{op}: q (B, Lq, H, D) and k (B, Lk, H, D) must have the same B and D, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        ),
    )
    if heads != key_heads:
        fits = 1 <= key_heads <= heads and heads % key_heads == 0
        message = "{}: in (B, L, H, D) the heads of k must divide those of q, got {} and {}"
        require(fits, message.format, op, key_heads, heads)
    check_same(op, "k and v must have the same B, Lk and H", tuple(k.shape[:3]), tuple(v.shape[:3]))
    check_same(op, "q and k must be on the same device", q.device, k.device)
    check_same(op, "q and v must be on the same device", q.device, v.device)


def _check_dtypes(
    op: str, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> torch.dtype:
    """Checks the dtypes and scales of q, k and v; returns the dtype that the op will see."""
    rows, scales = {"k": k, "v": v}, {"k_scale": k_scale, "v_scale": v_scale}
    given = [scale is not None for scale in scales.values()]
    if given != [x.dtype in QUANTIZED_DTYPES for x in rows.values()]:
        found = " and ".join(name for name, scale in scales.items() if scale is not None) or "neither"
        raise TypeError(
            f"{op}: k_scale and v_scale are required for {names(QUANTIZED_DTYPES)} k and v and not allowed for "
            f"others, got {names([k.dtype])} and {names([v.dtype])} with {found}"
        )
    if not any(given):
        return check_same_dtype(op, q=q, k=k, v=v)
    check_same(op, "k and v must have the same dtype", k.dtype, v.dtype)
    for (name, x), (scale_name, scale) in zip(rows.items(), scales.items(), strict=True):
        if x.requires_grad:
            raise ValueError(
                f"{op}: {name} must not require a gradient, which {names([x.dtype])} cannot have; detach it"
            )
        _check_by_key(op, scale_name, scale, q, x.shape[1], (torch.float32,))
    return check_same_dtype(op, q=q)


def _check_by_key(op: str, name: str, x: Tensor | None, q: Tensor, keys: int, dtypes: tuple[torch.dtype, ...]) -> None:
    x = check_tensor(op, name, x, "B, Lk", dtypes)
    check_same(op, f"{name} must have shape (B, Lk)", (_batch(x, q), keys), tuple(x.shape))
    check_same(op, f"q and {name} must be on the same device", q.device, x.device)


def _check_bias(op: str, q: Tensor, k: Tensor, key_bias: Tensor | None) -> None:
    if key_bias is None:
        return
    by_head = isinstance(key_bias, Tensor) and key_bias.dim() == 3
    check_tensor(op, "key_bias", key_bias, "B, H, Lk" if by_head else "B, Lk", FLOAT_DTYPES)
    batch, keys = _batch(key_bias, q), k.shape[1]
    expected: tuple[int, ...]
    if by_head:
        expected = batch, k.shape[2] if key_bias.shape[1] == k.shape[2] else q.shape[2], keys
    else:
        expected = batch, keys
    check_same(op, "key_bias must have shape (B, Lk) or (B, H, Lk)", expected, tuple(key_bias.shape))
    check_same(op, "q and key_bias must be on the same device", q.device, key_bias.device)


def _check_out_dtype(op: str, out_dtype: torch.dtype | None, dtype: torch.dtype) -> torch.dtype:
    if out_dtype is None:
        return dtype
    allowed = list(dict.fromkeys((dtype, accumulate_dtype(dtype))))
    if out_dtype not in allowed:
        raise TypeError(f"{op}: out_dtype must be {names(allowed)}, got {out_dtype}")
    return out_dtype


@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = ..., key_mask: Tensor | None = ...,
    num_sinks: int = ..., causal_sinks: bool = ..., q_time: Tensor | None = ..., k_time: Tensor | None = ...,
    window: tuple[float, float] | None = ..., block_index: Tensor | None = ..., block_size: tuple[int, int] = ...,
    block_sizes: Tensor | tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., out_dtype: torch.dtype | None = ..., return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = ..., key_mask: Tensor | None = ...,
    num_sinks: int = ..., causal_sinks: bool = ..., q_time: Tensor | None = ..., k_time: Tensor | None = ...,
    window: tuple[float, float] | None = ..., block_index: Tensor | None = ..., block_size: tuple[int, int] = ...,
    block_sizes: Tensor | tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., out_dtype: torch.dtype | None = ..., return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def cross_attention(
    q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = ..., key_mask: Tensor | None = ...,
    num_sinks: int = ..., causal_sinks: bool = ..., q_time: Tensor | None = ..., k_time: Tensor | None = ...,
    window: tuple[float, float] | None = ..., block_index: Tensor | None = ..., block_size: tuple[int, int] = ...,
    block_sizes: Tensor | tuple[Tensor, Tensor] | None = ..., scale: float | None = ..., k_scale: Tensor | None = ...,
    v_scale: Tensor | None = ..., out_dtype: torch.dtype | None = ..., return_lse: bool, backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
@fast
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    num_sinks: int = 0,
    causal_sinks: bool = False,
    q_time: Tensor | None = None,
    k_time: Tensor | None = None,
    window: tuple[float, float] | None = None,
    block_index: Tensor | None = None,
    block_size: tuple[int, int] = (128, 64),
    block_sizes: Tensor | tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes softmax attention of queries to a memory of keys, with optional visibility rules and a bias per key.

    Key j is visible to query i if j < num_sinks, or if both the window and the block list, as far as they are given,
    allow it. `key_mask` and a `key_bias` of -inf hide a key in any case.

    Args:
        q: (B, Lq, H, D) float queries.
        k: (B or 1, Lk, Hk, D) keys, of the dtype of q, or 8-bit with `k_scale`. Hk must divide H: query head h reads
            key head h // (H // Hk) (grouped-query attention). Keys shared by the batch or by a group of heads are not
            copied.
        v: (B or 1, Lk, Hk, Dv) values, of the batch and dtype of k; Dv may differ from D.
        key_bias: (B or 1, Lk) or (B or 1, H or Hk, Lk) of any float dtype, added to the scores; e.g. the log of a
            merged token's size (proportional attention). -inf hides a key from all queries, even if it is a sink.
        key_mask: (B or 1, Lk) bool: False hides a key from all queries, even if it is a sink; same as a bias of -inf.
        num_sinks: number of first keys that are visible to every query, regardless of the window and the block list.
        causal_sinks: a sink becomes visible only at its time, when k_time[j] <= q_time[i] + right: it is exempt only
            from the left bound of the window and from the block list. Requires `window`.
        q_time: (Lq,) or (B or 1, Lq) times of the queries, int32, int64, float32 or float64, in any unit. Two integer
            times are compared exactly over all of int64, two float32 times in float32, other pairs in float64. A query
            whose time is NaN sees no key. No gradient. Given together with `k_time` and `window`.
        k_time: (Lk,) or (B or 1, Lk) times of the keys, in the unit of `q_time`. No query sees a key whose time is NaN.
        window: (left, right), two numbers of at least 0 in the unit of the times, `math.inf` for no bound: a key is
            visible if q_time[i] - left <= k_time[j] <= q_time[i] + right. Converted to float64.
        block_index: (B or 1, H, Hk or 1, query blocks, topk) int32 or int64: the key blocks that a query block sees, as
            from `topk_blocks`; -1 is an empty entry, duplicates count once.
        block_size: (bq, bk), queries and keys per block; used only with `block_index`.
        block_sizes: (blocks,) int32 or int64, the number of queries or keys in each block, at most bq and bk, as from
            `tile_order` (see its example); one tensor for both, or a pair. Blocks are padded to equal length, which
            takes memory for padded copies of q, k, v and out. Requires `block_index`.
        scale: factor of the scores; default D**-0.5.
        k_scale: (B or 1, Lk) float32, required for k of int8 or float8_e4m3fn and not allowed otherwise: key j is
            `k[:, j].float() * k_scale[:, j]`, as from `quantize_rows` of rows (B, Lk, Hk * D). The kernels read the
            8-bit rows directly, whatever the dtype of q.
        v_scale: the same for v.
        out_dtype: dtype of out: that of q (default), or float32, which skips the rounding of the sums to half
            precision.
        return_lse: also return the log-sum-exp of the scores, for `merge_attention_states`.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, Lq, H, Dv) of `out_dtype`; with `return_lse` also (B, H, Lq) float32 (float64 for float64), the natural
        logarithm. A query that sees no key gets 0 and lse -inf, and its gradients are zero.

        Both results are differentiable in q, k, v, key_bias, k_scale and v_scale; the gradient of a tensor that is
        shared by the batch or by a group of heads is summed. The backward pass of a call with scales dequantises k and
        v to the dtype of q, or to float32 if the scales require a gradient; the 8-bit rows have no gradient. The
        gradient of out is rounded to the same dtype, as without `out_dtype`.

        Hidden values do not leak: NaN and infinities in keys, values, biases and scales that a query does not see, and
            in
        queries and gradients that do not see a key, change no bit of the other results. Visible NaN and infinities
        propagate as usual. The CPU and reference backends guarantee this for every pair of query and key. The Triton
        kernels work in tiles: they guarantee it for blocks that are not listed and for times outside all windows of a
            tile
        of 16 to 128 queries, but a NaN in a key whose bias is -inf reaches the queries of its tile.

        Under torch.compile, `scale` and `window` are inputs of the graph: new values do not recompile it.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.
        IndexError: a block index is outside [-1, ceil(Lk/bk) - 1]. In the Triton kernels on a GPU, where the check
            would cost a synchronisation, the queries with such a block are NaN instead; memory outside k and v is never
            read.

    Equivalent PyTorch:
        bias = key_bias.view(B, -1, 1, Lk).expand(B, H, Lq, Lk).masked_fill(~visible, -inf)
        scaled_dot_product_attention(q.mT, k.mT, v.mT, bias, scale=scale, enable_gqa=True)   # .mT: transpose(1, 2)

    Source: tiles with an online softmax: Milakov and Gimelshein, 2018 (arXiv 1805.02867) and FlashAttention, Dao et
    al., 2022 (arXiv 2205.14135). Bias by merged size: ToMe, Bolya et al., 2022 (arXiv 2210.09461). Sinks: Xiao et al.,
    2023 (arXiv 2309.17453). Grouped queries: Ainslie et al., 2023 (arXiv 2305.13245).
    """
    op = "cross_attention"
    check_tensor(op, "q", q, "B, Lq, H, D")
    batch, _, _, size = q.shape
    _check_keys(op, q, k, v)
    dtype = _check_dtypes(op, q, k, v, k_scale, v_scale)
    keys, key_heads = k.shape[1:3]
    _check_bias(op, q, k, key_bias)
    if key_mask is not None:
        _check_by_key(op, "key_mask", key_mask, q, keys, (torch.bool,))
    check_int(op, "num_sinks", num_sinks, 0, keys)
    bounds = _check_window(op, q, k, q_time, k_time, window)
    if not isinstance(causal_sinks, bool):
        raise TypeError(f"{op}: causal_sinks must be a bool, got {type(causal_sinks).__name__}")
    if causal_sinks and bounds is None:
        raise ValueError(f"{op}: causal_sinks requires window, got window=None")
    sizes = None
    if block_sizes is not None:
        if block_index is None:
            raise ValueError(f"{op}: block_sizes requires block_index, got block_index=None")
        _check_pair(op, "block_size", block_size)
        sizes = check_pair_of_sizes(op, block_sizes, block_size, q, k)
    _check_blocks(op, q, key_heads, block_index, block_size, None if sizes is None else sizes[0].shape[0])
    if scale is None:
        if size == 0:
            raise ValueError(f"{op}: scale must be given if D is 0, got None")
        scale = float(size**-0.5)
    check_number(op, "scale", scale)
    key_bias = spread(masked_bias(key_bias, key_mask, accumulate_dtype(dtype)), batch)
    attention = Attention(
        q=q,
        k=spread(k, batch),
        v=spread(v, batch),
        key_bias=key_bias,
        num_sinks=num_sinks,
        q_time=spread_times(q_time, batch),
        k_time=spread_times(k_time, batch),
        window=bounds,
        block_index=spread(block_index, batch),
        block_size=(block_size[0], block_size[1]),
        scale=scale,
        k_scale=harmless(spread(k_scale, batch), key_bias),
        v_scale=harmless(spread(v_scale, batch), key_bias),
        dtype=dtype,
        out_dtype=_check_out_dtype(op, out_dtype, dtype),
        backend=backend,
    )
    attend = attend_causal_sinks if causal_sinks else attend_groups
    out, lse = attend(attention) if sizes is None else attend_blocks(attend, attention, *sizes)
    return (out, lse) if return_lse else out


@fast
def merge_attention_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Merges attention results over several sets of keys into the exact attention over all of them.

    Args:
        outs: (B, L, H, D) each, of one shape and dtype: results of `cross_attention` for the same queries.
        lses: (B, H, L) each, float32 (float64 for float64 outs): their log-sum-exps; -inf for a query that saw no key,
            or +inf, which some attention libraries return for it.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (out, lse): out (B, L, H, D) of the dtype of `outs` and lse (B, H, L) of the dtype of `lses`, as if one softmax
        had run over all keys; 0 and -inf for a query that no set has a visible key for. A set without visible keys is
        ignored, whatever its out holds, and its gradients are 0. A NaN in lse makes the whole row NaN. Differentiable
        in outs and lses.

    Raises:
        ValueError, TypeError: there is no set, or an argument has a wrong shape, dtype or device.

    Equivalent PyTorch:
        lse = torch.stack(lses).logsumexp(0)  # no lse is +inf
        out = sum((l - lse).exp().mT.unsqueeze(-1) * o for o, l in zip(outs, lses))

    Source: the merging step of online softmax, Milakov and Gimelshein, 2018 (arXiv 1805.02867), as in Flash-Decoding.
    """
    op = "merge_attention_states"
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(
            f"{op}: outs and lses must have the same length of at least 1, got {len(outs)} and {len(lses)}"
        )
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(op, f"outs[{i}]", out, "B, L, H, D")
        wide = accumulate_dtype(out.dtype)
        check_tensor(op, f"lses[{i}]", lse, "B, H, L", (wide,))
        check_same(op, f"outs[0] and outs[{i}] must have the same shape", outs[0].shape, out.shape)
        batch, length, heads, _ = out.shape
        check_same(op, f"lses[{i}] must have shape (B, H, L)", (batch, heads, length), tuple(lse.shape))
        check_same(op, f"outs[0] and outs[{i}] must have the same dtype", outs[0].dtype, out.dtype)
        for name, tensor in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            check_same(op, f"outs[0] and {name} must be on the same device", outs[0].device, tensor.device)
    return call("merge_attention_states", list(outs), list(lses), backend=backend)
