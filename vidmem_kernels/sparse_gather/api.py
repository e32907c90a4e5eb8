"""Public functions of sparse gathering: they check the arguments and call the ops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._blocks import check_pair_of_sizes
from .._call import call
from .._checks import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    QUANTIZED_DTYPES,
    check_int,
    check_same,
    check_tensor,
    common_batch,
    is_one,
    names,
)
from .._fast import fast
from .._sharding import replicating
from .._symbolic import require, saveable, unguarded
from .block_choice import check_always, choose_blocks
from .tiles import TileOrder, tile_order

__all__ = [
    "QuantizedRows",
    "SelectResult",
    "TileOrder",
    "gather_tokens",
    "quantize_rows",
    "scatter_add_tokens",
    "select_tokens",
    "tile_order",
    "topk_blocks",
]


@saveable
class QuantizedRows(NamedTuple):
    """Rows of 8 bits with one scale each; row m dequantises to `rows[..., m, :].float() * scale[..., m]`.

    Attributes:
        rows: (..., M, C) int8 or float8_e4m3fn.
        scale: (..., M) float32 (float64 for float64 inputs).
    """

    rows: Tensor
    scale: Tensor


@saveable
class SelectResult(NamedTuple):
    """The kept tokens in their original order, and their positions: `tokens[b, i] == x[b, index[b, i]]`.

    Attributes:
        tokens: (B, keep, C) of the dtype of the input.
        index: (B, keep) int32, ascending.
    """

    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which a pair can do without


@fast
def gather_tokens(
    bank: Tensor,
    index: Tensor,
    *,
    scale: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Gathers rows of a token memory and dequantises them in the same pass.

    Args:
        bank: (B, M, C), or (1, M, C) shared by the whole batch; float32, bfloat16, float16, float64, int8 or
            float8_e4m3fn. With a CUDA `index`, the bank may lie in pinned host memory; it is then read in place.
        index: (B, K), or (1, K) shared by the whole batch; int32 or int64 row numbers; -1 gives a row of zeros.
        scale: (B or 1, M) float32 or, from `quantize_rows` of float64 tokens, float64: one factor per row. Required for
            int8 and float8 banks and not allowed for others.
        out_dtype: float dtype of the result; default: that of the bank, or of `scale` for an 8-bit bank.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, K, C) contiguous, on the device of `index`. Differentiable in a float `bank` (by a deterministic
        scatter-add) and in `scale`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
        IndexError: an index is outside [-1, M - 1]. On a GPU, where the check would cost a synchronisation, the row is
            NaN instead; memory outside the bank is never read.

    Equivalent PyTorch:
        rows = bank[arange(B)[:, None], index.clamp(min=0)].float() * scale[arange(B)[:, None], index, None]
        rows.masked_fill(index[..., None] < 0, 0).to(out_dtype)
    """
    op = "gather_tokens"
    check_tensor(op, "bank", bank, "B, M, C", FLOAT_DTYPES + QUANTIZED_DTYPES)
    check_tensor(op, "index", index, "B, K", INDEX_DTYPES)
    if bank.shape[0] != 1 and bank.shape[0] != index.shape[0]:
        if not is_one(index.shape[0]):
            raise ValueError(f"{op}: bank must have batch 1 or that of index, {index.shape[0]}, got {bank.shape[0]}")
        index = index.expand(bank.shape[0], -1)
    if bank.device != index.device and bank.device.type != "cpu":
        raise ValueError(
            f"{op}: bank must be on the device of index, {index.device}, or on the host, got {bank.device}"
        )
    if (scale is not None) != (bank.dtype in QUANTIZED_DTYPES):
        raise TypeError(
            f"{op}: scale is required for {names(QUANTIZED_DTYPES)} banks and not allowed for others, got a "
            f"{names([bank.dtype])} bank and {'a' if scale is not None else 'no'} scale"
        )
    if scale is not None:
        if bank.requires_grad:
            raise ValueError(
                f"{op}: bank must not require a gradient, which {names([bank.dtype])} cannot have; detach it"
            )
        check_tensor(op, "scale", scale, "B, M", (torch.float32, torch.float64))
        check_same(op, "scale must have the bank's first two sizes", scale.shape, bank.shape[:2])
        check_same(op, "scale must be on the bank's device", scale.device, bank.device)
    if out_dtype is not None and out_dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: out_dtype must be {names(FLOAT_DTYPES)}, got {out_dtype}")
    if scale is None or scale.dtype == torch.float32:
        return call("gather_tokens", bank, index, scale, out_dtype, backend=backend)
    # The kernels multiply in float32; codes and their factors are read apart, which float64 alone is slower for.
    on_host = scale.device.type == "cpu" and index.device.type != "cpu"  # and pinned, to be read in place
    ones = torch.ones_like(scale, dtype=torch.float32, pin_memory=on_host)
    codes = call("gather_tokens", bank, index, ones, torch.float64, backend=backend)
    factors = call("gather_tokens", scale.unsqueeze(2), index, None, None, backend=backend)
    return (codes * factors).to(out_dtype or torch.float64)


