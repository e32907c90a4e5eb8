"""Public functions of token merging: they check the arguments and call the ops."""

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
    """A plan that merges N tokens into M rows, as int32 tensors on the device of the metric.

    The groups are stored twice: by token, and by row in CSR form, so that sums over a group need no atomics.

    Attributes:
        assignment: (B, N) the row of each token.
        kept: (B, M) the position of each row among the tokens, ascending: order and positional embeddings are
            preserved.
        order: (B, N) the tokens sorted by row, ascending within a group.
        offsets: (B, M + 1) where the group of each row starts in `order`.
    """

    assignment: Tensor
    kept: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def from_assignment(cls, assignment: Tensor, num_rows: int) -> MergePlan:
        """Makes the plan that merges tokens into given rows, such as the clusters of k-means.

        Args:
            assignment: (B, N) int32 or int64, the row of each token, in [0, num_rows - 1]. The range is checked by the
                functions that use the plan, not here.
            num_rows: M. A row may have no token.

        Returns:
            `MergePlan`. `kept` is the first token of each row, or N for a row without tokens, so it is not ascending in
            general.

        Raises:
            ValueError, TypeError: an argument has a wrong shape, dtype or value.
        """
        op = "MergePlan.from_assignment"
        check_tensor(op, "assignment", assignment, "B, N", INDEX_DTYPES)
        check_int(op, "num_rows", num_rows, 0)
        order, offsets = group_by_row(assignment, num_rows)
        tokens = assignment.shape[1]
        start, end = offsets[:, :-1].long(), offsets[:, 1:].long()
        # An extra column, for rows that start after the last token.
        first = torch.cat([order, order.new_full((order.shape[0], 1), tokens)], dim=1).gather(1, start)
        return cls(assignment.to(torch.int32), first.masked_fill(start == end, tokens), order, offsets)


@saveable
class MergeResult(NamedTuple):
    """Merged tokens and their sizes.

    Attributes:
        tokens: (B, M, C) or (B, M, H, D), the merged tokens.
        size: (B, M), the number of original tokens that each merged token represents.
    """

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
    """The number of tokens to merge, out of `sources` tokens that may merge; symbolic in a compiled graph."""
    if (num_merge is None) == (ratio is None):
        found = "neither" if ratio is None else f"{num_merge} and {ratio}"
        raise ValueError(f"{op}: exactly one of num_merge and ratio must be given, got {found}")
    if ratio is None:
        check_int(op, "num_merge", num_merge, 0, sources)
        return num_merge
    check_number(op, "ratio", ratio)
    if not 0 <= ratio <= 1:
        raise ValueError(f"{op}: ratio must be in [0, 1], got {ratio}")
    return torch.sym_int(ratio * sources)


def _read_fewest(counts: Tensor, limit: Any) -> Any:
    """The minimum of the counts (B,) and the limit, which may be symbolic, read back from the device."""
    # The limit is an extra count, so that the minimum exists for an empty batch.
    fewest = torch.cat([counts, counts.new_full((1,), limit)]).amin().item()
    torch._check(fewest >= 0)
    torch._check(fewest <= limit)
    return fewest


