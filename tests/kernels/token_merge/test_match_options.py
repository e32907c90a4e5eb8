"""match_tokens with masks, borders and ratios, and match_into, against the rules in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F
from backend_helpers import compiled
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_kernels as vk
from vidmem_kernels import _dispatch
from vidmem_kernels._op import OPS

NAN, INF = float("nan"), float("inf")
TRITON = _dispatch.unavailable(OPS["match_tokens"], "triton", "cpu")


def values(kind, batch, tokens, channels, generator):
    """Tokens whose similarities no rounding decides: apart from each other, or exactly 1, 0, -1 and NaN."""
    if kind == "apart":
        return torch.randn(batch, tokens, channels, generator=generator)
    axes = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(1, 3)])
    x = axes[torch.randint(0, 7, (batch, tokens), generator=generator)]
    if kind == "nan":
        spoilt = torch.rand(batch, tokens, 1, generator=generator) < 0.4
        x = x.masked_fill(spoilt, NAN)
    return x


def rule(metric, num_merge, destinations, protect, sees=None):
    """(rows' positions, position that each token joined): the definition, a token at a time."""
    kept, joined = [], []
    for x, marks, alone in zip(metric.double(), destinations.tolist(), protect.tolist(), strict=True):
        unit = F.normalize(x, dim=1)
        score = (unit @ unit.T).nan_to_num(nan=-2).tolist()
        best = {}
        for i, is_destination in enumerate(marks):
            if is_destination or alone[i]:
                continue
            seen = [j for j, to in enumerate(marks) if to and not alone[j] and (sees is None or sees[i][j])]
            if seen:
                best[i] = min(seen, key=lambda j, i=i: (-score[i][j], j))
        merged = sorted(best, key=lambda i: (-score[i][best[i]], i))[:num_merge]
        assert len(merged) == num_merge
        kept.append([i for i in range(len(marks)) if i not in merged])
        joined.append([best[i] if i in merged else i for i in range(len(marks))])
    return kept, joined


def mergeable(destinations, protect, sees=None):
    """The most that may merge in every element."""
    takes, gives = destinations & ~protect, ~destinations & ~protect
    sees = torch.ones(takes.shape[1], takes.shape[1], dtype=torch.bool) if sees is None else sees
    return int((gives & (sees & takes.unsqueeze(1)).any(2)).sum(1).amin())


def assert_plan(plan, expected):
    kept, joined = expected
    assert plan.kept.tolist() == kept
    assert plan.kept.long().gather(1, plan.assignment.long()).tolist() == joined
    assert all(field.dtype == torch.int32 and field.is_contiguous() for field in plan)
    again = vk.MergePlan.from_assignment(plan.assignment, plan.kept.shape[1])
    assert torch.equal(plan.order, again.order) and torch.equal(plan.offsets, again.offsets)


def cells_of(grid, stride):
    """(N, 3) the cell of every token, and whether it is the first of it."""
    where = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, 3)
    return where // torch.tensor(stride), (where % torch.tensor(stride) == 0).all(1)


def in_window(cell, window):
    return ((cell.unsqueeze(1) - cell).abs() <= torch.tensor(window)).all(2)


COMMON = {
    "share": st.floats(0, 1),
    "batch": st.integers(1, 3),
    "kind": st.sampled_from(["apart", "ties", "nan"]),
    "seed": st.integers(0, 2**20),
}
PROTECTED = {"protected": st.sampled_from([0.0, 0.3, 0.8])}
GRIDS = st.fixed_dictionaries(
    {
        "grid": st.tuples(*[st.integers(1, 5)] * 3),
        "stride": st.tuples(*[st.integers(1, 3)] * 3),
        "window": st.none() | st.tuples(*[st.integers(0, 2)] * 3),
        "border": st.sampled_from(["own", "none"]),
        **PROTECTED,
        **COMMON,
    }
)
MASKS = st.fixed_dictionaries(
    {
        "tokens": st.integers(0, 40),
        "marked": st.none() | st.floats(0, 1),
        "shared": st.tuples(st.booleans(), st.booleans()),
        **PROTECTED,
        **COMMON,
    }
)
MEMORIES = st.fixed_dictionaries(
    {"rows": st.integers(0, 30), "tokens": st.integers(0, 30), "shared": st.booleans(), **COMMON}
)


