"""merge_tokens and unmerge_tokens against hand-made cases, a dense formula and their properties; memory."""

import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vidmem_kernels as vk
from vidmem_kernels import MergePlan


def plan_of(assignment):
    """A plan from the row of every token, for one batch element; a row's first token counts as kept."""
    rows = max(assignment) + 1
    groups = [[i for i, a in enumerate(assignment) if a == row] for row in range(rows)]
    order = [i for group in groups for i in group]
    offsets = [sum(map(len, groups[:row])) for row in range(rows + 1)]
    fields = (assignment, [group[0] for group in groups], order, offsets)
    return MergePlan(*(torch.tensor([f], dtype=torch.int32) for f in fields))


def in_one_group(batch, tokens, device="cpu"):
    plan = plan_of([0] * tokens)
    return MergePlan(*(f.repeat(batch, 1).to(device) for f in plan))


HAND = plan_of([0, 1, 0, 1, 2])
X = torch.tensor([[[1.0, 10], [2, 20], [3, 30], [6, 60], [5, 50]]])


# --- values ---


def test_hand_mean():
    tokens, size = vk.merge_tokens(X, HAND)
    assert tokens.tolist() == [[[2, 20], [4, 40], [5, 50]]]
    assert size.tolist() == [[2, 2, 1]] and size.dtype == torch.float32


def test_hand_sizes():
    size = torch.tensor([[1.0, 3, 3, 1, 7]])
    tokens, total = vk.merge_tokens(X, HAND, size)
    assert tokens.tolist() == [[[2.5, 25], [3, 30], [5, 50]]]
    assert total.tolist() == [[4, 4, 7]]


def test_hand_unmerge():
    y = torch.tensor([[[1.0, 2], [3, 4], [5, 6]]])
    assert vk.unmerge_tokens(y, HAND).tolist() == [[[1, 2], [3, 4], [1, 2], [3, 4], [5, 6]]]


