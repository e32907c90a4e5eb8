"""Triton's token merging beyond the contract's samples: many tiles, ties across them, tensor-core widths, bad plans."""

import pytest
import torch

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, testing
from vidmem_kernels._op import OPS

pytest.importorskip("triton")

NAN = float("nan")


@pytest.fixture(autouse=True)
def triton_runs(device):
    reason = _dispatch.unavailable(OPS["match_tokens"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)


def plans(metric, num_merge, **options):
    """The plan of Triton and that of the reference in float64, which no rounding decides."""
    matches = vk.match_neighbors if "neighbors" in options and options.pop("neighbors") else vk.match_tokens
    return (
        matches(metric, num_merge, backend="triton", **options),
        matches(metric.double(), num_merge, backend="reference", **options),
    )


def assert_same(plan, expected):
    for field, a, b in zip(plan._fields, plan, expected, strict=True):
        assert a.dtype == torch.int32 and a.is_contiguous()
        assert torch.equal(a, b), field


def few_vectors(batch, tokens, channels, kinds, device, dtype):
    """Tokens of few different directions, so that most similarities tie exactly."""
    vectors = torch.randn(kinds, channels, dtype=torch.float64).to(dtype)
    return vectors[torch.randint(0, kinds, (batch, tokens))].to(device)


# 24 channels and more go to tensor cores in half precision; 50 of float32 and 140 take several blocks of channels.
WIDTHS = [(torch.float32, 50), (torch.float16, 24), (torch.bfloat16, 140)]
OPTIONS = [
    {},
    {"grid": (2, 9, 15), "stride": (1, 2, 2)},
    {"grid": (2, 9, 15), "stride": (1, 3, 2), "window": (0, 1, 2)},
    {"grid": (2, 9, 15), "window": (1, 1, 1)},
    {"grid": (2, 9, 15), "neighbors": True},
]


@pytest.mark.sample(7)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "channels"), WIDTHS)
def test_many_tiles(dtype, channels, options, device):
    metric = torch.randn(2, 270, channels).to(dtype).to(device)
    assert_same(*plans(metric, 110, **options))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("dtype", "channels"), WIDTHS[1:])
def test_ties_across_tiles_take_the_lower_position(dtype, channels, options, device):
    """A source is like many destinations to the bit, in every tile: by rule it joins the first of them."""
    metric = few_vectors(1, 270, channels, 3, device, dtype)
    num_merge = 135 if "neighbors" not in options else 100
    most = vk.match_tokens if "neighbors" not in options else vk.match_neighbors
    options = {k: v for k, v in options.items() if k != "neighbors"}
    plan = most(metric, num_merge, backend="triton", **options)
    kinds = (metric == metric[:, :1]).all(2).long() + 2 * (metric[:, :, :1] > metric[:, :1, :1]).squeeze(2).long()
    target = plan.kept.long().gather(1, plan.assignment.long())
    every = most(metric.double(), num_merge, backend="reference", **options)
    expected = every.kept.long().gather(1, every.assignment.long())
    joined = target != torch.arange(270, device=device)
    both = joined & (expected != torch.arange(270, device=device))
    same_kind = kinds.gather(1, target) == kinds
    assert both.sum() > 50
    assert torch.equal(target[both & same_kind], expected[both & same_kind])


def test_equal_scores_are_selected_by_position(device):
    """Similarities of exactly 1, 0 and -1 over two tiles: of 600 equal ones, the first merge."""
    axes = torch.cat([torch.eye(3), -torch.eye(3)]).to(device)
    metric = axes[torch.randint(0, 6, (1, 1200))]
    for num_merge in (1, 599):
        assert_same(*plans(metric, num_merge))
    metric = axes[:1].repeat(1, 1200, 1).view(1, 1200, 3)
    for num_merge in (1, 550):
        assert_same(*plans(metric, num_merge))


@pytest.mark.parametrize(("dtype", "channels"), WIDTHS[::2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nan_infinity_and_zero(dtype, channels, options, device):
    metric = torch.randn(1, 270, channels).to(dtype)
    metric[0, ::3] = NAN
    metric[0, 1::7, 0] = float("inf")
    metric[0, 2::5] = 0
    metric = metric.to(device)
    plan = plans(metric, 130, **options)
    # Zero vectors tie with all; sources of similarity 0 or NaN still go to the first destination by rule.
    assert_same(*plan)


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.bfloat16, 2.0**-126), (torch.bfloat16, 2.0**115), (torch.float16, 2.0**-14)]
)
def test_length_does_not_matter(dtype, factor, device):
    """Small integers, so that scaling is exact down to subnormal numbers and up to squares that overflow."""
    metric = torch.randint(-15, 16, (1, 300, 40)).to(dtype).to(device)
    for options in ({}, {"grid": (3, 10, 10), "window": (1, 1, 1)}, {"grid": (3, 10, 10), "neighbors": True}):
        plan, expected = plans(metric * factor, 100, **options)
        assert_same(plan, plans(metric, 100, **options)[0])
        assert_same(plan, expected)


