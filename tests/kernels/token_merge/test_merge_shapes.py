"""merge_tokens and unmerge_tokens with plans and sizes of batch 1, and with more axes than channels."""

import pytest
import torch
from bank_helpers import backend_for, cpu_backends

import vidmem_kernels as vk

MERGING = pytest.mark.parametrize("backend", cpu_backends("merge_tokens", "unmerge_tokens"))
# Batch, tokens, further axes: of no token, no head and no batch element too.
SHAPES = [
    (3, 11, (2, 5)),
    (2, 16, (3, 1, 4)),
    (1, 9, (2, 3)),
    (2, 0, (2, 3)),
    (2, 7, (0, 4)),
    (0, 8, (2, 3)),
    (4, 6, (5,)),
]


def plan_of(batch, tokens, rows=4):
    return vk.MergePlan.from_assignment(torch.randint(0, rows, (batch, tokens)), rows)


def as_batch(plan, batch):
    return vk.MergePlan(*(field.repeat(batch, 1) for field in plan))


def outcome(x, plan, size, backend):
    """Merged, size, unmerged, and gradients of all of them."""
    x, size = x.clone().requires_grad_(), None if size is None else size.clone().requires_grad_()
    tokens, total = vk.merge_tokens(x, plan, size, backend=backend_for("merge_tokens", backend))
    back = vk.unmerge_tokens(tokens, plan, backend=backend_for("unmerge_tokens", backend))
    loss = tokens.double().square().sum() + back.double().sin().sum() + total.double().square().sum()
    leaves = (x,) if size is None else (x, size)
    return tokens, total, back, *torch.autograd.grad(loss, leaves)


@MERGING
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "axes"), SHAPES)
def test_one_plan_for_a_batch_is_that_plan_in_every_element(batch, tokens, axes, dtype, backend):
    x = torch.randn(batch, tokens, *axes).to(dtype)
    plan = plan_of(1, tokens)
    for size in (None, torch.rand(1, tokens) + 0.5, torch.rand(batch, tokens) + 0.5):
        whole = None if size is None else size.expand(batch, -1)
        got, expected = outcome(x, plan, size, backend), outcome(x, as_batch(plan, batch), whole, backend)
        if size is not None and size.shape[0] != batch:
            expected = (*expected[:4], expected[4].sum(dim=0, keepdim=True))
        for a, b in zip(got[:4], expected[:4], strict=True):
            assert torch.equal(a, b)
        torch.testing.assert_close(got[4:], expected[4:])
        assert got[0].shape == (batch, 4, *axes) and got[1].shape == (batch, 4) and got[2].shape == x.shape


@MERGING
@pytest.mark.parametrize(("batch", "tokens", "axes"), SHAPES)
def test_further_axes_are_channels(batch, tokens, axes, backend):
    x, plan, size = torch.randn(batch, tokens, *axes), plan_of(batch, tokens), torch.rand(batch, tokens) + 0.5
    got, expected = outcome(x, plan, size, backend), outcome(x.flatten(2), plan, size, backend)
    assert all(torch.equal(a.flatten(2) if a.dim() > 3 else a, b) for a, b in zip(got, expected, strict=True))
    assert all(a.shape[2:] == axes for a in got if a.dim() > 2)


def test_heads_of_any_layout():
    heads = torch.randn(2, 3, 12, 5)  # (B, H, N, D), as attention has them
    plan = plan_of(2, 12)
    x = heads.transpose(1, 2)
    assert torch.equal(vk.merge_tokens(x, plan).tokens, vk.merge_tokens(x.contiguous(), plan).tokens)
    y = torch.randn(2, 3, 4, 5).transpose(1, 2)
    assert torch.equal(vk.unmerge_tokens(y, plan), vk.unmerge_tokens(y.contiguous(), plan))


def test_compiles_for_all_sizes():
    def there_and_back(x, size, *plan):
        tokens, total = vk.merge_tokens(x, vk.MergePlan(*plan), size)
        return vk.unmerge_tokens(tokens, vk.MergePlan(*plan)), total

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for batch, tokens in ((2, 12), (3, 9), (5, 30)):
            x = torch.randn(batch, tokens, 2, 4, requires_grad=True)
            arguments = (x, torch.rand(1, tokens) + 0.5, *plan_of(1, tokens))
            got, expected = compiled(*arguments), there_and_back(*arguments)
            assert all(map(torch.equal, got, expected))
            grads = [torch.autograd.grad(out[0].square().sum(), x)[0] for out in (got, expected)]
            assert torch.equal(*grads)


X, PLAN = torch.zeros(2, 16, 3, 4), plan_of(3, 16)
ERRORS = [
    (
        lambda: vk.merge_tokens(X, PLAN),
        "merge_tokens: x must have the batch of 3 and the 16 tokens of plan, got (2, 16, 3, 4)",
    ),
    (
        lambda: vk.merge_tokens(X[:, :15], plan_of(1, 16)),
        "merge_tokens: x must have the 16 tokens of plan, got (2, 15, 3, 4)",
    ),
    (
        lambda: vk.merge_tokens(X, plan_of(1, 16), torch.zeros(3, 16)),
        "merge_tokens: size must have the first two sizes of x, got torch.Size([3, 16]) and torch.Size([2, 16])",
    ),
    (
        lambda: vk.merge_tokens(X.int(), plan_of(1, 16)),
        "merge_tokens: x must be float32, bfloat16, float16 or float64, got int32",
    ),
    (
        lambda: vk.unmerge_tokens(X, plan_of(1, 16)),
        "unmerge_tokens: y must have the 4 rows of plan, got (2, 16, 3, 4)",
    ),
    (lambda: vk.merge_tokens(X[:, :, 0, 0], PLAN), "merge_tokens: x must have shape (B, N, C), got (2, 16)"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert str(error.value) == message