def test_hand_gradients():
    x, size = X.clone().requires_grad_(), torch.tensor([[1.0, 3, 3, 1, 7]], requires_grad=True)
    tokens, total = vk.merge_tokens(x, HAND, size)
    (tokens[0, 0, 0] * 8 + total[0, 1] * 5).backward()
    assert x.grad[0, :, 0].tolist() == [2, 0, 6, 0, 0] and x.grad[0, :, 1].count_nonzero() == 0
    # d mean / d size is (x - mean) / total: (1 - 2.5) / 4 and (3 - 2.5) / 4, times 8.
    assert size.grad.tolist() == [[-3, 5, 1, 5, 0]]
    y = torch.zeros(1, 3, 1, requires_grad=True)
    (vk.unmerge_tokens(y, HAND)[0, :, 0] * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert y.grad[0, :, 0].tolist() == [4, 6, 5]


def test_group_of_size_zero_is_a_zero_row():
    x = X.clone().requires_grad_()
    size = torch.tensor([[0.0, 0, 0, 2, 1]], requires_grad=True)
    tokens, total = vk.merge_tokens(x, HAND, size)
    assert tokens.tolist() == [[[0, 0], [6, 60], [5, 50]]] and total.tolist() == [[0, 2, 1]]
    tokens.sum().backward()
    assert x.grad[0, :, 0].tolist() == [0, 0, 0, 1, 1]
    # Group 0 has no mean to move; in group 1 token 1, of size 0, pulls by (22 - 66) / 2.
    assert size.grad.tolist() == [[0, -22, 0, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype, device):
    """4,096 ones: a running sum in bfloat16 stops at 256, in float16 at 2,048."""
    plan = in_one_group(2, 4096, device)
    x = torch.ones(2, 4096, 3, dtype=dtype, device=device)
    tokens, size = vk.merge_tokens(x, plan)
    assert tokens.dtype == dtype and (tokens == 1).all()
    assert size.dtype == torch.float32 and (size == 4096).all()
    y = torch.zeros(2, 1, 3, dtype=dtype, device=device, requires_grad=True)
    vk.unmerge_tokens(y, plan).sum().backward()
    assert (y.grad == 4096).all()


# --- gradients ---


def dense(x, plan, size):
    """Merging as a product with the (B, M, N) one-hot matrix of the assignment."""
    member = torch.nn.functional.one_hot(plan.assignment.long(), plan.kept.shape[1]).mT.to(size.dtype)
    weight = member * size.unsqueeze(1)
    total = weight.sum(dim=2)
    return (weight @ x) / total.unsqueeze(2), total


@pytest.mark.parametrize("tokens_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_merge_equals_dense_formula(dtype, tokens_only):
    x = torch.randn(2, 50, 7, dtype=dtype, requires_grad=True)
    size = (torch.rand(2, 50, dtype=dtype) + 0.5).requires_grad_()
    plan = vk.match_tokens(x, 20)
    results, expected = vk.merge_tokens(x, plan, size), dense(x, plan, size)
    torch.testing.assert_close(tuple(results), expected)
    weights = [torch.randn_like(r) for r in results]
    if tokens_only:
        weights[1].zero_()
    for leaves in ([x, size], [x], [size]):
        torch.testing.assert_close(
            torch.autograd.grad(results, leaves, weights, retain_graph=True),
            torch.autograd.grad(expected, leaves, weights, retain_graph=True),
        )


def test_only_what_is_asked_for_is_differentiated():
    x, size = X.clone().requires_grad_(), torch.ones(1, 5)
    merged = vk.merge_tokens(x, HAND, size)
    assert merged.tokens.requires_grad and not merged.size.requires_grad
    saved = [t.shape for t in merged.tokens.grad_fn.saved_tensors if t is not None]
    assert x.shape not in saved  # its gradient does not need x
    merged = vk.merge_tokens(X, HAND, size.requires_grad_())
    assert merged.tokens.requires_grad and merged.size.requires_grad


def test_unmerge_is_differentiable_twice():
    y = torch.randn(1, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda y: vk.unmerge_tokens(y, HAND), y)


# --- properties ---


@st.composite
def merges(draw):
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    metric = torch.randn(batch, tokens, 3, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    sources = (tokens + 1) // 2 if tokens > 1 else 0
    return metric, draw(st.integers(0, sources))


@settings(max_examples=50, deadline=None)
@given(case=merges())
def test_plan_is_consistent(case):
    metric, num_merge = case
    batch, tokens, _ = metric.shape
    plan = vk.match_tokens(metric, num_merge)
    rows = tokens - num_merge
    assert plan.kept.shape == (batch, rows) and plan.offsets.shape == (batch, rows + 1)
    for assignment, kept, order, offsets in zip(*(f.tolist() for f in plan), strict=True):
        assert kept == sorted(set(kept))
        assert sorted(order) == list(range(tokens)) and offsets[0] == 0 and offsets[-1] == tokens
        for row in range(rows):
            group = order[offsets[row] : offsets[row + 1]]
            assert group == [i for i, a in enumerate(assignment) if a == row]
            assert kept[row] in group


@settings(max_examples=50, deadline=None)
@given(case=merges(), weighted=st.booleans())
def test_merge_properties(case, weighted):
    metric, num_merge = case
    plan = vk.match_tokens(metric, num_merge)
    x = metric.double()
    size = x[..., 0].abs() + 0.1 if weighted else torch.ones_like(x[..., 0])
    tokens, total = vk.merge_tokens(x, plan, size)
    torch.testing.assert_close(total.sum(1), size.sum(1))
    torch.testing.assert_close((tokens * total.unsqueeze(2)).sum(1), (x * size.unsqueeze(2)).sum(1))
    back = vk.unmerge_tokens(tokens, plan)
    members = plan.offsets.diff(dim=1).gather(1, plan.assignment.long())
    assert torch.equal(back[members == 1], x[members == 1])
    # What is merged comes back as a fixed point: merging it again changes nothing but rounding.
    torch.testing.assert_close(vk.merge_tokens(back, plan, size).tokens, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merging_nothing_is_the_identity(dtype):
    x = torch.randn(2, 9, 5).to(dtype)
    plan = vk.match_tokens(x, 0)
    size = (torch.rand(2, 9) + 0.1).to(torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, total = vk.merge_tokens(x, plan, size)
    assert torch.equal(tokens, x) and torch.equal(total, size)
    assert torch.equal(vk.unmerge_tokens(tokens, plan), x)


def test_merging_twice_with_sizes_is_merging_at_once():
    x = torch.randn(1, 24, 5, dtype=torch.float64)
    first = vk.match_tokens(x, 8)
    once, size = vk.merge_tokens(x, first)
    second = vk.match_tokens(once, 6)
    tokens, total = vk.merge_tokens(once, second, size)
    rows = second.assignment[0].long()[first.assignment[0].long()]
    for row in range(10):
        torch.testing.assert_close(tokens[0, row], x[0, rows == row].mean(dim=0))
        assert total[0, row] == (rows == row).sum()


def test_layouts_and_index_dtypes(device):
    x, size = torch.randn(2, 30, 6, device=device), torch.rand(2, 30, device=device) + 0.5
    plan = vk.match_tokens(x, 11)
    expected = vk.merge_tokens(x, plan, size)
    strided = MergePlan(*(f.long().mT.contiguous().mT for f in plan))
    got = vk.merge_tokens(x.mT.contiguous().mT, strided, size.mT.contiguous().mT)
    assert all(map(torch.equal, got, expected))
    assert torch.equal(vk.unmerge_tokens(got.tokens, strided), vk.unmerge_tokens(got.tokens, plan))


def test_results_are_deterministic(device):
    x = torch.randn(2, 5000, 33, device=device, requires_grad=True)
    size = (torch.rand(2, 5000, device=device) + 0.5).requires_grad_()
    plan = in_one_group(2, 5000, device)

    def everything():
        merged = vk.merge_tokens(x, plan, size)
        back = vk.unmerge_tokens(merged.tokens, plan)
        loss = (back * x.detach()).sum() + merged.size.square().sum()
        return *merged, back, *torch.autograd.grad(loss, (x, size))

    first = everything()
    for _ in range(3):
        assert all(map(torch.equal, first, everything()))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_plan_from_an_assignment_by_hand(dtype):
    assignment = torch.tensor([[2, 0, 2, 0, 0], [3, 3, 1, 3, 1]], dtype=dtype)
    plan = MergePlan.from_assignment(assignment, 4)
    assert plan.assignment.tolist() == assignment.tolist()
    assert plan.order.tolist() == [[1, 3, 4, 0, 2], [2, 4, 0, 1, 3]]
    assert plan.offsets.tolist() == [[0, 3, 3, 5, 5], [0, 0, 2, 2, 5]]
    assert plan.kept.tolist() == [[1, 5, 0, 5], [5, 2, 5, 0]]
    assert {t.dtype for t in plan} == {torch.int32}
    tokens, size = vk.merge_tokens(torch.tensor([[[6.0], [1], [8], [2], [6]]]).repeat(2, 1, 1), plan)
    assert tokens[..., 0].tolist() == [[3, 0, 7, 0], [0, 7, 0, 3]]
    assert size.tolist() == [[3, 0, 2, 0], [0, 2, 0, 3]]


def test_plan_from_an_assignment_groups_as_matching_does():
    plan = vk.match_tokens(torch.randn(2, 31, 4), 9)
    same = MergePlan.from_assignment(plan.assignment, 22)
    assert all(map(torch.equal, plan._replace(kept=same.kept), same))
    empty = MergePlan.from_assignment(torch.zeros(2, 0, dtype=torch.int32), 3)
    assert empty.offsets.tolist() == [[0] * 4] * 2 and empty.kept.tolist() == [[0] * 3] * 2


def test_match_and_merge_compile_together():
    def reduce(x, size):
        plan = vk.match_tokens(x, 9, grid=(2, 4, 4), window=(1, 1, 1))
        merged = vk.merge_tokens(x, plan, size)
        return vk.unmerge_tokens(merged.tokens * 2, plan), merged.size

    compiled = torch.compile(reduce, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(2, 32, 6, requires_grad=True)
    size = torch.rand(2, 32).add(0.5).requires_grad_()
    eager, traced = reduce(x, size), compiled(x, size)
    assert all(map(torch.equal, eager, traced))
    losses = [[t.square().sum() for t in results] for results in (eager, traced)]
    grads = [torch.autograd.grad(loss, (x, size)) for loss in losses]
    assert all(map(torch.equal, *grads))


# --- errors ---

PLAN = vk.match_tokens(torch.randn(2, 16, 4), 4)
T = torch.zeros(2, 16, 4)
ERRORS = [
    (lambda: vk.merge_tokens(T, tuple(PLAN)), "merge_tokens: plan must be a MergePlan, got tuple"),
    (
        lambda: vk.merge_tokens(T[:, :15], PLAN),
        "merge_tokens: x must have the batch of 2 and the 16 tokens of plan, got (2, 15, 4)",
    ),
    (
        lambda: vk.merge_tokens(T[:1], PLAN),
        "merge_tokens: x must have the batch of 2 and the 16 tokens of plan, got (1, 16, 4)",
    ),
    (
        lambda: vk.merge_tokens(T, PLAN, torch.ones(2, 15)),
        "merge_tokens: size must have the first two sizes of x, got torch.Size([2, 15]) and torch.Size([2, 16])",
    ),
    (
        lambda: vk.merge_tokens(T, PLAN, torch.ones(2, 16, dtype=torch.float64)),
        "merge_tokens: size must be float32, got float64",
    ),
    (
        lambda: vk.merge_tokens(T.double(), PLAN, torch.ones(2, 16)),
        "merge_tokens: size must be float64, got float32",
    ),
    (
        lambda: vk.merge_tokens(T.int(), PLAN),
        "merge_tokens: x must be float32, bfloat16, float16 or float64, got int32",
    ),
    (
        lambda: vk.merge_tokens(T, PLAN._replace(order=PLAN.order[:, 1:])),
        "merge_tokens: plan.order must have shape (2, 16), got (2, 15)",
    ),
    (
        lambda: vk.merge_tokens(T, PLAN._replace(offsets=PLAN.offsets[:, 1:])),
        "merge_tokens: plan.offsets must have shape (2, 13), got (2, 12)",
    ),
    (
        lambda: vk.merge_tokens(T, PLAN._replace(kept=PLAN.kept.float())),
        "merge_tokens: plan.kept must be int32 or int64, got float32",
    ),
    (
        lambda: vk.merge_tokens(T.to("meta"), PLAN),
        "merge_tokens: plan.assignment must be on the device of x, got cpu and meta",
    ),
    (
        lambda: vk.unmerge_tokens(T, PLAN),
        "unmerge_tokens: y must have the batch of 2 and the 12 rows of plan, got (2, 16, 4)",
    ),
    (
        lambda: MergePlan.from_assignment(PLAN.assignment[0], 3),
        "MergePlan.from_assignment: assignment must have shape (B, N), got (16,)",
    ),
    (
        lambda: MergePlan.from_assignment(PLAN.assignment, -1),
        "MergePlan.from_assignment: num_rows must be at least 0, got -1",
    ),
    (lambda: vk.unmerge_tokens(T[0], PLAN), "unmerge_tokens: y must have shape (B, M, C), got (16, 4)"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message


@pytest.mark.parametrize("wrong", [-1, 12])
def test_plan_outside_its_shapes(wrong):
    broken = PLAN.assignment.clone()
    broken[1, 3] = wrong
    plan = PLAN._replace(assignment=broken)
    for call in (lambda: vk.merge_tokens(T, plan), lambda: vk.unmerge_tokens(T[:, :12], plan)):
        with pytest.raises(IndexError):
            call()
    with pytest.raises(IndexError):
        vk.merge_tokens(T, MergePlan.from_assignment(broken, 12))


# --- memory ---


def peak_growth(code):
    """MiB by which a fresh process grows while it runs `code`, beyond what imports and inputs take."""
    program = f"""
import resource, torch, vidmem_kernels as vk
torch.set_num_threads(1)  # threads that wait for a busy core would only cost time
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
vk.match_tokens(torch.randn(1, 480, 64), 300, grid=(2, 12, 20), window=(1, 1, 1))
{textwrap.dedent(code)}
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(result.stdout)


def test_memory_of_twenty_seconds_of_video():
    # All scores, 163,800 x 23,400, would take 14.3 GiB.
    growth = peak_growth("""
        metric = torch.randn(1, 120 * 30 * 52, 64)
        before = peak()
        plan = vk.match_tokens(metric, 163_800, grid=(120, 30, 52), window=(1, 1, 1))
        assert plan.kept.shape == (1, 23_400)
        print(peak() - before)
    """)
    assert growth < 512


def test_memory_without_window():
    # All scores, 40,950 x 5,850, would take 914 MiB.
    growth = peak_growth("""
        metric = torch.randn(1, 30 * 30 * 52, 64)
        before = peak()
        vk.match_tokens(metric, 40_950, grid=(30, 30, 52))
        print(peak() - before)
    """)
    assert growth < 256