@pytest.mark.parametrize("threshold", [-1.0, -0.0, 0.1, 1.0])
def test_threshold(threshold, device):
    metric = torch.randn(2, 270, 7, device=device)
    metric[1, ::11] = 0
    plan = vk.match_neighbors(metric, None, grid=(2, 9, 15), threshold=threshold, backend="triton")
    assert_same(plan, vk.match_neighbors(metric, None, grid=(2, 9, 15), threshold=threshold, backend="reference"))


# --- merging ---


def large_and_small_groups(device, dtype=torch.int32):
    """One group of 200 tokens, spread over the clip, one of 140, and 40 of one or two."""
    row = torch.arange(400) % 2
    row[1::2] = torch.where(torch.arange(200) < 140, 1, 2 + (torch.arange(200) - 140) % 40)
    rows = int(row.max()) + 1
    kept = torch.tensor([int((row == r).nonzero()[0]) for r in range(rows)])
    order = row.argsort(stable=True)
    offsets = torch.searchsorted(row[order], torch.arange(rows + 1))
    return vk.MergePlan(*(t.to(dtype).repeat(2, 1).to(device) for t in (row, kept, order, offsets)))


@pytest.mark.sample(1)
@pytest.mark.parametrize(("dtype", "index"), [(torch.float32, torch.int64), (torch.bfloat16, torch.int32)])
def test_groups_of_all_sizes(dtype, index, device):
    plan = large_and_small_groups(device, index)
    x = torch.randn(2, 400, 70).to(dtype).to(device).requires_grad_()
    size = (torch.rand(2, 400, device=device) + 0.5).requires_grad_()
    weights = [torch.randn(2, plan.kept.shape[1], 70, device=device), torch.randn(2, 400, 70, device=device)]

    def everything(x, size, backend):
        tokens, total = vk.merge_tokens(x, plan, size, backend=backend)
        back = vk.unmerge_tokens(tokens, plan, backend=backend)
        loss = (tokens.double() * weights[0]).sum() + (back.double() * weights[1]).sum() + total.square().sum()
        return tokens, total, back, *torch.autograd.grad(loss, (x, size))

    got = everything(x, size, "triton")
    wide = [t.detach().double().requires_grad_() for t in (x, size)]
    exact = everything(*wide, "reference")
    at_dtype = everything(x, size, "reference")
    testing.assert_within_budget(got, at_dtype, exact, "merge and unmerge")


@pytest.mark.sample(1)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_sizes_are_summed_in_any_order(index, device):
    """Correctly rounded, so that strides and types, which change the order in which a kernel adds, do not show."""
    plan = large_and_small_groups(device, index)
    size = torch.rand(2, 400, device=device) + 0.5
    x = torch.ones(2, 400, 1, device=device)
    exact = torch.zeros(2, plan.kept.shape[1], dtype=torch.float64, device=device)
    exact.scatter_add_(1, plan.assignment.long(), size.double())
    strided = vk.MergePlan(*(t.mT.contiguous().mT for t in plan))
    for groups, sizes in ((plan, size), (strided, size.mT.contiguous().mT)):
        assert torch.equal(vk.merge_tokens(x, groups, sizes, backend="triton").size, exact.float())


