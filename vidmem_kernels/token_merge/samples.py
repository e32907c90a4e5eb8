"""Sample inputs of the token merging ops."""

import torch

from .._numerics import accumulate_dtype
from ..testing import public_call, sample_inputs
from . import api, reference


def _every(make, batch, tokens, step):
    """(B, N) bool: every `step`-th token, starting at another token in each batch element."""
    position = torch.arange(tokens) + torch.arange(batch).unsqueeze(1)
    return (position % step == 1).to(make.device)


@sample_inputs("match_tokens")
def match_tokens(make):
    for label, args in _matches(make):
        yield label, args + (False, -1, None)[len(args) - 5 :]


def _matches(make):
    """Yields arguments of match_tokens; the last ones only where they differ from the default."""
    default = (2, 2, 2)
    yield "half and half", (make.randn(2, 16, 5), 5, None, default, None)
    yield "odd count, all sources", (make.randn(2, 17, 5), 9, None, default, None)
    yield "nothing merged", (make.randn(2, 7, 5), 0, None, default, None)
    yield "strided", (make.strided(make.randn(2, 16, 5)), 5, None, default, None)
    yield "one channel", (make.randn(2, 9, 1), 3, None, default, None)
    yield "equal tokens", (make.randn(2, 1, 5).repeat(1, 12, 1), 4, None, default, None)
    yield "zero vectors", (torch.zeros_like(make.randn(2, 12, 5)), 4, None, default, None)
    nan = make.randn(2, 12, 5)
    nan[0, 3] = float("nan")
    nan[1, 4, 2] = float("inf")
    yield "nan and infinity", (nan, 5, None, default, None)
    yield "one token", (make.randn(2, 1, 5), 0, None, default, None)
    yield "no token", (make.randn(2, 0, 5), 0, None, default, None)
    yield "no batch", (make.randn(0, 8, 5), 3, None, default, None)
    yield "grid", (make.randn(2, 48, 5), 20, (3, 4, 4), default, None)
    yield "grid, partial cells, window", (make.randn(2, 105, 6), 60, (3, 5, 7), (2, 2, 3), (1, 0, 1))
    yield "window 0", (make.randn(1, 60, 6), 13, (3, 4, 5), default, (0, 0, 0))
    yield "window, several tiles", (make.randn(1, 90, 3), 40, (1, 10, 9), (1, 2, 1), (0, 1, 1))
    nan = make.randn(1, 48, 5)
    nan[0, ::3] = float("nan")
    yield "window, nan", (nan, 30, (3, 4, 4), default, (0, 1, 1))
    yield "every token a destination", (make.randn(2, 24, 5), 0, (2, 3, 4), (1, 1, 1), (1, 1, 1))
    yield "several vectors of channels", (make.randn(1, 210, 70), 90, None, default, None)
    yield "strided grid", (make.strided(make.randn(2, 105, 6)), 60, (3, 5, 7), default, None)
    yield "long row of cells", (make.randn(1, 260, 33), 150, (1, 2, 130), default, (0, 1, 2))
    mixed = make.randn(2, 60, 5)
    mixed[:, ::4] = 0
    mixed[:, 1::8] = float("inf")
    yield "window 0, zero and infinite vectors", (mixed, 45, (3, 4, 5), default, (0, 0, 0))
    cut = make.randn(2, 105, 6)
    yield "whole cells", (cut, 70, (3, 5, 7), default, None, True)
    yield "whole cells, window", (cut, 70, (3, 5, 7), default, (1, 0, 2), True)
    yield "whole cells, window 0", (cut, 40, (3, 5, 7), default, (0, 0, 0), True)
    yield "no whole cell", (cut, 0, (3, 5, 7), (2, 6, 2), (1, 1, 1), True)
    yield "first ones are destinations", (make.randn(2, 60, 5), 33, None, default, None, False, 21)
    yield "one destination, nan", (nan, 47, None, default, None, False, 1)
    yield "no destination", (make.randn(2, 9, 5), 0, None, default, None, False, 0)
    yield "every token a destination by count", (make.randn(2, 9, 5), 0, None, default, None, False, 9)
    alone = _every(make, 2, 105, 4)
    yield "protected", (cut, 20, None, default, None, False, -1, alone)
    yield "protected, grid", (cut, 50, (3, 5, 7), default, None, True, -1, alone)
    yield "protected, window", (cut, 30, (3, 5, 7), default, (0, 1, 1), False, -1, alone)
    yield "protected, first ones are destinations", (cut, 50, None, default, None, False, 30, alone)
    spoilt = make.randn(2, 105, 6)
    spoilt[:, ::3] = float("nan")
    yield "protected, window, nan", (spoilt, 30, (3, 5, 7), default, (0, 1, 1), True, -1, make.strided(alone))
    yield "protected, nan", (spoilt, 26, None, default, None, False, -1, alone)


