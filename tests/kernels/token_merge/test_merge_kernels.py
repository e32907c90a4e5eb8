"""What the compiled kernels of merging do beyond the contract: order of sums, own checks, any number of threads."""

import pytest
import torch
from backend_helpers import compiled

from vidmem_kernels import match_tokens, merge_tokens, unmerge_tokens
from vidmem_kernels.token_merge import reference

pytestmark = compiled
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
cpp = torch.ops.vidmem_cpp


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def plan_of(groups):
    """(assignment, order, offsets) of one batch element from the tokens of every row."""
    order = [token for group in groups for token in group]
    assignment = [0] * len(order)
    for row, group in enumerate(groups):
        for token in group:
            assignment[token] = row
    offsets = [sum(map(len, groups[:row])) for row in range(len(groups) + 1)]
    return tuple(torch.tensor([field], dtype=torch.int32) for field in (assignment, order, offsets))


def sizes(*shape, dtype):
    size = torch.rand(*shape, dtype=torch.float64) + 0.5
    size[:, ::7] = 0
    return size.to(torch.float64 if dtype == torch.float64 else torch.float32)


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def spread(tensor):
    """The same values with no contiguous dimension."""
    wide = tensor.new_zeros(*(2 * n for n in reversed(tensor.shape)))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)].permute(*reversed(range(tensor.dim())))
    return view.copy_(tensor)


# Empty rows, one token, the four that are added in one pass and as many as need several passes.
LENGTHS = [1, 0, 2, 3, 4, 5, 8, 9, 1, 30, 0, 1]


