"""Sizes of zero in every dimension, strides of zero and beyond 2**62: every op but those of attention."""

from itertools import product
from typing import NamedTuple

import pytest
import torch
from backend_helpers import BACKENDS, CAPABILITIES, backend_called, skip_without

from vidmem_kernels import _dispatch, _fast
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import Make, public_calls, public_functions
from vidmem_kernels.token_merge.reference import group_by_row

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Op(NamedTuple):
    """Its dimensions with the sizes that they have unless they are zero, and its arguments for given sizes."""

    sizes: dict
    make: object


def floats(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def groups(B, N, M):
    """A plan of N tokens and M rows; tokens without rows have none."""
    assignment = torch.randint(0, max(M, 1), (B, N))
    return (assignment.int(), *group_by_row(assignment, M)) if M or not N else None


def merge(dtype, B, N, M, C, sized):
    plan = groups(B, N, M)
    size = torch.rand(B, N).to(wide(dtype)) + 0.5 if sized else None
    return plan and (floats(B, N, C, dtype=dtype), size, *plan)


def merge_backward(dtype, B, N, M, C, sized):
    plan = groups(B, N, M)
    x, size = (floats(B, N, C, dtype=dtype), torch.rand(B, N).to(wide(dtype)) + 0.5) if sized else (None, None)
    return plan and (floats(B, M, C, dtype=dtype), floats(B, M, dtype=wide(dtype)), x, size, *plan)


def grid_match(dtype, B, T, H, W, num_merge, window):
    tokens = T * H * W
    cells = -(-T // 2) * -(-H // 2) * -(-W // 2)
    merged = min(num_merge, tokens - cells)
    window = (1, 0, 1) if window else None
    return floats(B, tokens, 3, dtype=dtype), merged, (T, H, W), (2, 2, 2), window, False, -1, None


def match(dtype, B, N, num_merge):
    return floats(B, N, 3, dtype=dtype), min(num_merge, N // 2), None, (2, 2, 2), None, False, -1, None


def index_of(B, K, M):
    return torch.randint(-1, M, (B, K), dtype=torch.int32)


def gather(dtype, B, K, M, C, quantized):
    if quantized:
        codes = torch.randint(-127, 128, (B, M, C), dtype=torch.int8)
        return codes, index_of(B, K, M), torch.rand(B, M), dtype
    return floats(B, M, C, dtype=dtype), index_of(B, K, M), None, None


def topk(dtype, B, Lq, Lk, H, D, wanted):
    return floats(B, Lq, H, D, dtype=dtype), floats(B, Lk, H, D, dtype=dtype), 2, 3, min(wanted, -(-Lk // 3))


def plan_call(function):
    def make(dtype, B, N, M, C):
        plan = groups(B, N, M)
        return plan and (floats(B, M if function == "unmerge" else N, C, dtype=dtype), *plan)

    return make


OF_PLAN = {"B": 2, "N": 7, "M": 4, "C": 5}
CASES = {
    "match_tokens": Op({"B": 2, "N": 9, "num_merge": 4}, match),
    "match_tokens on a grid": Op({"B": 2, "T": 2, "H": 3, "W": 4, "num_merge": 5, "window": 1}, grid_match),
    "match_neighbors": Op(
        {"B": 2, "T": 2, "H": 3, "W": 4, "num_merge": 5},
        lambda dtype, B, T, H, W, num_merge: (
            floats(B, T * H * W, 3, dtype=dtype),
            min(num_merge, T * H * W // 2),
            (T, H, W),
        ),
    ),
    "count_neighbors": Op(
        {"B": 2, "T": 2, "H": 3, "W": 4},
        lambda dtype, B, T, H, W: (floats(B, T * H * W, 3, dtype=dtype), (T, H, W), 0.1),
    ),
    "merge_tokens": Op({**OF_PLAN, "sized": 1}, merge),
    "merge_tokens_backward": Op({**OF_PLAN, "sized": 1}, merge_backward),
    "unmerge_tokens": Op(OF_PLAN, plan_call("unmerge")),
    "sum_groups": Op(OF_PLAN, plan_call("sum")),
    "gather_tokens": Op({"B": 2, "K": 6, "M": 4, "C": 5, "quantized": 1}, gather),
    "scatter_add_tokens": Op(
        {"B": 2, "K": 6, "M": 4, "C": 5},
        lambda dtype, B, K, M, C: (floats(B, K, C, dtype=dtype), index_of(B, K, M), M),
    ),
    "quantize_rows": Op(
        {"B": 2, "M": 4, "C": 5, "int8": 1},
        lambda dtype, B, M, C, int8: (floats(B, M, C, dtype=dtype), torch.int8 if int8 else torch.float8_e4m3fn),
    ),
    "quantize_rows_backward": Op(
        {"B": 2, "M": 4, "C": 5},
        lambda dtype, B, M, C: (floats(B, M, dtype=wide(dtype)), floats(B, M, C, dtype=dtype), torch.int8),
    ),
    "select_tokens": Op(
        {"B": 2, "N": 7, "C": 5, "keep": 3, "scored": 1},
        lambda dtype, B, N, C, keep, scored: (
            floats(B, N, C, dtype=dtype),
            min(keep, N),
            floats(B, N, dtype=dtype) if scored else None,
        ),
    ),
    # Whole blocks of keys: of equal ones the means tie, which those of fewer rows do not to the bit.
    "topk_blocks": Op({"B": 2, "Lq": 5, "Lk": 9, "H": 2, "D": 5, "wanted": 2}, topk),
}
# By tests/kernels/cross_attn/test_attention_empty.py and test_linear_attn_empty.py.
ELSEWHERE = {"cross_attention", "merge_attention_states", "linear_attention"}


def of_public_call(call):
    """A function that has no case above: what its public call hands to the op."""

    def make(dtype, **sizes):
        if any(sizes[name] < least for name, least in call.least.items()):
            return None
        tensors = call.make(Make(dtype), sizes)
        _fast._watch.calls = []
        try:
            call.call(*tensors)
            ((_, args, _, _),) = _fast._watch.calls
        finally:
            _fast._watch.calls = None
        return tuple(args)

    return Op({name: max(3 + i, call.least.get(name, 0)) for i, name in enumerate(call.names)}, make)


COVERED = {case.split()[0] for case in CASES} | ELSEWHERE
CASES |= {
    f"{call.function} {call.label}": of_public_call(call)
    for call in public_calls()
    if call.function in public_functions() - COVERED
}


def same(actual, expected, what):
    actual, expected = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (actual, expected))
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, what
        if a.dtype == torch.float8_e4m3fn:
            a, e = a.view(torch.uint8), e.view(torch.uint8)
        tolerance = {} if a.is_floating_point() else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, e, msg=lambda text, what=what: f"{what}: {text}", **tolerance)


def agree(op, args, backend, what, expected=None):
    """A backend's results equal the reference's for the same arguments, or for those of `expected`."""
    if _dispatch.refusal(OPS[op], backend, torch.device("cpu"), args) is not None:
        return
    found = OPS[op].overload(*args, backend)
    same(found, OPS[op].overload(*(expected or args), "reference"), what)


@pytest.mark.sample(24)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_every_dimension_may_be_zero(case, backend):
    """Alone and together with every other one."""
    op = case.split()[0]
    skip_without(backend, op)
    sizes = CASES[case].sizes
    some = DTYPES if backend != "triton" else DTYPES[:1]
    for dtype, zeros in product(some, product([False, True], repeat=len(sizes))):
        if backend == "triton" and sum(zeros) > 2:
            continue  # slow, and each pair is enough to find what an early return hides
        given = {name: 0 if zero else size for (name, size), zero in zip(sizes.items(), zeros, strict=True)}
        args = CASES[case].make(dtype, **given)
        if args is not None:
            with backend_called(backend) as name:
                agree(op, args, name, f"{case} {dtype} {given}")


def expanded(tensor, axis):
    """The first entry along an axis, repeated by a stride of 0."""
    return tensor.narrow(axis, 0, 1).expand(tensor.shape) if tensor.shape[axis] else tensor


def far_apart(tensor):
    """The same values; where no address depends on it, a stride is 2**62 or more."""
    if tensor.numel() == 0:
        strides = [2**62 + axis for axis in range(tensor.dim())]
    else:
        strides = [
            2**62 + axis if n == 1 else s for axis, (n, s) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
        ]
    return tensor.as_strided(tensor.shape, strides)


def is_read_freely(argument):
    return isinstance(argument, torch.Tensor) and argument.is_floating_point()


@pytest.mark.sample(16)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_strides_of_zero(case, backend):
    op = case.split()[0]
    skip_without(backend, op)
    for dtype in DTYPES if backend != "triton" else DTYPES[:1]:
        args = CASES[case].make(dtype, **CASES[case].sizes)
        # Vectors of equal channels all point one of two ways: rounding decides which is the most similar.
        axes = 2 if op.startswith("match") else 4
        for i, axis in ((i, axis) for i, a in enumerate(args) if is_read_freely(a) for axis in range(a.dim())[:axes]):
            view = expanded(args[i], axis)
            given = (*args[:i], view, *args[i + 1 :])
            plain = (*args[:i], view.contiguous(), *args[i + 1 :])
            with backend_called(backend) as name:
                agree(op, given, name, f"{case} {dtype} argument {i} axis {axis}", plain)


@pytest.mark.sample(16)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_strides_that_no_address_needs(case, backend):
    """Of tensors that are empty or one long along an axis: any number, and not to be multiplied up."""
    op = case.split()[0]
    skip_without(backend, op)
    sizes = CASES[case].sizes
    choices = product([0, 1, None], repeat=len(sizes)) if backend != "triton" else product([1, None], repeat=len(sizes))
    for chosen in choices:
        given = {n: size if c is None else c for (n, size), c in zip(sizes.items(), chosen, strict=True)}
        args = CASES[case].make(torch.float32, **given)
        if args is None or not any(isinstance(a, torch.Tensor) and 1 in a.shape or 0 in given.values() for a in args):
            continue
        far = tuple(far_apart(a) if isinstance(a, torch.Tensor) else a for a in args)
        with backend_called(backend) as name:
            agree(op, far, name, f"{case} {given}", args)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiled_kernels_were_asked(capability):
    """None of these cases is left to the reference."""
    for case in CASES:
        assert _dispatch.unavailable(OPS[case.split()[0]], "cpu", "cpu") is None
