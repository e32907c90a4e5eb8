"""Sparse gathering in plain differentiable PyTorch: the reference for all other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from .._numerics import accumulate_dtype, add_rows, check_index


def gather_tokens(bank: Tensor, index: Tensor, scale: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """See `vidmem_kernels.gather_tokens`."""
    batch, rows, _ = bank.shape
    check_index("gather_tokens", "index", index, -1, rows)
    if out_dtype is None:
        out_dtype = bank.dtype if scale is None else torch.float32
    where = index.to(bank.device, torch.int64)  # a bank on the host is read on the host
    lane = torch.arange(index.shape[0], device=bank.device).unsqueeze(1)
    lane = lane if batch > 1 else torch.zeros_like(lane)
    if rows == 0:  # only -1 passes the check
        out = bank.new_zeros(*index.shape, bank.shape[2], dtype=out_dtype)
        return out.to(index.device)
    where_read = where.clamp(min=0)
    if bank.dtype == torch.float8_e4m3fn:  # torch cannot index float8
        taken = bank.view(torch.uint8)[lane, where_read].view(bank.dtype)
    else:
        taken = bank[lane, where_read]
    if scale is not None:
        taken = taken.to(torch.float32) * scale[lane, where_read].unsqueeze(2)
    out = taken.to(out_dtype).masked_fill((where < 0).unsqueeze(2), 0)
    return out.to(index.device)


def scatter_add_tokens(src: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """See `vidmem_kernels.scatter_add_tokens`."""
    batch, count, channels = src.shape
    check_index("scatter_add_tokens", "index", index, -1, num_rows)
    sum_dtype = accumulate_dtype(src.dtype)
    lane = torch.arange(batch, device=src.device).unsqueeze(1)
    # -1 goes to an extra row, which is dropped.
    row = torch.where(index < 0, num_rows, index).to(torch.int64) + lane * (num_rows + 1)
    out = src.new_zeros(batch * (num_rows + 1), channels, dtype=sum_dtype)
    out = add_rows(out, row.flatten(), src.flatten(0, 1).to(sum_dtype))
    return out.view(batch, num_rows + 1, channels)[:, :num_rows].to(src.dtype)


# Largest magnitudes of the two row dtypes.
QUANTIZED_MAX = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def scale_limits(dtype: torch.dtype, scale_dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest scale of a nonzero row of `dtype`.

    A subnormal scale is too coarse to keep x / scale within qmax; a scale rounded up from the largest float / qmax
    would dequantise qmax to infinity.
    """
    limits = torch.finfo(scale_dtype)
    return limits.tiny, limits.max / QUANTIZED_MAX[dtype] * (1 - limits.eps)


