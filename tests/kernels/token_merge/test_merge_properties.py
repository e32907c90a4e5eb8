"""Laws that every CPU backend of merging and gathering keeps, on small random cases."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from bank_helpers import QUANTIZED, backend_for, cpu_backends, ids
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_kernels as vk
from vidmem_kernels import MergePlan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
law = settings(max_examples=100, deadline=None, derandomize=True)


def backends(*ops):
    return pytest.mark.parametrize("backend", cpu_backends(*ops))


def generator(seed):
    return torch.Generator().manual_seed(seed)


class Case(NamedTuple):
    """A metric, how to match it, and the destinations that each source may merge into."""

    metric: torch.Tensor
    op: str
    options: dict
    allowed: dict
    num_merge: int

    def plan(self, backend):
        match = getattr(vk, self.op)
        return match(self.metric, self.num_merge, **self.options, backend=backend_for(self.op, backend))


def cell_heads(grid, stride, window):
    """Sources and the first tokens of the cells in their window."""
    places = list(product(*map(range, grid)))
    heads = [i for i, at in enumerate(places) if all(a % s == 0 for a, s in zip(at, stride, strict=True))]

    def near(at, head):
        cells = ([a // s for a, s in zip(p, stride, strict=True)] for p in (at, head))
        return all(abs(a - b) <= w for a, b, w in zip(*cells, window, strict=True))

    return {
        i: {h for h in heads if window is None or near(at, places[h])}
        for i, at in enumerate(places)
        if i not in set(heads)
    }


def neighbors(grid):
    """Tokens of odd coordinate sum and the tokens one step away."""
    places = list(product(*map(range, grid)))
    return {
        i: {j for j, other in enumerate(places) if sum(abs(a - b) for a, b in zip(at, other, strict=True)) == 1}
        for i, at in enumerate(places)
        if sum(at) % 2
    }


@st.composite
def cases(draw):
    op = draw(st.sampled_from(["match_tokens", "match_tokens on a grid", "match_neighbors"]))
    options = {}
    if op == "match_tokens":
        tokens = draw(st.integers(0, 40))
        allowed = {i: set(range(1, tokens, 2)) for i in range(0, tokens, 2)} if tokens > 1 else {}
    else:
        options["grid"] = grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)))
        tokens = grid[0] * grid[1] * grid[2]
        allowed = neighbors(grid)
        if op != "match_neighbors":
            options["stride"] = draw(st.tuples(*[st.integers(1, 3)] * 3))
            options["window"] = draw(st.none() | st.tuples(*[st.integers(0, 2)] * 3))
            allowed = cell_heads(grid, options["stride"], options["window"])
    shape = draw(st.integers(1, 3)), tokens, draw(st.integers(1, 9))
    seed = generator(draw(st.integers(0, 999)))
    # Few different values make most similarities tie.
    values = torch.randint(-1, 2, shape, generator=seed) if draw(st.booleans()) else torch.randn(shape, generator=seed)
    metric = values.to(draw(st.sampled_from(DTYPES)))
    return Case(metric, op.split()[0], options, allowed, draw(st.integers(0, len(allowed))))


@st.composite
def weighted_cases(draw):
    """A case, its plan still to be made, with tokens and, half of the time, their sizes."""
    case = draw(cases())
    batch, tokens, _ = case.metric.shape
    seed = generator(draw(st.integers(0, 999)))
    x = torch.randn(batch, tokens, draw(st.integers(1, 40)), generator=seed).to(draw(st.sampled_from(DTYPES)))
    size = torch.rand(batch, tokens, generator=seed) * 4 + 0.5 if draw(st.booleans()) else None
    return case, x, size


MATCHING = backends("match_tokens", "match_neighbors")
MERGING = backends("match_tokens", "match_neighbors", "merge_tokens", "unmerge_tokens")


def merge(x, plan, size, backend):
    return vk.merge_tokens(x, plan, size, backend=backend_for("merge_tokens", backend))


def unmerge(y, plan, backend):
    return vk.unmerge_tokens(y, plan, backend=backend_for("unmerge_tokens", backend))


def bits(x):
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def rounding(x, terms):
    """Bound of a weighted mean of `terms` rows of x: one rounding of the result, `terms` of float32 sums and shares."""
    largest = x.abs().max().double() if x.numel() else torch.zeros((), dtype=torch.float64)
    return largest * (torch.finfo(x.dtype).eps + (terms + 4) * torch.finfo(torch.float32).eps)


# --- plans ---


@MATCHING
@law
@given(case=cases())
def test_plan_invariants(backend, case):
    batch, tokens, _ = case.metric.shape
    plan = case.plan(backend)
    rows = tokens - case.num_merge
    assert [tuple(f.shape) for f in plan] == [(batch, n) for n in (tokens, rows, tokens, rows + 1)]
    assert all(f.dtype == torch.int32 for f in plan)
    for assignment, kept, order, offsets in zip(*(f.tolist() for f in plan), strict=True):
        assert kept == sorted(set(kept))
        assert [assignment[k] for k in kept] == list(range(rows))
        assert sorted(order) == list(range(tokens))
        assert offsets == [sum(a < row for a in assignment) for row in range(rows + 1)]
        assert [assignment[i] for i in order] == sorted(assignment)
        for row in range(rows):
            group = order[offsets[row] : offsets[row + 1]]
            assert group == sorted(group)
        for token in set(range(tokens)) - set(kept):
            assert kept[assignment[token]] in case.allowed[token]


# --- merging ---


@MERGING
@law
@given(args=weighted_cases())
def test_tokens_alone_in_their_group_survive_bitwise(backend, args):
    case, x, size = args
    plan = case.plan(backend)
    merged = merge(x, plan, size, backend)
    alone = (plan.offsets.diff(dim=1) == 1).gather(1, plan.assignment.long())
    back = unmerge(merged.tokens, plan, backend)
    assert torch.equal(bits(back)[alone], bits(x)[alone])
    rows = merged.tokens[torch.arange(len(x)).unsqueeze(1), plan.assignment.long()]
    assert torch.equal(bits(back), bits(rows))
    if size is not None:
        assert torch.equal(merged.size.gather(1, plan.assignment.long())[alone], size[alone])


@MERGING
@law
@given(args=weighted_cases())
def test_sizes_and_weighted_means_are_preserved(backend, args):
    case, x, size = args
    tokens = x.shape[1]
    merged = merge(x, case.plan(backend), size, backend)
    if size is None:
        assert (merged.size.sum(dim=1) == tokens).all() and torch.equal(merged.size, merged.size.round())
        size = torch.ones(x.shape[:2])
    whole = size.double().sum(dim=1)
    error = (merged.size.double().sum(dim=1) - whole).abs()
    assert (error <= tokens * torch.finfo(torch.float32).eps * whole).all()
    if tokens:
        before = (x.double() * size.double().unsqueeze(2)).sum(dim=1) / whole.unsqueeze(1)
        after = (merged.tokens.double() * merged.size.double().unsqueeze(2)).sum(dim=1) / whole.unsqueeze(1)
        assert (after - before).abs().max() <= rounding(x, 2 * tokens)


@MERGING
@law
@given(args=weighted_cases())
def test_merging_nothing_is_the_identity(backend, args):
    case, x, size = args
    plan = case._replace(num_merge=0).plan(backend)
    everything = torch.arange(x.shape[1] + 1).expand(len(x), -1)
    for field in plan[:3]:
        assert torch.equal(field, everything[:, :-1].int())
    assert torch.equal(plan.offsets, everything.int())
    merged = merge(x, plan, size, backend)
    assert torch.equal(bits(merged.tokens), bits(x)) and torch.equal(bits(unmerge(x, plan, backend)), bits(x))
    assert torch.equal(merged.size, torch.ones(x.shape[:2]) if size is None else size)


def composed(first, second):
    """The plan that does at once what two do one after the other."""
    assignment = second.assignment.gather(1, first.assignment.long())
    kept = first.kept.gather(1, second.kept.long())
    order = assignment.argsort(dim=1, stable=True)
    rows = torch.arange(kept.shape[1] + 1).repeat(len(kept), 1)
    offsets = torch.searchsorted(assignment.gather(1, order).long(), rows)
    return MergePlan(assignment, kept, order.int(), offsets.int())


@MERGING
@law
@given(args=weighted_cases(), share=st.floats(0, 1))
def test_merging_twice_is_merging_once_with_the_composed_plan(backend, args, share):
    case, x, size = args
    x = x.float()  # a rounding to fewer bits between the two would be one more
    first = case.plan(backend)
    once, sizes = merge(x, first, size, backend)
    rows = once.shape[1]
    more = int(share * ((rows + 1) // 2)) if rows > 1 else 0
    second = vk.match_tokens(once, more, backend=backend_for("match_tokens", backend))
    twice = merge(once, second, sizes, backend)
    direct = merge(x, composed(first, second), size, backend)
    if size is None:
        assert torch.equal(twice.size, direct.size)
    torch.testing.assert_close(twice.size, direct.size, rtol=(x.shape[1] + 1) * torch.finfo(torch.float32).eps, atol=0)
    if x.numel():
        error = (twice.tokens.double() - direct.tokens.double()).abs().max()
        assert error <= rounding(x, 2 * x.shape[1])


@backends("unmerge_tokens", "sum_groups")
@law
@given(args=weighted_cases())
def test_sum_groups_is_the_transpose_of_unmerge(backend, args):
    case, x, _ = args
    plan = case.plan("reference")
    seed = generator(x.shape[1])
    s = torch.randint(-4, 5, x.shape, generator=seed).to(x.dtype)  # small integers: every sum is exact
    y = torch.randint(-4, 5, (len(x), plan.kept.shape[1], x.shape[2]), generator=seed).to(x.dtype)
    groups = plan.assignment, plan.order, plan.offsets
    sums = torch.ops.vidmem.sum_groups(s, *groups, backend_for("sum_groups", backend))
    assert (unmerge(y, plan, backend).double() * s.double()).sum() == (y.double() * sums.double()).sum()


# --- gathering ---


@backends("gather_tokens", "scatter_add_tokens")
@law
@given(
    batch=st.integers(0, 3),
    rows=st.integers(0, 9),
    count=st.integers(0, 12),
    channels=st.integers(0, 40),
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    seed=st.integers(0, 999),
)
def test_scatter_add_is_the_transpose_of_gather(backend, batch, rows, count, channels, dtype, wide, seed):
    seed = generator(seed)
    bank = torch.randint(-4, 5, (batch, rows, channels), generator=seed).to(dtype)
    s = torch.randint(-4, 5, (batch, count, channels), generator=seed).to(dtype)
    index = torch.randint(-1, rows, (batch, count), generator=seed, dtype=torch.int64 if wide else torch.int32)
    gathered = vk.gather_tokens(bank, index, backend=backend_for("gather_tokens", backend))
    scattered = vk.scatter_add_tokens(s, index, rows, backend=backend_for("scatter_add_tokens", backend))
    assert gathered.dtype == scattered.dtype == dtype
    assert (gathered.double() * s.double()).sum() == (bank.double() * scattered.double()).sum()


@backends("quantize_rows")
@pytest.mark.parametrize("quantized", QUANTIZED, ids=ids)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    channels=st.integers(1, 70),
    exponents=st.tuples(st.integers(-44, 38), st.integers(0, 12)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_quantized_rows_stay_within_the_documented_bound(backend, quantized, channels, exponents, dtype, seed):
    seed = generator(seed)
    largest, spread = exponents
    powers = largest - spread * torch.rand(4, channels, generator=seed, dtype=torch.float64)
    x = torch.randn(4, channels, generator=seed, dtype=torch.float64) * 10**powers
    x = x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
    rows, scale = vk.quantize_rows(x, quantized, backend=backend_for("quantize_rows", backend))
    back = (rows.float() * scale.unsqueeze(1)).double()
    x, step = x.double(), scale.double().unsqueeze(1)
    bound = step / 2 if quantized == torch.int8 else torch.maximum(x.abs() / 16, step / 1024)
    assert ((back - x).abs() <= bound + 2.0**-23 * x.abs()).all()
    assert (scale.ge(2.0**-126) | (x == 0).all(dim=1)).all() and not back[(x == 0)].any()


@backends("select_tokens")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_select_is_a_stable_sort(backend, data):
    batch, count = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 12))
    keep = data.draw(st.integers(0, count))
    values = st.sampled_from([-2.0, -0.0, 0.0, 1.0, float("inf"), float("-inf"), float("nan")])
    scores = [data.draw(st.lists(values, min_size=count, max_size=count)) for _ in range(batch)]
    x = torch.randn(batch, count, 3, generator=generator(count))
    score = torch.tensor(scores).view(batch, count) if data.draw(st.booleans()) else None
    if score is None:
        scores = x.norm(dim=2).tolist()
    tokens, index = vk.select_tokens(x, keep, score=score, backend=backend_for("select_tokens", backend))
    for b in range(batch):
        worst_first = [float("-inf") if s != s else s for s in scores[b]]
        best = sorted(sorted(range(count), key=lambda i, s=worst_first: (-s[i], i))[:keep])
        assert index[b].tolist() == best
        assert torch.equal(tokens[b], x[b, best])