def test_token_alone_is_unchanged_to_the_bit(device):
    plan = large_and_small_groups(device)
    alone = (plan.offsets.diff(dim=1) == 1)[0]
    assert alone.sum() == 20
    x = torch.randn(2, 400, 33).to(device)
    x[:, ::7] *= 0
    size = torch.rand(2, 400, device=device) + 1e-3
    tokens, total = vk.merge_tokens(x, plan, size, backend="triton")
    own = plan.kept.long()
    for b in range(2):
        assert torch.equal(tokens[b, alone].view(torch.int32), x[b, own[b, alone]].view(torch.int32))
        assert torch.equal(total[b, alone], size[b, own[b, alone]])


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_plan_outside_its_shapes_gives_nan(bad, device):
    """A kernel cannot raise: what depends on a bad index is NaN, the rest is right, nothing outside is read."""
    plan = vk.match_tokens(torch.randn(1, 5, 3, device=device), 1)
    x = torch.randn(1, 5, 40, device=device)
    size = torch.ones(1, 5, device=device)
    good = vk.merge_tokens(x, plan, size, backend="triton")
    order, offsets, assignment = plan.order.clone(), plan.offsets.clone(), plan.assignment.clone()
    order[0, 4], assignment[0, 3] = bad, bad

    broken = vk.merge_tokens(x, plan._replace(order=order), size, backend="triton")
    assert broken.tokens[0].isnan().all(dim=1).tolist() == [False, False, False, True]
    assert broken.size[0].isnan().tolist() == [False, False, False, True]
    assert torch.equal(broken.tokens[0, :3], good.tokens[0, :3])

    if bad != 5:  # the last offset of a good plan is 5
        offsets[0, 4] = bad
        broken = vk.merge_tokens(x, plan._replace(offsets=offsets), None, backend="triton")
        assert broken.tokens[0].isnan().all(dim=1).tolist() == [False, False, False, True]

    y = torch.randn(1, 4, 40, device=device)
    back = vk.unmerge_tokens(y, plan._replace(assignment=assignment), backend="triton")
    assert back[0].isnan().all(dim=1).tolist() == [False, False, False, True, False]
    x.requires_grad_()
    size.requires_grad_()
    merged = vk.merge_tokens(x, plan._replace(assignment=assignment), size, backend="triton")
    grads = torch.autograd.grad(merged.tokens.sum(), (x, size))
    assert grads[0][0].isnan().all(dim=1).tolist() == [False, False, False, True, False]
    assert grads[1][0, 3].isnan()


# --- which backend ---


def test_explain(device):
    x = torch.randn(1, 24, 5, device=device)
    calls = [
        lambda x: vk.match_tokens(x, 5, backend="triton"),
        lambda x: vk.match_neighbors(x, None, grid=(2, 3, 4), threshold=0.5, backend="triton"),
    ]
    chosen = [choice for call in calls for choice in vk.explain(call, x)]
    assert [(c.op, c.backend) for c in chosen] == [
        ("match_tokens", "triton"),
        ("count_neighbors", "triton"),
        ("match_neighbors", "triton"),
    ]
    plan = vk.match_tokens(x, 5)
    assert [c.backend for c in vk.explain(vk.merge_tokens, x, plan, backend="triton")] == ["triton"]
    for call in calls:
        with pytest.raises(vk.BackendError, match="does not support float64: it compares in float32"):
            call(x.double())
    with pytest.raises(vk.BackendError, match="does not support float64: it sums in float32"):
        vk.merge_tokens(x.double(), plan, backend="triton")


# --- cost ---


def test_boxes_see_few_cells():
    """The windowed kernel's work: tokens of a box times cells it sees, for every box."""
    from vidmem_kernels.token_merge.triton_match import box_edges
    from vidmem_kernels.token_merge.triton_rows import layout_of

    def work(grid, window=(1, 1, 1), stride=(2, 2, 2)):
        layout = layout_of(grid[0] * grid[1] * grid[2], grid, stride)
        total = 1
        for edge, step, w, n in zip(box_edges(layout, window, 128), stride, window, layout.cells, strict=True):
            boxes = -(-n // edge)
            total *= boxes * edge * step * min(n, edge + 2 * w)
        return total

    per_token = [work((frames, 30, 52)) / (frames * 30 * 52) for frames in (45, 90, 180, 360)]
    assert max(per_token) < 1.1 * min(per_token) < 150
    assert work((1, 1, 4096), (0, 0, 0), (1, 1, 1)) <= 4096 * 128
    layout = layout_of(8**3, (8, 8, 8), (8, 8, 8))
    assert box_edges(layout, (0, 0, 0), 128) == [1, 1, 1]


@pytest.mark.parametrize("tokens", [0, 1, 8])
def test_a_plan_that_merges_nothing_shares_no_memory(tokens, device):
    plan = vk.match_tokens(torch.randn(1, tokens, 3, device=device), 0, backend="triton")
    places = [t.untyped_storage().data_ptr() for t in plan if t.numel()]
    assert len(set(places)) == len(places)
    assert plan.offsets.tolist() == [list(range(tokens + 1))] and plan.kept.tolist() == [list(range(tokens))]
