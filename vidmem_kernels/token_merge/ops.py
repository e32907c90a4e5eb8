"""Registers the ops of token merging: schemas, fakes and gradients.

A plan stores its groups in two forms: `assignment` (the row of each token) for computations per token, and `order` with
`offsets` (the tokens of each row) for sums, which then need no atomics.
"""

from __future__ import annotations

import torch

from .._numerics import accumulate_dtype
from .._registry import register_op
from .._symbolic import minus
from . import reference

# --- matching ---


def _plan_fake(metric, num_merge, memory_rows=0):
    batch, tokens = metric.shape[0], memory_rows + metric.shape[1]
    rows = minus(tokens, num_merge)
    sizes = (tokens, rows, tokens, rows + 1)
    return tuple(metric.new_empty(batch, size, dtype=torch.int32) for size in sizes)


def _match_tokens_fake(metric, num_merge, grid, stride, window, whole_cells, num_destinations, protect):
    return _plan_fake(metric, num_merge)


def _match_into_fake(metric, memory_metric, num_merge):
    return _plan_fake(metric, num_merge, memory_metric.shape[1])


def _match_neighbors_fake(metric, num_merge, grid):
    return _plan_fake(metric, num_merge)


def _count_neighbors_fake(metric, grid, threshold):
    return metric.new_empty(metric.shape[0], dtype=torch.int32)


def _match_refuse_triton(metric, *_):
    return "does not support float64: it compares in float32" if metric.dtype == torch.float64 else None


register_op(
    "match_tokens(Tensor metric, SymInt num_merge, SymInt[]? grid=None, SymInt[] stride=[2, 2, 2], "
    "SymInt[]? window=None, bool whole_cells=False, SymInt num_destinations=-1, Tensor? protect=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.match_tokens,
    fake=_match_tokens_fake,
    autocast=(),
    triton="triton_match",
    refuse={"triton": _match_refuse_triton},
)

register_op(
    "match_into(Tensor metric, Tensor memory_metric, SymInt num_merge) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.match_into,
    fake=_match_into_fake,
    autocast=(),
    broadcasts=("memory_metric",),
    triton="triton_match",
    refuse={"triton": _match_refuse_triton},
)

register_op(
    "match_neighbors(Tensor metric, SymInt num_merge, SymInt[] grid) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.match_neighbors,
    fake=_match_neighbors_fake,
    autocast=(),
    triton="triton_neighbors",
    refuse={"triton": _match_refuse_triton},
)

# A threshold makes the number of rows depend on the data. Counting is a separate op, so that the sizes of all other ops
# are known from their arguments, and a compiled graph has at most one symbolic number.
register_op(
    "count_neighbors(Tensor metric, SymInt[] grid, float threshold) -> Tensor",
    reference=reference.count_neighbors,
    fake=_count_neighbors_fake,
    autocast=(),
    triton="triton_neighbors",
    refuse={"triton": _match_refuse_triton},
)

# --- merge_tokens ---


def _merge_fake(x, size, assignment, order, offsets):
    batch, _, channels = x.shape
    rows = offsets.shape[1] - 1
    total = x.new_empty(batch, rows, dtype=accumulate_dtype(x.dtype))
    return x.new_empty(batch, rows, channels), total


def _merge_setup(ctx, inputs, output):
    x, size, *groups = inputs
    ctx.channels, ctx.dtype = x.shape[2], x.dtype
    wants_size = ctx.needs_input_grad[1]
    # Only the gradient of size needs x; without it, x is freed after the forward pass.
    ctx.save_for_backward(x if wants_size else None, size, *groups)
    ctx.set_materialize_grads(False)
    if not wants_size:
        ctx.mark_non_differentiable(output[1])


def _merge_backward(ops, ctx, grad_tokens, grad_size):
    x, size, *groups = ctx.saved_tensors
    # An unused result has no gradient.
    if grad_tokens is None and grad_size is None:
        return None, None, None, None, None
    if grad_tokens is None:
        grad_tokens = grad_size.new_zeros(*grad_size.shape, ctx.channels, dtype=ctx.dtype)
    if grad_size is None:
        grad_size = grad_tokens.new_zeros(grad_tokens.shape[:2], dtype=accumulate_dtype(grad_tokens.dtype))
    grad_x, grad_size = ops.merge_tokens_backward(grad_tokens, grad_size, x, size, *groups)
    return grad_x, grad_size if x is not None else None, None, None, None


def _merge_refuse_triton(x, *_):
    return "does not support float64: it sums in float32" if x.dtype == torch.float64 else None


register_op(
    "merge_tokens(Tensor x, Tensor? size, Tensor assignment, Tensor order, Tensor offsets) -> (Tensor, Tensor)",
    reference=reference.merge_tokens,
    fake=_merge_fake,
    setup_context=_merge_setup,
    backward=_merge_backward,
    autocast=(),
    triton="triton_merge",
    refuse={"triton": _merge_refuse_triton},
)


def _merge_backward_fake(grad_tokens, grad_size, x, size, assignment, order, offsets):
    batch, tokens = assignment.shape
    dtype = accumulate_dtype(grad_tokens.dtype)
    wanted = tokens if x is not None else 0
    return (
        grad_tokens.new_empty(batch, tokens, grad_tokens.shape[2]),
        grad_tokens.new_empty(batch, wanted, dtype=dtype),
    )


register_op(
    "merge_tokens_backward(Tensor grad_tokens, Tensor grad_size, Tensor? x, Tensor? size, Tensor assignment, "
    "Tensor order, Tensor offsets) -> (Tensor, Tensor)",
    reference=reference.merge_tokens_backward,
    fake=_merge_backward_fake,
    autocast=(),
    triton="triton_merge",
    refuse={"triton": _merge_refuse_triton},
)

# --- unmerge_tokens and its transpose ---


def _groups_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _unmerge_fake(y, assignment, order, offsets):
    return y.new_empty(*assignment.shape, y.shape[2])


def _unmerge_backward(ops, ctx, grad):
    return ops.sum_groups(grad, *ctx.saved_tensors), None, None, None


register_op(
    "unmerge_tokens(Tensor y, Tensor assignment, Tensor order, Tensor offsets) -> Tensor",
    reference=reference.unmerge_tokens,
    fake=_unmerge_fake,
    setup_context=_groups_setup,
    backward=_unmerge_backward,
    autocast=(),
    triton="triton_merge",
)


def _sum_groups_fake(x, assignment, order, offsets):
    return x.new_empty(x.shape[0], offsets.shape[1] - 1, x.shape[2])


def _sum_groups_backward(ops, ctx, grad):
    return ops.unmerge_tokens(grad, *ctx.saved_tensors), None, None, None


register_op(
    "sum_groups(Tensor x, Tensor assignment, Tensor order, Tensor offsets) -> Tensor",
    reference=reference.sum_groups,
    fake=_sum_groups_fake,
    setup_context=_groups_setup,
    backward=_sum_groups_backward,
    autocast=(),
    triton="triton_merge",
)
