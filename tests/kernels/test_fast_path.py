"""A call that was made before goes past the dispatcher: same results, and whatever decides how it is served is seen."""

import itertools
import threading

import pytest
import torch
from backend_helpers import backend_called, compiled
from torch.utils._python_dispatch import TorchDispatchMode

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _extension, _fast
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import Make, public_calls, public_functions

INDEX = torch.tensor([[2, 0, -1, 5], [1, 1, 3, 4]])


SIZES = {"B": 2, "N": 6, "L": 6, "Lq": 6, "Lk": 12, "H": 2, "D": 8, "C": 8}  # all others 3
# Calls that hold more than one op or make tensors on the way: they go through the dispatcher every time.
NEVER_REMEMBERED = {
    "cross_attention[blocks of their own lengths]",
    "cross_attention[causal sinks]",
    "cross_attention[one memory for a batch and groups, mask]",
    "linear_attention[normalizer of its own]",
    "match_neighbors[threshold]",
    "merge_tokens[heads, one plan and size for a batch]",
    "quantize_rows[five dimensions]",
    "quantize_rows[two dimensions]",
    "topk_blocks[causal]",
    "topk_blocks[masked keys, one always]",
    "topk_blocks[tiles of their own sizes]",
    "unmerge_tokens[heads, one plan for a batch]",
}


def of_floats(call):
    """A public call as a function of the tensors that get a gradient, and those."""
    given = call.make(Make(), {name: SIZES.get(name, 3) for name in call.names})
    places = call.floats(given)

    def function(*floats):
        moved = dict(zip(places, floats, strict=True))
        return call.call(*(moved.get(i, t) for i, t in enumerate(given)))

    return function, [given[i] for i in places]


def functions():
    """Each public call of a function that remembers, and calls of particular kinds."""
    x, q = torch.randn(2, 6, 8), torch.randn(2, 6, 2, 8)
    state = vk.LinearAttentionState(torch.randn(2, 2, 8, 8).abs(), torch.randn(2, 2, 8).abs())
    found = {str(c): of_floats(c) for c in public_calls() if hasattr(getattr(vk, c.function), "__wrapped__")}
    return found | {
        "match_neighbors[threshold]": (lambda x: vk.match_neighbors(x, 2, grid=(1, 2, 3), threshold=0.1), [x]),
        "linear_attention[one tensor, constant state]": (
            lambda q: vk.linear_attention(q, q, q, state=state, return_state=True), [q]
        ),
        "cross_attention[one tensor as keys and values]": (lambda q, k: vk.cross_attention(q, k, k), [q, q + 1]),
        "merge_attention_states[made on the way]": (
            lambda q, a: vk.merge_attention_states([q, q + 1], [a, a - 1]), [q, torch.randn(2, 2, 6)]
        ),
    }  # fmt: skip


NAMES = sorted(functions())


