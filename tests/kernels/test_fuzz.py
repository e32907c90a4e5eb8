"""The fuzzer draws every op and finds faults that are planted: in Python in seconds, in C++ under the marker `long`."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
import torch
from fuzzing import moving, run
from fuzzing.draw import Draw
from paths import ROOT
from torch import Tensor
from torch.utils import _pytree as pytree

import vidmem_kernels as vk
from vidmem_kernels import _dispatch, _extension, _fast
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import named_call, public_functions


def forget() -> None:
    """Calls that were made before are not served past what a test replaces."""
    for table in _fast._tables:
        table.clear()
    for op in OPS.values():
        op.remembered.clear()


@pytest.fixture
def implementation(monkeypatch):
    """Replaces `_dispatch.implementation`, by a function of the original one."""

    def replace(make: Callable) -> None:
        monkeypatch.setattr(_dispatch, "implementation", make(_dispatch.implementation))
        forget()

    yield replace
    forget()


def ops_in_use() -> set[str]:
    """The ops that public functions call, and those that their gradients call; not one that is not public yet."""
    modules = [path.read_text() for path in Path(vk.__file__).parent.glob("*/*.py")]
    sources = "".join(text for text in modules if "from .._call import call" in text)
    found: set[str] = set()
    new = {name for name in OPS if f'"{name}"' in sources}
    while new:
        found |= new
        gradients = [OPS[name].backward.__code__.co_names for name in new if OPS[name].backward]
        new = OPS.keys() & {name for names in gradients for name in names} - found
    return found


def test_every_op_is_drawn(implementation):
    reached = set()

    def noting(original):
        def implementation(op, *rest):
            reached.add(op.name)
            return original(op, *rest)

        return implementation

    implementation(noting)
    public = public_functions()
    lacking = ", ".join(public - set(run.all_ops()))
    assert not lacking, (
        f"{lacking}: write a Case and, of the function's name, a @generator in tests/fuzzing/<family's file>.py "
        "(Unmerge is a short one), or declare public_call(…, moves=True) if results are elements of the tensors"
    )
    seen, case = set(), 0
    while (seen < public or reached < ops_in_use()) and case < 1000:
        seen.add(run.draw_case(0, case)[0])
        assert not run.run_case(0, case, public, {"reference"})
        case += 1
    assert seen == public
    assert reached == ops_in_use()


@pytest.mark.skipif(_extension.module is None, reason="needs the CPU kernels, whose place the fault takes")
@pytest.mark.parametrize(
    ("planted", "what"), [("select_tokens", "tokens"), ("scatter_add_tokens", "gradient of tensor 0")]
)
def test_functions_that_move_elements_are_drawn_from_their_public_calls(planted, what, implementation):
    """Of a function that is declared so: what is right passes, a fault of one element is found."""
    keep = named_call("select_tokens", "some", lambda x: vk.select_tokens(x, 4), "B N C", moves=True, N=6)

    def faults():
        for case in range(60):
            trial = run._Trial(moving.generate([keep], Draw(0, case)), Draw(1, case))
            try:
                trial.on("auto")
            except run.Wrong as wrong:
                yield str(wrong).split(":")[0]

    assert list(faults()) == []

    def planting(original):
        def implementation(op, backend, *rest):
            kernel = original(op, backend, *rest)
            return (lambda *args: tail_of_results(kernel, *args)) if (op.name, backend) == (planted, "cpu") else kernel

        return implementation

    implementation(planting)
    assert set(faults()) == {what}


def test_a_case_comes_again():
    """The same seed and number draw the same, whatever ran before."""

    def drawn(case):
        name, draw = run.draw_case(3, case)
        leaves = pytree.tree_leaves(run.GENERATORS[name](draw).args)
        return name, [(t.stride(), t.double().nan_to_num(7)) if isinstance(t, Tensor) else t for t in leaves]

    first = [drawn(case) for case in range(20)]
    for case in reversed(range(20)):
        (name, leaves), (again, others) = first[case], drawn(case)
        assert name == again
        for a, b in zip(leaves, others, strict=True):
            assert a[0] == b[0] and torch.equal(a[1], b[1]) if isinstance(a, tuple) else a == b


# --- planted faults ---


def without_tail(x: Tensor, axis: int = -1) -> Tensor:
    """What a loop over 16 at a time sees that forgets a rest of one: the others, and a zero."""
    size = x.shape[axis]
    if size % 16 != 1 or size < 2 or not is_float(x):
        return x
    kept = torch.ones(size, dtype=torch.bool)
    kept[-1] = False
    return x.where(kept.view([size if a == axis % x.dim() else 1 for a in range(x.dim())]), 0)


def tail_of_results(function, *args):
    return pytree.tree_map_only(Tensor, without_tail, function(*args))


def tail_of_channels(function, *args):
    return function(*(without_tail(a) if isinstance(a, Tensor) and a.dim() > 2 else a for a in args))


def tail_of_keys(function, q, k, v, *rest):
    return function(q, without_tail(k, 1), without_tail(v, 1), *rest)


def no_infinity(function, *args):
    def finite(t):
        return t.masked_fill(t == -torch.inf, 0) if is_float(t) else t

    return function(*pytree.tree_map_only(Tensor, finite, args))


def is_float(t: Tensor) -> bool:
    return t.is_floating_point() and t.dtype.itemsize > 1


def strides_as_contiguous(function, *args):
    def misread(t):
        wrong = torch.empty(t.shape).stride()
        fits = t.storage_offset() + t.numel() <= t.untyped_storage().nbytes() // t.itemsize
        return t.as_strided(t.shape, wrong) if fits and t.is_floating_point() else t

    return function(*pytree.tree_map_only(Tensor, misread, list(args)))


def negated(index: int):
    def fault(function, *args):
        results = function(*args)
        if isinstance(results, Tensor):
            return -results
        return tuple(-r if i == index else r for i, r in enumerate(results))

    return fault


def has_cpu_kernel(op: str) -> bool:
    """Whether there is one to take the place of."""
    return _extension.module is not None and _extension.has_kernel(op, "cpu")


PLANTED = [
    *[(op, tail_of_results) for op in ("cross_attention", "linear_attention", "gather_tokens", "merge_tokens")],
    *[(op, tail_of_results) for op in ("scatter_add_tokens", "unmerge_tokens", "merge_attention_states")],
    *[(op, tail_of_results) for op in ("cross_attention_backward", "linear_attention_backward", "sum_groups")],
    *[(op, tail_of_channels) for op in ("topk_blocks", "match_tokens", "match_neighbors", "quantize_rows")],
    ("cross_attention", tail_of_keys),
    ("linear_attention", tail_of_keys),
    *[(op, no_infinity) for op in ("cross_attention", "merge_attention_states", "select_tokens")],
    *[(op, strides_as_contiguous) for op in OPS if op in ops_in_use() and has_cpu_kernel(op)],
    *[("cross_attention_backward", negated(i)) for i in range(4)],
    *[("linear_attention_backward", negated(i)) for i in range(5)],
    *[("merge_tokens_backward", negated(i)) for i in range(2)],
    *[("merge_attention_states_backward", negated(i)) for i in range(2)],
    ("quantize_rows_backward", negated(0)),
    ("scatter_add_tokens", negated(0)),
    ("sum_groups", negated(0)),
]
# Which public function, of several, a fault is looked for in.
CALLERS = {
    "cross_attention_mixed": "cross_attention",
    "count_neighbors": "match_neighbors",
    "sum_groups": "unmerge_tokens",
}


def hunts() -> list:
    named = {}
    for op, fault in PLANTED:
        named[f"{op}-{fault.__qualname__.split('.')[0]}-{len(named)}"] = (op, fault)
    return [pytest.param(*value, id=name) for name, value in named.items()]


@pytest.mark.skipif(_extension.module is None, reason="needs the CPU kernels, whose place the faults take")
@pytest.mark.parametrize(("op", "fault"), hunts())
def test_finds_planted_fault(op, fault, implementation):
    """In place of the C++ kernel of an op runs its reference with a fault."""

    def planting(original):
        def implementation(called, backend, *rest):
            if called.name == op and backend == "cpu":
                return lambda *args: pytree.tree_map_only(
                    Tensor, torch.Tensor.contiguous, fault(called.reference, *args)
                )
            return original(called, backend, *rest)

        return implementation

    implementation(planting)
    best = f"cpu/{_extension.module.available_cpu_capabilities()[-1]}"
    caller = CALLERS.get(op, op.removesuffix("_backward"))
    assert caller in run.all_ops(), f"{caller} has no generator in tests/fuzzing"
    ran = 0
    for case in range(20_000):
        if run.draw_case(0, case)[0] == caller:
            ran += 1
            found = run.run_case(0, case, {caller}, {best})
            if found:
                assert found[0].op == caller and found[0].backend == best
                assert not found[0].what.startswith("raised")
                return
    pytest.fail(f"not found in {ran} cases")


def test_goes_on_behind_a_crash_and_a_hang(tmp_path, monkeypatch, capfd):
    """A case that ends its process or does not end is told as a fault, with its arguments, and the next ones run."""
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, sys, time
if "--from-case" in sys.orig_argv:
    sys.path.insert(0, {str(ROOT / "tests")!r})
    from fuzzing import run
    def run_case(seed, number, ops, wanted, begin):
        begin("cpu/some")
        if number == 1:
            os.abort()
        if number == 3:
            time.sleep(600)
        return [run.lost(seed, 0, "reference", "found: 1")] if number == 0 else []
    run.run_case = run_case
"""
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(fuzz, "HANGS", 0.5)
    options = fuzz.arguments(["--seed", "0", "--workers", "1", "--faults", "3", "--seconds", "120"])
    assert fuzz.hunt(options) == 3
    told = [part.strip() for part in capfd.readouterr().out.split("FAULT ")[1:]]
    for text, case, what in zip(told, (0, 1, 3), ("found: 1", "with SIGABRT", "takes more than"), strict=True):
        assert what in text and f"--seed 0 --case {case}" in text and "float" in text


