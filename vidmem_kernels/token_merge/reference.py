"""Token merging in plain differentiable PyTorch: the reference for all other backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .._numerics import accumulate_dtype, add_rows, check_index

NO_SIMILARITY = -2.0  # replaces NaN; below every cosine and every threshold
_CHUNK = 2**22  # elements of a temporary tensor: 16 MiB in float32
_BLOCK = 48
_TILE = 4


# --- matching ---


def _unit_vectors(metric: Tensor) -> Tensor:
    """Vectors of length one; zero vectors stay zero, vectors with a NaN or an infinity become NaN throughout."""
    # Contiguous, so that the order of sums does not depend on the layout.
    x = metric.detach().to(accumulate_dtype(metric.dtype)).contiguous()
    # Dividing a vector by its largest value first keeps its squares from overflowing or underflowing.
    peak = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True)
    x = x / peak.masked_fill(peak == 0, 1)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x.div_(norm.masked_fill_(norm == 0, 1))


def _whole_blocks(x: Tensor) -> Tensor:
    """(B, L, C) padded with zero rows: BLAS rounds the edge of a matrix differently, but equal tokens must tie."""
    return F.pad(x, (0, 0, 0, -x.shape[1] % _BLOCK))


def _best_column(rows: Tensor, columns: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The highest similarity of each row (B, R, C) to the columns (B, K, C), and the first column that reaches it."""
    scores = torch.bmm(_whole_blocks(rows), _whole_blocks(columns).transpose(1, 2))
    scores = scores[:, : rows.shape[1], : columns.shape[1]].nan_to_num_(nan=NO_SIMILARITY)
    if hidden is not None:
        scores.masked_fill_(hidden, float("-inf"))
    score, column = scores.max(dim=2)
    return score, column


