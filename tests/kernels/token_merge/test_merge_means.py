"""What the mean of a group must be, whatever its tokens and sizes: drawn cases on every backend."""

import math
import random

import pytest
import torch
from backend_helpers import BACKENDS, CAPABILITIES, backend_called, compiled, skip_without
from torch.autograd import gradcheck, gradgradcheck

import vidmem_kernels as vk
from vidmem_kernels import MergePlan
from vidmem_kernels.token_merge import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODES = {2: torch.int16, 4: torch.int32, 8: torch.int64}
INF, NAN = float("inf"), float("nan")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.fixture(params=BACKENDS)
def merge(request):
    """merge(groups, sizes) -> one row a group. `groups`: tensors (count, C); `sizes`: lists, or None for ones."""
    skip_without(request.param, "merge_tokens")

    def call(groups, sizes=None):
        dtype = groups[0].dtype
        if request.param == "triton" and dtype == torch.float64:
            pytest.skip(reason="Triton's kernels sum in float32")
        assignment = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(g) for g in groups]))
        # Tokens in a drawn order, so that groups are spread over the whole.
        places = torch.randperm(len(assignment), generator=torch.Generator().manual_seed(len(assignment)))
        within = places.argsort()
        order = torch.cat([within[assignment == row].sort().values for row in range(len(groups))])
        x = torch.empty(1, len(assignment), groups[0].shape[1], dtype=dtype)
        x[0, order] = torch.cat(groups)
        row = torch.empty(1, len(assignment), dtype=torch.int32)
        row[0, order] = assignment.int()
        size = None
        if sizes is not None:
            size = torch.empty(1, len(assignment), dtype=wide(dtype))
            size[0, order] = torch.tensor([s for group in sizes for s in group], dtype=wide(dtype))
        plan = MergePlan.from_assignment(row, len(groups))
        with backend_called(request.param) as backend:
            return vk.merge_tokens(x, plan, size, backend=backend).tokens[0]

    call.is_triton = request.param == "triton"
    return call


def finite_tokens(draw, count, channels, dtype, subnormal=True):
    """Any finite bits: all exponents are as likely."""
    code = CODES[dtype.itemsize]
    info = torch.iinfo(code)
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    x = torch.randint(info.min, info.max, (count, channels), generator=generator).to(code).view(dtype)
    x = torch.where(x.isfinite(), x, 1)
    return x if subnormal else torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)


def drawn_sizes(draw, count, dtype):
    """Positive sizes: counts, fractions, or of any magnitude."""
    top = 30 if dtype != torch.float64 else 140
    kind = draw.randrange(3)
    if kind == 0:
        return [float(draw.randint(1, 5000)) for _ in range(count)]
    if kind == 1:
        return [draw.random() + 0.01 for _ in range(count)]
    return [10.0 ** draw.uniform(-top, top) for _ in range(count)]