# --- planted in C++ ---

# name: (public functions that it may show in, source, right, wrong)
MUTANTS = {
    "tail": (
        ("merge_tokens", "unmerge_tokens"),
        "token_merge_kernels.cpp",
        "for (; c < channels; ++c) {\n    S sum = start",
        "for (; c + 1 < channels; ++c) {\n    S sum = start",
    ),
    "infinity": (
        ("cross_attention",),
        "cross_attention_args.cpp",
        "element(key_bias, offset + j * key_bias.stride(dims - 1))",
        "std::max<double>(-1e4, element(key_bias, offset + j * key_bias.stride(dims - 1)))",
    ),
    "stride": (
        ("topk_blocks",),
        "topk_blocks.cpp",
        "{pair_data(x_, pair), dtype_, x_.stride(1), x_.stride(3), channels, count}",
        "{pair_data(x_, pair), dtype_, x_.stride(1), 1, channels, count}",
    ),
    "sign": (
        ("cross_attention",),
        "cross_attention_backward_kernels.cpp",
        "sum[v] += grad;",
        "sum[v] -= grad;",
    ),
}


@pytest.mark.long
@pytest.mark.skipif(_extension.module is None, reason="needs the CPU kernels, and what compiles them")
@pytest.mark.parametrize("name", MUTANTS)
def test_finds_planted_fault_in_cpp(name, tmp_path, monkeypatch):
    """One source with a fault is compiled anew, the library linked with it is found to be wrong within a minute."""
    functions, file, right, wrong = MUTANTS[name]
    (source,) = [found.read_text() for found in (ROOT / "csrc" / "cpu").rglob(file)]
    assert source.count(right) == 1
    mutant = tmp_path / file
    mutant.write_text(source.replace(right, wrong))
    package = tmp_path / "package" / "vidmem_kernels"
    shutil.copytree(ROOT / "vidmem_kernels", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    build(mutant, package / Path(_extension.module.__file__).name, tmp_path / "objects", monkeypatch)
    path = os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--seconds", "60", "--seed", "0", "--faults", "4"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=200)
    faults = re.findall(r"^FAULT (\w+) on (.*?):", done.stdout, re.MULTILINE)
    assert done.returncode == 1, done.stdout + done.stderr
    assert any(op in functions and "cpu/" in backends for op, backends in faults), done.stdout
    assert not any("reference" in backends for _, backends in faults), done.stdout


def build(mutant: Path, target: Path, objects: Path, monkeypatch) -> None:
    """The library with `mutant` in place of the source of its name; objects of the tree's own build are taken."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_of_vidmem", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    built = next((ROOT / "build").glob("temp.*"), None)
    if built is not None:
        shutil.copytree(built, objects)
    objects.mkdir(exist_ok=True)
    jobs = [
        (command, mutant if source.name == mutant.name else source, obj)
        for command, source, obj in setup.compile_jobs(torch, objects, cuda=False)
    ]
    monkeypatch.setattr(setup, "compile_jobs", lambda *_: jobs)
    setup.BuildExtension.compile_and_link(None, torch, objects, target, cuda=False)
