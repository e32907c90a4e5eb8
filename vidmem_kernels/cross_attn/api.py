"""Public functions of cross-attention: contracts and checks of meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._call import call
from .._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    check_int,
    check_number,
    check_same,
    check_same_dtype,
    check_tensor,
    is_number,
)
from .._dispatch import requested
from .._fast import fast
from .._numerics import accumulate_dtype
from .._symbolic import require_same
from .._transforms import depth
from .symbolic import any_open, attend

__all__ = [
    "cross_attention",
    "merge_attention_states",
]

_TIME_DTYPES = (torch.int32, torch.int64, torch.float32, torch.float64)
_UNBOUNDED = torch.finfo(torch.float32).max  # stands for infinity beside finite times


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
        expected = tuple(x.shape[1:2] if time.dim() == 1 else x.shape[:2])
        check_same(op, f"{name} must have shape ({shape})", expected, tuple(time.shape))
        check_same(op, f"q and {name} must be on the same device", q.device, time.device)
    if torch.compiler.is_exporting():
        # AOTInductor writes constants as JSON, which has no infinity.
        window = [_UNBOUNDED if side == float("inf") else side for side in window]
    return list(window)


def _check_blocks(op: str, q: Tensor, block_index: Tensor | None, block_size: tuple[int, int]) -> None:
    _check_pair(op, "block_size", block_size)
    check_int(op, "block_size[0]", block_size[0], 1)
    check_int(op, "block_size[1]", block_size[1], 1)
    if block_index is None:
        return
    check_tensor(op, "block_index", block_index, "B, H|1, ceil(Lq/bq), topk", INDEX_DTYPES)
    batch, heads, rows, _ = block_index.shape
    blocks = -(-q.shape[1] // block_size[0])
    require_same(
        (batch, heads, rows),
        (q.shape[0], 1 if heads == 1 else q.shape[2], blocks),
        lambda: (
            f"{op}: block_index must have shape ({q.shape[0]}, {q.shape[2]} or 1, {blocks}, topk), "
            f"got {tuple(block_index.shape)}"
        ),
    )
    check_same(op, "q and block_index must be on the same device", q.device, block_index.device)


@fast
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_bias: Tensor | None = None,
    num_sinks: int = 0,
    q_time: Tensor | None = None,
    k_time: Tensor | None = None,
    window: tuple[float, float] | None = None,
    block_index: Tensor | None = None,
    block_size: tuple[int, int] = (128, 64),
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of queries to a memory of keys, some of them visible, each with its own bias.

    Key j is visible to query i when j < num_sinks, or when the window and the block condition hold, as far as given.

    Args:
        q: (B, Lq, H, D) queries.
        k: (B, Lk, H, D) keys, of the same dtype.
        v: (B, Lk, H, Dv) values; Dv may differ from D.
        key_bias: (B, Lk) or (B, H, Lk) float of any dtype, added to the scores; e.g. the log of a merged token's size
            (proportional attention). -inf hides a key from every query, sinks too.
        num_sinks: the first keys, visible to every query whatever the other conditions.
        q_time, k_time: (Lq,) or (B, Lq), and (Lk,) or (B, Lk): times in any common unit, int32, int64, float32 or
            float64. Integers are compared exactly, wherever in int64 they lie; two float32 in float32; anything else
            in float64. A time that is NaN sees nothing and is seen by nothing. They have no gradient.
        window: (left, right), numbers of at least 0, `math.inf` for no bound, in the unit of the times:
            q_time[i] - left <= k_time[j] <= q_time[i] + right. Taken as float64.
        block_index: (B, H or 1, ceil(Lq/bq), topk) int32 or int64: the blocks of keys that a block of queries sees, as
            from `topk_blocks`; -1 is none, duplicates count once.
        block_size: (bq, bk), queries and keys in a block; used only with `block_index`.
        scale: factor of the scores; default D**-0.5.
        return_lse: also return the log-sum-exp of the scores, for `merge_attention_states`.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, Lq, H, Dv) of the dtype of q; with `return_lse` also (B, H, Lq) float32 (float64 for float64), the natural
        logarithm. A query that sees nothing gets 0 and lse -inf, and has gradients of zero. Differentiable in q, k, v
        and key_bias, through both results.

        What is hidden touches nothing: NaN and infinities in keys, values and biases that a query does not see, and in
        queries and gradients that a key is hidden from, change no bit of what else there is. What is visible and no
        number has its natural effect. The CPU and reference backends keep this pair by pair. Triton's kernels work in
        tiles: there it holds for blocks that are not listed and for times outside the span of all windows of a tile
        of 16 to 128 queries, but NaN where the bias is -inf reaches the queries of its tile.

        In a graph of torch.compile a changing window or scale becomes an input of the graph: no value compiles anew.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or options that do not fit.
        IndexError: a block index outside [-1, ceil(Lk/bk) - 1]. Where Triton's kernels run on a GPU, on which checking
            would cost a synchronisation, the queries with such a block are NaN instead; nothing outside is read.

    Equivalent PyTorch:
        bias = key_bias.view(B, -1, 1, Lk).expand(B, H, Lq, Lk).masked_fill(~visible, -inf)
        scaled_dot_product_attention(q.mT, k.mT, v.mT, bias, scale=scale)   # .mT: transpose(1, 2)

    Source:
        Tiled with an online softmax: Milakov and Gimelshein, 2018 (arXiv:1805.02867); FlashAttention, Dao et al., 2022
        (arXiv:2205.14135). Bias by merged size: ToMe, Bolya et al., 2022 (arXiv:2210.09461). Sinks: Xiao et al., 2023
        (arXiv:2309.17453).
    """
    op = "cross_attention"
    check_tensor(op, "q", q, "B, Lq, H, D")
    check_tensor(op, "k", k, "B, Lk, H, D")
    check_tensor(op, "v", v, "B, Lk, H, Dv")
    batch, _, heads, size = q.shape
    keys = k.shape[1]
    check_same(
        op,
        "q and k must have the same B, H and D",
        (batch, heads, size),
        (k.shape[0], *k.shape[2:]),
    )
    check_same(op, "k and v must have the same B, Lk and H", tuple(k.shape[:3]), tuple(v.shape[:3]))
    dtype = check_same_dtype(op, q=q, k=k, v=v)
    check_same(op, "q and k must be on the same device", q.device, k.device)
    check_same(op, "q and v must be on the same device", q.device, v.device)
    if key_bias is not None:
        by_head = isinstance(key_bias, Tensor) and key_bias.dim() == 3
        check_tensor(op, "key_bias", key_bias, "B, H, Lk" if by_head else "B, Lk", FLOAT_DTYPES)
        expected = (batch, heads, keys) if by_head else (batch, keys)
        check_same(op, "key_bias must have shape (B, Lk) or (B, H, Lk)", expected, tuple(key_bias.shape))
        check_same(op, "q and key_bias must be on the same device", q.device, key_bias.device)
    check_int(op, "num_sinks", num_sinks, 0, keys)
    bounds = _check_window(op, q, k, q_time, k_time, window)
    _check_blocks(op, q, block_index, block_size)
    if scale is None:
        if size == 0:
            raise ValueError(f"{op}: scale must be given where D is 0, got None")
        scale = float(size**-0.5)
    check_number(op, "scale", scale)
    if torch.compiler.is_compiling() and depth() == 0 and any_open([*(bounds or ()), scale]):
        options = (num_sinks, q_time, k_time, bounds, block_index, list(block_size), scale)
        out, lse = attend(*(x.to(dtype) for x in (q, k, v)), key_bias, *options, requested(backend))
    else:
        window = bounds and [float(side) for side in bounds]
        out, lse = call(
            "cross_attention", q, k, v, key_bias, num_sinks, q_time, k_time, window, block_index, list(block_size),
            float(scale), backend=backend,
        )  # fmt: skip
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