def mixed_plan(batch=2):
    plans = []
    for _ in range(batch):
        tokens = torch.randperm(sum(LENGTHS)).split(LENGTHS)
        plans.append(plan_of([sorted(t.tolist()) for t in tokens]))
    return tuple(torch.cat(fields) for fields in zip(*plans, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["contiguous", "strided", "int64", "mixed"])
@pytest.mark.parametrize("channels", [1, 15, 16, 37, 1037])
def test_equals_reference_to_the_bit(channels, layout, dtype, capability):
    """The same products, rounded and added in the same order: groups of every length, sizes with zeros."""
    plan, tokens = mixed_plan(), sum(LENGTHS)
    x, size = torch.randn(2, tokens, channels).to(dtype), sizes(2, tokens, dtype=dtype)
    y = torch.randn(2, len(LENGTHS), channels).to(dtype)
    expected = [
        reference.merge_tokens(x, size, *plan),
        reference.merge_tokens(x, None, *plan),
        reference.sum_groups(x, *plan),
        reference.unmerge_tokens(y, *plan),
        reference.merge_tokens_backward(y, size[:, : len(LENGTHS)], None, size, *plan)[0],
    ]
    if layout == "strided":
        x, y, size, *plan = (spread(t) for t in (x, y, size, *plan))
    elif layout == "int64":
        plan = [t.long() for t in plan]
    elif layout == "mixed":
        plan = [plan[0].long(), *plan[1:]]
    actual = [
        cpp.merge_tokens(x, size, *plan),
        cpp.merge_tokens(x, None, *plan),
        cpp.sum_groups(x, *plan),
        cpp.unmerge_tokens(y, *plan),
        cpp.merge_tokens_backward(y, size[:, : len(LENGTHS)], None, size, *plan)[0],
    ]
    equal(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_gradient_of_size(dtype, capability):
    """Against the definition in float64: <grad, x> to the precision of the sums."""
    plan, tokens = mixed_plan(), sum(LENGTHS)
    x, size = torch.randn(2, tokens, 300).to(dtype), sizes(2, tokens, dtype=dtype)
    grad = torch.randn(2, len(LENGTHS), 300).to(dtype)
    grad_size = torch.randn(2, len(LENGTHS)).to(size.dtype)
    for arguments in ((grad, grad_size, x, size), tuple(map(spread, (grad, grad_size, x, size)))):
        actual = cpp.merge_tokens_backward(*arguments, *plan)
        exact = reference.merge_tokens_backward(*(t.double() for t in (grad, grad_size, x, size)), *plan)
        tolerance = 1e-13 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(actual[1].double(), exact[1], rtol=tolerance, atol=tolerance)
        equal(actual[0], reference.merge_tokens_backward(grad, grad_size, None, size, *plan)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_token_alone_comes_out_unchanged(dtype, capability):
    """Minus zero, NaN with its payload, infinity, subnormals; a group of size 0 is a row of zeros."""
    codes = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(codes)
    x = torch.randint(info.min, info.max, (1, 6, 70), dtype=torch.int64).to(codes)
    x[0, 0, 0] = info.min
    x[0, 5] = 0
    plan = plan_of([[0], [1], [2], [3], [4], [5]])
    size = torch.tensor([[1, 3.7, 1e-30, 2, 5e20, 0]], dtype=torch.float64)
    size = size.to(torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, total = cpp.merge_tokens(x.view(dtype), size, *plan)
    assert torch.equal(tokens.view(codes), x) and torch.equal(total, size)
    assert (cpp.merge_tokens(torch.ones(1, 6, 70, dtype=dtype), size, *plan)[0][0, 5] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_group(value, capability):
    plan = mixed_plan(1)
    x, size = torch.randn(1, sum(LENGTHS), 40), torch.ones(1, sum(LENGTHS))
    for row, length in enumerate(LENGTHS):
        if length == 0:
            continue
        broken = x.clone()
        token = plan[1][0, plan[2][0, row + 1] - 1]
        broken[0, token, 33] = value
        for tokens in (cpp.merge_tokens(broken, size, *plan)[0], cpp.sum_groups(broken, *plan)):
            wrong = (~tokens.isfinite()).nonzero().tolist()
            assert wrong == [[0, row, 33]]
            equal(tokens[0, row, 33], torch.tensor(value))
    weights = size.clone()
    weights[0, plan[1][0, 1]] = value  # a token of row 2
    tokens, total = cpp.merge_tokens(x, weights, *plan)
    assert (~total.isfinite()).nonzero().tolist() == [[0, 2]]
    assert tokens[0, 2].isnan().all() and tokens[0, [0, *range(3, 12)]].isfinite().all()


def test_results_do_not_depend_on_threads(threads):
    """One long group, many short ones, and batches that no thread gets whole."""
    tokens = 3000
    long = plan_of([[0], list(range(1, tokens - 5)), *([t] for t in range(tokens - 5, tokens))])
    metric = torch.randn(3, tokens, 4)
    assignment, _, order, offsets = match_tokens(metric, tokens // 2)
    for plan in (long, (assignment, order, offsets)):
        batch, rows = plan[2].shape[0], plan[2].shape[1] - 1
        x, size = torch.randn(batch, tokens, 70), torch.rand(batch, tokens)
        y, grad_size = torch.randn(batch, rows, 70), torch.randn(batch, rows)

        def everything(x=x, size=size, y=y, grad_size=grad_size, plan=plan):
            return (
                *cpp.merge_tokens(x, size, *plan),
                *cpp.merge_tokens_backward(y, grad_size, x, size, *plan),
                cpp.unmerge_tokens(y, *plan),
                cpp.sum_groups(x, *plan),
            )

        threads(1)
        expected = everything()
        equal(expected[0], reference.merge_tokens(x, size, *plan)[0])
        for count in (2, 3, 8):
            threads(count)
            for _ in range(3):
                assert all(map(torch.equal, everything(), expected))


# --- plans that are none ---

GROUPS = [[0, 4], [1], [2, 3, 5]]
BROKEN = [
    ("assignment", 3, -1, r"assignment must be in \[0, 2\], got -1"),
    ("assignment", 3, 3, r"assignment must be in \[0, 2\], got 3"),
    ("order", 2, -1, r"order must be in \[0, 5\], got -1"),
    ("order", 5, 6, r"order must be in \[0, 5\], got 6"),
    ("order", 0, 2**31 - 1, r"order must be in \[0, 5\], got 2147483647"),
    ("offsets", 1, -3, r"offsets must be in \[0, 6\], got -3"),
    ("offsets", 2, 7, r"offsets must be in \[0, 6\], got 7"),
    ("offsets", 0, 1, r"offsets must go from 0 to 6, got 1 to 6"),
    ("offsets", 3, 5, r"offsets must go from 0 to 6, got 0 to 5"),
    ("offsets", 1, 4, r"offsets must not fall, got 3 after 4"),
    ("offsets", 1, 1, r"order must hold the tokens of every row of assignment, ascending"),
    ("order", 1, 0, r"order must hold the tokens of every row of assignment, ascending"),
    ("assignment", 0, 1, r"order must hold the tokens of every row of assignment, ascending"),
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("field", "place", "value", "message"), BROKEN)
@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.float64])
def test_broken_plan_is_refused(field, place, value, message, dtype, tokens_dtype, threads):
    """In the second of two batch elements, whatever the number of threads."""
    plan = {name: f.repeat(2, 1) for name, f in zip(("assignment", "order", "offsets"), plan_of(GROUPS), strict=True)}
    plan[field][1, place] = value
    fields = [f.to(dtype) for f in plan.values()]
    x, y = torch.randn(2, 6, 20_000, dtype=tokens_dtype), torch.randn(2, 3, 20_000, dtype=tokens_dtype)
    size, grad_size = torch.ones(2, 6, dtype=tokens_dtype), torch.ones(2, 3, dtype=tokens_dtype)
    for count in (1, 4):
        threads(count)
        for name, call in (
            ("merge_tokens", lambda: cpp.merge_tokens(x, size, *fields)),
            ("sum_groups", lambda: cpp.sum_groups(x, *fields)),
            ("merge_tokens_backward", lambda: cpp.merge_tokens_backward(y, grad_size, x, size, *fields)),
            ("merge_tokens_backward", lambda: cpp.merge_tokens_backward(y, grad_size, None, size, *fields)),
        ):
            with pytest.raises(IndexError, match=f"{name}: {message}"):
                call()
        if message.startswith("assignment"):
            with pytest.raises(IndexError, match=f"unmerge_tokens: {message}"):
                cpp.unmerge_tokens(y, *fields)


def test_plan_without_rows():
    none = [torch.zeros(1, n, dtype=torch.int32) for n in (0, 0, 1)]
    assert cpp.merge_tokens(torch.zeros(1, 0, 3), None, *none)[0].shape == (1, 0, 3)
    none[2] += 1
    with pytest.raises(IndexError, match="sum_groups: offsets must be in"):
        cpp.sum_groups(torch.zeros(1, 0, 3), *none)
    some = [torch.zeros(1, n, dtype=torch.int64) for n in (2, 2, 1)]
    for call in (lambda: cpp.sum_groups(torch.zeros(1, 2, 3), *some), lambda: cpp.unmerge_tokens(X[:, :0], *some)):
        with pytest.raises(IndexError, match=r"assignment must be in \[0, -1\], got 0"):
            call()


X = torch.zeros(1, 6, 4)
PLAN = plan_of(GROUPS)
ROWS = torch.zeros(1, 3)
WRONG = [
    (lambda: cpp.merge_tokens(X[0], None, *PLAN), "merge_tokens: x must have 3 dimensions, got 2"),
    (lambda: cpp.merge_tokens(X[:, 1:], None, *PLAN), r"x must have shape \(1, 6, 4\), got \(1, 5, 4\)"),
    (lambda: cpp.merge_tokens(X.int(), None, *PLAN), "x must have a dtype that kernels handle, got int32"),
    (lambda: cpp.merge_tokens(X.to(torch.int8), None, *PLAN), "x must have a float dtype"),
    (lambda: cpp.merge_tokens(X, ROWS, *PLAN), r"size must have shape \(1, 6\), got \(1, 3\)"),
    (lambda: cpp.merge_tokens(X, X[..., 0].double(), *PLAN), "size must be float32"),
    (lambda: cpp.sum_groups(X, PLAN[0], PLAN[1][:, 1:], PLAN[2]), r"order must have shape \(1, 6\), got \(1, 5\)"),
    (
        lambda: cpp.sum_groups(X, *PLAN[:2], PLAN[2].repeat(2, 1)),
        r"offsets .* \(1, rows \+ 1\), got \(2, 4\)",
    ),
    (lambda: cpp.sum_groups(X, *PLAN[:2], PLAN[2][:, :0]), r"offsets must have shape \(1, rows \+ 1\), got \(1, 0\)"),
    (lambda: cpp.sum_groups(X, *PLAN[:2], PLAN[2].short()), "offsets must be int32 or int64"),
    (lambda: cpp.unmerge_tokens(X, *PLAN), r"y must have shape \(1, 3, 4\), got \(1, 6, 4\)"),
    (lambda: cpp.merge_tokens_backward(X, ROWS, None, None, *PLAN), r"grad_tokens must have shape \(1, 3, 4\)"),
    (
        lambda: cpp.merge_tokens_backward(X[:, :3], ROWS[:, 1:], None, None, *PLAN),
        r"grad_size must have shape",
    ),
    (
        lambda: cpp.merge_tokens_backward(X[:, :3], ROWS, X[..., 1:], None, *PLAN),
        r"x must have shape \(1, 6, 4\), got \(1, 6, 3\)",
    ),
    (lambda: cpp.merge_tokens_backward(X[:, :3], ROWS, X.half(), None, *PLAN), "x must be float32, got float16"),
]


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_compiled_kernels_check_for_themselves(call, message):
    """What could read outside memory is refused below api.py too."""
    with pytest.raises(ValueError, match=message):
        call()


def test_large_outputs_are_written_throughout():
    """36 MiB, more than the 8 from which stores go past the caches."""
    plan = match_tokens(torch.randn(1, 4608, 4), 2304)
    x = torch.randn(1, 4608, 2048)
    merged = merge_tokens(x, plan, backend="cpu")
    back = unmerge_tokens(merged.tokens, plan, backend="cpu")
    equal(back, merged.tokens[:, plan.assignment[0].long()])
    equal(merged.tokens, reference.merge_tokens(x, None, plan.assignment, plan.order, plan.offsets)[0])