@fast
def scatter_add_tokens(src: Tensor, index: Tensor, num_rows: int, *, backend: str | None = None) -> Tensor:
    """Adds rows into a new memory of zeros: the transpose of `gather_tokens`.

    Args:
        src: (B, K, C) float rows.
        index: (B or 1, K) int32 or int64, the output row of each source row; -1 drops the source row.
        num_rows: M, the number of rows of the result.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, M, C) of the dtype of `src`. Rows with the same index are summed in float32, in order of K, so the result is
        deterministic even with duplicates. Differentiable in `src`, any number of times.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
        IndexError: an index is outside [-1, M - 1]; on a GPU the row is dropped instead.

    Equivalent PyTorch:
        src.new_zeros(B, M, C).scatter_add_(1, index[..., None].expand_as(src), src)
    """
    op = "scatter_add_tokens"
    check_tensor(op, "src", src, "B, K, C")
    check_tensor(op, "index", index, "B, K", INDEX_DTYPES)
    if is_one(index.shape[0]) and not is_one(src.shape[0]):
        index = index.expand(src.shape[0], -1)
    check_same(op, "index must have the first two sizes of src", index.shape, src.shape[:2])
    check_same(op, "index must be on the device of src", index.device, src.device)
    check_int(op, "num_rows", num_rows, 0)
    return call("scatter_add_tokens", src, index, num_rows, backend=backend)


@fast
def quantize_rows(x: Tensor, dtype: torch.dtype = torch.int8, *, backend: str | None = None) -> QuantizedRows:
    """Quantises each row to 8 bits, symmetrically, with one scale per row from its largest magnitude.

    With qmax = 127 for int8 and 448 for float8_e4m3fn: scale = max(|row|) / qmax, rows = x / scale, rounded to
    nearest, ties to even. The dequantised row differs from x by at most

        int8:           scale / 2
        float8_e4m3fn:  max(|x| / 16, scale / 1024)

    plus the float32 rounding of the quotient and the product (2**-23 of |x|).

    Args:
        x: (..., M, C) float.
        dtype: torch.int8 or torch.float8_e4m3fn.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        QuantizedRows with rows (..., M, C) of `dtype` and scale (..., M) float32 (float64 for a float64 x). A row of
        zeros has scale 0 and rows 0; any other scale is at least 2**-126. A row with a NaN or an infinity has scale NaN
        and rows 0, so that it dequantises to NaN. `scale` is differentiable in x: its gradient goes to the first
        largest |x| of the row. `rows` are rounded and have no gradient.

    Raises:
        ValueError: x has fewer than two dimensions.
        TypeError: x is not a float tensor, or `dtype` is neither of the two.

    Equivalent PyTorch:
        scale = x.abs().amax(-1).float() / 127
        rows = (x / scale[..., None]).round().to(torch.int8)

    Source: symmetric absmax quantisation per row, as of tokens in LLM.int8() (arXiv 2208.07339); float8 as in
    FP8 Formats for Deep Learning (arXiv 2209.05433).
    """
    op = "quantize_rows"
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (..., M, C), got {tuple(x.shape)}")
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: x must be {names(FLOAT_DTYPES)}, got {names([x.dtype])}")
    if dtype not in QUANTIZED_DTYPES:
        raise TypeError(f"{op}: dtype must be {names(QUANTIZED_DTYPES)}, got {dtype!r}")
    if x.dim() == 3:
        return QuantizedRows(*call("quantize_rows", x, dtype, backend=backend))
    flat = unguarded(torch.reshape, x, (math.prod(x.shape[:-2]), *x.shape[-2:]))
    rows, scale = call("quantize_rows", flat, dtype, backend=backend)
    return QuantizedRows(unguarded(torch.reshape, rows, x.shape), unguarded(torch.reshape, scale, x.shape[:-1]))


