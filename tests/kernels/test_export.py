"""Every public function under torch.export, make_fx and torch.compile, with every size dynamic that may be.

All tests run one table. A case names the dimensions of its tensors; a dimension with a name is dynamic. What a program
was traced at must not matter: it runs at other sizes, one of each among them, and equals eager mode to the bit.
"""

import copy
import io
import random
import re

import pytest
import torch
from export_cases import CASES, NOT_TRACED
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels.testing import Make, gradients, public_functions, with_grad

IDS = [str(c) for c in CASES]


# --- sizes ---


def tensors(case, sizes, seed=0):
    return case.make(Make(seed=seed), sizes)


def example(case):
    """Sizes to trace at: unequal, so that torch takes no two for one."""
    return {name: case.least.get(name, 1) + 12 + 2 * i for i, name in enumerate(case.names)}


def other_sizes(case, seed):
    """Odd and even sizes, one dimension at a time of the smallest size and of 1, all of 1 and all of the smallest."""
    draw = random.Random(f"{seed} {case.function} {case.label}")
    names = case.names
    least = {name: case.least.get(name, 0) for name in names}
    ones = {name: max(1, size) for name, size in least.items()}
    yield {n: draw.randint(ones[n], 29) for n in names}
    for smallest in (ones, least):
        for name in names:
            yield {n: smallest[n] if n == name else draw.randint(ones[n], 29) for n in names}
        yield smallest


def dims(case, kind):
    """dynamic_shapes with named dimensions ("named"), or with Dim.DYNAMIC or Dim.AUTO for each."""
    if kind != "named":
        return tuple({i: kind for i, d in enumerate(shape.split()) if not d.isdigit()} for shape in case.shapes)
    named = {name: Dim(name, min=case.least.get(name)) for name in case.names}

    def dim(text):
        name, _, more = text.partition("+")
        # A quotient is no dimension that torch can write: it gets a name of its own.
        size = named.setdefault(name, Dim(name.replace("/", "_by_")))
        return size + int(more) if more else size

    return tuple({i: dim(d) for i, d in enumerate(shape.split()) if not d.isdigit()} for shape in case.shapes)


class Wrapped(torch.nn.Module):
    """A call as a module, whatever the number of its tensors."""

    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *tensors):
        return self.call(*tensors)


def leaves(result):
    return [t.detach() for t in pytree.tree_leaves(result)]


def check_at(run, case, sizes, rounding=0.0):
    """`rounding` relative to the values is allowed, which is none where the same kernels run."""
    given = tensors(case, sizes)
    found, expected = leaves(run(*given)), leaves(case.call(*given))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        bound = {"rtol": rounding, "atol": rounding}
        torch.testing.assert_close(a, b, **bound, equal_nan=True, msg=lambda m: f"{sizes}: {m}")


def export(case, kind, **options):
    given = tensors(case, example(case))
    return torch.export.export(Wrapped(case.call), given, dynamic_shapes=(dims(case, kind),), **options)


def _with_gradients(call, given):
    """Results, and the gradients of a projection of them for every float tensor."""
    given = with_grad(given)
    results = call(*given)
    return [leaves(results), gradients(given, results)]


