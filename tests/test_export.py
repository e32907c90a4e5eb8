"""Every public function under torch.export, make_fx and torch.compile, with every size dynamic that may be.

All tests run one table. A case names the dimensions of its tensors; a dimension with a name is dynamic. What a program
was traced at must not matter: it runs at other sizes, one of each among them, and equals eager mode to the bit.
"""

import copy
import io
import math
import random
import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels.testing import Make, gradients, with_grad


class Case(NamedTuple):
    """A call, its tensors and the names of their dimensions ("B N 4": the last one is fixed)."""

    function: str
    label: str
    call: Callable
    shapes: tuple[str, ...]
    make: Callable  # (Make, sizes by name) -> the tensors
    least: dict[str, int]  # smallest size of a dimension that is not 1


CASES: list[Case] = []
# They compute nothing, or live on files.
NOT_TRACED = {
    "BackendError", "Choice", "LinearAttentionState", "MemoryBank", "MemoryFileError", "MergeResult", "QuantizedRows",
    "SelectResult", "explain", "recording", "use_backend",
}  # fmt: skip


def case(function, label, call, *shapes, make=None, **least):
    """Without `make` all tensors are normal."""

    def normal(m, sizes):
        return tuple(m.randn(*(int(d) if d.isdigit() else sizes[d] for d in shape.split())) for shape in shapes)

    CASES.append(Case(function, label, call, shapes, make or normal, least))


# --- token merging ---


