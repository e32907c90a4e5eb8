"""torch.use_deterministic_algorithms off, on, to warn only, and flipped later: results are right, and on they are equal
to the bit. docs/determinism.md says what is by default."""

import re

import pytest
import torch
from paths import ROOT
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _fast, testing
from vidmem_kernels._determinism import must_be_deterministic, warn_if_asked
from vidmem_kernels._op import OPS, Library
from vidmem_kernels.testing import FLAGS, Make, determinism, gradients, naming, run, samples, with_grad

ALL_OPS = sorted(OPS)


def cases():
    """Every op on every backend; the interpreter is slow."""
    for name in ALL_OPS:
        for backend in _dispatch.BACKENDS:
            if (backend, None) in (("library", OPS[name].library), ("triton", OPS[name].triton)):
                continue
            yield pytest.param(name, backend, marks=pytest.mark.long if backend == "triton" else ())


def skip_unless_available(name, backend, device):
    if why := _dispatch.unavailable(OPS[name], backend, device):
        pytest.skip(reason=why)


def table():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "determinism.md").read_text(), re.M)
    return {name: (default, flagged) for name, default, flagged in rows}


def test_the_table_in_the_docs_says_what_ops_declare():
    assert sorted(table()) == ALL_OPS
    for name, (default, flagged) in table().items():
        varies = OPS[name].varies
        assert default == (f"varies ({', '.join(varies)})" if varies else "same bits"), name
        assert flagged.startswith("same bits")


@pytest.mark.filterwarnings("error")
def test_what_the_flag_asks():
    for flag, expected in zip(FLAGS, (False, True, False), strict=True):
        with determinism(flag):
            assert must_be_deterministic() == expected
            if flag == "warn only":
                with pytest.warns(UserWarning, match="some kernel is not deterministic"):
                    warn_if_asked("some kernel")
            else:
                warn_if_asked("some kernel")


@pytest.mark.parametrize("flag", ["on", "warn only"])
@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_right_whatever_the_flag(name, backend, flag, device):
    """As test_backends_agree_with_reference has it without the flag."""
    skip_unless_available(name, backend, device)
    dtype = torch.bfloat16 if (backend, device) == ("library", "cuda") else torch.float32
    with determinism(flag):
        if backend != "reference":
            testing.check_backend(OPS[name], backend, dtype, device)
        for sample in samples(name, Make(device=device)):
            run(OPS[name], sample.args)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("name", "backend"), list(cases()))
def test_runs_agree_to_the_bit(name, backend, flag, device):
    """With the flag on, and by default but for what the table has."""
    skip_unless_available(name, backend, device)
    op = OPS[name]
    if flag != "on" and device == "cuda" and backend in op.varies:
        pytest.skip(reason="docs/determinism.md: varies")
    for dtype in (torch.float32, torch.bfloat16):
        for sample in samples(name, Make(dtype, device)):
            if _dispatch.refusal(op, backend, torch.device(device), sample.args) is not None:
                continue
            with determinism(flag), naming(f"{name}[{sample.label}] on {backend}"):
                first, *others = (pytree.tree_leaves(run(op, sample.args, backend)) for _ in range(3))
                for other in others:
                    torch.testing.assert_close(other, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.sample(8)
@pytest.mark.parametrize("name", ALL_OPS)
def test_flipped_after_compilation(name):
    """A graph that was compiled with the flag off is right with it on, to warn only, and off again."""
    op, sample = OPS[name], samples(name)[0]

    def call(*args):
        return run(op, args)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for flag in ("off", "on", "warn only", "off"):
        args = [with_grad(sample.args) if op.backward is not None else sample.args for _ in range(3)]
        with determinism(flag):
            results = [compiled(*args[0]), compiled(*args[1]), call(*args[2])]
            torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(results[0], results[2], rtol=0, atol=0, equal_nan=True)
            if op.backward is not None:
                grads = [gradients(given, result) for given, result in zip(args, results, strict=True)]
                torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(grads[0], grads[2], rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def fast_and_exact():
    """Cross-attention by two libraries, the first of which is not deterministic; which one ran."""
    ran, op = [], OPS["cross_attention"]
    before = op.library

    def library(name, refuse):
        def call(*args):
            ran.append(name)
            return op.run_reference(*args)

        return Library(name, ("cpu",), call, refuse)

    op.library = (
        library("fast", lambda *args: "is not deterministic" if must_be_deterministic() else None),
        library("exact", lambda *args: None),
    )
    yield ran
    op.library = before
    for table in _fast._tables:
        table.clear()


@pytest.mark.parametrize("way", ["eager", "compiled", "exported"])
def test_every_way_of_a_call_follows_the_flag(way, fast_and_exact):
    """The fast path, a graph that guards on the flag, and one that does not."""

    class Attend(torch.nn.Module):
        def forward(self, q):
            return vk.cross_attention(q, q, q, backend="library")

    q = torch.randn(1, 5, 2, 8)
    call = Attend()
    if way == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    elif way == "exported":
        call = torch.export.export(call, (q,)).module()
    with torch.no_grad():
        for flag in ("off", "off", "on", "on", "warn only", "off"):
            with determinism(flag):
                call(q)
    assert fast_and_exact == ["fast", "fast", "exact", "exact", "fast", "fast"]