@fast
def select_tokens(x: Tensor, keep: int, *, score: Tensor | None = None, backend: str | None = None) -> SelectResult:
    """Keeps a fixed number of tokens, those with the highest scores, in their original order.

    Args:
        x: (B, N, C) float tokens.
        keep: tokens to keep in each batch element, in [0, N].
        score: (B or 1, N) float; the highest scores are kept. Default: the L2 norm of each token, computed in float32
            (float64 for float64) relative to the token's largest magnitude, so that it neither overflows nor
            underflows. Of equal scores, the lower position is kept. NaN counts as -inf.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        SelectResult with tokens (B, keep, C) and index (B, keep) int32, ascending. `tokens` is differentiable in x.
        `score` only decides which tokens are kept and has no gradient, as in argmax.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device, or `keep` is outside [0, N].

    Equivalent PyTorch:
        score = x.float().norm(dim=2)
        index = score.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(dim=1).values
        tokens = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    """
    op = "select_tokens"
    check_tensor(op, "x", x, "B, N, C")
    check_int(op, "keep", keep, 0, x.shape[1])
    if score is not None:
        check_tensor(op, "score", score, "B, N")
        if is_one(score.shape[0]) and not is_one(x.shape[0]):
            score = score.expand(x.shape[0], -1)
        check_same(op, "score must have the first two sizes of x", score.shape, x.shape[:2])
        check_same(op, "score must be on the device of x", score.device, x.device)
    return SelectResult(*call("select_tokens", x, keep, score, backend=backend))