def _half(x, **options):
    return vk.match_tokens(x, x.shape[1] // 2, **options)


def _plan(m, sizes):
    """Tensors of a plan that merges R of N tokens."""
    return tuple(vk.MergePlan.from_assignment(m.randint(0, sizes["R"], (sizes["B"], sizes["N"])), sizes["R"]))


def _merge(x):
    plan = _half(x)
    tokens, size = vk.merge_tokens(x, plan)
    return vk.unmerge_tokens(tokens, plan), tokens, size


PLAN = ("B N", "B R", "B N", "B R+1")
case("match_tokens", "half", _half, "B N 5")
case("match_tokens", "a third, channels", lambda x: vk.match_tokens(x, x.shape[1] // 3), "B N C", C=1)
case("match_tokens", "3/10", lambda x: vk.match_tokens(x, x.shape[1] * 3 // 10), "B N 5")
case("match_tokens", "some", lambda x: vk.match_tokens(x, 3), "B N 5", N=6)
case("match_tokens", "none", lambda x: vk.match_tokens(x, 0), "B N 5")
case("match_tokens", "of a half", lambda x: _half(vk.merge_tokens(x, _half(x)).tokens), "B N 5", N=4)
case("match_tokens", "grid", lambda x: vk.match_tokens(x, 20, grid=(3, 4, 4), window=(1, 0, 1)), "B 48 5")
case(
    "match_tokens",
    "grid of the sizes",
    lambda x: vk.match_tokens(x.flatten(1, 3), x.shape[1] * x.shape[2] * x.shape[3] // 4, grid=x.shape[1:4]),
    "B T H W 5", T=2, H=2, W=2,
)  # fmt: skip
case("match_neighbors", "grid", lambda x: vk.match_neighbors(x, 11, grid=(3, 4, 5)), "B 60 5")
case(
    "match_neighbors",
    "grid of the sizes",
    lambda x: vk.match_neighbors(x.flatten(1, 3), x.shape[1] * x.shape[2] * x.shape[3] // 3, grid=x.shape[1:4]),
    "B T H W C", T=2, H=2, W=2, C=1,
)  # fmt: skip
case(
    "match_neighbors",
    "threshold",
    lambda x: vk.match_neighbors(x, None, grid=(3, 4, 5), threshold=0.5),
    "B 60 5",
)
case(
    "match_neighbors",
    "threshold, limit, merged",
    lambda x: vk.merge_tokens(x, vk.match_neighbors(x, 9, grid=(3, 4, 5), threshold=0.1)),
    "B 60 5",
)
case("merge_tokens", "there and back", _merge, "B N 5")
case(
    "merge_tokens",
    "plan given, sizes",
    lambda x, size, *plan: vk.merge_tokens(x, vk.MergePlan(*plan), size),
    "B N C", "B N", *PLAN,
    make=lambda m, s: (m.randn(s["B"], s["N"], s["C"]), m.rand(s["B"], s["N"]), *_plan(m, s)), R=1,
)  # fmt: skip
case(
    "unmerge_tokens",
    "plan given",
    lambda y, *plan: vk.unmerge_tokens(y, vk.MergePlan(*plan)),
    "B R C", *PLAN,
    make=lambda m, s: (m.randn(s["B"], s["R"], s["C"]), *_plan(m, s)), R=1,
)  # fmt: skip
case(
    "MergePlan",
    "from_assignment",
    lambda a: vk.MergePlan.from_assignment(a, 7),
    "B N",
    make=lambda m, s: (m.randint(0, 7, (s["B"], s["N"])),),
)
case(
    "MergePlan",
    "from_assignment, rows of another tensor, merged",
    lambda a, x, y: vk.merge_tokens(x, vk.MergePlan.from_assignment(a, y.shape[0])),
    "B N", "B N 5", "R",
    make=lambda m, s: (
        m.randint(0, s["R"], (s["B"], s["N"]), torch.int64), m.randn(s["B"], s["N"], 5), m.randn(s["R"]),
    ), R=1,
)  # fmt: skip

# --- sparse gathering ---


def _bank(m, s, lanes, dtype=None, index_dtype=torch.int32):
    index = m.randint(-1, s["M"], (s["B"], s["K"]), index_dtype)
    if dtype is None:
        return m.randn(lanes, s["M"], s["C"]), index
    rows, scale = vk.quantize_rows(m.randn(lanes, s["M"], s["C"]), dtype)
    return rows, index, scale


case("gather_tokens", "own bank", vk.gather_tokens, "B M C", "B K", make=lambda m, s: _bank(m, s, s["B"]))
case(
    "gather_tokens",
    "shared bank, int64, out_dtype",
    lambda bank, index: vk.gather_tokens(bank, index, out_dtype=torch.bfloat16),
    "1 M C", "B K",
    make=lambda m, s: _bank(m, s, 1, index_dtype=torch.int64),
)  # fmt: skip
for _dtype in (torch.int8, torch.float8_e4m3fn):
    case(
        "gather_tokens",
        f"{_dtype}".removeprefix("torch."),
        lambda bank, index, scale: vk.gather_tokens(bank, index, scale=scale),
        "B M C", "B K", "B M",
        make=lambda m, s, dtype=_dtype: _bank(m, s, s["B"], dtype),
    )  # fmt: skip
    case("quantize_rows", f"{_dtype}".removeprefix("torch."), lambda x, d=_dtype: vk.quantize_rows(x, d), "B M C")
case("quantize_rows", "two dimensions", vk.quantize_rows, "M C")
case("quantize_rows", "five dimensions", vk.quantize_rows, "B T H M C")
case(
    "scatter_add_tokens",
    "rows of another tensor",
    lambda src, index, bank: vk.scatter_add_tokens(src, index, bank.shape[1]),
    "B K C", "B K", "B M C",
    make=lambda m, s: (
        m.randn(s["B"], s["K"], s["C"]), m.randint(-1, s["M"], (s["B"], s["K"])), m.randn(s["B"], s["M"], s["C"]),
    ),
)  # fmt: skip
case(
    "scatter_add_tokens",
    "half as many rows, and fixed ones",
    lambda src, index: (vk.scatter_add_tokens(src, index, src.shape[1] // 2), vk.scatter_add_tokens(src, index, 40)),
    "B K C", "B K",
    make=lambda m, s: (m.randn(s["B"], s["K"], s["C"]), m.randint(-1, s["K"] // 2, (s["B"], s["K"]))),
)  # fmt: skip
case("select_tokens", "a quarter by norm", lambda x: vk.select_tokens(x, x.shape[1] // 4), "B N C")
case("select_tokens", "half by score", lambda x, s: vk.select_tokens(x, x.shape[1] // 2, score=s), "B N 5", "B N")
case("select_tokens", "all but two", lambda x: vk.select_tokens(x, x.shape[1] - 2), "B N 5", N=4)
case("select_tokens", "some", lambda x: vk.select_tokens(x, 4), "B N 5", N=6)
case("select_tokens", "all", lambda x: vk.select_tokens(x, x.shape[1]), "B N 5")
case(
    "topk_blocks",
    "some",
    lambda q, k: vk.topk_blocks(q, k, block_size=(4, 3), topk=2),
    "B Lq H D", "B Lk H D", Lk=6,
)  # fmt: skip
case(
    "topk_blocks",
    "a quarter",
    lambda q, k: vk.topk_blocks(q, k, block_size=(4, 2), topk=k.shape[1] // 4),
    "B Lq H 5", "B Lk H 5",
)  # fmt: skip

# --- linear attention ---

QKV = ("B L H 4", "B L H 4", "B L H 6")
for _map in ("relu", "elu1", "identity"):
    for _causal, _block in ((False, 1), (True, 1), (True, 4)):
        case(
            "linear_attention",
            f"{_map}{f', causal in blocks of {_block}' if _causal else ''}",
            lambda q, k, v, options=(_map, _causal, _block): vk.linear_attention(
                q,
                k,
                v,
                feature_map=options[0],
                causal=options[1],
                block_size=options[2],
                normalize=options[0] != "identity",
            ),
            *QKV,
        )
case(
    "linear_attention",
    "state, channels",
    lambda q, k, v, S, z: vk.linear_attention(
        q, k, v, causal=True, state=vk.LinearAttentionState(S, z), return_state=True
    ),
    "B L H D", "B L H D", "B L H E", "B H D E", "B H D",
    make=lambda m, s: (
        m.randn(s["B"], s["L"], s["H"], s["D"]), m.randn(s["B"], s["L"], s["H"], s["D"]),
        m.randn(s["B"], s["L"], s["H"], s["E"]), m.randn(s["B"], s["H"], s["D"], s["E"]),
        m.rand(s["B"], s["H"], s["D"]),
    ), D=1, E=1,
)  # fmt: skip
case(
    "linear_attention",
    "block of the size",
    lambda q, k, v: vk.linear_attention(q, k, v, causal=True, block_size=q.shape[1] // 2 + 1),
    *QKV,
)

# --- cross-attention ---

ATTENTION = ("B Lq H 4", "B Lk H 4", "B Lk H 6")


def _attention(*more):
    """Tensors of `ATTENTION`, and of `more` (functions of Make and sizes)."""

    def make(m, s):
        qkv = [m.randn(s["B"], s[length], s["H"], c) for length, c in (("Lq", 4), ("Lk", 4), ("Lk", 6))]
        return *qkv, *(f(m, s) for f in more)

    return make


def _cross(*names, **options):
    """A call of cross_attention whose tensors after q, k and v have names."""
    return lambda q, k, v, *rest: vk.cross_attention(q, k, v, **dict(zip(names, rest, strict=True)), **options)


def _blocks(m, s, heads=None, rows=4):
    return m.randint(-1, -(-s["Lk"] // 3), (s["B"], heads or s["H"], -(-s["Lq"] // rows), s["K"]))


def _sinks(q, k, v):
    return vk.cross_attention(q, k, v, num_sinks=k.shape[1] // 2, scale=0.3, return_lse=True)


def _q_times(m, s):
    return torch.arange(s["Lq"])


def _k_times(m, s):
    return torch.arange(s["Lk"], dtype=torch.float32).repeat(s["B"], 1) / 2


case("cross_attention", "plain, lse", _cross(return_lse=True), *ATTENTION)
case("cross_attention", "sinks of the size", _sinks, *ATTENTION)
case("cross_attention", "value channels", _cross(), "B Lq H 4", "B Lk H 4", "B Lk H E")
case(
    "cross_attention", "key_bias", _cross("key_bias"), *ATTENTION, "B Lk",
    make=_attention(lambda m, s: m.randn(s["B"], s["Lk"])),
)  # fmt: skip
case(
    "cross_attention", "key_bias a head", _cross("key_bias", return_lse=True), *ATTENTION, "B H Lk",
    make=_attention(lambda m, s: m.randn(s["B"], s["H"], s["Lk"])),
)  # fmt: skip
case(
    "cross_attention", "window, sinks", _cross("q_time", "k_time", window=(1.25, math.inf), num_sinks=1),
    *ATTENTION, "Lq", "B Lk", make=_attention(_q_times, _k_times), Lk=1,
)  # fmt: skip
case(
    "cross_attention", "blocks of one row", _cross("block_index", block_size=(1, 3), return_lse=True),
    *ATTENTION, "B H Lq K", make=_attention(lambda m, s: _blocks(m, s, rows=1)),
)  # fmt: skip
case(
    "cross_attention", "blocks", _cross("block_index", block_size=(4, 3), num_sinks=1), *ATTENTION, "B H Lq/4 K",
    make=_attention(_blocks), Lk=1,
)  # fmt: skip
case(
    "cross_attention", "blocks of all heads", _cross("block_index", block_size=(4, 3)), *ATTENTION, "B 1 Lq/4 K",
    make=_attention(lambda m, s: _blocks(m, s, heads=1)),
)  # fmt: skip
case(
    "cross_attention",
    "blocks found",
    lambda q, k, v: vk.cross_attention(
        q, k, v, block_index=vk.topk_blocks(q, k, block_size=(4, 3), topk=2), block_size=(4, 3)
    ),
    *ATTENTION, Lk=6,
)  # fmt: skip
case(
    "cross_attention", "all", _cross("key_bias", "q_time", "k_time", "block_index", window=(2, 1), num_sinks=1,
                                    block_size=(4, 3), scale=0.5, return_lse=True),
    *ATTENTION, "B Lk", "Lq", "B Lk", "B H Lq/4 K",
    make=_attention(lambda m, s: m.randn(s["B"], s["Lk"]), _q_times, _k_times, _blocks), Lk=1,
)  # fmt: skip
case(
    "merge_attention_states",
    "two",
    lambda a, b, c, d: vk.merge_attention_states([a, b], [c, d]),
    "B L H D", "B L H D", "B H L", "B H L",
)  # fmt: skip

# --- modules ---


class _Carry(torch.nn.Module):
    """Linear attention to a state that an earlier call returned."""

    def __init__(self):
        super().__init__()
        self.attention = vk.LinearAttention(8, 2, causal=True, block_size=2, feature_map="elu1")

    def forward(self, x, y):
        return self.attention(y, self.attention(x, None, True)[1], True)


class _Read(torch.nn.Module):
    """A memory read with proportional attention, as an encoder and a DiT do."""

    def __init__(self):
        super().__init__()
        self.attention = vk.MemoryCrossAttention(8, 2, memory_dim=6, qk_norm="rms_norm")
        torch.nn.init.ones_(self.attention.gate)

    def forward(self, x, memory):
        plan = vk.match_tokens(memory, memory.shape[1] // 2)
        tokens, size = vk.merge_tokens(memory, plan)
        return self.attention(x, tokens, key_bias=size.log())


def _module(cls, *args, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(*args, **options)


case("LinearAttention", "relu", _module(vk.LinearAttention, 8, 2), "B L 8")
case("LinearAttention", "causal, state", _module(_Carry), "B L 8", "B Ly 8")
case("MemoryCrossAttention", "plain", _module(vk.MemoryCrossAttention, 8, 2, memory_dim=6), "B Lq 8", "B M 6")
case("MemoryCrossAttention", "of merged tokens", _module(_Read), "B Lq 8", "B M 6", B=1, M=4)

IDS = [f"{c.function}[{c.label}]" for c in CASES]


# --- sizes ---


def names_of(case):
    """Names of the dimensions, in order."""
    found = (d for shape in case.shapes for d in shape.split() if not d.isdigit() and d.isalnum())
    return list(dict.fromkeys(found))


def tensors(case, sizes, seed=0):
    return case.make(Make(seed=seed), sizes)


def example(case):
    """Sizes to trace at: unequal, so that torch takes no two for one."""
    return {name: case.least.get(name, 1) + 12 + 2 * i for i, name in enumerate(names_of(case))}


def other_sizes(case, seed):
    """Odd and even sizes, one dimension at a time of the smallest size and of 1, all of 1 and all of the smallest."""
    draw = random.Random(f"{seed} {case.function} {case.label}")
    names = names_of(case)
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
    named = {name: Dim(name, min=case.least.get(name)) for name in names_of(case)}

    def dim(text):
        name, _, more = text.partition("+")
        # A quotient is no dimension that torch can write: it gets a name of its own.
        size = named.setdefault(name, Dim(name.replace("/", "_by_")))
        return size + int(more) if more else size

    return tuple({i: dim(d) for i, d in enumerate(shape.split()) if not d.isdigit()} for shape in case.shapes)


class Wrapped(torch.nn.Module):
    """A case's call as a module with arguments of its own number."""

    def __init__(self, case):
        super().__init__()
        self.inner = case.call if isinstance(case.call, torch.nn.Module) else None
        self.call = case.call

    def forward(self, *tensors):
        return self.call(*tensors)


def leaves(result):
    return [t.detach() for t in pytree.tree_leaves(result)]


def check_at(run, case, sizes):
    given = tensors(case, sizes)
    found, expected = leaves(run(*given)), leaves(case.call(*given))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{sizes}: {m}")


def export(case, kind, **options):
    given = tensors(case, example(case))
    return torch.export.export(Wrapped(case), given, dynamic_shapes=(dims(case, kind),), **options)


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
        check_at(make_fx(Wrapped(case), tracing_mode=mode, _allow_non_fake_inputs=True)(*given), case, example(case))
    graph = make_fx(Wrapped(case), tracing_mode="symbolic", _allow_non_fake_inputs=True)(*given)
    for sizes in other_sizes(case, 1):
        check_at(graph, case, sizes)


@pytest.mark.sample(6)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_export_strict(case):
    """The same through Dynamo, whose guards keep out sizes of 0 and 1 of results."""
    program = export(case, Dim.AUTO, strict=True).module()
    draw = random.Random(f"{case.function} {case.label}")
    for _ in range(3):
        check_at(program, case, {n: draw.randint(max(case.least.get(n, 0), 9), 29) for n in names_of(case)})


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
            given = tensors(case, {n: draw.randint(max(case.least.get(n, 0), 9), 29) for n in names_of(case)})
            found, expected = _with_gradients(compiled, given), _with_gradients(case.call, given)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            # torch may begin again in the first call, where it made a constant number symbolic.
            first = first or counter.frame_count
    assert counter.frame_count == first


def test_every_public_function_has_a_case():
    assert {c.function for c in CASES} == set(vk.__all__) - NOT_TRACED


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
    for sizes in list(other_sizes(case, 3))[:4]:
        check_at(program, case, sizes)


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


class Function(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


@pytest.mark.parametrize(("call", "message", "fits", "other"), REFUSED, ids=[r[1] for r in REFUSED])
def test_a_size_that_does_not_fit_is_refused(call, message, fits, other):
    """While tracing, as in eager mode; by the exported program, for sizes that it meets later."""
    named = ({1: Dim("N")},)
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.randn(2, other, 3))
    with pytest.raises(ValueError, match=re.escape(message)):
        torch.export.export(Function(call), (torch.randn(2, other, 3),), dynamic_shapes=named)
    program = torch.export.export(Function(call), (torch.randn(2, fits, 3),), dynamic_shapes=named).module()
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
    class Numbers(torch.nn.Module):
        def forward(self, x, counts):
            return _numbers(x, counts)

    given = torch.randn(2, 24, 3), torch.tensor([5, 6, 7, 4, 3])
    others = [torch.tensor(n) for n in ([0, 0, 1, 0, 0], [12, 24, 40, 12, 24], [1, 1, 1, 1, 1])]
    shapes = ({0: Dim("B")}, None)
    program = torch.export.export(Numbers(), given, dynamic_shapes=shapes).module()
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