COUNTS = [1, 2, 3, 4, 5, 6, 7, 9, 13, 49, 150]  # the last: several pieces of Triton's sums


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_equal_tokens_merge_to_themselves(merge, dtype, sized):
    """To the bit: -0, subnormals, the largest numbers, infinity."""
    draw = random.Random(f"{dtype} {sized}")
    largest = torch.finfo(dtype).max
    for _ in range(1 if merge.is_triton else 12):
        tokens = finite_tokens(draw, len(COUNTS), 37, dtype, subnormal=not merge.is_triton)
        tokens[:, :6] = torch.tensor([0.0, -0.0, largest, -largest, INF, -INF], dtype=dtype)
        groups = [token.expand(count, -1) for token, count in zip(tokens, COUNTS, strict=True)]
        sizes = [drawn_sizes(draw, count, dtype) for count in COUNTS] if sized else None
        merged = merge(groups, sizes)
        code = CODES[dtype.itemsize]
        assert torch.equal(merged.view(code), tokens.view(code))


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_a_mean_that_is_a_number_is_exact(merge, dtype, sized):
    """Of integers times any power of two: 3, 4, 5 give 4, and so do 1, 1, 1, 13."""
    draw = random.Random(f"{dtype} {sized}")
    info = torch.finfo(dtype)
    # Where Triton's interpreter is right about subnormals, and all the way down.
    low = math.log2(info.tiny) if merge.is_triton else {torch.float16: -24, torch.float64: -1070}.get(dtype, -130)
    for _ in range(1 if merge.is_triton else 60):
        groups, sizes, means = [torch.tensor([[3.0], [4], [5]])], [[1, 1, 1]], [4.0]
        for count in COUNTS[1:]:
            weights = [draw.randint(1, 9) if sized else 1 for _ in range(count)]
            values = [draw.randint(0, 20) for _ in range(count - 1)]
            # The last token brings the sum to a multiple of the total; its size is 1.
            weights[-1] = 1
            rest = -sum(w * v for w, v in zip(weights, values, strict=False)) % sum(weights)
            values.append(rest + sum(weights) * draw.randint(0, 1) if rest + 2 * sum(weights) < 256 else rest)
            if max(values) > 256:  # more than bfloat16 holds
                continue
            whole = sum(w * v for w, v in zip(weights, values, strict=True)) // sum(weights)
            groups.append(torch.tensor(values, dtype=torch.float64).unsqueeze(1))
            sizes.append(weights)
            means.append(float(whole))
        # Up to the largest power at which the products with sizes are finite.
        power = draw.uniform(low, {torch.float16: 7, torch.float64: 900}.get(dtype, 100))
        factor = 2.0 ** int(power)
        merged = merge([(g.double() * factor).to(dtype) for g in groups], sizes if sized else None)
        expected = (torch.tensor(means, dtype=torch.float64) * factor).to(dtype)
        assert torch.equal(merged[:, 0], expected), factor


