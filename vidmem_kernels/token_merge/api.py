"""Public functions of token merging: contracts and checks of meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._call import call
from .._checks import INDEX_DTYPES, check_int, check_number, check_same, check_tensor, is_number, is_one
from .._fast import fast
from .._numerics import accumulate_dtype
from .._symbolic import require, require_same, saveable, unguarded
from .._transforms import check_values
from .reference import group_by_row
from .splits import Split, order_by_mask, plan_of_order

__all__ = [
    "MergePlan",
    "MergeResult",
    "match_into",
    "match_neighbors",
    "match_tokens",
    "merge_tokens",
    "unmerge_tokens",
]


@saveable
class MergePlan(NamedTuple):
    """Which of N tokens merge into which of M rows; plain int32 tensors, on the device of the metric.

    The groups come twice: by token, and by row as CSR, so that sums over a group need no atomics.

    Attributes:
        assignment: (B, N) the row of every token.
        kept: (B, M) the position of every row among the tokens, ascending: order and positional embeddings survive.
        order: (B, N) the tokens grouped by row, ascending inside a group.
        offsets: (B, M + 1) where each row's group starts in `order`.
    """

    assignment: Tensor
    kept: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def from_assignment(cls, assignment: Tensor, num_rows: int) -> MergePlan:
        """The plan that merges tokens into given rows, such as the clusters of k-means.

        Args:
            assignment: (B, N) int32 or int64, the row of every token, in [0, num_rows - 1]; not checked here but
                by what the plan is given to.
            num_rows: M. A row may have no token.

        Returns:
            `MergePlan`; `kept` is the first token of every row, N for a row without, so not ascending in general.

        Raises:
            ValueError, TypeError: arguments that do not fit.
        """
        op = "MergePlan.from_assignment"
        check_tensor(op, "assignment", assignment, "B, N", INDEX_DTYPES)
        check_int(op, "num_rows", num_rows, 0)
        order, offsets = group_by_row(assignment, num_rows)
        tokens = assignment.shape[1]
        start, end = offsets[:, :-1].long(), offsets[:, 1:].long()
        # One more column, for rows that start behind the last token.
        first = torch.cat([order, order.new_full((order.shape[0], 1), tokens)], dim=1).gather(1, start)
        return cls(assignment.to(torch.int32), first.masked_fill(start == end, tokens), order, offsets)


@saveable
class MergeResult(NamedTuple):
    """Merged tokens (B, M, C) and the size (B, M), the number of tokens that each stands for."""

    tokens: Tensor
    size: Tensor


def _check_metric(op: str, metric: Tensor, name: str = "metric", shape: str = "B, N, C") -> None:
    check_tensor(op, name, metric, shape)
    if metric.shape[2] < 1:
        raise ValueError(f"{op}: {name} must have at least one channel, got {tuple(metric.shape)}")


def _check_three(op: str, name: str, value: object, low: int) -> tuple[int, int, int]:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 3:
        raise TypeError(f"{op}: {name} must be three ints (t, h, w), got {value!r}")
    for axis, number in zip("thw", value, strict=True):
        check_int(op, f"{name} along {axis}", number, low)
    return tuple(value)


def _check_grid(op: str, metric: Tensor, grid: object) -> tuple[int, int, int]:
    t, h, w = _check_three(op, "grid", grid, 0)
    require(
        t * h * w == metric.shape[1],
        lambda: f"{op}: grid must hold the {metric.shape[1]} tokens of metric, got {(t, h, w)}",
    )
    return t, h, w


def _check_mask(op: str, name: str, mask: Tensor, metric: Tensor) -> None:
    check_tensor(op, name, mask, "B, N", (torch.bool,))
    check_same(op, f"{name} must be on the device of metric", mask.device, metric.device)
    batch = mask.shape[0] if is_one(mask.shape[0]) else metric.shape[0]
    require_same(
        mask.shape,
        (batch, metric.shape[1]),
        lambda: f"{op}: {name} must have shape (1 or {metric.shape[0]}, {metric.shape[1]}), got {tuple(mask.shape)}",
    )


def _count_merges(op: str, num_merge: int | None, ratio: float | None, sources: Any) -> Any:
    """How many tokens merge, of so many that may; both are symbolic in a compiled graph."""
    if (num_merge is None) == (ratio is None):
        found = "neither" if ratio is None else f"{num_merge} and {ratio}"
        raise ValueError(f"{op}: one of num_merge and ratio must be given, got {found}")
    if ratio is None:
        check_int(op, "num_merge", num_merge, 0, sources)
        return num_merge
    check_number(op, "ratio", ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"{op}: ratio must be in [0, 1], got {ratio}")
    return torch.sym_int(ratio * sources)


def _read_fewest(counts: Tensor, limit: Any) -> Any:
    """The smallest of the counts (B,) and the limit, which may be symbolic, read back from the device."""
    # The limit is one more count, so that an empty batch has a smallest one.
    fewest = torch.cat([counts, counts.new_full((1,), limit)]).amin().item()
    torch._check(fewest >= 0)
    torch._check(fewest <= limit)
    return fewest


def _read_destinations(op: str, destinations: Tensor) -> int:
    """How many tokens a mask marks in every batch element, read back from the device."""
    batch, tokens = destinations.shape
    if batch == 0:
        return torch.sym_min(tokens, 1)  # the fewest that anything could merge with
    counts = destinations.sum(dim=1)
    fewest, most = torch.stack([counts.amin(), counts.amax()]).tolist()
    require(
        fewest == most,
        lambda: f"{op}: destinations must be as many in every batch element, got {fewest} to {most}",
    )
    torch._check(fewest >= 0)
    torch._check(fewest <= tokens)
    return fewest


@fast
def match_tokens(
    metric: Tensor,
    num_merge: int | None = None,
    *,
    ratio: float | None = None,
    protect: Tensor | None = None,
    destinations: Tensor | None = None,
    border: str = "own",
    grid: Sequence[int] | None = None,
    stride: Sequence[int] = (2, 2, 2),
    window: Sequence[int] | None = None,
    backend: str | None = None,
) -> MergePlan:
    """Plans a merge by bipartite soft matching: each source's most similar destination, the best pairs merge.

    Similarity is the cosine, computed in float32 (float64 for float64); a zero vector's is 0 with everything. Of
    equal similarities the lower position wins, for the destination of a source and for the sources that merge. A
    NaN similarity, which every vector with a NaN or an infinity has, counts as below all others.

    Args:
        metric: (B, N, C) what tokens are compared by, for example attention keys averaged over heads. One of batch 1
            makes a plan of batch 1, which `merge_tokens` applies to a whole batch.
        num_merge: number of tokens to merge away, in [0, number of sources], of those that see a destination.
        ratio: in place of `num_merge`, the part of these sources to merge, in [0, 1], rounded down.
        protect: (B|1, N) bool, tokens that stay alone: they merge into nothing and nothing merges into them. What
            `num_merge` may be and `ratio` is of are the sources that may still merge, in the batch element with the
            fewest. Goes with everything.
        destinations: (B|1, N) bool, which tokens are destinations, in place of the odd ones; all others are sources.
            As many in every batch element. Without a grid, whose cells say themselves which tokens are.
        border: "own": cells that the grid cuts at its far border have a destination as all others. "none": they have
            none, and their tokens join those of whole cells, as in tomesd; without a whole cell in their window they
            cannot merge. With a grid only.
        grid: (T, H, W) of the tokens, T * H * W = N, W fastest. The first token of every cell of `stride` is a
            destination, all others are sources. Without it even positions are sources, odd ones destinations.
        stride: (t, h, w) size of a cell, used with `grid` only; cells at the far border may be partial.
        window: (t, h, w); a source sees only the destinations whose cell is at most so many cells from its own,
            on each axis, and time grows linearly with N. By default it sees all.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` with M = N - num_merge rows. Indices carry no gradient. Scores are never held all at once. How many
        tokens `protect` leaves and `destinations` marks is read back from the device, and under `torch.compile` that
        breaks the graph unless `torch._dynamo.config.capture_scalar_outputs` is set; without the two nothing is read.

    Raises:
        ValueError, TypeError: arguments that do not fit. A `num_merge` beyond the sources that may merge is told the
            most that can be.
        RuntimeError: `protect` or `destinations` under vmap.

    Equivalent PyTorch:
        a, b = normalize(metric, dim=-1)[:, ::2], normalize(metric, dim=-1)[:, 1::2]
        score, destination = (a @ b.transpose(1, 2)).max(dim=-1)
        merged = score.argsort(dim=-1, descending=True, stable=True)[:, :num_merge]
        # source 2 * merged joins token 2 * destination.gather(1, merged) + 1; all other tokens stay

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461; destinations on a grid as in Bolya
    and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604.
    """
    op = "match_tokens"
    _check_metric(op, metric)
    stride = _check_three(op, "stride", stride, 1)
    if grid is not None:
        grid = _check_grid(op, metric, grid)
    if window is not None:
        window = _check_three(op, "window", window, 0)
        if grid is None:
            raise ValueError(f"{op}: window must come with a grid, got window {window} and no grid")
    if border not in ("own", "none"):
        raise ValueError(f"{op}: border must be 'own' or 'none', got {border!r}")
    if border == "none" and grid is None:
        raise ValueError(f"{op}: border must be 'own' where there is no grid, got 'none'")
    split = Split(metric.shape[1], grid, stride, window, border == "none")
    for name, mask in (("protect", protect), ("destinations", destinations)):
        if mask is not None:
            _check_mask(op, name, mask, metric)
            check_values(op, f"how many tokens may merge depends on {name}")
    if destinations is not None:
        if grid is not None:
            raise ValueError(f"{op}: destinations must come without a grid and a window, got {grid} and {window}")
        split = split._replace(num_destinations=_read_destinations(op, destinations))
        order = order_by_mask(destinations)
        metric = torch.take_along_dim(metric.detach(), order.unsqueeze(2), dim=1)
        protect = None if protect is None else torch.take_along_dim(protect, order, dim=1)
    sources = split.count_sources()
    if protect is not None:
        sources = _read_fewest(split.count_unprotected(protect), sources)
        # Another tensor than was given: the fast path cannot take this call, which depends on values, for the same.
        protect = protect.expand(metric.shape[0], -1)
    num_merge = _count_merges(op, num_merge, ratio, sources)
    plan = call("match_tokens", metric, num_merge, *split.arguments, protect, backend=backend)
    return MergePlan(*(plan if destinations is None else plan_of_order(plan, order)))


@fast
def match_into(
    metric: Tensor,
    memory_metric: Tensor,
    num_merge: int | None = None,
    *,
    ratio: float | None = None,
    backend: str | None = None,
) -> MergePlan:
    """Plans a merge of new tokens into the rows of a memory: each token's most similar row, the best pairs merge.

    Every row of the memory is kept and stays where it is; tokens merge into rows, never into each other. Similarity,
    ties and NaN as in `match_tokens`. The plan is over the memory followed by the tokens:

        plan = match_into(key(tokens), key(memory), ratio=0.5)
        memory, size = merge_tokens(cat([memory, tokens], dim=1), plan, cat([size, ones(B, N)], dim=1))

    after which row m < M of the memory is the mean of what it was and of the tokens that it took, weighted by how many
    each stands for, and the tokens that were like no row are appended in their order.

    Args:
        metric: (B, N, C) what the tokens are compared by.
        memory_metric: (B|1, M, C) the same of the rows of the memory, of the same dtype; of batch 1 for a whole batch.
        num_merge: number of tokens to merge away, in [0, N], or 0 where the memory is empty.
        ratio: in place of `num_merge`, the part of the tokens to merge, in [0, 1], rounded down.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` over M + N tokens, with M + N - num_merge rows: `assignment` of row m of the memory is m. Indices
        carry no gradient. Scores are never held all at once; on a GPU the two metrics are, as one tensor.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Equivalent PyTorch:
        score, row = (normalize(metric, dim=-1) @ normalize(memory_metric, dim=-1).transpose(1, 2)).max(dim=-1)
        merged = score.argsort(dim=-1, descending=True, stable=True)[:, :num_merge]
        # token M + merged joins row.gather(1, merged); all others stay

    Source: the matching of Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, between two sets.
    """
    op = "match_into"
    _check_metric(op, metric)
    _check_metric(op, memory_metric, "memory_metric", "B, M, C")
    check_same(op, "memory_metric must have the dtype of metric", memory_metric.dtype, metric.dtype)
    check_same(op, "memory_metric must be on the device of metric", memory_metric.device, metric.device)
    batch, tokens, channels = metric.shape
    rows = memory_metric.shape[1]
    fits = (memory_metric.shape[0] if is_one(memory_metric.shape[0]) else batch, rows, channels)
    require_same(
        memory_metric.shape,
        fits,
        lambda: (
            f"{op}: memory_metric must have batch 1 or {batch} and {channels} channels as metric, "
            f"got {tuple(memory_metric.shape)}"
        ),
    )
    split = Split(rows + tokens, num_destinations=rows)
    num_merge = _count_merges(op, num_merge, ratio, split.count_sources())
    return MergePlan(*call("match_into", metric, memory_metric, num_merge, backend=backend))


@fast
def match_neighbors(
    metric: Tensor,
    num_merge: int | None,
    *,
    grid: Sequence[int],
    threshold: float | None = None,
    backend: str | None = None,
) -> MergePlan:
    """Plans a merge of tokens with their most similar neighbour on a T, H, W grid.

    Tokens of odd t + h + w are sources; their up to six neighbours, all even, are destinations. Each source goes with
    its most similar neighbour, and the `num_merge` best pairs merge. Similarity, ties and NaN as in `match_tokens`.

    Args:
        metric: (B, N, C) what tokens are compared by.
        num_merge: number of tokens to merge away, in [0, N // 2]; the upper bound if there is a threshold. None, only
            with a threshold, is N // 2.
        grid: (T, H, W) of the tokens, T * H * W = N, W fastest.
        threshold: in [-1, 1]; pairs of a similarity below it never merge. A plan has the same number of rows for the
            whole batch, so the element with the fewest such pairs sets how many merge in each. That number depends on
            the data: it is read back from the device, and under `torch.compile` it breaks the graph unless
            `torch._dynamo.config.capture_scalar_outputs` is set.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` with M = N - num_merge rows, or more with a threshold. Indices carry no gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit.

    Equivalent PyTorch:
        x = normalize(metric, dim=-1).view(B, T, H, W, C)
        right = (x[:, :, :, :-1] * x[:, :, :, 1:]).sum(dim=-1)  # and so along H and T
        # a source's score is the largest of its up to six; the num_merge sources of highest score merge

    Source: the token merging baseline of arXiv 2512.23851 (cosine similarity with the six T/H/W neighbours, merged
    above a threshold), made bipartite as in ToMe, arXiv 2210.09461, so that merges never chain.
    """
    op = "match_neighbors"
    _check_metric(op, metric)
    grid = _check_grid(op, metric, grid)
    sources = metric.shape[1] // 2
    if num_merge is None and threshold is None:
        raise ValueError(f"{op}: num_merge must be an int when there is no threshold, got None")
    if num_merge is None:
        num_merge = sources
    check_int(op, "num_merge", num_merge, 0, sources)
    if threshold is not None:
        if not is_number(threshold):
            raise TypeError(f"{op}: threshold must be a float, got {type(threshold).__name__}")
        if not -1 <= threshold <= 1:
            raise ValueError(f"{op}: threshold must be in [-1, 1], got {threshold}")
        check_values(op, "the number of rows depends on the values with a threshold")
        counts = call("count_neighbors", metric, grid, float(threshold), backend=backend)
        num_merge = _read_fewest(counts, num_merge)
    return MergePlan(*call("match_neighbors", metric, num_merge, grid, backend=backend))


def _check_shape(what: str, found: tuple[int, ...], shape: tuple[int, ...]) -> None:
    require_same(found, shape, lambda: f"{what} must have shape {shape}, got {found}")


def _plan_for(op: str, plan: object, name: str, tensor: Tensor, of_rows: bool) -> MergePlan:
    """The plan, checked and of the batch of `tensor`, which is (B, M, ...) if `of_rows`, else (B, N, ...)."""
    if not isinstance(plan, MergePlan):
        raise TypeError(f"{op}: plan must be a MergePlan, got {type(plan).__name__}")
    for field, value in plan._asdict().items():
        check_tensor(op, f"plan.{field}", value, "B, N", INDEX_DTYPES)
        check_same(op, f"plan.{field} must be on the device of {name}", value.device, tensor.device)
    batch, tokens = plan.assignment.shape
    rows = plan.kept.shape[1]
    shapes = {"kept": (batch, rows), "order": (batch, tokens), "offsets": (batch, rows + 1)}
    for field, shape in shapes.items():
        _check_shape(f"{op}: plan.{field}", tuple(getattr(plan, field).shape), shape)
    count, what = (rows, "rows") if of_rows else (tokens, "tokens")
    shared = is_one(batch) and not is_one(tensor.shape[0])
    require_same(
        tensor.shape[1:2] if shared else tensor.shape[:2],
        (count,) if shared else (batch, count),
        lambda: (
            f"{op}: {name} must have {'' if shared else f'the batch of {batch} and '}the {count} {what} of plan, "
            f"got {tuple(tensor.shape)}"
        ),
    )
    return MergePlan(*(field.expand(tensor.shape[0], -1) for field in plan)) if shared else plan


def _check_tokens(op: str, name: str, tensor: Tensor, shape: str) -> Tensor:
    """Checks a float tensor of that shape or with more axes at its end; returns it with these as one, C."""
    if isinstance(tensor, Tensor) and tensor.dim() > 3:
        tensor = tensor.flatten(2)
    return check_tensor(op, name, tensor, shape)


def _with_axes_of(tensor: Tensor, tokens: Tensor) -> Tensor:
    """(B, N, C) as (B, N, ...) with the further axes of `tensor`."""
    return unguarded(Tensor.reshape, tokens, (*tokens.shape[:2], *tensor.shape[2:]))


@fast
def merge_tokens(x: Tensor, plan: MergePlan, size: Tensor | None = None, *, backend: str | None = None) -> MergeResult:
    """Merges each group of a plan into its size-weighted mean.

    Args:
        x: (B, N, C) float tokens; or with more axes, (B, N, H, D), which merge as (B, N, H * D) do.
        plan: of `match_tokens`, `match_into`, `match_neighbors` or `MergePlan.from_assignment`, for N and the batch
            of x, or of batch 1 for all of it.
        size: (B|1, N) float32 (float64 when x is float64) weights, not negative: how many tokens each one already
            stands for. By default 1. A token of size 0 adds nothing, even if it holds a NaN; a group of total size 0
            gives a row of zeros.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergeResult`: tokens (B, M, C) or (B, M, H, D) of the dtype of x, summed in float32 in order of the tokens,
        and size (B, M) of the dtype of `size`. Equal tokens merge to that very token, one alone in its group to its own
        bits, and 3, 4, 5 to exactly 4; the mean of finite tokens is finite, even of the largest ones. An infinity gives
        infinity, two of opposite signs or a NaN give NaN. Tokens are differentiable in x and in `size`, the new size in
        `size`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        IndexError: a plan that was not made by this package and holds indices outside its shapes. On a GPU, where
            checking would cost a synchronisation, what depends on them is NaN instead; nothing outside is read.

    Equivalent PyTorch:
        row = plan.assignment[..., None].expand_as(x)
        total = zeros(B, M).scatter_add_(1, plan.assignment, size)
        origin = a token of each group, (B, M, C)  # the first of the largest size
        moved = (origin.gather(1, row) - x) * size[..., None]
        tokens = origin - zeros(B, M, C).scatter_add_(1, row, moved) / total[..., None]

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461.
    """
    op = "merge_tokens"
    flat = _check_tokens(op, "x", x, "B, N, C")
    plan = _plan_for(op, plan, "x", x, of_rows=False)
    if size is not None:
        dtype = accumulate_dtype(x.dtype)
        check_tensor(op, "size", size, "B, N", (dtype,))
        if is_one(size.shape[0]) and not is_one(x.shape[0]):
            size = size.expand(x.shape[0], -1)
        check_same(op, "size must have the first two sizes of x", size.shape, x.shape[:2])
        check_same(op, "size must be on the device of x", size.device, x.device)
    tokens, total = call("merge_tokens", flat, size, plan.assignment, plan.order, plan.offsets, backend=backend)
    return MergeResult(tokens if flat is x else _with_axes_of(x, tokens), total)


@fast
def unmerge_tokens(y: Tensor, plan: MergePlan, *, backend: str | None = None) -> Tensor:
    """Gives every token the row that it was merged into.

    Args:
        y: (B, M, C) float rows; or with more axes, (B, M, H, D).
        plan: the plan they were merged by, of the batch of y or of batch 1.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, N, C) or (B, N, H, D) of the dtype of y, differentiable: gradients are summed over each group in float32, in
        order of the tokens.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        IndexError: a plan that was not made by this package and holds indices outside its shapes. On a GPU, where
            checking would cost a synchronisation, what depends on them is NaN instead; nothing outside is read.

    Equivalent PyTorch:
        y.gather(1, plan.assignment[..., None].expand(B, N, C))

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604.
    """
    op = "unmerge_tokens"
    flat = _check_tokens(op, "y", y, "B, M, C")
    plan = _plan_for(op, plan, "y", y, of_rows=True)
    tokens = call("unmerge_tokens", flat, plan.assignment, plan.order, plan.offsets, backend=backend)
    return tokens if flat is y else _with_axes_of(y, tokens)