def _row_maximum(x: Tensor) -> Tensor:
    """Largest magnitude of each row, in float32 (float64 for float64); NaN if the row is not finite."""
    compute = accumulate_dtype(x.dtype)
    magnitude = x.abs()
    if x.shape[-1] == 0:
        return magnitude.sum(dim=-1, dtype=compute)
    # The first of the largest; amax would divide the gradient among equal ones.
    first = magnitude.argmax(dim=-1, keepdim=True)
    maximum = magnitude.gather(-1, first).squeeze(-1).to(compute)
    return maximum.masked_fill(maximum == torch.inf, torch.nan)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.quantize_rows`."""
    maximum = _row_maximum(x)
    scale = maximum / torch.full_like(
        maximum, QUANTIZED_MAX[dtype]
    )  # with a Python number, CUDA would multiply by its inverse
    scale = torch.where(maximum > 0, scale.clamp(*scale_limits(dtype, scale.dtype)), maximum)
    usable = (scale > 0).unsqueeze(-1)  # neither 0 nor NaN
    values = torch.where(usable, x.detach().to(scale.dtype) / scale.detach().unsqueeze(-1), 0)
    return (values.round() if dtype == torch.int8 else values).to(dtype), scale


def quantize_rows_backward(grad_scale: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of `quantize_rows` with respect to x: sign(x) / qmax at the first largest |x| of each row, else 0."""
    grad = torch.zeros_like(x, memory_format=torch.contiguous_format)
    if x.shape[-1] == 0:
        return grad
    first = x.abs().argmax(dim=-1, keepdim=True)
    at = x.gather(-1, first).to(grad_scale.dtype)
    scale = at.abs() / QUANTIZED_MAX[dtype]
    smallest, largest = scale_limits(dtype, scale.dtype)
    step = grad_scale.unsqueeze(-1) * at.sign() / QUANTIZED_MAX[dtype]
    step = step.masked_fill((scale < smallest) | (scale > largest), 0)  # where the scale is clamped
    step = step.masked_fill(~at.isfinite(), torch.nan)
    return grad.scatter(-1, first, step.to(x.dtype))


def merge_best(values: Tensor, index: Tensor, scores: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """Updates a running top-k with further columns; equal scores stay in the order of their index.

    Args:
        values: (..., <= k) the best scores of the columns before `start`, best first.
        index: (..., <= k) their columns.
        scores: (..., n) scores of the columns from `start` on; NaN counts as -inf.
        start: index of the first of these columns.
        k: number of scores to keep.

    Returns:
        (values, index) of the best scores so far.
    """
    scores = scores.masked_fill(scores.isnan(), -torch.inf)
    if k == 1 and scores.shape[-1] > 0:  # avoids sorting
        scores, at = scores.max(dim=-1, keepdim=True)
        columns = at.to(index.dtype) + start
    else:
        columns = torch.arange(start, start + scores.shape[-1], dtype=index.dtype, device=index.device)
    values = torch.cat([values, scores], dim=-1)
    index = torch.cat([index, columns.expand(scores.shape)], dim=-1)
    # A stable sort, unlike torch.topk, keeps equal scores in the order of their index.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index.gather(-1, order[..., :k])


def _norm_keys(x: Tensor) -> Tensor:
    """(B, N) int64 keys in the order of the L2 norms of the rows, computed in float32 with an unbounded exponent."""
    x = x.detach().to(accumulate_dtype(x.dtype))
    if x.shape[2] == 0:
        return x.new_zeros(x.shape[:2], dtype=torch.int64)
    code, mantissa, bias = (torch.int64, 52, 1023) if x.dtype == torch.float64 else (torch.int32, 23, 127)
    peak = torch.linalg.vector_norm(x, ord=torch.inf, dim=2)
    exponent = (peak.view(code) >> mantissa).clamp(min=1)
    # A power of two gives each row's largest value the exponent of 2; rows with NaN or infinity are left unchanged.
    power = ((2 * bias + 1 - exponent) << mantissa).view(x.dtype)
    power = torch.where(peak.isfinite(), power, 1)
    norm = torch.linalg.vector_norm(x * power.unsqueeze(2), dim=2)
    key = norm.view(code).to(torch.int64) + ((exponent.to(torch.int64) - (bias + 65)) << mantissa)
    limits = torch.iinfo(torch.int64)
    key = key.masked_fill(norm == 0, limits.min + 1).masked_fill(norm == torch.inf, limits.max)
    return key.masked_fill(norm.isnan(), limits.min)


def select_tokens(x: Tensor, keep: int, score: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.select_tokens`."""
    score = _norm_keys(x) if score is None else score.masked_fill(score.isnan(), -torch.inf)
    best = score.argsort(dim=1, descending=True, stable=True)[:, :keep]
    index = best.sort(dim=1).values
    lane = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x[lane, index], index.to(torch.int32)


def _block_means(x: Tensor, block: int) -> Tensor:
    """(B, H, ceil(L / block), D) means of blocks of rows of (B, L, H, D); the last block may have fewer rows."""
    length = x.shape[1]
    count = -(-length // block)
    sums = x.new_zeros(x.shape[0], count, *x.shape[2:], dtype=accumulate_dtype(x.dtype))
    for offset in range(min(block, length)):  # one row of each block at a time avoids a float32 copy of x
        # Not a slice with a step, which multiplies a stride: the stride of a single row may be any number.
        rows = x.index_select(1, torch.arange(offset, length, block, device=x.device))
        sums[:, : rows.shape[1]] += rows
    sizes = (length - block * torch.arange(count, device=x.device)).clamp(max=block)
    return (sums / sizes.view(-1, 1, 1)).transpose(1, 2)


# Scores held at a time: 16 MiB in float32.
_SCORES = 1 << 22


def topk_blocks(q: Tensor, k: Tensor, block_q: int, block_k: int, topk: int) -> Tensor:
    """See `vidmem_kernels.topk_blocks`."""
    queries, keys = _block_means(q, block_q), _block_means(k, block_k)
    shape = queries.shape[:3]
    values = queries.new_empty(*shape, 0)
    index = torch.empty(*shape, 0, dtype=torch.int32, device=q.device)
    step = max(1, _SCORES // max(1, shape.numel()))
    for start in range(0, keys.shape[2], step):
        scores = queries @ keys[:, :, start : start + step].transpose(2, 3)
        values, index = merge_best(values, index, scores, start, topk)
    return index


_LAST_COLUMN = 2**31 - 1


def _rank_keys(scores: Tensor) -> Tensor:
    """Non-negative int64 keys in the order of float32 scores: NaN as -inf, equal scores by descending column."""
    scores = scores.masked_fill(scores.isnan(), -torch.inf) + 0.0  # turns -0 into 0
    bits = scores.view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + 2**31
    columns = torch.arange(scores.shape[-1], device=scores.device)
    return (ordered << 31) | (_LAST_COLUMN - columns)


def topk_blocks_causal(q: Tensor, k: Tensor, last: Tensor, present: Tensor, topk: int) -> Tensor:
    """Finds the best key blocks up to the `last` key block of each query block.

    Args:
        q: (B, nq, H, D) means of query blocks, float32 or float64.
        k: (B, nk, H, D) means of key blocks.
        last: (B or 1, nq) the last key block that a query block may choose.
        present: (B or 1, nk) bool, the key blocks that exist.
        topk: number of blocks to find.

    Returns:
        (B, H, nq, topk) int32, best first, equal scores by ascending block; -1 if there are fewer.
    """
    queries, keys = q.transpose(1, 2), k.permute(0, 2, 3, 1)
    shape = (*queries.shape[:3], topk)
    columns = torch.arange(k.shape[1], device=k.device)
    parts = [torch.empty(*shape[:2], 0, topk, dtype=torch.int32, device=q.device)]
    held = (
        _SCORES // 4 if q.device.type == "cpu" else _SCORES
    )  # read in several passes, so they should fit a CPU's cache
    step = max(1, held // max(1, shape[0] * shape[1] * k.shape[1]))
    for start in range(0, shape[2], step):
        rows = slice(start, start + step)
        scores = queries[:, :, rows] @ keys
        seen = ((columns <= last[:, rows].unsqueeze(2)) & present.unsqueeze(1)).unsqueeze(1)
        if scores.dtype == torch.float64:  # a float64 score and a column number do not fit one key
            scores = scores.masked_fill(scores.isnan(), -torch.inf)
            by_score = scores.sort(dim=3, descending=True, stable=True).indices
            seen = seen.expand(scores.shape).gather(3, by_score)
            seen_first = (~seen).sort(dim=3, stable=True).indices[..., :topk]
            found = by_score.gather(3, seen_first).masked_fill(~seen.gather(3, seen_first), -1)
        else:
            best = torch.where(seen, _rank_keys(scores), -1).topk(topk, dim=3).values
            found = torch.where(best < 0, -1, _LAST_COLUMN - (best & _LAST_COLUMN))
        parts.append(found.to(torch.int32))
    return torch.cat(parts, dim=2)