@pytest.mark.sample(45)
@pytest.mark.parametrize("kind", ["named", Dim.DYNAMIC, Dim.AUTO], ids=["named", "dynamic", "auto"])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_export(case, kind):
    exported = export(case, kind)
    if kind is Dim.AUTO:  # one of the three also goes through a file
        file = io.BytesIO()
        torch.export.save(exported, file)
        file.seek(0)
        exported = torch.export.load(file)
    program = exported.module()
    for sizes in other_sizes(case, 0):
        check_at(program, case, sizes)
    # A program that is trained: its gradients are those of the ops.
    given = tensors(case, example(case), seed=1)
    found, expected = _with_gradients(program, given), _with_gradients(case.call, given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sample(16)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_make_fx(case):
    """A graph of symbolic sizes runs at others; one of fakes or of the tensors themselves at those of the example."""
    given = tensors(case, example(case))
    # With a threshold the number of rows depends on the data, which torch reads off no tensor that it traces.
    modes = ("fake",) if case.function == "match_neighbors" and "threshold" in case.label else ("fake", "real")
    for mode in modes:
        check_at(
            make_fx(Wrapped(case.call), tracing_mode=mode, _allow_non_fake_inputs=True)(*given), case, example(case)
        )
    graph = make_fx(Wrapped(case.call), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
    for sizes in other_sizes(case, 1):
        check_at(graph, case, sizes)


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_export_strict(case):
    """The same through Dynamo, whose guards keep out sizes of 0 and 1 of results."""
    program = export(case, Dim.AUTO, strict=True).module()
    draw = random.Random(f"{case.function} {case.label}")
    for _ in range(3):
        check_at(program, case, {n: draw.randint(max(case.least.get(n, 0), 9), 29) for n in case.names})


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_compile_makes_one_graph(case):
    """fullgraph, dynamic and differentiated, at sizes of all kinds but 0 and 1, which torch compiles apart."""
    draw = random.Random(f"{case.function} {case.label}")
    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(case.call, fullgraph=True, dynamic=True, backend=counter)
    # With a threshold the number of rows depends on the data. Sizes that are equal by chance are not one size.
    scalars = torch._dynamo.config.patch(capture_scalar_outputs=True)
    with scalars, torch.fx.experimental._config.patch(use_duck_shape=False):
        for _ in range(3):
            given = tensors(case, {n: draw.randint(max(case.least.get(n, 0), 9), 29) for n in case.names})
            found, expected = _with_gradients(compiled, given), _with_gradients(case.call, given)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            # torch may begin again in the first call, where it made a constant number symbolic.
            first = first or counter.frame_count
    assert counter.frame_count == first


def test_every_public_function_has_a_case():
    lacking = (public_functions() | {"MergePlan"}) - {c.function for c in CASES}
    assert not lacking, f"declare a public_call of {', '.join(lacking)} in the family's samples.py"
    others = set(vk.__all__) - public_functions() - {c.function for c in CASES} - NOT_TRACED
    assert not others, f"give {', '.join(others)} a case in export_cases.py, or put it under NOT_TRACED there"
    assert {c.function for c in CASES} <= set(vk.__all__)


NUMBERS = {
    "match_tokens": lambda x, n: vk.match_tokens(x, n),
    "match_neighbors": lambda x, n: vk.match_neighbors(x, n, grid=(2, 3, 4)),
    "merge_tokens": lambda x, n: vk.merge_tokens(x, vk.match_tokens(x, n)),
    "MergePlan": lambda x, n: vk.MergePlan.from_assignment(torch.zeros(x.shape[:2], dtype=torch.int32), n),
    "select_tokens": lambda x, n: vk.select_tokens(x, n),
    "scatter_add_tokens": lambda x, n: vk.scatter_add_tokens(x, torch.zeros(x.shape[:2], dtype=torch.int32), n),
    "topk_blocks": lambda x, n: vk.topk_blocks(x[:, :, None], x[:, :, None], block_size=(n, n), topk=24 // n),
    "linear_attention": lambda x, n: vk.linear_attention(*[x[:, :, None]] * 3, causal=True, block_size=n),
    "cross_attention": lambda x, n: vk.cross_attention(*[x[:, :, None]] * 3, num_sinks=n),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_changes_compiles_once(name):
    """An int argument and a batch marked dynamic; an int of 0 or 1 torch makes a constant."""
    call = NUMBERS[name]
    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, number in ((2, 5), (3, 4), (7, 12)):
        x = torch.randn(batch, 24, 3)
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x, number), call(x, number), rtol=0, atol=0)
        first = first or counter.frame_count
    assert counter.frame_count == first


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_ahead_of_time(case, tmp_path):
    """Compiled by AOTInductor to a library, which runs at sizes other than the example's."""
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(export(case, "named"), package_path=str(tmp_path / "case.pt2"))
    program = torch._inductor.aoti_load_package(path)
    rounding = 1e-6 if case.function[0].isupper() else 0.0  # of a module's own layers, which Inductor fuses
    for sizes in list(other_sizes(case, 3))[:4]:
        check_at(program, case, sizes, rounding)


# --- arguments that do not fit ---

# (call, message, a number of tokens that fits, one that does not)
REFUSED = [
    (lambda x: vk.select_tokens(x, 9), "select_tokens: keep must be in [0, ", 12, 7),
    (lambda x: vk.select_tokens(x, 2 * x.shape[1] - 20), "select_tokens: keep must be in [0, ", 14, 9),
    (lambda x: vk.select_tokens(x, x.shape[1] ** 2 // 20), "select_tokens: keep must be in [0, ", 16, 25),
    (lambda x: vk.match_tokens(x, 5), "match_tokens: num_merge must be in [0, ", 12, 8),
    (lambda x: vk.match_tokens(x, x.shape[1] - 8), "match_tokens: num_merge must be in [0, ", 12, 20),
    (
        lambda x: vk.topk_blocks(x[:, :, None], x[:, :, None], block_size=(2, 2), topk=4),
        "topk_blocks: topk must be in [0, ",
        12,
        6,
    ),
    (
        lambda x: vk.cross_attention(*[x[:, :, None]] * 3, num_sinks=6),
        "cross_attention: num_sinks must be in [0, ",
        12,
        5,
    ),
    (
        lambda x: vk.scatter_add_tokens(x, torch.zeros(x.shape[:2], dtype=torch.int32), x.shape[1] - 8),
        "scatter_add_tokens: num_rows must be at least 0, got ",
        12,
        7,
    ),
    (
        lambda x: vk.linear_attention(*[x[:, :, None]] * 3, causal=True, block_size=x.shape[1] - 8),
        "linear_attention: block_size must be at least 1, got ",
        12,
        8,
    ),
]


@pytest.mark.parametrize(("call", "message", "fits", "other"), REFUSED, ids=[r[1] for r in REFUSED])
def test_a_size_that_does_not_fit_is_refused(call, message, fits, other):
    """While tracing, as in eager mode; by the exported program, for sizes that it meets later."""
    named = (({1: Dim("N")},),)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.randn(2, other, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.export.export(Wrapped(call), (torch.randn(2, other, 3),), dynamic_shapes=named)
    program = torch.export.export(Wrapped(call), (torch.randn(2, fits, 3),), dynamic_shapes=named).module()
    program(torch.randn(2, fits, 3))
    with pytest.raises(RuntimeError, match=re.escape(message)):
        program(torch.randn(2, other, 3))


def _numbers(x, counts):
    """Every int argument read off a tensor."""
    merge, keep, rows, topk, sinks = counts.tolist()
    plan = vk.match_tokens(x, merge)
    index = torch.zeros(x.shape[:2], dtype=torch.int32)
    heads = x[:, :, None]
    return (
        vk.merge_tokens(x, plan),
        vk.match_neighbors(x, merge, grid=(2, 3, 4)),
        vk.select_tokens(x, keep),
        vk.scatter_add_tokens(x, index, rows),
        vk.topk_blocks(heads, heads, block_size=(2, 2), topk=topk),
        vk.cross_attention(heads, heads, heads, num_sinks=sinks),
        vk.MergePlan.from_assignment(index, rows),
    )


def test_numbers_that_depend_on_data():
    given = torch.randn(2, 24, 3), torch.tensor([5, 6, 7, 4, 3])
    others = [torch.tensor(n) for n in ([0, 0, 1, 0, 0], [12, 24, 40, 12, 24], [1, 1, 1, 1, 1])]
    shapes = (({0: Dim("B")}, None),)
    program = torch.export.export(Wrapped(_numbers), given, dynamic_shapes=shapes).module()
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(_numbers, fullgraph=True, dynamic=True, backend="aot_eager")
        for counts in others:
            x = torch.randn(3, 24, 3)
            expected = leaves(_numbers(x, counts))
            torch.testing.assert_close(leaves(program(x, counts)), expected, rtol=0, atol=0)
            torch.testing.assert_close(leaves(compiled(x, counts)), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="keep must be in|<= 24"):
        program(given[0], torch.tensor([5, 25, 7, 4, 3]))


@pytest.mark.sample(30)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_meta_tensors_give_the_shapes(case):
    if "threshold" in case.label and case.function == "match_neighbors":
        pytest.skip("the number of rows depends on the data")
    sizes = next(other_sizes(case, 4))
    call = case.call
    given = tensors(case, sizes)
    meta = [t.to("meta") for t in given]
    if isinstance(call, torch.nn.Module):
        call = copy.deepcopy(call).to("meta")
    for found, expected in zip(leaves(call(*meta)), leaves(case.call(*given)), strict=True):
        assert found.is_meta and found.shape == expected.shape and found.dtype == expected.dtype
        assert found.stride() == expected.stride()
