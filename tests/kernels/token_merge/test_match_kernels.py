"""The CPU kernels of matching and of top-k blocks: every instruction set, ties, special values, threads, own checks."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from backend_helpers import compiled

import vidmem_kernels as vk
from vidmem_kernels.sparse_gather import reference as gather_reference
from vidmem_kernels.token_merge import reference

pytestmark = compiled
NAN, INF = float("nan"), float("inf")
CUBE = (2, 2, 2)


def match(metric, num_merge, grid=None, stride=CUBE, window=None):
    return vk.match_tokens(metric, num_merge, grid=grid, stride=stride, window=window, backend="cpu")


def neighbors(metric, num_merge, grid):
    return vk.match_neighbors(metric, num_merge, grid=grid, backend="cpu")


def topk(q, k, count, block=(1, 1)):
    return vk.topk_blocks(q, k, block_size=block, topk=count, backend="cpu")


def same(a, b):
    assert all(map(torch.equal, a, b))


def check_ties(call, allowed, channels, dtype):
    """Equal tokens tie to the bit wherever they lie: the first of them wins.

    Few distinct vectors lie at random places; `call(metric, num_merge)` plans with them.
    """
    tokens, sources = len(allowed), allowed.any(dim=1).sum().item()
    kind = torch.randint(0, 7, (tokens,))
    metric = torch.randn(7, channels)[kind].to(dtype).unsqueeze(0)
    source, destination = pair_of(call(metric, sources), 0)
    first = [(allowed[i] & (kind == kind[j])).int().argmax() for i, j in zip(source, destination, strict=True)]
    assert torch.equal(destination, torch.stack(first))
    # Sources of one kind with destinations of one kind have one score, so those that merge are the first ones.
    group = kind[source] * 7 + kind[destination]
    chosen = torch.isin(source, pair_of(call(metric, sources // 2), 0)[0])
    assert chosen.sum() == sources // 2
    for g in group.unique():
        assert (chosen[group == g].int().diff() <= 0).all()


def along_axes(batch, tokens, channels=3):
    """Vectors along the axes, of any length and some of them zero: similarities are exactly -1, 0 or 1."""
    axes = torch.cat([torch.eye(channels), -torch.eye(channels), torch.zeros(1, channels)])
    length = torch.tensor([1e-44, 1e-30, 0.3, 1.0, 7.0, 1e20, 3e38])
    return (
        axes[torch.randint(0, len(axes), (batch, tokens))] * length[torch.randint(0, len(length), (batch, tokens, 1))]
    )


def spoiled(metric):
    metric = metric.clone()
    flat = metric.view(-1, metric.shape[2])
    flat[torch.rand(len(flat)) < 0.2, 0] = NAN
    flat[torch.rand(len(flat)) < 0.1, -1] = INF
    return metric


def pair_of(plan, b):
    """(sources, their destinations) of a plan whose fields agree with each other."""
    assignment, kept, order, offsets = (field[b].long() for field in plan)
    assert all(field.dtype == torch.int32 and field.is_contiguous() for field in plan)
    target = kept[assignment]
    source = (target != torch.arange(len(target))).nonzero()[:, 0]
    assert torch.equal(kept, (target == torch.arange(len(target))).nonzero()[:, 0])
    assert torch.equal(order, assignment.argsort(stable=True))
    assert torch.equal(offsets, torch.searchsorted(assignment[order], torch.arange(len(kept) + 1)))
    return source, target[source]


def allowed_pairs(tokens, grid, stride, window):
    """(N, N) bool: token j is a destination that source i sees."""
    if grid is None:
        odd = torch.arange(tokens) % 2 == 1
        return ~odd[:, None] & odd
    at = torch.tensor(list(product(*map(range, grid))))
    is_destination = (at % torch.tensor(stride) == 0).all(dim=1)
    allowed = ~is_destination[:, None] & is_destination
    if window is not None:
        cell = at // torch.tensor(stride)
        allowed &= ((cell[:, None] - cell).abs() <= torch.tensor(window)).all(dim=2)
    return allowed


def as_good_as_exact(metric, plan, allowed, eps):
    """Every pair is one of the best there are, by float64, up to a few roundings of the kernel's own dtype."""
    tolerance = 16 * eps
    for b in range(len(metric)):
        unit = F.normalize(metric[b].double(), dim=1)
        scores = (unit @ unit.T).masked_fill(~allowed, -INF)
        source, destination = pair_of(plan, b)
        assert allowed[source, destination].all()
        best = scores.amax(dim=1)
        chosen = scores[source, destination]
        assert (chosen >= best[source] - tolerance).all()
        highest = best.sort(descending=True).values[: len(source)]
        torch.testing.assert_close(chosen.sort(descending=True).values, highest, rtol=0, atol=tolerance)