def _match_all(sources: Tensor, destinations: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Similarity and number of the best destination of each source, in chunks of the batch and of sources.

    `hidden` (B, D) marks destinations that no source sees.
    """
    count = destinations.shape[1]
    score = sources.new_empty(sources.shape[:2])
    column = torch.empty_like(score, dtype=torch.int64)
    lanes = max(1, _CHUNK // (count * _BLOCK))
    rows = max(1, _CHUNK // (count * _BLOCK * lanes)) * _BLOCK
    for b in range(0, sources.shape[0], lanes):
        for s in range(0, sources.shape[1], rows):
            part = slice(b, b + lanes), slice(s, s + rows)
            unseen = None if hidden is None else hidden[b : b + lanes].unsqueeze(1)
            score[part], column[part] = _best_column(sources[part], destinations[b : b + lanes], unseen)
    return score, column


def _tiles(
    grid: Sequence[int], stride: Sequence[int], window: Sequence[int], ends: Sequence[int], lanes: int
) -> Iterator[tuple[list[slice], list[slice]]]:
    """Boxes of cells that cover the grid: per axis, the tokens of a box and the cells before `ends` that they see."""
    cells = [-(-n // s) for n, s in zip(grid, stride, strict=True)]
    edge = [min(_TILE, n) for n in cells]
    last = [-(-n // s) for n, s in zip(ends, stride, strict=True)]

    def scores() -> int:
        total = lanes
        for e, s, w, n in zip(edge, stride, window, cells, strict=True):
            total *= e * s * min(n, e + 2 * w)
        return total

    while scores() > _CHUNK and max(edge) > 1:
        longest = edge.index(max(edge))
        edge[longest] = -(-edge[longest] // 2)
    for origin in product(*(range(0, n, e) for n, e in zip(cells, edge, strict=True))):
        axes = list(zip(origin, edge, grid, stride, window, last, strict=True))
        own = [slice(o * s, min((o + e) * s, size)) for o, e, size, s, _, _ in axes]
        seen = [slice(max(o - w, 0), min(o + e + w, n)) for o, e, _, _, w, n in axes]
        yield own, seen


def _hidden(
    own: list[slice], seen: list[slice], stride: Sequence[int], window: Sequence[int], device: torch.device
) -> Tensor:
    """(R, K): whether cell k is outside the window of token r on any axis."""
    hidden = torch.zeros(1, 1, dtype=torch.bool, device=device)
    for tokens, cells, s, w in zip(own, seen, stride, window, strict=True):
        cell = torch.arange(tokens.start, tokens.stop, device=device).unsqueeze(1) // s
        far = (cell - torch.arange(cells.start, cells.stop, device=device)).abs() > w
        rows, columns = hidden.shape[0] * far.shape[0], hidden.shape[1] * far.shape[1]
        hidden = (hidden[:, None, :, None] | far[None, :, None, :]).view(rows, columns)
    return hidden


def _match_window(
    x: Tensor, stride: Sequence[int], window: Sequence[int], ends: Sequence[int], protect: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B, T, H, W): similarity and position of the best destination in the window of each token of a grid.

    `ends` is from `_cell_ends`; `protect` (B, N) marks tokens that no source sees. Without a visible destination the
    results are -inf and 0.
    """
    batch, *grid, _ = x.shape
    every = slice(None)
    first_of_cell = [slice(0, end, s) for end, s in zip(ends, stride, strict=True)]
    cells = x[(every, *first_of_cell)]
    positions = torch.arange(grid[0] * grid[1] * grid[2], device=x.device).view(grid)[tuple(first_of_cell)]
    hidden_cells = None if protect is None else protect.reshape(batch, *grid)[(every, *first_of_cell)]
    score = x.new_full((batch, *grid), float("-inf"))
    destination = positions.new_zeros(batch, *grid)
    for own, seen in _tiles(grid, stride, window, ends, batch):
        rows = x[(every, *own)]
        columns = cells[(every, *seen)].flatten(1, 3)
        if columns.shape[1] == 0:
            continue
        hidden = _hidden(own, seen, stride, window, x.device)
        if hidden_cells is not None:
            hidden = hidden | hidden_cells[(every, *seen)].flatten(1).unsqueeze(1)
        best, column = _best_column(rows.flatten(1, 3), columns, hidden)
        score[(every, *own)] = best.view(rows.shape[:4])
        destination[(every, *own)] = positions[tuple(seen)].flatten()[column].view(rows.shape[:4])
    return score, destination


def group_by_row(assignment: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """int32 (order (B, N), offsets (B, rows + 1)) of a `MergePlan` from the row (B, N) of each token."""
    order = assignment.argsort(dim=1, stable=True)
    # Group m starts at the first place in the sorted rows that is not below m.
    starts = torch.arange(rows + 1, dtype=assignment.dtype, device=assignment.device).repeat(assignment.shape[0], 1)
    offsets = torch.searchsorted(assignment.gather(1, order).contiguous(), starts)
    return order.to(torch.int32), offsets.to(torch.int32)


def _plan(
    score: Tensor, source: Tensor, destination: Tensor, num_merge: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The MergePlan that merges the `num_merge` best pairs.

    Args:
        score: (B, S) similarity of each source to its destination.
        source: (S,) ascending positions of the sources.
        destination: (B, S) positions of their destinations.
        num_merge: number of sources to merge.
        tokens: N.

    Returns:
        (assignment, kept, order, offsets).
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


def _cell_ends(grid: Sequence[int], stride: Sequence[int], whole_cells: bool) -> list[int]:
    """Per axis, the end of the cells that have a destination."""
    return [n // s * s if whole_cells else n for n, s in zip(grid, stride, strict=True)]


def mark_destinations(
    tokens: int,
    grid: Sequence[int] | None,
    stride: Sequence[int],
    whole_cells: bool,
    num_destinations: int,
    device: torch.device,
) -> Tensor:
    """(N,) bool: which tokens are destinations; takes the arguments of `match_tokens`."""
    position = torch.arange(tokens, device=device)
    if num_destinations >= 0:
        return position < num_destinations
    if grid is None:
        return position % 2 == 1
    marks = torch.zeros(tuple(grid), dtype=torch.bool, device=device)
    marks[tuple(slice(0, end, s) for end, s in zip(_cell_ends(grid, stride, whole_cells), stride, strict=True))] = True
    return marks.flatten()


def match_tokens(
    metric: Tensor,
    num_merge: int,
    grid: Sequence[int] | None,
    stride: Sequence[int],
    window: Sequence[int] | None,
    whole_cells: bool = False,
    num_destinations: int = -1,
    protect: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_tokens`.

    Args:
        metric: see there.
        num_merge: see there; it must not count sources that cannot merge.
        grid: see there.
        stride: see there.
        window: see there.
        whole_cells: cells that the border of the grid cuts have no destination.
        num_destinations: if not negative, this many first tokens are destinations; only without a grid.
        protect: (B, N) bool, tokens that stay alone.

    Returns:
        (assignment, kept, order, offsets).
    """
    batch, tokens, channels = metric.shape
    is_destination = mark_destinations(tokens, grid, stride, whole_cells, num_destinations, metric.device)
    position = torch.arange(tokens, device=metric.device)
    source = position[~is_destination]
    if num_merge == 0:  # also if there is no destination
        score = metric.new_zeros(batch, source.shape[0], dtype=torch.float32)
        return _plan(score, source, score.to(torch.int64), 0, tokens)
    x = _unit_vectors(metric)
    if window is not None:
        ends = _cell_ends(grid, stride, whole_cells)
        score, destination = _match_window(x.view(batch, *grid, channels), stride, window, ends, protect)
        score = score.view(batch, tokens)[:, source]
        destination = destination.view(batch, tokens)[:, source]
    else:
        hidden = None if protect is None else protect[:, is_destination]
        score, column = _match_all(x[:, source], x[:, is_destination], hidden)
        destination = position[is_destination][column]
    if protect is not None:
        score = score.masked_fill(protect[:, source], float("-inf"))
    return _plan(score, source, destination, num_merge, tokens)


def match_into(metric: Tensor, memory_metric: Tensor, num_merge: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `vidmem_kernels.match_into`."""
    both = torch.cat([memory_metric.expand(metric.shape[0], -1, -1), metric], dim=1)
    return match_tokens(both, num_merge, None, (1, 1, 1), None, num_destinations=memory_metric.shape[1])


def _match_neighbors(metric: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity (B, S) and position (B, S) of the best neighbour of each source, and the sources' positions (S,)."""
    batch, tokens, channels = metric.shape
    x = _unit_vectors(metric.detach()).view(batch, *grid, channels)  # indices and counts have no gradient
    position = torch.arange(tokens, device=metric.device).view(*grid)
    score = x.new_full((batch, *grid), float("-inf"))
    destination = torch.zeros(batch, *grid, dtype=torch.int64, device=metric.device)
    similarities = [_adjacent(x, axis) for axis in (1, 2, 3)]
    # Neighbours by ascending position, so that the first of equal ones wins: t-1, h-1, w-1, w+1, h+1, t+1.
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
    """Similarity of each token (B, T, H, W, C) to the next one along an axis."""
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
    """(B,) int32: the number of sources of `match_neighbors` whose best neighbour has at least that similarity."""
    score, _, _ = _match_neighbors(metric, grid)
    return (score >= threshold).sum(dim=1, dtype=torch.int32)


# --- merging ---


def _chunks(tokens: int, batch: int, channels: int) -> Iterator[slice]:
    """Slices of tokens that bound the size of temporaries."""
    step = max(1, _CHUNK // max(1, batch * channels))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def _batch_index(assignment: Tensor) -> Tensor:
    """(B, 1): indexes the batch next to an index (B, K)."""
    return torch.arange(assignment.shape[0], device=assignment.device).unsqueeze(1)


def _sum_groups(x: Tensor, assignment: Tensor, rows: int, term: Callable[[slice], Tensor] | None = None) -> Tensor:
    """(B, rows, C) float32 sums of the tokens (B, N, C), or of `term` of them, over each row, in order."""
    batch, tokens, channels = x.shape
    dtype = accumulate_dtype(x.dtype)
    out = x.new_zeros(batch * rows, channels, dtype=dtype)
    row = assignment + _batch_index(assignment) * rows
    for chunk in _chunks(tokens, batch, channels):
        values = x[:, chunk].to(dtype) if term is None else term(chunk)
        # All sizes are given: without channels they could not be inferred.
        out = add_rows(out, row[:, chunk].flatten(), values.reshape(batch * values.shape[1], channels))
    return out.view(batch, rows, channels)


def _shares(x: Tensor, size: Tensor | None, assignment: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each token's share of its group's size (B, N), the size of its group (B, N), and all group sizes (B, rows).

    A token alone in its group has a share of exactly 1. In a group of size 0 all shares are 0.
    """
    if size is None:
        size = x.new_ones(assignment.shape, dtype=accumulate_dtype(x.dtype))
    total = _sum_groups(size.unsqueeze(2), assignment, rows).squeeze(2)
    own = total.gather(1, assignment.to(torch.int64))
    share = torch.where(own == 0, 0, size / own.masked_fill(own == 0, 1))
    return share, own, total


def _origins(size: Tensor | None, assignment: Tensor, rows: int) -> Tensor:
    """(B, rows) the token of each group that the others are measured from: the first one of the largest size.

    It has the largest size because its value enters the rounding errors and should not exceed the mean by orders of
    magnitude.
    """
    batch, tokens = assignment.shape
    row = assignment.to(torch.int64)
    position = torch.arange(tokens, device=row.device).expand(batch, tokens)
    if size is not None:
        size = size.detach()
        largest = size.new_zeros(batch, rows).scatter_reduce(1, row, size, "amax", include_self=False)
        position = position.masked_fill(size < largest.gather(1, row), tokens)
    return row.new_full((batch, rows), tokens - 1).scatter_reduce(1, row, position, "amin")


def _scale_up(total: Tensor) -> Tensor:
    """A power of two that scales sizes with a total below 1 to a total of about 1, so that no product underflows."""
    code, mantissa, bias = (torch.int64, 52, 1023) if total.dtype == torch.float64 else (torch.int32, 23, 127)
    exponent = total.detach().contiguous().view(code) >> mantissa
    power = ((2 * bias - exponent) << mantissa).view(total.dtype)
    return torch.where(total < 1, power, 1)


def merge_tokens(
    x: Tensor, size: Tensor | None, assignment: Tensor, order: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    """See `vidmem_kernels.merge_tokens`.

    A mean is computed as origin - sum(size * (origin - x)) / total, where the origin is one of the tokens: equal tokens
    give exactly that token, and means that are integers are exact. If this overflows, the mean is the sum of the
    tokens' shares, which is finite for finite tokens and passes infinities on. The derivative is that of the shares.
    """
    batch, tokens, channels = x.shape
    rows = offsets.shape[1] - 1
    check_index("merge_tokens", "assignment", assignment, 0, rows)
    share, _, total = _shares(x, size, assignment, rows)
    if tokens == 0:
        return x.new_zeros(batch, rows, channels), total
    dtype = accumulate_dtype(x.dtype)
    origin = x.detach()[_batch_index(assignment), _origins(size, assignment, rows)]
    up = _scale_up(total)
    weight = torch.ones_like(share) if size is None else size.detach() * up.gather(1, assignment.to(torch.int64))

    def deviation(chunk: slice) -> Tensor:
        row = assignment[:, chunk].to(torch.int64)
        values = origin[_batch_index(row), row].to(dtype) - x[:, chunk].detach().to(dtype)
        by = weight[:, chunk].unsqueeze(2)
        return torch.where(by == 0, 0, values * by)

    def half(chunk: slice) -> Tensor:
        values, by = x[:, chunk].to(dtype), share[:, chunk].unsqueeze(2) * 0.5
        # A token of size 0 counts for nothing, even if it is NaN; with a share that only rounds to 0, infinity still
        # counts. Finite values must stay in the derivative with respect to size.
        lost = torch.where(weight[:, chunk].unsqueeze(2) == 0, 0, values.detach())
        return torch.where((by == 0) & ~values.isfinite(), lost, values * by)

    is_empty = (total == 0).unsqueeze(2)
    divisor = (total.detach() * up).unsqueeze(2).masked_fill(is_empty, 1)
    mean = origin.to(dtype) - _sum_groups(x, assignment, rows, deviation) / divisor
    halves = _sum_groups(x, assignment, rows, half)
    limit = torch.finfo(dtype).max
    doubled = halves * 2
    shares = torch.where(halves.isfinite(), doubled.clamp(-limit, limit), doubled)
    # Subtracting zero, unlike adding it, preserves a mean of -0.
    mean = torch.where(mean.isfinite(), mean - (halves.detach() - halves) * 2, shares)
    merged = torch.where(is_empty, 0, mean).to(x.dtype)
    # A token alone in its group also keeps the bits of a NaN, and its size may be infinite.
    alone = ((offsets.diff(dim=1) == 1) & (total > 0)).unsqueeze(2)
    return torch.where(alone & ~merged.isfinite(), origin, merged), total


def merge_tokens_backward(
    grad_tokens: Tensor,
    grad_size: Tensor,
    x: Tensor | None,
    size: Tensor | None,
    assignment: Tensor,
    order: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of `merge_tokens` with respect to x and size; without x, the latter is not needed and is (B, 0)."""
    batch, tokens = assignment.shape
    rows, channels = grad_tokens.shape[1:]
    check_index("merge_tokens_backward", "assignment", assignment, 0, rows)
    dtype = accumulate_dtype(grad_tokens.dtype)
    share, own, _ = _shares(grad_tokens, size, assignment, rows)
    grad_x, along = [grad_tokens.new_empty(batch, 0, channels)], [grad_tokens.new_empty(batch, 0, dtype=dtype)]
    for chunk in _chunks(tokens, batch, channels):
        row = assignment[:, chunk].to(torch.int64)
        grad = grad_tokens[_batch_index(row), row].to(dtype)
        if x is not None:
            along.append((grad * x[:, chunk].to(dtype)).sum(dim=2))
        grad_x.append((grad * share[:, chunk].unsqueeze(2)).to(grad_tokens.dtype))
    grad_x, along = torch.cat(grad_x, dim=1), torch.cat(along, dim=1)
    if x is None:
        return grad_x, along
    # <grad, x> is the gradient of a share, size / total, which depends on the size and on the group's total. The order
    # is autograd's: the terms cancel, and another order would differ by more than the rounding of the result.
    along = torch.where(own == 0, 0, along)
    own = own.masked_fill(own == 0, 1)
    pull = torch.where(share == 0, 0, along * (share / own))  # a NaN of size 0 does not affect other tokens
    of_total = grad_size - _sum_groups(pull.unsqueeze(2), assignment, rows).squeeze(2)
    return grad_x, along / own + of_total.gather(1, assignment.to(torch.int64))


def unmerge_tokens(y: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """See `vidmem_kernels.unmerge_tokens`."""
    check_index("unmerge_tokens", "assignment", assignment, 0, y.shape[1])
    return y[_batch_index(assignment), assignment.to(torch.int64)]


def sum_groups(x: Tensor, assignment: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Sum of the tokens of each row: the transpose of `unmerge_tokens`."""
    rows = offsets.shape[1] - 1
    check_index("sum_groups", "assignment", assignment, 0, rows)
    return _sum_groups(x, assignment, rows).to(x.dtype)