@fast
def topk_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: tuple[int, int],
    topk: int,
    block_sizes: Tensor | tuple[Tensor, Tensor] | None = None,
    key_mask: Tensor | None = None,
    always: Sequence[int] | Tensor | None = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Finds the best key blocks for each query block: the `block_index` of `cross_attention`.

    The rows of each block are averaged in float32 (float64 for float64); the score of a query block and a key block is
    the dot product of their means. A sum or score that overflows is infinite, and infinite scores tie. The full matrix
    of scores is never held in memory.

    Args:
        q: (B, Lq, H, D) float queries.
        k: (B, Lk, H, D) float keys. One of q and k may have batch 1.
        block_size: (bq, bk), the rows of a query block and of a key block; the last block may be shorter.
        topk: number of key blocks to find, in [0, number of key blocks].
        block_sizes: (blocks,) int32 or int64 rows of each block, at most bq and bk, as from `tile_order`: one tensor
            for both queries and keys, or a pair of tensors. Default: every block has bq or bk rows, except the last.
        key_mask: (B or 1, Lk) bool: keys that are False are left out of the means, whatever their values. A block
            without any visible key is never chosen.
        always: key blocks that every query block gets: a sequence or an int tensor (n,) of block numbers; or a bool
            mask (query blocks, key blocks). They count towards `topk` and come first, in ascending order; if a mask has
            more of them than `topk`, the first ones are taken.
        causal: each query block chooses only among the key blocks up to its own, which is the one with its last row; if
            there are more keys than queries, the queries are aligned to the end. Its own block is always chosen, counts
            towards `topk` and comes before all others, as in MoBA.
        backend: see `vidmem_kernels.use_backend`. With `causal`, the choice itself is plain PyTorch on every backend.

    Returns:
        (B, H, query blocks, topk) int32 key blocks, best first, equal scores by ascending block; -1 fills the places
        for which `key_mask` or `causal` leave no block. A NaN score counts as -inf. The result has no gradient, as in
        argmax.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device, or `topk` exceeds the number of blocks.
        IndexError: block sizes are outside [0, block size] or have a wrong sum, or `always` names a block that does not
            exist. On a GPU, where the check would cost a synchronisation, the result is undefined instead.

    Equivalent PyTorch:
        # whole blocks, no options
        queries, keys = (x.unflatten(1, (-1, b)).float().mean(2).transpose(1, 2) for x, b in ((q, bq), (k, bk)))
        (queries @ keys.transpose(2, 3)).argsort(dim=3, descending=True, stable=True)[..., :topk].int()

    Source: block selection by mean-pooled keys as in MoBA (arXiv 2502.13189), with queries pooled too, as in the
    coarse stage of VSA (arXiv 2505.13389). Their implementations round the means of bfloat16 blocks to bfloat16; here
    they stay in float32. If scores nearly tie, the order of blocks, or the choice itself, may therefore differ from
    theirs.
    """
    op = "topk_blocks"
    check_tensor(op, "q", q, "B, Lq, H, D")
    check_tensor(op, "k", k, "B, Lk, H, D")
    batch = common_batch(op, q=q, k=k)
    for axis, name in ((2, "H"), (3, "D")):
        check_same(op, f"q and k must have the same {name}", q.shape[axis], k.shape[axis])
    check_same(op, "q and k must be on the same device", q.device, k.device)
    if not isinstance(block_size, tuple | list) or len(block_size) != 2:
        raise TypeError(f"{op}: block_size must be a pair (bq, bk), got {block_size!r}")
    block_q, block_k = block_size
    check_int(op, "block_size[0]", block_q, 1)
    check_int(op, "block_size[1]", block_k, 1)
    blocks_q, blocks_k = -(-q.shape[1] // block_q), -(-k.shape[1] // block_k)
    q_sizes = k_sizes = None
    if block_sizes is not None:
        q_sizes, k_sizes = check_pair_of_sizes(op, block_sizes, block_size, q, k)
        blocks_q, blocks_k = q_sizes.shape[0], k_sizes.shape[0]
    check_int(op, "topk", topk, 0, blocks_k)
    if key_mask is not None:
        check_tensor(op, "key_mask", key_mask, "B|1, Lk", (torch.bool,))
        if not is_one(key_mask.shape[0]):
            check_same(op, "key_mask must have batch 1 or that of q and k", batch, key_mask.shape[0])
        check_same(op, "k and key_mask must have the same Lk", k.shape[1], key_mask.shape[1])
        check_same(op, "k and key_mask must be on the same device", k.device, key_mask.device)
    if not isinstance(causal, bool):
        raise TypeError(f"{op}: causal must be a bool, got {type(causal).__name__}")
    if causal:
        require(
            k.shape[1] >= q.shape[1],
            lambda: f"{op}: causal requires at least as many keys as queries, got {k.shape[1]} and {q.shape[1]}",
        )
    if always is not None:
        check_always(op, always, q, blocks_q, blocks_k, topk)
    # Widening is exact, so queries and keys of two dtypes, as autocast leaves them, need no separate kernel.
    wider = torch.promote_types(q.dtype, k.dtype)
    q, k = q.to(wider), k.to(wider)
    if block_sizes is None and key_mask is None and always is None and not causal:
        q, k = (x.expand(batch, *x.shape[1:]) if is_one(x.shape[0]) else x for x in (q, k))
        return call("topk_blocks", q, k, block_q, block_k, topk, backend=backend)
    with replicating(q):
        return unguarded(
            choose_blocks, q, k, batch, block_size, topk, q_sizes, k_sizes, key_mask, always, causal, backend
        )