# --- match_tokens ---

SIZES = [(2, 33, 1), (1, 200, 65), (3, 197, 16), (1, 1500, 300), (1, 90, 1100)]


@pytest.mark.parametrize(("batch", "tokens", "channels"), SIZES)
def test_half_and_half(batch, tokens, channels, capability):
    metric = torch.randn(batch, tokens, channels) if channels > 1 else torch.randint(-2, 3, (batch, tokens, 1)).float()
    share, allowed = tokens // 3, allowed_pairs(tokens, None, CUBE, None)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        check_ties(match, allowed, channels, dtype)
    if channels > 1:
        as_good_as_exact(metric, match(metric, share), allowed, 2**-23)
        wide = metric.double()
        as_good_as_exact(wide, match(wide, share), allowed, 2**-52)
        same(match(wide, share), reference.match_tokens(wide, share, None, CUBE, None))
    else:
        same(match(metric, share), reference.match_tokens(metric, share, None, CUBE, None))


GRIDS = [
    ((3, 7, 50), (2, 2, 2), (1, 1, 1)),
    ((3, 7, 50), (2, 2, 2), (0, 2, 3)),
    ((2, 5, 61), (1, 1, 3), (1, 0, 2)),
    ((9, 8, 7), (4, 3, 2), (1, 1, 1)),
    ((4, 6, 30), (9, 9, 60), (1, 1, 1)),
    ((1, 1, 700), (1, 1, 2), (0, 0, 2)),
    ((300, 1, 3), (3, 1, 1), (2, 5, 1)),
]