@sample_inputs("match_into")
def match_into(make):
    x, memory = make.randn(2, 33, 5), make.randn(2, 21, 5)
    yield "half", (x, memory, 16)
    yield "all tokens", (x, memory, 33)
    yield "nothing merged", (x, memory, 0)
    yield "one memory for a batch", (make.randn(3, 20, 6), make.randn(1, 7, 6), 11)
    yield "strided", (make.strided(x), make.strided(memory), 12)
    yield "one row", (x, memory[:, :1], 9)
    yield "no row", (x, memory[:, :0], 0)
    yield "no token", (x[:, :0], memory, 0)
    yield "no batch", (x[:0], memory[:0], 7)
    yield "no batch, one memory", (x[:0], memory[:1], 7)
    yield "equal tokens", (x[:, :1].repeat(1, 30, 1), x[:, :1].repeat(1, 9, 1), 8)
    spoilt = memory.clone()
    spoilt[:, ::2] = float("nan")
    yield "nan", (x, spoilt, 20)
    yield "several tiles", (make.randn(1, 150, 40), make.randn(1, 140, 40), 60)


@sample_inputs("match_neighbors")
def match_neighbors(make):
    yield "grid", (make.randn(2, 60, 5), 11, (3, 4, 5))
    yield "all sources", (make.randn(2, 27, 5), 13, (3, 3, 3))
    yield "one axis", (make.randn(2, 9, 5), 2, (1, 9, 1))
    yield "strided, one channel", (make.strided(make.randn(2, 24, 1)), 5, (2, 3, 4))
    yield "equal tokens", (make.randn(1, 1, 5).repeat(1, 24, 1), 5, (2, 3, 4))
    nan = make.randn(2, 24, 5)
    nan[0, ::5] = float("nan")
    yield "nan", (nan, 10, (2, 3, 4))
    yield "nothing merged", (make.randn(1, 24, 5), 0, (2, 3, 4))
    yield "one token", (make.randn(2, 1, 5), 0, (1, 1, 1))
    yield "no token", (make.randn(2, 0, 5), 0, (0, 3, 4))
    yield "no batch", (make.randn(0, 24, 5), 5, (2, 3, 4))
    yield "several vectors of channels", (make.randn(1, 60, 70), 20, (3, 4, 5))


@sample_inputs("count_neighbors")
def count_neighbors(make):
    yield "grid", (make.randn(2, 60, 5), (3, 4, 5), 0.25)
    yield "strided", (make.strided(make.randn(2, 24, 5)), (2, 3, 4), -0.5)
    yield "one token", (make.randn(2, 1, 5), (1, 1, 1), 0.0)
    yield "no batch", (make.randn(0, 24, 5), (2, 3, 4), 0.0)
    mixed = make.randn(2, 60, 70)
    mixed[:, ::7] = float("nan")
    mixed[:, ::5] = 0
    yield "zero vectors and nan", (mixed, (3, 4, 5), 0.0)


def _groups(make, batch, tokens, num_merge):
    """assignment, order and offsets of a random plan."""
    metric = make.randn(batch, tokens, 3, dtype=torch.float32)
    assignment, _, order, offsets = reference.match_tokens(metric, num_merge, None, (2, 2, 2), None)
    return assignment, order, offsets


def _size(make, *shape):
    return make.rand(*shape, dtype=accumulate_dtype(make.dtype))


def _one_group(make, batch, tokens):
    order = torch.arange(tokens, dtype=torch.int32, device=make.device).repeat(batch, 1)
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device=make.device).repeat(batch, 1)
    return torch.zeros_like(order), order, offsets


def _long_groups(make):
    """Groups of 0, 1, 9, 5 and 0 tokens; match_tokens makes no empty groups, but a user may."""
    tokens = torch.tensor([[7, 0, 2, 3, 5, 8, 9, 10, 13, 14, 1, 4, 6, 11, 12]], dtype=torch.int32)
    offsets = torch.tensor([[0, 0, 1, 10, 15, 15]], dtype=torch.int32)
    rows = torch.arange(5, dtype=torch.int32).repeat_interleave(offsets[0].diff().long())
    assignment = torch.empty_like(tokens).index_copy_(1, tokens[0].long(), rows.unsqueeze(0))
    return tuple(t.to(make.device) for t in (assignment, tokens, offsets))


def _merges(make):
    """Yields label, x, size, assignment, order, offsets."""
    plan = _groups(make, 2, 11, 5)
    yield "mean", make.randn(2, 11, 5), None, *plan
    yield "sizes", make.randn(2, 11, 5), _size(make, 2, 11), *plan
    wide = tuple(t.long() for t in plan)
    yield "int64, wide", make.randn(2, 11, 1031), _size(make, 2, 11), *wide
    strided = (make.strided(t) for t in (make.randn(2, 11, 5), _size(make, 2, 11), *plan))
    yield "strided", *strided
    yield "one channel", make.randn(2, 11, 1), _size(make, 2, 11), *plan
    yield "nothing merged", make.randn(2, 7, 5), _size(make, 2, 7), *_groups(make, 2, 7, 0)
    yield "one group", make.randn(2, 40, 33), _size(make, 2, 40), *_one_group(make, 2, 40)
    yield "no token", make.randn(2, 0, 5), _size(make, 2, 0), *_groups(make, 2, 0, 0)
    yield "no batch", make.randn(0, 8, 5), _size(make, 0, 8), *_groups(make, 0, 8, 3)
    yield "empty and long groups", make.randn(1, 15, 35), _size(make, 1, 15), *_long_groups(make)


