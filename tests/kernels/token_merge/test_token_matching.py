"""match_tokens and match_neighbors against loops, hand-made cases and ToMe's own algorithm."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_kernels as vk
from vidmem_kernels.token_merge import reference

NAN = float("nan")
M = torch.zeros(1, 1022, 4)


def lists(plan):
    """The plan of the first batch element as Python lists."""
    return [field[0].tolist() for field in plan]


def plan_by_loops(metric, num_merge, candidates):
    """The rule itself: `candidates` maps a source position to its destinations; metric is (N, C) of Python floats."""

    def similarity(a, b):
        norms = [sum(v * v for v in x) ** 0.5 for x in (a, b)]
        return sum(u * v for u, v in zip(a, b, strict=True)) / (norms[0] * norms[1])

    best = {}
    for source, destinations in candidates.items():
        scored = [(-similarity(metric[source], metric[d]), d) for d in destinations]
        best[source] = min(scored)
    merged = sorted(best, key=lambda source: (best[source][0], source))[:num_merge]
    target = {source: best[source][1] for source in merged}
    kept = [i for i in range(len(metric)) if i not in target]
    assignment = [kept.index(target.get(i, i)) for i in range(len(metric))]
    groups = [[i for i, a in enumerate(assignment) if a == row] for row in range(len(kept))]
    order = [i for group in groups for i in group]
    offsets = [sum(len(g) for g in groups[:row]) for row in range(len(kept) + 1)]
    return [assignment, kept, order, offsets]


def grid_candidates(grid, stride, window):
    position = {cell: i for i, cell in enumerate(product(*map(range, grid)))}

    def cell_of(at):
        return [a // s for a, s in zip(at, stride, strict=True)]

    destinations = [at for at in position if all(a % s == 0 for a, s in zip(at, stride, strict=True))]
    return {
        position[at]: [
            position[d]
            for d in destinations
            if window is None or all(abs(a - b) <= w for a, b, w in zip(cell_of(at), cell_of(d), window, strict=True))
        ]
        for at in position
        if at not in destinations
    }


def neighbor_candidates(grid):
    position = {at: i for i, at in enumerate(product(*map(range, grid)))}
    found = {}
    for (t, h, w), i in position.items():
        if (t + h + w) % 2:
            around = [(t - 1, h, w), (t, h - 1, w), (t, h, w - 1)]
            around += [(t, h, w + 1), (t, h + 1, w), (t + 1, h, w)]
            found[i] = [position[n] for n in around if n in position]
    return found


# --- hand-made cases ---

SIX = torch.tensor([[[1.0, 0], [0, 1], [0, 2], [3, 0], [1, 1], [-1, 0]]])


def test_hand_one_pair_tie_takes_the_lower_source():
    # 0 joins 3 and 2 joins 1, both with similarity 1; 4 is as near to 1 as to 3.
    plan = vk.match_tokens(SIX, 1)
    assert lists(plan) == [[2, 0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 0, 3, 4, 5], [0, 1, 2, 4, 5, 6]]
    assert all(field.dtype == torch.int32 and field.is_contiguous() for field in plan)


def test_hand_all_sources_tie_takes_the_lower_destination():
    assert lists(vk.match_tokens(SIX, 3)) == [
        [1, 0, 0, 1, 0, 2],
        [1, 3, 5],
        [1, 2, 4, 0, 3, 5],
        [0, 3, 5, 6],
    ]


def test_hand_grid():
    # One frame of 2 x 3, cells of 2 x 2: destinations 0 and 2 (a partial cell).
    metric = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [1, 0], [1, 0.1], [0, 1]]])
    plan = vk.match_tokens(metric, 3, grid=(1, 2, 3))
    assert lists(plan) == [[0, 1, 1, 0, 2, 1], [0, 2, 4], [0, 3, 1, 2, 5, 4], [0, 2, 5, 6]]
    # With window 0 token 1 may only join its own cell's destination 0, at similarity 0: token 4 comes before it.
    plan = vk.match_tokens(metric, 3, grid=(1, 2, 3), window=(0, 0, 0))
    assert lists(plan)[:2] == [[0, 1, 2, 0, 0, 2], [0, 1, 2]]


def test_hand_neighbors():
    # A row of five: sources 1 and 3. 1 is as similar to 0 as to 2, 3 is like 4.
    metric = torch.tensor([[[1.0, 0], [1, 1], [0, 1], [1, 3], [1, 2]]])
    plan = vk.match_neighbors(metric, 2, grid=(1, 1, 5))
    assert lists(plan) == [[0, 0, 1, 2, 2], [0, 2, 4], [0, 1, 2, 3, 4], [0, 2, 3, 5]]
    assert lists(vk.match_neighbors(metric, 1, grid=(1, 1, 5)))[1] == [0, 1, 2, 4]


def test_zero_vector_has_similarity_zero():
    # Source 0 is zero: 0 with both. Source 2 opposes both: -1. So 0 merges first, into the lower destination.
    metric = torch.tensor([[[0.0, 0], [1, 0], [-1, 0], [2, 0]]])
    assert lists(vk.match_tokens(metric, 1))[0] == [0, 0, 1, 2]
    # A zero destination beats an opposed one.
    metric = torch.tensor([[[-1.0, 0], [1, 0], [-1, 0], [0, 0]]])
    assert lists(vk.match_tokens(metric, 2))[0] == [1, 0, 1, 1]


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_nan_similarity_counts_as_lowest(bad):
    # Destination 1 is bad, so source 0 joins 3 although it opposes it; source 2 is bad and merges last.
    metric = torch.tensor([[[1.0, 0], [1, bad], [bad, 0], [-1, 0]]])
    assert lists(vk.match_tokens(metric, 1))[0] == [2, 0, 1, 2]
    assert lists(vk.match_tokens(metric, 2))[0] == [1, 0, 0, 1]
    row = torch.tensor([[[1.0, 0], [bad, 0], [-1.0, 0], [1, 0], [bad, 0]]])
    assert lists(vk.match_neighbors(row, 1, grid=(5, 1, 1)))[0] == [0, 1, 2, 2, 3]
    assert lists(vk.match_neighbors(row, None, grid=(5, 1, 1), threshold=-1.0))[1] == [0, 1, 2, 4]
    # A bad source takes its lowest neighbour.
    row = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [bad, 0], [1, 0]]])
    assert lists(vk.match_neighbors(row, 2, grid=(1, 5, 1)))[0] == [0, 0, 1, 1, 2]


def test_nan_in_a_window_stays_in_the_window():
    metric = torch.full((1, 8, 3), NAN)
    plan = vk.match_tokens(metric, 4, grid=(1, 1, 8), window=(0, 0, 0))
    assert lists(plan)[0] == [0, 0, 1, 1, 2, 2, 3, 3]
    plan = vk.match_tokens(metric, 4, grid=(1, 1, 8), window=(0, 0, 1))
    assert lists(plan)[0] == [0, 0, 1, 0, 2, 1, 3, 2]


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30])
def test_length_does_not_matter(factor):
    metric = torch.randint(-8, 9, (1, 48, 6)).float()
    for options in ({}, {"grid": (3, 4, 4)}, {"grid": (3, 4, 4), "window": (1, 1, 1)}):
        scaled = vk.match_tokens(metric * factor, 20, **options)
        assert lists(scaled) == lists(vk.match_tokens((metric * factor).double(), 20, **options))


# --- ToMe ---


def tome(metric, x, size, r):
    """Bipartite soft matching and size-weighted merging as in arXiv 2210.09461: unmerged sources, destinations."""
    metric = metric / metric.norm(dim=-1, keepdim=True)
    scores = metric[:, ::2] @ metric[:, 1::2].transpose(-1, -2)
    node_max, node_idx = scores.max(dim=-1)
    edge_idx = node_max.argsort(dim=-1, descending=True).unsqueeze(-1)
    unm_idx, src_idx = edge_idx[:, r:], edge_idx[:, :r]
    dst_idx = node_idx.unsqueeze(-1).gather(1, src_idx)

    def merge(values):
        src, dst = values[:, ::2], values[:, 1::2]
        channels = values.shape[2]
        unm = src.gather(1, unm_idx.expand(-1, -1, channels))
        src = src.gather(1, src_idx.expand(-1, -1, channels))
        dst = dst.scatter_reduce(1, dst_idx.expand(-1, -1, channels), src, reduce="sum")
        return torch.cat([unm, dst], dim=1)

    total = merge(size.unsqueeze(2))
    odd = torch.arange(1, x.shape[1], 2).repeat(len(x), 1)
    positions = torch.cat([2 * unm_idx.squeeze(2), odd], dim=1)
    return merge(x * size.unsqueeze(2)) / total, total.squeeze(2), positions, 2 * src_idx.squeeze(2)


@pytest.mark.parametrize(("tokens", "r"), [(64, 20), (197, 99), (10, 0), (33, 16)])
def test_equals_tome(tokens, r):
    metric, x = torch.randn(3, tokens, 16), torch.randn(3, tokens, 7)
    size = torch.randint(1, 5, (3, tokens)).float()
    plan = vk.match_tokens(metric, r)
    merged = vk.merge_tokens(x, plan, size)
    means, sizes, positions, sources = tome(metric, x, size, r)
    for b in range(3):
        gone = set(range(tokens)) - set(plan.kept[b].tolist())
        assert gone == set(sources[b].tolist())
        rows = plan.assignment[b][positions[b]].long()
        torch.testing.assert_close(merged.tokens[b][rows], means[b])
        torch.testing.assert_close(merged.size[b][rows], sizes[b], rtol=0, atol=0)


# --- loops ---

axes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


@st.composite
def grid_cases(draw):
    grid = draw(axes)
    stride = draw(st.tuples(*[st.integers(1, 3)] * 3))
    window = draw(st.none() | st.tuples(*[st.integers(0, 2)] * 3))
    candidates = grid_candidates(grid, stride, window)
    return grid, stride, window, candidates, draw(st.integers(0, len(candidates)))


def distinct_vectors(tokens, seed):
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tying_vectors(tokens, seed):
    """Few distinct vectors along the axes: similarities are exactly 1, 0 or -1, and nearly all tie."""
    labels = torch.randint(0, 6, (tokens,), generator=torch.Generator().manual_seed(seed))
    return torch.cat([torch.eye(3), -torch.eye(3)])[labels].double()


@settings(max_examples=60, deadline=None)
@given(case=grid_cases(), seed=st.integers(0, 99), make=st.sampled_from([distinct_vectors, tying_vectors]))
def test_grid_equals_loops(case, seed, make):
    grid, stride, window, candidates, num_merge = case
    metric = make(grid[0] * grid[1] * grid[2], seed)
    plan = vk.match_tokens(metric.unsqueeze(0), num_merge, grid=grid, stride=stride, window=window)
    assert lists(plan) == plan_by_loops(metric.tolist(), num_merge, candidates)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(2, 40),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    make=st.sampled_from([distinct_vectors, tying_vectors]),
)
def test_half_and_half_equals_loops(tokens, share, seed, make):
    metric = make(tokens, seed)
    candidates = {s: range(1, tokens, 2) for s in range(0, tokens, 2)}
    num_merge = int(share * len(candidates))
    plan = vk.match_tokens(metric.unsqueeze(0), num_merge)
    assert lists(plan) == plan_by_loops(metric.tolist(), num_merge, candidates)


@settings(max_examples=40, deadline=None)
@given(
    grid=axes,
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    make=st.sampled_from([distinct_vectors, tying_vectors]),
)
def test_neighbors_equal_loops(grid, share, seed, make):
    metric = make(grid[0] * grid[1] * grid[2], seed)
    candidates = neighbor_candidates(grid)
    assert len(candidates) == len(metric) // 2
    num_merge = int(share * len(candidates))
    plan = vk.match_neighbors(metric.unsqueeze(0), num_merge, grid=grid)
    assert lists(plan) == plan_by_loops(metric.tolist(), num_merge, candidates)


@pytest.mark.parametrize("options", [{}, {"grid": (2, 9, 11)}, {"grid": (2, 9, 11), "window": (1, 1, 1)}])
def test_chunks_change_nothing(monkeypatch, options):
    """Equal tokens at random places tie exactly, wherever the borders of chunks and tiles fall."""
    vectors = torch.randn(9, 37)
    metric = vectors[torch.randint(0, 9, (3, 198))]
    whole = vk.match_tokens(metric, 77, **options)
    monkeypatch.setattr(reference, "_CHUNK", 2000)
    monkeypatch.setattr(reference, "_TILE", 3)
    assert all(map(torch.equal, whole, vk.match_tokens(metric, 77, **options)))


def test_window_over_everything_is_no_window():
    metric = torch.randn(2, 120, 8, dtype=torch.float64)
    everything = vk.match_tokens(metric, 70, grid=(4, 5, 6), window=(9, 9, 9))
    assert all(map(torch.equal, everything, vk.match_tokens(metric, 70, grid=(4, 5, 6))))


# --- dtypes, layouts, determinism ---

CALLS = [
    lambda m: vk.match_tokens(m, 17),
    lambda m: vk.match_tokens(m, 17, grid=(2, 5, 6)),
    lambda m: vk.match_tokens(m, 17, grid=(2, 5, 6), window=(1, 1, 0)),
    lambda m: vk.match_neighbors(m, 17, grid=(2, 5, 6)),
]


@pytest.mark.parametrize("call", CALLS)
def test_dtypes_layouts_and_repetition(call, device):
    metric = torch.randn(2, 60, 9).to(torch.bfloat16).to(device)
    plan = call(metric)
    for same in (metric, metric.float(), metric.mT.contiguous().mT, metric.float()[:, :, None, :][:, :, 0]):
        assert all(map(torch.equal, plan, call(same)))
    half = metric.to(torch.float16)
    assert all(map(torch.equal, call(half), call(half.float())))


@pytest.mark.parametrize("call", CALLS)
def test_batch_elements_are_independent(call):
    metric = torch.randn(3, 60, 9)
    together = call(metric)
    for b in range(3):
        assert all(torch.equal(f[b : b + 1], g) for f, g in zip(together, call(metric[b : b + 1]), strict=True))


# --- thresholds ---


def similarity_of_merged(metric, plan, b):
    x = torch.nn.functional.normalize(metric[b].double(), dim=-1)
    kept = plan.kept[b].long()
    joined = kept[plan.assignment[b].long()]
    merged = (joined != torch.arange(len(joined))).nonzero()[:, 0]
    return (x[merged] * x[joined[merged]]).sum(-1)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("num_merge", [None, 7])
def test_threshold(threshold, num_merge):
    metric = torch.randn(3, 60, 4) + 1
    grid = (3, 4, 5)
    plan = vk.match_neighbors(metric, num_merge, grid=grid, threshold=threshold)
    most = vk.match_neighbors(metric, 30, grid=grid)
    # Every source merges in `most`, so its similarities are those of all pairs.
    eligible = min((similarity_of_merged(metric, most, b) >= threshold).sum().item() for b in range(3))
    count = min(eligible, 30 if num_merge is None else num_merge)
    assert plan.kept.shape == (3, 60 - count)
    assert all(map(torch.equal, plan, vk.match_neighbors(metric, count, grid=grid)))
    for b in range(3):
        assert (similarity_of_merged(metric, plan, b) >= threshold).all()


def test_threshold_of_an_empty_batch_is_the_upper_bound():
    metric = torch.randn(0, 24, 4)
    assert vk.match_neighbors(metric, None, grid=(2, 3, 4), threshold=0.9).kept.shape == (0, 12)


def test_threshold_is_explained():
    choices = vk.explain(vk.match_neighbors, M[:, :60], None, grid=(3, 4, 5), threshold=0.5)
    assert [choice.op for choice in choices] == ["count_neighbors", "match_neighbors"]


def test_threshold_exports_and_compiles():
    class Match(torch.nn.Module):
        def forward(self, metric):
            return vk.match_neighbors(metric, None, grid=(3, 4, 5), threshold=0.5)

    metric, other = torch.randn(1, 60, 4), torch.randn(1, 60, 4) + 1
    program = torch.export.export(Match(), (metric,)).module()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(Match(), fullgraph=True, backend="aot_eager")
        for m in (metric, other):
            expected = Match()(m)
            assert all(map(torch.equal, expected, program(m)))
            assert all(map(torch.equal, expected, compiled(m)))


# --- errors ---

G = torch.zeros(1, 100, 4)
ERRORS = [
    (lambda: vk.match_tokens(M, 900), "match_tokens: num_merge must be in [0, 511], got 900"),
    (lambda: vk.match_tokens(M, -1), "match_tokens: num_merge must be in [0, 511], got -1"),
    (lambda: vk.match_tokens(M[:, :1], 1), "match_tokens: num_merge must be in [0, 0], got 1"),
    (lambda: vk.match_tokens(M, 1.5), "match_tokens: num_merge must be an int, got float"),
    (lambda: vk.match_tokens(M[0], 1), "match_tokens: metric must have shape (B, N, C), got (1022, 4)"),
    (lambda: vk.match_tokens(M[..., :0], 1), "match_tokens: metric must have at least one channel, got (1, 1022, 0)"),
    (
        lambda: vk.match_tokens(M.int(), 1),
        "match_tokens: metric must be float32, bfloat16, float16 or float64, got int32",
    ),
    (lambda: vk.match_tokens([1], 1), "match_tokens: metric must be a tensor, got list"),
    (
        lambda: vk.match_tokens(G, 1, grid=(4, 5, 6)),
        "match_tokens: grid must hold the 100 tokens of metric, got (4, 5, 6)",
    ),
    (lambda: vk.match_tokens(G, 89, grid=(4, 5, 5)), "match_tokens: num_merge must be in [0, 82], got 89"),
    (lambda: vk.match_tokens(G, 1, grid=(10, 10)), "match_tokens: grid must be three ints (t, h, w), got (10, 10)"),
    (
        lambda: vk.match_tokens(G, 1, grid=(4, 5, 5), stride=(2, 0, 2)),
        "match_tokens: stride along h must be at least 1, got 0",
    ),
    (
        lambda: vk.match_tokens(G, 1, grid=(4, 5, 5), window=(1, 1, -1)),
        "match_tokens: window along w must be at least 0, got -1",
    ),
    (
        lambda: vk.match_tokens(G, 1, window=(1, 1, 1)),
        "match_tokens: window requires a grid, got window (1, 1, 1) and no grid",
    ),
    (
        lambda: vk.match_neighbors(G, 51, grid=(4, 5, 5)),
        "match_neighbors: num_merge must be in [0, 50], got 51",
    ),
    (
        lambda: vk.match_neighbors(G, None, grid=(4, 5, 5)),
        "match_neighbors: num_merge must be an int if there is no threshold, got None",
    ),
    (
        lambda: vk.match_neighbors(G, None, grid=(4, 5, 5), threshold=NAN),
        "match_neighbors: threshold must be in [-1, 1], got nan",
    ),
    (
        lambda: vk.match_neighbors(G, None, grid=(4, 5, 5), threshold="0.5"),
        "match_neighbors: threshold must be a float, got str",
    ),
    (
        lambda: vk.match_neighbors(G, 1, grid=None),
        "match_neighbors: grid must be three ints (t, h, w), got None",
    ),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


# --- cost ---


def test_windowed_work_is_linear(monkeypatch):
    work = []
    original = reference._best_column

    def count(rows, columns, hidden=None):
        work.append(rows.shape[1] * columns.shape[1])
        return original(rows, columns, hidden)

    monkeypatch.setattr(reference, "_best_column", count)
    totals = []
    for frames in (32, 64, 128):
        work.clear()
        vk.match_tokens(torch.randn(1, frames * 64, 2), 5, grid=(frames, 8, 8), window=(1, 1, 1))
        totals.append(sum(work))
    assert totals[2] - totals[1] == 2 * (totals[1] - totals[0])