@pytest.mark.parametrize(("grid", "stride", "window"), GRIDS)
def test_grid_and_window(grid, stride, window, capability):
    tokens = grid[0] * grid[1] * grid[2]
    sources = tokens - torch.tensor([-(-n // s) for n, s in zip(grid, stride, strict=True)]).prod().item()
    for seen in (None, window):
        allowed = allowed_pairs(tokens, grid, stride, seen)
        check_ties(lambda m, r, seen=seen: match(m, r, grid, stride, seen), allowed, 20, torch.float32)
        metric = torch.randn(2, tokens, 33)
        as_good_as_exact(metric, match(metric, sources // 2, grid, stride, seen), allowed, 2**-23)
        wide = torch.randn(1, tokens, 9, dtype=torch.float64)
        for exact in (wide, along_axes(2, tokens), spoiled(along_axes(2, tokens))):
            for num_merge in (1, sources // 2, sources):
                plan = match(exact, num_merge, grid, stride, seen)
                same(plan, reference.match_tokens(exact, num_merge, grid, stride, seen))


def test_window_over_everything_is_no_window(capability):
    metric = torch.randn(2, 2 * 9 * 70, 40)
    whole = match(metric, 900, (2, 9, 70))
    same(match(metric, 900, (2, 9, 70), CUBE, (2**40, 2**40, 2**40)), whole)


@pytest.mark.parametrize("make", [along_axes, lambda *size: spoiled(along_axes(*size))])
def test_special_values(make, capability):
    """Zero, huge, tiny, infinite and NaN tokens; whole batches of nothing but NaN too."""
    metric = make(3, 350)
    metric[2] = NAN
    for num_merge in (1, 100, 175):
        same(match(metric, num_merge), reference.match_tokens(metric, num_merge, None, CUBE, None))
        plan = neighbors(metric, num_merge, (5, 7, 10))
        same(plan, reference.match_neighbors(metric, num_merge, (5, 7, 10)))


def test_length_of_a_token_does_not_matter(capability):
    """Of powers of two not even the rounding changes."""
    metric, factor = torch.randn(1, 300, 21), 2.0 ** torch.randint(-100, 100, (1, 300, 1))
    same(match(metric * factor, 100), match(metric, 100))
    same(neighbors(metric * factor, 100, (3, 10, 10)), neighbors(metric, 100, (3, 10, 10)))


def test_batches_larger_than_the_panels(capability):
    """Destinations of 40 elements are packed in several goes; each element's plan is its own."""
    metric = torch.randn(40, 900, 150)
    plan = match(metric, 50)
    for b in (0, 30, 39):
        same([field[b : b + 1] for field in plan], match(metric[b : b + 1], 50))


CALLS = [
    lambda m: match(m, 170),
    lambda m: match(m, 170, (4, 9, 10)),
    lambda m: match(m, 170, (4, 9, 10), CUBE, (1, 1, 2)),
    lambda m: neighbors(m, 170, (4, 9, 10)),
    lambda m: [torch.ops.vidmem.count_neighbors(m, (4, 9, 10), 0.2, "cpu")],
    lambda m: [topk(m.unsqueeze(2), m.unsqueeze(2), 1, (1, 2)), topk(m.unsqueeze(2), m.unsqueeze(2), 20, (3, 1))],
]


@pytest.mark.parametrize("call", CALLS)
def test_layouts_dtypes_and_threads_change_nothing(call, capability):
    metric = torch.randn(3, 360, 37).bfloat16()
    expected = call(metric)
    spread = metric.repeat_interleave(2, dim=2)[:, :, ::2]
    for layout in (
        metric.float(),
        spread,
        metric.mT.contiguous().mT,
        metric.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        same(call(layout), expected)
    half = metric.half()
    same(call(half), call(half.float()))
    same(call(half.mT.contiguous().mT), call(half))
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            same(call(metric), expected)
    finally:
        torch.set_num_threads(threads)


def test_nothing_to_do(capability):
    for metric in (torch.randn(0, 8, 3), torch.randn(2, 0, 3), torch.randn(2, 1, 3), torch.randn(2, 8, 3)):
        _, tokens, _ = metric.shape
        for grid, window in ((None, None), ((1, 1, tokens), None), ((1, 1, tokens), (1, 1, 1))):
            plan = match(metric, 0, grid, CUBE, window)
            same(plan, reference.match_tokens(metric, 0, grid, CUBE, window))
            same(neighbors(metric, 0, (1, tokens, 1)), plan)
    same(match(torch.randn(0, 8, 3), 4), reference.match_tokens(torch.randn(0, 8, 3), 4, None, CUBE, None))


def test_window_of_a_long_video():
    """Ten minutes at 480 x 832, 561,600 tokens: the work is linear in them."""
    grid, channels = (360, 30, 52), 4
    tokens = grid[0] * grid[1] * grid[2]
    metric = torch.randn(1, tokens, channels)
    source, destination = pair_of(match(metric, 491_400, grid, CUBE, (1, 1, 1)), 0)
    assert len(source) == 491_400  # all of them
    unit = F.normalize(metric[0].double(), dim=1)
    similarity = (unit[source] * unit[destination]).sum(1)
    video = unit.view(*grid, channels)
    for i in torch.randint(0, len(source), (100,)).tolist():
        p = source[i].item()
        t, h, w = (c // 2 for c in (p // 1560, p // 52 % 30, p % 52))
        box = [slice(max(0, 2 * c - 2), 2 * c + 3, 2) for c in (t, h, w)]
        best = (video[box[0], box[1], box[2]] @ unit[p]).amax()
        torch.testing.assert_close(similarity[i], best, rtol=0, atol=2**-20)


# --- neighbours ---


@pytest.mark.parametrize("grid", [(3, 4, 5), (1, 1, 90), (7, 1, 3), (5, 9, 11)])
@pytest.mark.parametrize("channels", [1, 20, 200])
def test_neighbors(grid, channels, capability):
    tokens = grid[0] * grid[1] * grid[2]
    wide = torch.randn(2, tokens, channels, dtype=torch.float64)
    for metric in (wide, along_axes(2, tokens), spoiled(along_axes(2, tokens))):
        for num_merge in (0, 1, tokens // 3, tokens // 2):
            plan, expected = neighbors(metric, num_merge, grid), reference.match_neighbors(metric, num_merge, grid)
            same(plan, expected)
    at = torch.tensor(list(product(*map(range, grid))))
    allowed = ((at[:, None] - at).abs().sum(dim=2) == 1) & (at.sum(dim=1) % 2 == 1)[:, None]
    check_ties(lambda m, r: neighbors(m, r, grid), allowed, channels, torch.bfloat16)
    metric = torch.randn(2, tokens, channels)
    if channels > 1:
        as_good_as_exact(metric, neighbors(metric, tokens // 3, grid), allowed, 2**-23)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 1.0])
def test_count_neighbors(threshold, capability):
    grid = (3, 6, 7)
    for metric in (along_axes(3, 126), spoiled(along_axes(3, 126)), torch.randn(3, 126, 30, dtype=torch.float64)):
        got = torch.ops.vidmem_cpp.count_neighbors(metric, grid, threshold)
        assert got.dtype == torch.int32
        assert torch.equal(got, reference.count_neighbors(metric, grid, threshold))


# --- topk_blocks ---


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 64, 256, 257, 300])
@pytest.mark.parametrize("channels", [1, 65, 400])
def test_topk_of_ties_and_special_values(count, channels, capability):
    """Sums of small integers are exact: indices are the reference's, whatever the order of summation."""
    q, k = torch.randint(-2, 3, (2, 70, 2, channels)).float(), torch.randint(-2, 3, (2, 300, 2, channels)).float()
    assert torch.equal(topk(q, k, count), gather_reference.topk_blocks(q, k, 1, 1, count))
    assert torch.equal(topk(q.double(), k.double(), count), gather_reference.topk_blocks(q, k, 1, 1, count))
    k[0, ::3, 0, 0] = NAN
    k[0, ::7, 1, 0] = -INF
    k[1, 10:20, 0, 0] = INF
    q[0, 5] = NAN
    q[1, 6] = -INF
    assert torch.equal(topk(q, k, count), gather_reference.topk_blocks(q, k, 1, 1, count))
    k[:] = NAN
    assert torch.equal(topk(q, k, count), gather_reference.topk_blocks(q, k, 1, 1, count))


@pytest.mark.parametrize(("lq", "lk", "block"), [(300, 2000, (1, 1)), (131, 500, (32, 3)), (97, 64, (200, 7))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_topk_of_random_values(lq, lk, block, dtype, capability):
    q, k = torch.randn(1, lq, 3, 65).to(dtype), torch.randn(1, lk, 3, 65).to(dtype)
    queries, keys = (gather_reference._block_means(x.double(), b) for x, b in zip((q, k), block, strict=True))
    scores = queries @ keys.mT
    tolerance = 64 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for count in (1, 3, scores.shape[3]) if lk < 600 else (1, 40):
        found = topk(q, k, count, block).long()
        assert (found.sort(dim=3).values.diff(dim=3) > 0).all()
        best = scores.topk(count, dim=3).values
        torch.testing.assert_close(scores.gather(3, found), best, rtol=0, atol=tolerance)


def test_topk_of_no_channel(capability):
    q = torch.zeros(1, 5, 2, 0)
    assert torch.equal(topk(q, q, 1), torch.zeros(1, 2, 5, 1, dtype=torch.int32))
    assert topk(q, q, 3)[0, 1].tolist() == [[0, 1, 2]] * 5


# --- checks of the compiled ops themselves ---


def test_compiled_matching_checks_for_itself():
    """What could read or write outside memory is refused below api.py too."""
    ops = torch.ops.vidmem_cpp
    metric = torch.zeros(2, 24, 4)
    bad = [
        (lambda: ops.match_tokens(metric[0], 1), "match_tokens: metric must have 3 dimensions, got 2"),
        (lambda: ops.match_tokens(metric.int(), 1), "match_tokens: metric must have a dtype that kernels handle"),
        (lambda: ops.match_tokens(metric.to(torch.int8), 1), "match_tokens: metric must have a float dtype"),
        (lambda: ops.match_tokens(metric[..., :0], 1), "metric must have at least one channel"),
        (lambda: ops.match_tokens(metric, 13), r"match_tokens: num_merge must be in \[0, 12\], got 13"),
        (lambda: ops.match_tokens(metric, -1), r"match_tokens: num_merge must be in \[0, 12\], got -1"),
        (lambda: ops.match_tokens(metric[:, :1], 1), r"num_merge must be in \[0, 0\], got 1"),
        (lambda: ops.match_tokens(metric, 22, [2, 3, 4]), r"num_merge must be in \[0, 20\], got 22"),
        (lambda: ops.match_tokens(metric, 1, [2, 12]), "grid must be three ints, got 2"),
        (lambda: ops.match_tokens(metric, 1, [2, -3, -4]), "grid must be at least 0, got -3"),
        (lambda: ops.match_tokens(metric, 1, [2, 3, 5]), "grid must hold the 24 tokens of metric"),
        (lambda: ops.match_tokens(metric, 1, [2**32, 2**32, 24]), "grid must hold the 24 tokens of metric"),
        (lambda: ops.match_tokens(metric, 1, [2, 3, 4], [2, 0, 2]), "stride must be at least 1, got 0"),
        (lambda: ops.match_tokens(metric, 1, [2, 3, 4], [2, 2]), "stride must be three ints, got 2"),
        (lambda: ops.match_tokens(metric, 1, [2, 3, 4], CUBE, [1, 1]), "window must be three ints, got 2"),
        (lambda: ops.match_tokens(metric, 1, [2, 3, 4], CUBE, [1, -1, 1]), "window must be at least 0, got -1"),
        (lambda: ops.match_tokens(metric, 1, None, CUBE, [1, 1, 1]), "window requires a grid"),
        (
            lambda: ops.match_neighbors(metric, 13, [2, 3, 4]),
            r"match_neighbors: num_merge must be in \[0, 12\], got 13",
        ),
        (lambda: ops.match_neighbors(metric, 1, [2, 3, 3]), "match_neighbors: grid must hold the 24 tokens"),
        (lambda: ops.count_neighbors(metric, [24], 0.5), "count_neighbors: grid must be three ints, got 1"),
        (lambda: ops.count_neighbors(metric[0], [2, 3, 4], 0.5), "count_neighbors: metric must have 3 dimensions"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    huge = [2**62, 2**62, 2**62]
    same(ops.match_tokens(metric, 5, [2, 3, 4], huge, huge), match(metric, 5, [2, 3, 4], [2, 3, 4]))


def test_empty_grid_of_any_length_is_no_work():
    """2^62 rows of no token: nothing walks over them."""
    ops, metric = torch.ops.vidmem_cpp, torch.zeros(1, 0, 4)
    for grid in ([2**62, 0, 5], [2**31, 2**31, 0]):
        assert [t.shape[1] for t in ops.match_tokens(metric, 0, grid)] == [0, 0, 0, 1]
        assert [t.shape[1] for t in ops.match_neighbors(metric, 0, grid)] == [0, 0, 0, 1]
        assert ops.count_neighbors(metric, grid, 0.5).tolist() == [0]


@pytest.mark.parametrize("batch", [0, 1])
def test_sizes_whose_product_overflows(batch):
    """A stride of 0, or no batch element, makes any size possible: bytes of buffers must not wrap around to few."""
    ops, metric = torch.ops.vidmem_cpp, torch.zeros(1, dtype=torch.float64).expand(batch, 8, 2**59)
    rows, index = metric[:, :, None], torch.zeros(batch, 8, dtype=torch.int32)
    for call in (
        lambda: ops.match_tokens(metric, 2),
        lambda: ops.match_tokens(metric, 2, [2, 2, 2], CUBE, [1, 1, 1]),
        lambda: ops.match_neighbors(metric, 2, [2, 2, 2]),
        lambda: ops.count_neighbors(metric, [2, 2, 2], 0.5),
        lambda: ops.topk_blocks(rows, rows, 1, 1, 1),
        lambda: ops.topk_blocks(rows, rows, 2, 2, 1),
        lambda: ops.scatter_add_tokens(metric, index, 1),
    ):
        with pytest.raises(ValueError, match=r"must have less than 2\*\*48 elements"):
            call()


def test_compiled_topk_checks_for_itself():
    op, q, k = torch.ops.vidmem_cpp.topk_blocks, torch.zeros(2, 5, 3, 4), torch.zeros(2, 9, 3, 4)
    bad = [
        (lambda: op(q[0], k, 1, 1, 1), "topk_blocks: q must have 4 dimensions, got 3"),
        (lambda: op(q, k[0], 1, 1, 1), "topk_blocks: k must have 4 dimensions, got 3"),
        (lambda: op(q, k[:1], 1, 1, 1), "q and k must have the same size along axis 0, got 2 and 1"),
        (lambda: op(q, k[:, :, :2], 1, 1, 1), "q and k must have the same size along axis 2, got 3 and 2"),
        (lambda: op(q, k[..., :3], 1, 1, 1), "q and k must have the same size along axis 3, got 4 and 3"),
        (lambda: op(q, k.double(), 1, 1, 1), "k must be float32, got float64"),
        (lambda: op(q.int(), k.int(), 1, 1, 1), "q must have a dtype that kernels handle"),
        (lambda: op(q, k, 0, 1, 1), "blocks must have at least one row, got 0"),
        (lambda: op(q, k, 1, -3, 1), "blocks must have at least one row, got -3"),
        (lambda: op(q, k, 1, 4, 4), r"topk must be in \[0, 3\], got 4"),
        (lambda: op(q, k, 1, 4, -1), r"topk must be in \[0, 3\], got -1"),
    ]
    for call, message in bad:
        with pytest.raises(ValueError, match=message):
            call()
    assert op(q, k, 2**62, 2**62, 1).tolist() == [[[[0]]] * 3] * 2