@sample_inputs("merge_tokens")
def merge_tokens(make):
    for label, *args in _merges(make):
        yield label, tuple(args)


@sample_inputs("merge_tokens_backward")
def merge_tokens_backward(make):
    for label, x, size, assignment, order, offsets in _merges(make):
        batch, rows = offsets.shape[0], offsets.shape[1] - 1
        grad = make.randn(batch, rows, x.shape[2])
        grad_size = _size(make, batch, rows)
        if label == "strided":
            grad, grad_size = make.strided(grad), make.strided(grad_size)
        groups = (assignment, order, offsets)
        if size is not None:
            yield label, (grad, grad_size, x, size, *groups)
        yield f"{label}, x only", (grad, grad_size, None, size, *groups)
    # Not among the samples of merge_tokens: finite differences fail for a group of size 0, which has no derivative.
    groups = _one_group(make, 1, 6)
    size = torch.zeros_like(_size(make, 1, 6))
    yield "size 0", (make.randn(1, 1, 5), _size(make, 1, 1), make.randn(1, 6, 5), size, *groups)


@sample_inputs("unmerge_tokens")
def unmerge_tokens(make):
    for label, x, _, assignment, order, offsets in _merges(make):
        y = make.randn(x.shape[0], offsets.shape[1] - 1, x.shape[2])
        y = make.strided(y) if label == "strided" else y
        yield label, (y, assignment, order, offsets)


@sample_inputs("sum_groups")
def sum_groups(make):
    for label, x, _, assignment, order, offsets in _merges(make):
        yield label, (x, assignment, order, offsets)


def _plan(m, sizes):
    """Tensors of a plan that merges N tokens to R."""
    return tuple(api.MergePlan.from_assignment(m.randint(0, sizes["R"], (sizes["B"], sizes["N"])), sizes["R"]))


def _sized(m, s):
    size = m.rand(s["B"], s["N"], dtype=accumulate_dtype(m.dtype))
    return m.randn(s["B"], s["N"], s["C"]), size, *_plan(m, s)


PLAN = ("B N", "B R", "B N", "B R+1")
SHARED = ("1 N", "1 R", "1 N", "1 R+1")
public_call("match_tokens", "half", lambda x: api.match_tokens(x, x.shape[1] // 2), "B N 5")
public_call("match_tokens", "grid", lambda x: api.match_tokens(x, 20, grid=(3, 4, 4), window=(1, 0, 1)), "B 48 5")
public_call("match_tokens", "ratio", lambda x: api.match_tokens(x, ratio=0.3), "B N 5")
public_call(
    "match_tokens",
    "whole cells, ratio",
    lambda x: api.match_tokens(x, ratio=0.5, grid=(3, 5, 7), window=(0, 1, 1), border="none"),
    "B 105 5",
)
public_call("match_into", "half", lambda x, memory: api.match_into(x, memory, x.shape[1] // 2), "B N 5", "B M 5", M=1)
public_call(
    "match_into",
    "one memory for a batch",
    lambda x, memory: api.match_into(x, memory, ratio=0.3),
    "B N 5",
    "1 M 5",
    M=1,
)
public_call("match_neighbors", "grid", lambda x: api.match_neighbors(x, 11, grid=(3, 4, 5)), "B 60 5")
public_call(
    "merge_tokens",
    "plan given, sizes",
    lambda x, size, *plan: api.merge_tokens(x, api.MergePlan(*plan), size),
    *("B N C", "B N", *PLAN),
    make=_sized,
    R=1,
)
public_call(
    "merge_tokens",
    "heads, one plan and size for a batch",
    lambda x, size, *plan: api.merge_tokens(x, api.MergePlan(*plan), size),
    *("B N H D", "1 N", *SHARED),
    make=lambda m, s: (
        m.randn(s["B"], s["N"], s["H"], s["D"]),
        m.rand(1, s["N"], dtype=accumulate_dtype(m.dtype)),
        *_plan(m, s | {"B": 1}),
    ),
    R=1,
)
public_call(
    "unmerge_tokens",
    "heads, one plan for a batch",
    lambda y, *plan: api.unmerge_tokens(y, api.MergePlan(*plan)),
    *("B R H D", *SHARED),
    make=lambda m, s: (m.randn(s["B"], s["R"], s["H"], s["D"]), *_plan(m, s | {"B": 1})),
    R=1,
)
public_call(
    "unmerge_tokens",
    "plan given",
    lambda y, *plan: api.unmerge_tokens(y, api.MergePlan(*plan)),
    *("B R C", *PLAN),
    make=lambda m, s: (m.randn(s["B"], s["R"], s["C"]), *_plan(m, s)),
    R=1,
)
public_call(
    "MergePlan",
    "from_assignment",
    lambda assignment: api.MergePlan.from_assignment(assignment, 7),
    "B N",
    make=lambda m, s: (m.randint(0, 7, (s["B"], s["N"])),),
)
