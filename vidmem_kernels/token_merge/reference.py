"""Token merging in plain differentiable torch: the oracle of every other backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .._numerics import accumulate_dtype, add_rows_, check_index

NO_SIMILARITY = -2.0  # stands for NaN: below every cosine and every threshold
_CHUNK = 2**22  # elements of a temporary: 16 MiB in float32
_BLOCK = 48
_TILE = 4


# --- matching ---


def _unit_vectors(metric: Tensor) -> Tensor:
    """Vectors of length one; zero ones stay zero, ones that hold a NaN or an infinity become NaN throughout."""
    # Contiguous, so that sums have one order whatever the layout.
    x = metric.detach().to(accumulate_dtype(metric.dtype)).contiguous()
    # Divided by its largest value first, a vector's squares neither overflow nor vanish.
    peak = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True)
    x = x / peak.masked_fill(peak == 0, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div_(norm.masked_fill_(norm == 0, 1))


def _whole_blocks(x: Tensor) -> Tensor:
    """(B, L, C) padded with zero rows; BLAS rounds the edge of a matrix differently, and equal tokens must tie."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % _BLOCK))


def _best_column(rows: Tensor, columns: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Highest similarity of each row (B, R, C) to the columns (B, K, C), and the first column that reaches it."""
    scores = torch.bmm(_whole_blocks(rows), _whole_blocks(columns).transpose(1, 2))
    scores = scores[:, : rows.shape[1], : columns.shape[1]].nan_to_num_(nan=NO_SIMILARITY)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    score, column = scores.max(dim=2)
    return score, column


def _match_all(sources: Tensor, destinations: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity and number of the best destination of every source, in chunks of the batch and of sources."""
    count = destinations.shape[1]
    score = sources.new_empty(sources.shape[:2])
    column = torch.empty_like(score, dtype=torch.int64)
    lanes = max(1, _CHUNK // (count * _BLOCK))
    rows = max(1, _CHUNK // (count * _BLOCK * lanes)) * _BLOCK
    for b in range(0, sources.shape[0], lanes):
        for s in range(0, sources.shape[1], rows):
            part = slice(b, b + lanes), slice(s, s + rows)
            score[part], column[part] = _best_column(sources[part], destinations[b : b + lanes])
    return score, column


def _tiles(
    grid: Sequence[int], stride: Sequence[int], window: Sequence[int], lanes: int
) -> Iterator[tuple[list[slice], list[slice]]]:
    """Boxes of cells that cover the grid: per axis, the tokens of a box and the cells that any of them sees."""
    cells = [-(-n // s) for n, s in zip(grid, stride, strict=True)]
    edge = [min(_TILE, n) for n in cells]

    def scores() -> int:
        total = lanes
        for e, s, w, n in zip(edge, stride, window, cells, strict=True):
            total *= e * s * min(n, e + 2 * w)
        return total

    while scores() > _CHUNK and max(edge) > 1:
        longest = edge.index(max(edge))
        edge[longest] = -(-edge[longest] // 2)
    for origin in product(*(range(0, n, e) for n, e in zip(cells, edge, strict=True))):
        axes = list(zip(origin, edge, grid, stride, window, cells, strict=True))
        own = [slice(o * s, min((o + e) * s, size)) for o, e, size, s, _, _ in axes]
        seen = [slice(max(o - w, 0), min(o + e + w, n)) for o, e, _, _, w, n in axes]
        yield own, seen


def _hidden(
    own: list[slice], seen: list[slice], stride: Sequence[int], window: Sequence[int], device: torch.device
) -> Tensor:
    """(R, K): cell k lies outside the window of token r, on any axis."""
    hidden = torch.zeros(1, 1, dtype=torch.bool, device=device)
    for tokens, cells, s, w in zip(own, seen, stride, window, strict=True):
        cell = torch.arange(tokens.start, tokens.stop, device=device).unsqueeze(1) // s
        far = (cell - torch.arange(cells.start, cells.stop, device=device)).abs() > w
        rows, columns = hidden.shape[0] * far.shape[0], hidden.shape[1] * far.shape[1]
        hidden = (hidden[:, None, :, None] | far[None, :, None, :]).view(rows, columns)
    return hidden


def _match_window(x: Tensor, stride: Sequence[int], window: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(B, T, H, W): similarity and position of the best destination in the window of every token of a grid."""
    batch, *grid, _ = x.shape
    cells = x[:, :: stride[0], :: stride[1], :: stride[2]]
    positions = torch.arange(grid[0] * grid[1] * grid[2], device=x.device).view(grid)
    positions = positions[:: stride[0], :: stride[1], :: stride[2]]
    score = x.new_empty(batch, *grid)
    destination = positions.new_empty(batch, *grid)
    for own, seen in _tiles(grid, stride, window, batch):
        rows = x[:, own[0], own[1], own[2]]
        columns = cells[:, seen[0], seen[1], seen[2]]
        hidden = _hidden(own, seen, stride, window, x.device)
        best, column = _best_column(rows.flatten(1, 3), columns.flatten(1, 3), hidden)
        score[:, own[0], own[1], own[2]] = best.view(rows.shape[:4])
        found = positions[seen[0], seen[1], seen[2]].flatten()[column]
        destination[:, own[0], own[1], own[2]] = found.view(rows.shape[:4])
    return score, destination


def group_by_row(assignment: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """int32 (order (B, N), offsets (B, rows + 1)) of a `MergePlan` for the row (B, N) of every token."""
    order = assignment.argsort(dim=1, stable=True)
    # The first place in the sorted rows that is not below row m is where group m starts.
    starts = torch.arange(rows + 1, dtype=assignment.dtype, device=assignment.device).repeat(assignment.shape[0], 1)
    offsets = torch.searchsorted(assignment.gather(1, order), starts)
    return order.to(torch.int32), offsets.to(torch.int32)


def _plan(
    score: Tensor, source: Tensor, destination: Tensor, num_merge: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MergePlan of the `num_merge` best of the pairs.

    Args:
        score: (B, S) similarity of each source to its destination.
        source: (S,) ascending positions.
        destination: (B, S) positions.
    """
    batch, device = score.shape[0], score.device
    chosen = score.argsort(dim=1, descending=True, stable=True)[:, :num_merge]
    merged = source[chosen]
    target = torch.arange(tokens, device=device).repeat(batch, 1)
    target.scatter_(1, merged, destination.gather(1, chosen))
    is_kept = torch.ones(batch, tokens, dtype=torch.bool, device=device).scatter_(1, merged, False)
    kept = is_kept.nonzero()[:, 1].view(batch, tokens - num_merge)
    assignment = (is_kept.cumsum(1) - 1).gather(1, target)
    order, offsets = group_by_row(assignment, tokens - num_merge)
    return assignment.to(torch.int32), kept.to(torch.int32), order, offsets


def match_tokens(
    metric: Tensor,
    num_merge: int,
    grid: Sequence[int] | None,
    stride: Sequence[int],
    window: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_tokens`."""
    batch, tokens, channels = metric.shape
    position = torch.arange(tokens, device=metric.device)
    is_source = position % 2 == 0
    if grid is not None:
        position = position.view(*grid)
        is_source = torch.ones_like(position, dtype=torch.bool)
        is_source[:: stride[0], :: stride[1], :: stride[2]] = False
        position, is_source = position.flatten(), is_source.flatten()
    source = position[is_source]
    if num_merge == 0:  # also where there is nothing to match with
        score = metric.new_zeros(batch, source.shape[0], dtype=torch.float32)
        return _plan(score, source, score.to(torch.int64), 0, tokens)
    x = _unit_vectors(metric)
    if window is not None:
        score, destination = _match_window(x.view(batch, *grid, channels), stride, window)
        score = score.view(batch, tokens)[:, source]
        destination = destination.view(batch, tokens)[:, source]
    else:
        score, column = _match_all(x[:, source], x[:, ~is_source])
        destination = position[~is_source][column]
    return _plan(score, source, destination, num_merge, tokens)


def _match_neighbors(metric: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity (B, S) and position (B, S) of the best neighbour of the sources, and their positions (S,)."""
    batch, tokens, channels = metric.shape
    x = _unit_vectors(metric.detach()).view(batch, *grid, channels)  # indices and counts carry no gradient
    position = torch.arange(tokens, device=metric.device).view(*grid)
    score = x.new_full((batch, *grid), float("-inf"))
    destination = torch.zeros(batch, *grid, dtype=torch.int64, device=metric.device)
    similarities = [_adjacent(x, axis) for axis in (1, 2, 3)]
    # Neighbours by ascending position, so that of equal ones the first wins: t-1, h-1, w-1, w+1, h+1, t+1.
    for axis, before in ((1, True), (2, True), (3, True), (3, False), (2, False), (1, False)):
        pairs = grid[axis - 1] - 1
        if pairs < 1:
            continue
        here, there = (1, 0) if before else (0, 1)
        best, at = score.narrow(axis, here, pairs), destination.narrow(axis, here, pairs)
        better = similarities[axis - 1] > best
        best.copy_(torch.where(better, similarities[axis - 1], best))
        at.copy_(torch.where(better, position.narrow(axis - 1, there, pairs), at))
    t, h, w = (torch.arange(n, device=metric.device) for n in grid)
    odd = (t[:, None, None] + h[:, None] + w) % 2 == 1
    source = position[odd]
    return score.view(batch, tokens)[:, source], destination.view(batch, tokens)[:, source], source


def _adjacent(x: Tensor, axis: int) -> Tensor:
    """Similarity of every token (B, T, H, W, C) to the next one along an axis."""
    pairs = max(0, x.shape[axis] - 1)
    first, second = x.narrow(axis, 0, pairs), x.narrow(axis, x.shape[axis] - pairs, pairs)
    out = x.new_empty(first.shape[:4])
    frames = max(1, _CHUNK // max(1, x[:, :1].numel()))
    for o, a, b in zip(out.split(frames, 1), first.split(frames, 1), second.split(frames, 1), strict=True):
        o.copy_((a * b).sum(dim=-1))
    return out.nan_to_num_(nan=NO_SIMILARITY)


def match_neighbors(metric: Tensor, num_merge: int, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_neighbors`."""
    score, destination, source = _match_neighbors(metric, grid)
    return _plan(score, source, destination, num_merge, metric.shape[1])


def count_neighbors(metric: Tensor, grid: Sequence[int], threshold: float) -> Tensor:
    """(B,) int32: the sources of `match_neighbors` whose best neighbour is at least that similar."""
    score, _, _ = _match_neighbors(metric, grid)
    return (score >= threshold).sum(dim=1, dtype=torch.int32)


# --- merging ---


def _token_chunks(x: Tensor) -> Iterator[slice]:
    batch, tokens, channels = x.shape
    step = max(1, _CHUNK // max(1, batch * channels))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _sum_groups(x: Tensor, weight: Tensor | None, assignment: Tensor, rows: int) -> Tensor:
    """(B, rows, C) float32 sums, in order of the tokens, of the (B, N, C) tokens of each row."""
    batch, _, channels = x.shape
    dtype = accumulate_dtype(x.dtype)
    out = x.new_zeros(batch * rows, channels, dtype=dtype)
    row = assignment + torch.arange(batch, device=x.device).unsqueeze(1) * rows
    for chunk in _token_chunks(x):
        values = x[:, chunk].to(dtype)
        if weight is not None:
            values = values * weight[:, chunk].unsqueeze(2)
        add_rows_(out, row[:, chunk].flatten(), values.flatten(0, 1))
    return out.view(batch, rows, channels)


def _shares(x: Tensor, size: Tensor | None, assignment: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """A token's share of its group's size (B, N), the size of its group (B, N), and all group sizes (B, rows).

    A token alone in its group has a share of exactly 1. In a group of size 0 every share is 0.
    """
    if size is None:
        size = x.new_ones(assignment.shape, dtype=accumulate_dtype(x.dtype))
    total = _sum_groups(size.unsqueeze(2), None, assignment, rows).squeeze(2)
    own = total.gather(1, assignment.to(torch.int64))
    share = torch.where(own == 0, 0, size / own.masked_fill(own == 0, 1))
    return share, own, total


def merge_tokens(
    x: Tensor, size: Tensor | None, assignment: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.merge_tokens`."""
    rows = offsets.shape[1] - 1
    check_index("merge_tokens", "assignment", assignment, 0, rows)
    share, _, total = _shares(x, size, assignment, rows)
    return _sum_groups(x, share, assignment, rows).to(x.dtype), total


def merge_tokens_backward(
    grad_tokens: Tensor,
    grad_size: Tensor,
    x: Tensor | None,
    size: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge_tokens` in x and size; without x the latter is not wanted and is (B, 0)."""
    batch, tokens = assignment.shape
    rows = offsets.shape[1] - 1
    check_index("merge_tokens_backward", "assignment", assignment, 0, rows)
    dtype = accumulate_dtype(grad_tokens.dtype)
    share, own, _ = _shares(grad_tokens, size, assignment, rows)
    lane = torch.arange(batch, device=assignment.device).unsqueeze(1)
    grad_x = grad_tokens.new_empty(batch, tokens, grad_tokens.shape[2])
    along = grad_tokens.new_empty(batch, tokens, dtype=dtype)
    for chunk in _token_chunks(grad_x):
        grad = grad_tokens[lane, assignment[:, chunk].to(torch.int64)].to(dtype)
        if x is not None:
            along[:, chunk] = (grad * x[:, chunk].to(dtype)).sum(dim=2)
        grad_x[:, chunk] = (grad * share[:, chunk].unsqueeze(2)).to(grad_tokens.dtype)
    if x is None:
        return grad_x, grad_tokens.new_empty(batch, 0, dtype=dtype)
    # <grad, x> is the gradient of a share, size / total: by the size, and by the total of its group. In autograd's
    # order, since the terms cancel and any other would differ by more than the rounding of the result.
    along = torch.where(own == 0, 0, along)
    own = own.masked_fill(own == 0, 1)
    of_total = grad_size - _sum_groups(along.unsqueeze(2), share / own, assignment, rows).squeeze(2)
    return grad_x, along / own + of_total.gather(1, assignment.to(torch.int64))


def unmerge_tokens(y: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """See `vidmem_kernels.unmerge_tokens`."""
    check_index("unmerge_tokens", "assignment", assignment, 0, y.shape[1])
    lane = torch.arange(y.shape[0], device=y.device).unsqueeze(1)
    return y[lane, assignment.to(torch.int64)]


def sum_groups(x: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row: the transpose of `unmerge_tokens`."""
    rows = offsets.shape[1] - 1
    check_index("sum_groups", "assignment", assignment, 0, rows)
    return _sum_groups(x, None, assignment, rows).to(x.dtype)