def outcome(call, tensors):
    """Results and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    results = call(*leaves)
    flat = [t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]
    wanted = [t for t in flat if t.requires_grad]
    grads = torch.autograd.grad([t.float().sin().sum() for t in wanted], leaves) if wanted else ()
    return type(results), flat, grads


class Hits:
    """Counts the calls that went past the dispatcher."""

    def __init__(self, monkeypatch):
        self.count = 0
        runner = _fast._runner

        def counted(*args):
            run = runner(*args)
            if run is None:
                return None

            def counting(tensors):
                self.count += 1
                return run(tensors)

            return counting

        monkeypatch.setattr(_fast, "_runner", counted)


@pytest.fixture
def hits(monkeypatch):
    for table in _fast._tables:
        table.clear()
    return Hits(monkeypatch)


def test_every_declared_function_remembers():
    assert public_functions() & {c.function for c in public_calls()} == {name.split("[")[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_same_results_and_gradients(name, hits):
    call, tensors = functions()[name]
    hits.count = 0
    first = outcome(call, tensors)
    again = outcome(call, tensors)
    assert first[0] is again[0]
    torch.testing.assert_close(first[1:], again[1:], rtol=0, atol=0, equal_nan=True)
    dispatched = name in NEVER_REMEMBERED
    assert hits.count or dispatched or OPS[name.split("[")[0]].backward is None, "with gradients"
    with torch.no_grad():
        call(*tensors)
        before = hits.count
        call(*tensors)
    assert hits.count - before == (0 if dispatched else 1)


@compiled
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("change", ["environment", "context", "library", "capability", "determinism"])
def test_surroundings_are_seen(change, compiled, monkeypatch):
    """Each change between two equal calls is served as a first call would be."""
    for table in _fast._tables:
        table.clear()
    q = torch.randn(1, 5, 2, 8)
    seen = []
    implementation = _dispatch.implementation

    def noted(op, backend, device, args):
        run = implementation(op, backend, device, args)

        def noting(*args):
            seen.append((backend, torch.are_deterministic_algorithms_enabled()))
            return run(*args)

        return noting

    monkeypatch.setattr(_dispatch, "implementation", noted)

    def attend(q):
        return vk.cross_attention(q, q, q)

    call = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    with torch.no_grad():
        call(q), call(q)
        assert {backend for backend, _ in seen} == {"cpu"}
        seen.clear()
        if change == "environment":
            monkeypatch.setenv("VIDMEM_BACKEND", "reference")
            call(q)
            expected = "reference"
        elif change == "context":
            with vk.use_backend("reference"):
                call(q)
            expected = "reference"
        elif change == "library":
            monkeypatch.setattr(_extension, "module", None)
            monkeypatch.setattr(_extension, "reason", "taken away")
            call(q)
            expected = "library"
        elif change == "capability":
            with backend_called("baseline"):
                call(q)
            expected = "library"
        else:
            torch.use_deterministic_algorithms(True)
            try:
                call(q)
            finally:
                torch.use_deterministic_algorithms(False)
            assert seen == [("cpu", True)]
            expected = "cpu"
    assert {backend for backend, _ in seen} == {expected}


@pytest.mark.parametrize("switch", ["enable_flash_sdp", "enable_cudnn_sdp"])
def test_switches_of_sdpa_are_in_the_key(switch):
    before = _fast._surroundings()
    getattr(torch.backends.cuda, switch)(False)
    try:
        assert _fast._surroundings() != before
    finally:
        getattr(torch.backends.cuda, switch)(True)
    assert _fast._surroundings() == before


VARIANTS = {
    "dtype": lambda x: x.bfloat16(),
    "float64": lambda x: x.double(),
    "sizes": lambda x: torch.cat([x, x], 1),
    "channels": lambda x: x[:, :, :5],
    "strides": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:1].expand(2, -1, -1),
    "gradient": lambda x: x.clone().requires_grad_(),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
    "negative": lambda x: torch.complex(torch.zeros_like(x), x).conj().imag,
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tensors_are_told_apart(variant, compiled):
    def call(x):
        return vk.gather_tokens(x, INDEX)

    torch._dynamo.reset()
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    x = torch.randn(2, 6, 8)
    other = VARIANTS[variant](x)
    for tensor in (x, other, x, other):
        found = run(tensor)
        expected = vk.gather_tokens(tensor, INDEX, backend="reference")
        assert torch.equal(found, expected) and found.dtype == tensor.dtype
        assert found.requires_grad == tensor.requires_grad


def test_numbers_are_told_apart_by_type():
    x = torch.randn(1, 6, 8)
    assert vk.select_tokens(x, 1).index.shape == (1, 1)
    with pytest.raises(TypeError, match="keep must be an int, got bool"):
        vk.select_tokens(x, True)
    with pytest.raises(TypeError, match="keep must be an int, got float"):
        vk.select_tokens(x, 1.0)


def aliased():
    """Calls with several tensors of the same kind: any of them may be one object."""

    def states(a, b, c):
        return vk.merge_attention_states([a, b, c], [t.mean(3).mT for t in (a, b, c)])[0]

    return {
        "cross_attention": lambda a, b, c: vk.cross_attention(a, b, c),
        "linear_attention": lambda a, b, c: vk.linear_attention(a, b, c),
        "topk_blocks": lambda a, b, c: vk.topk_blocks(a, b, block_size=(2, 2), topk=2),
        "merge_attention_states": states,
        "select_tokens": lambda a, b, c: vk.select_tokens(a[:, :, 0], 3, score=b[:, :, 0, 0]).index,
    }  # fmt: skip


@pytest.mark.parametrize("order", list(itertools.permutations(["aaa", "aab", "aba", "abb", "abc"], 3)))
@pytest.mark.parametrize("name", sorted(aliased()))
def test_tensors_that_are_one_object(name, order):
    """What was remembered of a call whose tensors are one object serves no call whose tensors differ, and back."""
    call, tensors = aliased()[name], {n: torch.randn(2, 6, 2, 8) for n in "abc"}
    for pattern in (*order, *order):
        args = [tensors[n] for n in pattern]
        with Seen():  # through the dispatcher
            expected = call(*args)
        torch.testing.assert_close(call(*args), expected)


def test_errors_come_again(hits):
    x = torch.randn(1, 6, 8)
    for _ in range(3):
        with pytest.raises(IndexError, match="index must be in"):
            vk.gather_tokens(x, torch.tensor([[7]]))
        with pytest.raises(ValueError, match="index must have shape"):
            vk.gather_tokens(x, torch.tensor([1]))
    vk.gather_tokens(x, torch.tensor([[2]])), vk.gather_tokens(x, torch.tensor([[2]]))
    with pytest.raises(IndexError, match="index must be in"):
        vk.gather_tokens(x, torch.tensor([[9]]))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Sub(torch.Tensor):
    pass


def test_steps_aside(hits):
    """Modes, autocast, explain, subclasses, transforms and traces are served by the dispatcher, also after a hit."""
    x = torch.randn(2, 6, 8)

    def call(x=x):
        return vk.gather_tokens(x, INDEX)

    call(), call()
    assert hits.count == 1
    with Seen() as seen:
        call()
    assert "vidmem::gather_tokens" in seen.names
    with torch.overrides.BaseTorchFunctionMode():
        call()
    with torch.autocast("cpu", torch.bfloat16):
        call()
    assert vk.explain(call)[0].op == "gather_tokens"
    assert isinstance(call(x.as_subclass(Sub)), Sub)
    torch.func.vmap(lambda x: vk.gather_tokens(x, INDEX))(torch.stack([x, x]))
    torch.jit.trace(call, x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        call()
    assert hits.count == 1
    call()
    assert hits.count == 2


def test_autocast_after_a_hit():
    q = torch.randn(1, 5, 2, 8)
    vk.cross_attention(q, q, q), vk.cross_attention(q, q, q)
    with torch.autocast("cpu", torch.bfloat16):
        assert vk.cross_attention(q, q, q).dtype == torch.bfloat16
    assert vk.cross_attention(q, q, q).dtype == torch.float32


def test_second_derivatives_and_hooks(hits):
    """A gradient of a gradient, saved-tensor hooks and retained graphs after a hit."""
    x, index = torch.randn(1, 6, 8, requires_grad=True), torch.tensor([[1, 1, 4]])
    for _ in range(2):
        y = vk.gather_tokens(x, index)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.sum(), x)
        assert torch.equal(h[0, :, 0], torch.tensor([0.0, 4, 0, 0, 2, 0]))
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        vk.gather_tokens(x, index).sum().backward()
    assert packed and hits.count >= 1


def test_threads():
    """Many threads with different shapes and backends at once."""
    errors = []

    def work(n):
        try:
            torch.manual_seed(n)
            x = torch.randn(1, n + 2, 4)
            with vk.use_backend("reference" if n % 2 else "auto"):
                for _ in range(50):
                    assert torch.equal(vk.gather_tokens(x, torch.tensor([[n]])), x[:, n : n + 1])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not errors


def test_remembers_a_bounded_number(monkeypatch):
    monkeypatch.setattr(_fast, "MAX_REMEMBERED", 5)
    cells = [cell.cell_contents for cell in vk.gather_tokens.__closure__]
    (table,) = [content for content in cells if isinstance(content, dict)]
    for n in range(2, 20):
        x = torch.randn(1, n, 4)
        for _ in range(2):
            assert torch.equal(vk.gather_tokens(x, torch.tensor([[0]])), x[:, :1])
    assert 0 < len(table) <= _fast.MAX_REMEMBERED