@pytest.mark.sample(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_finite_tokens_have_a_finite_mean(merge, dtype, sized):
    """Near the limits of the dtype too, of any signs, and right to the rounding of as many terms."""
    draw = random.Random(f"{dtype} {sized}")
    info = torch.finfo(dtype)
    for _ in range(1 if merge.is_triton else 12):
        groups, sizes = [], []
        for count in COUNTS:
            x = finite_tokens(draw, count, 21, dtype, subnormal=not merge.is_triton)
            signs = x.sign() + (x == 0)
            x[:, 7:14] = (torch.rand(count, 7, dtype=torch.float64) * 0.5 + 0.5).to(dtype) * info.max * signs[:, 7:14]
            x[:, 14:] = signs[:, 14:] * info.max
            groups.append(x)
            sizes.append(drawn_sizes(draw, count, dtype) if sized else [1.0] * count)
        merged = merge(groups, sizes if sized else None)
        assert merged.isfinite().all()
        for row, x, size in zip(merged, groups, sizes, strict=True):
            # Halved and by shares, float64 does not overflow.
            share = torch.tensor(size, dtype=wide(dtype)).double()
            share = (share / share.max()) / (share / share.max()).sum()
            terms = x.double() / 2 * share.unsqueeze(1)
            exact, scale = terms.sum(0), terms.abs().sum(0)
            unit = torch.finfo(wide(dtype)).eps
            bound = scale * len(size) * 4 * unit * len(size) ** 0.5 + exact.abs() * info.eps + info.tiny * 2
            assert ((row.double() / 2 - exact).abs() <= bound).all()


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_nan_and_size_zero(merge, dtype):
    draw = random.Random(str(dtype))
    for _ in range(1 if merge.is_triton else 20):
        groups, sizes, expected, clean = [], [], [], []
        for count in COUNTS[1:]:
            x = torch.randn(count, 5).to(dtype)
            size = drawn_sizes(draw, count, dtype)
            some = draw.randrange(count)
            x[some, 0], x[some, 1], x[some, 2] = INF, -INF, NAN
            x[(some + 1) % count, 3], x[some, 3] = INF, -INF
            # One more token that stands for nothing.
            at = draw.randrange(count + 1)
            nothing = torch.tensor([[NAN, INF, -INF, 1, draw.choice([NAN, INF, 65000.0])]]).to(dtype)
            groups.append(torch.cat([x[:at], nothing, x[at:]]))
            sizes.append([*size[:at], 0.0, *size[at:]])
            clean.append(x)
            expected.append([INF, -INF, NAN, NAN])
        merged = merge(groups, sizes)
        torch.testing.assert_close(merged[:, :4], torch.tensor(expected, dtype=dtype), equal_nan=True)
        without = merge(clean, [[s for s in size if s] for size in sizes])
        if merge.is_triton:  # whose pieces of long groups begin elsewhere then
            torch.testing.assert_close(merged[:, 4], without[:, 4])
        else:
            assert torch.equal(merged[:, 4], without[:, 4])
    zeros = merge([torch.full((3, 2), NAN, dtype=dtype), torch.ones(2, 2, dtype=dtype)], [[0.0] * 3, [0.0, 2]])
    assert zeros.tolist() == [[0, 0], [1, 1]]


@compiled
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_the_reference_to_the_bit(dtype, capability):
    """Any bits, of which a seventh is neither finite nor of a size."""
    draw = random.Random(str(dtype))
    for _ in range(25):
        tokens, rows, channels = draw.randint(1, 60), draw.randint(1, 9), draw.choice([1, 5, 16, 40, 600])
        plan = MergePlan.from_assignment(torch.randint(0, rows, (2, tokens)), rows)
        x = finite_tokens(draw, 2 * tokens, channels, dtype).view(2, tokens, channels)
        if draw.random() < 0.5:
            x = torch.randn(2, tokens, channels).to(dtype)
        x = torch.where(torch.rand(x.shape) < 0.02, draw.choice([INF, -INF, NAN]), x)
        size = torch.tensor(drawn_sizes(draw, 2 * tokens, dtype), dtype=wide(dtype)).view(2, tokens)
        size = torch.where(torch.rand(size.shape) < 0.15, draw.choice([0.0, 0.0, INF, NAN]), size)
        for by in (size, None):
            expected = reference.merge_tokens(x, by, *plan[:1], *plan[2:])
            with backend_called(capability) as backend:
                actual = vk.merge_tokens(x, plan, by, backend=backend)
            for a, e in zip(actual, expected, strict=True):
                assert torch.equal(a.isnan(), e.isnan())
                same = a.contiguous().view(CODES[a.itemsize]) == e.contiguous().view(CODES[e.itemsize])
                assert (same | a.isnan()).all()


def test_derivatives_of_the_reference():
    """First and second, in tokens and sizes, as autograd and torch.func see them."""
    draw = random.Random(0)
    for _ in range(4):
        tokens, rows = draw.randint(2, 7), draw.randint(1, 3)
        plan = MergePlan.from_assignment(torch.randint(0, rows, (1, tokens)), rows)
        x = torch.randn(1, tokens, 2, dtype=torch.float64, requires_grad=True)
        size = (torch.rand(1, tokens, dtype=torch.float64) + 0.5).requires_grad_()

        def call(x, size, plan=plan):
            return reference.merge_tokens(x, size, plan.assignment, plan.order, plan.offsets)

        assert gradcheck(call, (x, size)) and gradgradcheck(call, (x, size))
        forward = torch.func.jacfwd(call, argnums=(0, 1))(x.detach(), size.detach())
        reverse = torch.autograd.functional.jacobian(call, (x, size))
        torch.testing.assert_close(forward, reverse)
        weights = torch.randn(1, rows, 2, dtype=torch.float64)
        found = torch.autograd.grad((call(x, size)[0] * weights).sum(), (x, size))
        through = torch.autograd.grad((vk.merge_tokens(x, plan, size).tokens * weights).sum(), (x, size))
        torch.testing.assert_close(through, found)
