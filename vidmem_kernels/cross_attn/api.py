"""Public functions of cross-attention: contracts and checks of meaning."""

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
    """The batch that x must have: that of q, unless x has the batch of 1 that serves every batch."""
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
            f"{op}: q and k must have the same B, H and D, "
            f"got {(q.shape[0], *q.shape[2:])} and {(k.shape[0], *k.shape[2:])}"
        ),
    )
    if heads != key_heads:
        fits = 1 <= key_heads <= heads and heads % key_heads == 0
        require(fits, "{}: the heads of k must divide those of q, got {} and {}".format, op, key_heads, heads)
    check_same(op, "k and v must have the same B, Lk and H", tuple(k.shape[:3]), tuple(v.shape[:3]))
    check_same(op, "q and k must be on the same device", q.device, k.device)
    check_same(op, "q and v must be on the same device", q.device, v.device)


def _check_dtypes(
    op: str, q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> torch.dtype:
    """The dtype that the op will see."""
    rows, scales = {"k": k, "v": v}, {"k_scale": k_scale, "v_scale": v_scale}
    given = [scale is not None for scale in scales.values()]
    if given != [x.dtype in QUANTIZED_DTYPES for x in rows.values()]:
        raise TypeError(
            f"{op}: k_scale and v_scale must be given exactly for {names(QUANTIZED_DTYPES)} k and v, got "
            f"{names([k.dtype])} and {names([v.dtype])} with {' and '.join(n for n in scales if scales[n] is not None)}"
            f"{'' if any(given) else 'neither'}"
        )
    if not any(given):
        return check_same_dtype(op, q=q, k=k, v=v)
    check_same(op, "k and v must have the same dtype", k.dtype, v.dtype)
    for (name, x), (scale_name, scale) in zip(rows.items(), scales.items(), strict=True):
        if x.requires_grad:
            raise ValueError(f"{op}: {name} must be detached, for {names([x.dtype])} has no gradient, got one required")
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
    """Softmax attention of queries to a memory of keys, some of them visible, each with its own bias.

    Key j is visible to query i when j < num_sinks, or when the window and the block condition hold, as far as given;
    and in any case only where `key_mask` and the bias do not hide it.

    Args:
        q: (B, Lq, H, D) queries.
        k: (B|1, Lk, Hk, D) keys, of the same dtype, or in 8 bits with `k_scale`. Hk divides H: head h of the queries
            reads head h // (H // Hk) (grouped-query attention). Nothing is copied for a batch or a group.
        v: (B|1, Lk, Hk, Dv) values, with the batch and the dtype of k; Dv may differ from D.
        key_bias: (B|1, Lk) or (B|1, H or Hk, Lk) float of any dtype, added to the scores; e.g. the log of a merged
            token's size (proportional attention). -inf hides a key from every query, sinks too.
        key_mask: (B|1, Lk) bool: False hides a key from every query, sinks too, as a bias of -inf does.
        num_sinks: the first keys, visible to every query whatever the window and the blocks.
        causal_sinks: with a window: a sink is visible from its own time on, when k_time[j] <= q_time[i] + right; it
            escapes the left bound and the block list alone.
        q_time, k_time: (Lq,) or (B|1, Lq), and (Lk,) or (B|1, Lk): times in any common unit, int32, int64, float32 or
            float64. Integers are compared exactly, wherever in int64 they lie; two float32 in float32; anything else
            in float64. A time that is NaN sees nothing and is seen by nothing. They have no gradient.
        window: (left, right), numbers of at least 0, `math.inf` for no bound, in the unit of the times:
            q_time[i] - left <= k_time[j] <= q_time[i] + right. Taken as float64.
        block_index: (B|1, H, Hk or 1, blocks of q, topk) int32 or int64: the blocks of keys that a block of queries
            sees, as from `topk_blocks`; -1 is none, duplicates count once.
        block_size: (bq, bk), queries and keys in a block; used only with `block_index`.
        block_sizes: with `block_index`: (blocks,) int32 or int64 queries or keys of every block, at most bq and bk, as
            of `tile_order`, which has an example; one tensor for both, or a pair. Blocks are copied into places of one
            length, which takes memory for whole blocks of q, k, v and out.
        scale: factor of the scores; default D**-0.5.
        k_scale, v_scale: (B|1, Lk) float32 for k and v of int8 or float8_e4m3fn, and only for those: row j stands for
            `k[:, j].float() * k_scale[:, j]`, as from `quantize_rows` of rows (B, Lk, Hk * D). Rows are read as they
            are, whatever the dtype of q.
        out_dtype: of out; default that of q. float32 gives sums as they are, not rounded to half precision.
        return_lse: also return the log-sum-exp of the scores, for `merge_attention_states`.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, Lq, H, Dv) of `out_dtype`; with `return_lse` also (B, H, Lq) float32 (float64 for float64), the natural
        logarithm. A query that sees nothing gets 0 and lse -inf, and has gradients of zero. Differentiable in q, k, v,
        key_bias, k_scale and v_scale, through both results; what serves a batch or a group gets the sum. The gradient
        of a call with scales dequantises k and v to the dtype of q, or to float32 where scales require a gradient; rows
        have none. The gradient of out is rounded to that dtype, as it would be without `out_dtype`.

        What is hidden touches nothing: NaN and infinities in keys, values, biases and scales that a query does not see,
        and in queries and gradients that a key is hidden from, change no bit of what else there is. What is visible and
        no number has its natural effect. The CPU and reference backends keep this pair by pair. Triton's kernels work
        in tiles: there it holds for blocks that are not listed and for times outside the span of all windows of a tile
        of 16 to 128 queries, but NaN where the bias is -inf reaches the queries of its tile.

        In a graph of torch.compile a changing window or scale becomes an input of the graph: no value compiles anew.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        IndexError: a block index outside [-1, ceil(Lk/bk) - 1]. Where Triton's kernels run on a GPU, on which checking
            would cost a synchronisation, the queries with such a block are NaN instead; nothing outside is read.

    Equivalent PyTorch:
        bias = key_bias.view(B, -1, 1, Lk).expand(B, H, Lq, Lk).masked_fill(~visible, -inf)
        scaled_dot_product_attention(q.mT, k.mT, v.mT, bias, scale=scale, enable_gqa=True)   # .mT: transpose(1, 2)

    Source:
        Tiled with an online softmax: Milakov and Gimelshein, 2018 (arXiv:1805.02867); FlashAttention, Dao et al., 2022
        (arXiv:2205.14135). Bias by merged size: ToMe, Bolya et al., 2022 (arXiv:2210.09461). Sinks: Xiao et al., 2023
        (arXiv:2309.17453). Grouped queries: Ainslie et al., 2023 (arXiv:2305.13245).
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
        raise ValueError(f"{op}: causal_sinks must be given with a window, got window=None")
    sizes = None
    if block_sizes is not None:
        if block_index is None:
            raise ValueError(f"{op}: block_sizes must be given with block_index, got block_index=None")
        _check_pair(op, "block_size", block_size)
        sizes = check_pair_of_sizes(op, block_sizes, block_size, q, k)
    _check_blocks(op, q, key_heads, block_index, block_size, None if sizes is None else sizes[0].shape[0])
    if scale is None:
        if size == 0:
            raise ValueError(f"{op}: scale must be given where D is 0, got None")
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
    """Merges attention over several sources of keys into attention over all of them, exactly.

    Args:
        outs: (B, L, H, D) each, of one shape and dtype: results of `cross_attention` for the same queries.
        lses: (B, H, L) each, float32 (float64 for float64 outs): their log-sum-exps; -inf where nothing was visible,
            or +inf, as some attentions have it.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (out (B, L, H, D), lse (B, H, L)) of the dtypes given, as if one softmax had run over all keys; 0 and -inf
        where no source had a visible key. A source without one counts for nothing, whatever its out holds, and has
        gradients of 0. An lse that is NaN makes its row NaN. Differentiable in outs and lses.

    Raises:
        ValueError, TypeError: no source, or shapes, dtypes or devices that do not fit.

    Equivalent PyTorch:
        lse = torch.stack(lses).logsumexp(0)  # where none is +inf
        out = sum((l - lse).exp().mT.unsqueeze(-1) * o for o, l in zip(outs, lses))

    Source:
        The merging step of online softmax, Milakov and Gimelshein, 2018 (arXiv:1805.02867), as in Flash-Decoding.
    """
    op = "merge_attention_states"
    if len(outs) != len(lses) or len(outs) == 0:
        raise ValueError(f"{op}: outs and lses must be as many, and at least one, got {len(outs)} and {len(lses)}")
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