def _read_destinations(op: str, destinations: Tensor) -> int:
    """The number of tokens that the mask marks in each batch element, read back from the device."""
    batch, tokens = destinations.shape
    if batch == 0:
        return torch.sym_min(tokens, 1)  # the minimum number of destinations
    counts = destinations.sum(dim=1)
    fewest, most = torch.stack([counts.amin(), counts.amax()]).tolist()
    require(
        fewest == most,
        lambda: f"{op}: destinations must mark equally many tokens in every batch element, got {fewest} to {most}",
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
    """Plans a merge by bipartite soft matching: each source finds its most similar destination, the best pairs merge.

    Similarity is the cosine, computed in float32 (float64 for float64); a zero vector has similarity 0 to every token.
    Of equal similarities the lower position wins, both for the destination of a source and for the sources that merge.
    The similarity to a vector with a NaN or an infinity is NaN, which ranks below all numbers.

    Args:
        metric: (B, N, C) float features that tokens are compared by, e.g. attention keys averaged over heads. A metric
            of batch 1 makes a plan of batch 1, which `merge_tokens` applies to a whole batch.
        num_merge: number of tokens to merge away, in [0, number of sources that see a destination].
        ratio: instead of `num_merge`: the share of these sources to merge, in [0, 1], rounded down.
        protect: (B or 1, N) bool, tokens that stay alone: they are neither merged nor merged into. The upper limit of
            `num_merge` and the base of `ratio` are then the sources that may still merge, in the batch element with the
            fewest. May be combined with all other options.
        destinations: (B or 1, N) bool, the tokens that are destinations, instead of the odd positions; all others are
            sources. Each batch element must have the same number. Not allowed with `grid`, which defines the
            destinations.
        border: "own": a cell that the border of the grid cuts off has a destination like any other. "none": it has
            none, and its tokens join the destinations of whole cells, as in tomesd; without a whole cell in their
            window they cannot merge. "none" requires `grid`.
        grid: (T, H, W) of the tokens, T * H * W = N, W fastest. The first token of each cell of size `stride` is a
            destination, all others are sources. Without a grid, even positions are sources and odd ones destinations.
        stride: (t, h, w) size of a cell, used only with `grid`; cells at the far border may be partial.
        window: (t, h, w): a source sees only destinations whose cell is at most this many cells away on each axis, so
            that time grows linearly with N. Default: a source sees all destinations. Requires `grid`.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` with M = N - num_merge rows, without gradient. The matrix of similarities is never held in memory.
        With `protect` or `destinations`, the number of tokens that may merge is read back from the device; under
        `torch.compile` this breaks the graph unless `torch._dynamo.config.capture_scalar_outputs` is set. Without them,
        nothing is read back.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value. If `num_merge` is too large, the
            message gives the largest possible value.
        RuntimeError: `protect` or `destinations` is used under vmap.

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
            raise ValueError(f"{op}: window requires a grid, got window {window} and no grid")
    if border not in ("own", "none"):
        raise ValueError(f"{op}: border must be 'own' or 'none', got {border!r}")
    if border == "none" and grid is None:
        raise ValueError(f"{op}: border must be 'own' without a grid, got 'none'")
    split = Split(metric.shape[1], grid, stride, window, border == "none")
    for name, mask in (("protect", protect), ("destinations", destinations)):
        if mask is not None:
            _check_mask(op, name, mask, metric)
            check_values(op, f"the number of tokens that may merge depends on {name}")
    if destinations is not None:
        if grid is not None:
            raise ValueError(f"{op}: destinations cannot be combined with grid and window, got {grid} and {window}")
        split = split._replace(num_destinations=_read_destinations(op, destinations))
        order = order_by_mask(destinations)
        metric = torch.take_along_dim(metric.detach(), order.unsqueeze(2), dim=1)
        protect = None if protect is None else torch.take_along_dim(protect, order, dim=1)
    sources = split.count_sources()
    if protect is not None:
        sources = _read_fewest(split.count_unprotected(protect), sources)
        # A different tensor, so that the fast path does not repeat this call, which depends on the argument's values.
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
    """Plans a merge of new tokens into a memory: each token finds its most similar memory row, the best pairs merge.

    Every memory row keeps its place; tokens merge into rows, never into each other. Similarity, ties and NaN are as in
    `match_tokens`. The plan covers the memory followed by the tokens:

        plan = match_into(key(tokens), key(memory), ratio=0.5)
        memory, size = merge_tokens(cat([memory, tokens], dim=1), plan, cat([size, ones(B, N)], dim=1))

    Afterwards, memory row m < M is the mean of its old value and the tokens merged into it, weighted by their sizes.
    The tokens that did not merge are appended in their order.

    Args:
        metric: (B, N, C) float features that the tokens are compared by.
        memory_metric: (B or 1, M, C) the features of the memory rows, of the same dtype; batch 1 serves a whole batch.
        num_merge: number of tokens to merge away, in [0, N]; 0 if the memory is empty.
        ratio: instead of `num_merge`: the share of the tokens to merge, in [0, 1], rounded down.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` over M + N tokens with M + N - num_merge rows, without gradient; the `assignment` of memory row m is
        m. The matrix of similarities is never held in memory; on a GPU the two metrics are concatenated.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype, device or value.

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
    """Plans a merge of tokens with their most similar neighbour on a (T, H, W) grid.

    Tokens with odd t + h + w are sources; their up to six neighbours are even, and are destinations. Each source is
    paired with its most similar neighbour, and the `num_merge` best pairs merge. Similarity, ties and NaN are as in
    `match_tokens`.

    Args:
        metric: (B, N, C) float features that tokens are compared by.
        num_merge: number of tokens to merge away, in [0, N // 2]; with a threshold, the upper bound. None means N // 2
            and is allowed only with a threshold.
        grid: (T, H, W) of the tokens, T * H * W = N, W fastest.
        threshold: in [-1, 1]; pairs with a lower similarity never merge. A plan has the same number of rows for the
            whole batch, so the batch element with the fewest pairs above the threshold sets the number. This number is
            read back from the device; under `torch.compile` this breaks the graph unless
            `torch._dynamo.config.capture_scalar_outputs` is set.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergePlan` with M = N - num_merge rows, or more with a threshold, without gradient.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or value.
        RuntimeError: `threshold` is used under vmap.

    Equivalent PyTorch:
        x = normalize(metric, dim=-1).view(B, T, H, W, C)
        right = (x[:, :, :, :-1] * x[:, :, :, 1:]).sum(dim=-1)  # likewise along H and T
        # the score of a source is the largest of its up to six; the num_merge sources with the highest scores merge

    Source: the token merging baseline of arXiv 2512.23851 (cosine similarity with the six T/H/W neighbours, merged
    above a threshold), made bipartite as in ToMe, arXiv 2210.09461, so that merges never chain.
    """
    op = "match_neighbors"
    _check_metric(op, metric)
    grid = _check_grid(op, metric, grid)
    sources = metric.shape[1] // 2
    if num_merge is None and threshold is None:
        raise ValueError(f"{op}: num_merge must be an int if there is no threshold, got None")
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
    """Checks the plan and returns it with the batch of `tensor`: (B, M, ...) if `of_rows`, else (B, N, ...)."""
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
    """Checks a float tensor of that shape, or one with further trailing axes, which it flattens into C."""
    if isinstance(tensor, Tensor) and tensor.dim() > 3:
        tensor = tensor.flatten(2)
    return check_tensor(op, name, tensor, shape)


def _with_axes_of(tensor: Tensor, tokens: Tensor) -> Tensor:
    """Reshapes (B, N, C) to (B, N, ...) with the trailing axes of `tensor`."""
    return unguarded(Tensor.reshape, tokens, (*tokens.shape[:2], *tensor.shape[2:]))


@fast
def merge_tokens(x: Tensor, plan: MergePlan, size: Tensor | None = None, *, backend: str | None = None) -> MergeResult:
    """Merges each group of tokens of a plan into its size-weighted mean.

    Args:
        x: (B, N, C) float tokens, or (B, N, H, D), which merge like (B, N, H * D).
        plan: plan from `match_tokens`, `match_into`, `match_neighbors` or `MergePlan.from_assignment`, for N tokens,
            with the batch of x or batch 1.
        size: (B or 1, N) float32 (float64 if x is float64) non-negative weights: how many original tokens each token
            represents. Default: 1. A token of size 0 adds nothing, even if it holds a NaN; a group of total size 0
            gives a row of zeros.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        `MergeResult` with tokens (B, M, C) or (B, M, H, D) of the dtype of x, summed in float32 in the order of the
        tokens, and size (B, M) of the dtype of `size`. Equal tokens merge to exactly that token, a token alone in its
        group is copied bit by bit, and 3, 4, 5 merge to exactly 4. The mean of finite tokens is finite, even near the
        largest float. An infinity gives infinity; infinities of opposite signs or a NaN give NaN. The tokens are
        differentiable in x and `size`, the new size in `size`.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
        IndexError: a plan that this package did not make has indices outside its shapes. On a GPU, where the check
            would cost a synchronisation, the results that depend on them are NaN instead; memory outside x is never
            read.

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
    """Copies each merged row back to all tokens that were merged into it.

    Args:
        y: (B, M, C) float rows, or (B, M, H, D).
        plan: the plan that merged them, with the batch of y or batch 1.
        backend: see `vidmem_kernels.use_backend`.

    Returns:
        (B, N, C) or (B, N, H, D) of the dtype of y. Differentiable: gradients are summed over each group in float32, in
        the order of the tokens.

    Raises:
        ValueError, TypeError: an argument has a wrong shape, dtype or device.
        IndexError: a plan that this package did not make has indices outside its shapes. On a GPU, where the check
            would cost a synchronisation, the results that depend on them are NaN instead; memory outside y is never
            read.

    Equivalent PyTorch:
        y.gather(1, plan.assignment[..., None].expand(B, N, C))

    Source: Bolya and Hoffman, "Token Merging for Fast Stable Diffusion", arXiv 2303.17604.
    """
    op = "unmerge_tokens"
    flat = _check_tokens(op, "y", y, "B, M, C")
    plan = _plan_for(op, plan, "y", y, of_rows=True)
    tokens = call("unmerge_tokens", flat, plan.assignment, plan.order, plan.offsets, backend=backend)
    return tokens if flat is y else _with_axes_of(y, tokens)