def check_grid(backend, grid, stride, window, border, share, protected, batch, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(grid)
    cell, first = cells_of(grid, stride)
    if border == "none":
        first = first & ((cell + 1) * torch.tensor(stride) <= torch.tensor(grid)).all(1)
    sees = None if window is None else in_window(cell, window)
    masks = torch.rand(batch, tokens, generator=generator) < protected
    most = mergeable(first[None], masks, sees)
    num_merge = round(share * most)
    metric = values(kind, batch, tokens, 20, generator)
    options = {"grid": grid, "stride": stride, "window": window, "border": border, "backend": backend}
    if protected:
        options["protect"] = masks
    expected = rule(metric, num_merge, first.expand(batch, -1), masks, sees)
    assert_plan(vk.match_tokens(metric, num_merge, **options), expected)
    by_ratio = vk.match_tokens(metric, ratio=share, **options)
    assert by_ratio.kept.shape == (batch, tokens - math.floor(share * most))
    with pytest.raises(ValueError, match=rf"num_merge must be in \[0, {most}\], got {most + 1}"):
        vk.match_tokens(metric, most + 1, **options)


def check_masks(backend, tokens, marked, shared, share, protected, batch, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    options = {"backend": backend}
    destinations = (torch.arange(tokens) % 2 == 1).expand(batch, -1)
    if marked is not None:
        lots = torch.rand(1 if shared[0] else batch, tokens, generator=generator)
        options["destinations"] = lots.argsort(dim=1) < round(marked * tokens)
        destinations = options["destinations"].expand(batch, -1)
    protect = torch.rand(1 if shared[1] else batch, tokens, generator=generator) < protected
    if protected:
        options["protect"] = protect
    most = mergeable(destinations, protect.expand(batch, -1))
    metric = values(kind, batch, tokens, 20, generator)
    num_merge = round(share * most)
    plan = vk.match_tokens(metric, num_merge, **options)
    assert_plan(plan, rule(metric, num_merge, destinations, protect.expand(batch, -1)))
    assert vk.match_tokens(metric, ratio=share, **options).kept.shape == (batch, tokens - math.floor(share * most))
    with pytest.raises(ValueError, match=rf"num_merge must be in \[0, {most}\], got {most + 1}"):
        vk.match_tokens(metric, most + 1, **options)


def check_memory(backend, rows, tokens, shared, share, batch, kind, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = values(kind, batch, tokens, 20, generator)
    memory = values(kind, 1 if shared else batch, rows, 20, generator)
    most = tokens if rows else 0
    num_merge = math.floor(share * most)
    plan = vk.match_into(metric, memory, num_merge, backend=backend)
    whole = torch.cat([memory.expand(batch, -1, -1), metric], dim=1)
    destinations = (torch.arange(rows + tokens) < rows).expand(batch, -1)
    assert_plan(plan, rule(whole, num_merge, destinations, torch.zeros_like(destinations)))
    assert (plan.assignment[:, :rows] == torch.arange(rows)).all()
    assert all(map(torch.equal, plan, vk.match_into(metric, memory, ratio=share, backend=backend)))
    with pytest.raises(ValueError, match=rf"match_into: num_merge must be in \[0, {most}\], got {most + 1}"):
        vk.match_into(metric, memory, most + 1, backend=backend)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@settings(max_examples=60, deadline=None)
@given(grid=GRIDS, masks=MASKS, memory=MEMORIES)
def test_drawn(backend, grid, masks, memory):
    check_grid(backend, **grid)
    check_masks(backend, **masks)
    check_memory(backend, **memory)


@pytest.mark.skipif(TRITON is not None, reason=str(TRITON))
@settings(max_examples=5, deadline=None)
@given(grid=GRIDS, masks=MASKS, memory=MEMORIES)
def test_drawn_in_triton(grid, masks, memory):
    check_grid("triton", **grid)
    check_masks("triton", **masks)
    check_memory("triton", **memory)


# --- tomesd ---


def tomesd_split(grid, cell):
    """Sources and destinations as tomesd's bipartite_soft_matching_random2d draws them, with no_rand and 3D cells."""
    counts = [n // c for n, c in zip(grid, cell, strict=True)]
    marks = torch.zeros(*counts, math.prod(cell), dtype=torch.int64)
    marks[..., 0] = -1
    marks = (
        marks.view(*counts, *cell).permute(0, 3, 1, 4, 2, 5).reshape([n * c for n, c in zip(counts, cell, strict=True)])
    )
    whole = torch.zeros(grid, dtype=torch.int64)  # the rest of the grid has no destination
    whole[: marks.shape[0], : marks.shape[1], : marks.shape[2]] = marks
    ordered = whole.flatten().argsort(stable=True)
    return ordered[math.prod(counts) :], ordered[: math.prod(counts)]


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=compiled)])
@pytest.mark.parametrize(
    ("grid", "cell"), [((1, 9, 13), (1, 2, 2)), ((5, 7, 6), (2, 2, 2)), ((1, 8, 10), (1, 3, 4)), ((3, 3, 3), (1, 2, 1))]
)
def test_border_none_is_tomesd(backend, grid, cell):
    source, destination = tomesd_split(grid, cell)
    metric = torch.randn(2, math.prod(grid), 16)
    unit = metric / metric.norm(dim=-1, keepdim=True)
    best, index = (unit[:, source] @ unit[:, destination].mT).max(dim=-1)
    for ratio in (0.25, 0.5, 1.0):
        plan = vk.match_tokens(metric, ratio=ratio, grid=grid, stride=cell, border="none", backend=backend)
        merged = best.argsort(dim=-1, descending=True)[:, : int(ratio * len(source))]
        into = plan.kept.long().gather(1, plan.assignment.long())
        expected = torch.arange(metric.shape[1]).repeat(2, 1)
        expected.scatter_(1, source[merged], destination[index.gather(1, merged)])
        assert torch.equal(into, expected)


# --- what a plan may be used with ---


def test_one_plan_for_a_batch():
    metric, x = torch.randn(1, 24, 8), torch.randn(4, 24, 3, 5)
    plan = vk.match_tokens(metric, ratio=0.5)
    every = vk.match_tokens(metric.expand(4, -1, -1), ratio=0.5)
    assert plan.kept.shape == (1, 18)
    assert all(map(torch.equal, vk.merge_tokens(x, plan), vk.merge_tokens(x, every)))


def test_new_values_of_the_same_masks_are_read_anew():
    """Calls that differ in the values of a mask alone differ in how many tokens merge."""
    metric, alone, odd = (
        torch.randn(1, 40, 8),
        torch.zeros(1, 40, dtype=torch.bool),
        torch.arange(40).unsqueeze(0) % 2 == 1,
    )
    with torch.no_grad():
        for share in (0.0, 1.0, 0.0):
            alone.fill_(bool(share))
            assert vk.match_tokens(metric, ratio=0.5, protect=alone).kept.shape == (1, 40 if share else 30)
            odd[:, 1] = not share
            assert vk.match_tokens(metric, ratio=1.0, destinations=odd).kept.shape == (1, 19 if share else 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_layouts(dtype):
    metric, memory = torch.randn(2, 45, 24).to(dtype), torch.randn(2, 12, 24).to(dtype)
    masks = torch.rand(2, 45) < 0.3
    spread = masks.repeat_interleave(2, dim=1)[:, ::2]
    for call in (
        lambda m, p: vk.match_tokens(m, 9, protect=p),
        lambda m, p: vk.match_tokens(
            m, 9, grid=(1, 5, 9), stride=(1, 2, 2), window=(0, 1, 1), border="none", protect=p
        ),
        lambda m, p: vk.match_tokens(m, 9, destinations=(torch.arange(45) % 3 == 0).unsqueeze(0), protect=p),
        lambda m, p: vk.match_into(m, memory.to(m.dtype), 20),
    ):
        expected = call(metric, masks)
        for m in (metric, metric.float(), metric.mT.contiguous().mT, metric.float().requires_grad_()):
            assert all(map(torch.equal, call(m, spread), expected))


def take_in(memory, size, segment, rows, ratio=0.75):
    """A memory that took a segment in, of at most `rows` rows, and how many tokens each stands for."""
    plan = vk.match_into(segment, memory, ratio=ratio)  # what is like a row joins it, the rest is appended
    both, ones = torch.cat([memory, segment], dim=1), segment.new_ones(segment.shape[:2])
    memory, size = vk.merge_tokens(both, plan, torch.cat([size, ones], dim=1))
    if memory.shape[1] > rows:  # the rows that are most alike become one
        plan = vk.match_tokens(memory, memory.shape[1] - rows)
        memory, size = vk.merge_tokens(memory, plan, size)
    return memory, size


def test_a_memory_of_bounded_size_stands_for_all_that_it_took_in():
    segments = torch.randn(6, 2, 40, 8)
    memory, size = segments.new_zeros(2, 0, 8), segments.new_zeros(2, 0)
    for i, segment in enumerate(segments):
        memory, size = take_in(memory, size, segment, rows=30)
        assert memory.shape == (2, 30, 8) and (size.sum(dim=1) == 40 * (i + 1)).all()
        mean = (memory * size.unsqueeze(2)).sum(dim=1) / size.sum(dim=1, keepdim=True)
        torch.testing.assert_close(mean, segments[: i + 1].mean(dim=(0, 2)), rtol=0, atol=1e-6)


# --- compiled ---

STATIC = [
    lambda m, memory: vk.match_tokens(m, ratio=0.3),
    lambda m, memory: vk.match_tokens(m, ratio=0.7, grid=(m.shape[1] // 6, 2, 3), border="none"),
    lambda m, memory: vk.match_tokens(m, ratio=1.0, grid=(m.shape[1] // 6, 2, 3), window=(1, 0, 1), border="none"),
    lambda m, memory: vk.match_into(m, memory, ratio=0.4),
    lambda m, memory: vk.match_into(m, memory[:1], m.shape[1] // 2),
]


@pytest.mark.parametrize("number", range(len(STATIC)))
def test_one_graph_without_reading_the_device(number):
    graphs = []

    def count(module, _):
        graphs.append(module)
        assert ".item(" not in module.code and "nonzero" not in module.code
        return module

    compiled_call = torch.compile(STATIC[number], fullgraph=True, dynamic=True, backend=count)
    for batch, frames, rows in ((2, 4, 9), (3, 6, 20), (2, 9, 5)):
        m, memory = torch.randn(batch, 6 * frames, 8), torch.randn(batch, rows, 8)
        assert all(map(torch.equal, compiled_call(m, memory), STATIC[number](m, memory)))
    assert len(graphs) == 1


@pytest.mark.parametrize("mask", ["protect", "destinations"])
def test_masks_compile_to_one_graph_where_their_counts_may_be_captured(mask):
    def plan(metric, marks):
        return vk.match_tokens(metric, 3, **{mask: marks})

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled_plan = torch.compile(plan, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (20, 31):
            metric, marks = torch.randn(2, tokens, 8), torch.arange(tokens).repeat(2, 1) % 3 == 0
            assert all(map(torch.equal, compiled_plan(metric, marks), plan(metric, marks)))


# --- errors ---

G, ODD = torch.zeros(2, 100, 4), torch.arange(100).repeat(2, 1) % 2 == 1
GRID = {"grid": (4, 5, 5)}
ERRORS = [
    (lambda: vk.match_tokens(G), "match_tokens: exactly one of num_merge and ratio must be given, got neither"),
    (
        lambda: vk.match_tokens(G, 3, ratio=0.5),
        "match_tokens: exactly one of num_merge and ratio must be given, got 3 and 0.5",
    ),
    (lambda: vk.match_tokens(G, ratio=1.01), "match_tokens: ratio must be in [0, 1], got 1.01"),
    (lambda: vk.match_tokens(G, ratio=-0.1), "match_tokens: ratio must be in [0, 1], got -0.1"),
    (lambda: vk.match_tokens(G, ratio=NAN), "match_tokens: ratio must be in [0, 1], got nan"),
    (lambda: vk.match_tokens(G, ratio=True), "match_tokens: ratio must be a number, got bool"),
    (lambda: vk.match_tokens(G, ratio="1"), "match_tokens: ratio must be a number, got str"),
    (
        lambda: vk.match_tokens(G, 1, border="tomesd", **GRID),
        "match_tokens: border must be 'own' or 'none', got 'tomesd'",
    ),
    (lambda: vk.match_tokens(G, 1, border=None, **GRID), "match_tokens: border must be 'own' or 'none', got None"),
    (
        lambda: vk.match_tokens(G, 1, border="none"),
        "match_tokens: border must be 'own' without a grid, got 'none'",
    ),
    (lambda: vk.match_tokens(G, 93, border="none", **GRID), "match_tokens: num_merge must be in [0, 92], got 93"),
    (
        lambda: vk.match_tokens(G, 65, border="none", window=(0, 0, 0), **GRID),
        "match_tokens: num_merge must be in [0, 56], got 65",
    ),
    (
        lambda: vk.match_tokens(G, 1, border="none", grid=(1, 10, 10)),
        "match_tokens: num_merge must be in [0, 0], got 1",
    ),
    (
        lambda: vk.match_tokens(G, 1, destinations=ODD, **GRID),
        "match_tokens: destinations cannot be combined with grid and window, got (4, 5, 5) and None",
    ),
    (
        lambda: vk.match_tokens(G, 1, destinations=ODD, window=(1, 1, 1), **GRID),
        "match_tokens: destinations cannot be combined with grid and window, got (4, 5, 5) and (1, 1, 1)",
    ),
    (
        lambda: vk.match_tokens(G, 1, destinations=torch.stack([ODD[0], ODD[0] & (torch.arange(100) > 9)])),
        "match_tokens: destinations must mark equally many tokens in every batch element, got 45 to 50",
    ),
    (
        lambda: vk.match_tokens(G, 1, destinations=ODD.int()),
        "match_tokens: destinations must be bool, got int32",
    ),
    (
        lambda: vk.match_tokens(G, 1, protect=ODD[0]),
        "match_tokens: protect must have shape (B, N), got (100,)",
    ),
    (
        lambda: vk.match_tokens(G, 1, protect=ODD[:, :99]),
        "match_tokens: protect must have shape (1 or 2, 100), got (2, 99)",
    ),
    (
        lambda: vk.match_tokens(G[:1], 1, protect=ODD),
        "match_tokens: protect must have shape (1 or 1, 100), got (2, 100)",
    ),
    (
        lambda: vk.match_tokens(G, 1, protect=ODD.to("meta")),
        "match_tokens: protect must be on the device of metric, got meta and cpu",
    ),
    (lambda: vk.match_tokens(G, 1, protect=ODD), "match_tokens: num_merge must be in [0, 0], got 1"),
    (
        lambda: vk.match_tokens(G, 51, protect=torch.zeros_like(ODD)),
        "match_tokens: num_merge must be in [0, 50], got 51",
    ),
    (lambda: vk.match_into(G, G), "match_into: exactly one of num_merge and ratio must be given, got neither"),
    (lambda: vk.match_into(G, G[0], 1), "match_into: memory_metric must have shape (B, M, C), got (100, 4)"),
    (
        lambda: vk.match_into(G, torch.zeros(3, 8, 4), 1),
        "match_into: memory_metric must have batch 1 or 2 and 4 channels as metric, got (3, 8, 4)",
    ),
    (
        lambda: vk.match_into(G, torch.zeros(2, 8, 5), 1),
        "match_into: memory_metric must have batch 1 or 2 and 4 channels as metric, got (2, 8, 5)",
    ),
    (
        lambda: vk.match_into(G, G.double(), 1),
        "match_into: memory_metric must have the dtype of metric, got torch.float64 and torch.float32",
    ),
    (lambda: vk.match_into(G, G, 101), "match_into: num_merge must be in [0, 100], got 101"),
    (lambda: vk.match_into(G, G[:, :0], 1), "match_into: num_merge must be in [0, 0], got 1"),
    (lambda: vk.match_into(G, G, ratio=2), "match_into: ratio must be in [0, 1], got 2"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


def test_masks_cannot_be_read_under_vmap():
    for mask in ("protect", "destinations"):
        with pytest.raises(RuntimeError, match=f"depends on {mask}, which cannot be read under vmap"):
            torch.vmap(lambda m, d, mask=mask: vk.match_tokens(m, 1, **{mask: d}))(G.unsqueeze(1), ODD.unsqueeze(1))


@compiled
def test_compiled_ops_check_for_themselves():
    ops = torch.ops.vidmem_cpp
    rest = (None, (2, 2, 2), None, False)
    bad = [
        (
            lambda: ops.match_tokens(G, 1, (4, 5, 5), (2, 2, 2), None, False, 3),
            "num_destinations cannot be combined with grid",
        ),
        (lambda: ops.match_tokens(G, 1, *rest, 101), "num_destinations must be at most 100, got 101"),
        (lambda: ops.match_tokens(G, 1, *rest, -1, ODD[:1]), "protect must have shape"),
        (lambda: ops.match_tokens(G, 1, *rest, -1, ODD.int()), "protect must be bool"),
        (lambda: ops.match_tokens(G, 26, *rest, -1, torch.arange(100).repeat(2, 1) % 4 == 0), r"in \[0, 25\], got 26"),
        (lambda: ops.match_into(G, torch.zeros(3, 8, 4), 1), "memory_metric must have shape"),
        (lambda: ops.match_into(G, torch.zeros(2, 8, 3), 1), "memory_metric must have shape"),
        (lambda: ops.match_into(G, G.double(), 1), "memory_metric must be float32, got float64"),
        (lambda: ops.match_into(G, G, 101), r"match_into: num_merge must be in \[0, 100\], got 101"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
