"""What every registered op must satisfy, on every one of its samples."""

import importlib
import logging
import random
from pathlib import Path

import pytest
import torch
from torch.library import opcheck
from torch.utils import _pytree as pytree

import vidmem_kernels
from vidmem_kernels import _dispatch, testing
from vidmem_kernels._op import OPS
from vidmem_kernels._registry import register_op
from vidmem_kernels.testing import Make, float_leaves, gradients, naming, run, samples, with_grad

ALL_OPS = sorted(OPS)
ALL_CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def missing(name):
    """What an op lacks of the contract."""
    op = OPS[name]
    lacks = []
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"vidmem::{name}", "Meta"):
        lacks.append("fake")
    try:
        if not samples(name):
            lacks.append("samples for opcheck")
    except KeyError:
        lacks.append("samples for opcheck")
    else:
        results = float_leaves([run(op, s.args) for s in samples(name)])
        if results and op.backward is None and not name.endswith("_backward"):
            lacks.append("backward")
    return lacks


@pytest.mark.parametrize("name", ALL_OPS)
def test_contract_is_complete(name):
    assert missing(name) == []


def test_every_family_is_public():
    for api in Path(vidmem_kernels.__file__).parent.glob("*/api.py"):
        names = importlib.import_module(f"vidmem_kernels.{api.parent.name}.api").__all__
        lacking = ", ".join(set(names) - set(vidmem_kernels.__all__))
        assert not lacking, f"vidmem_kernels/__init__.py does not import {api.parent.name}.api, which has {lacking}"


def test_incomplete_op_is_found():
    """An op without fake cannot be registered; without samples or backward it fails the contract."""

    def double(x):
        return x * 2

    double.__module__ = "vidmem_kernels.sparse_gather.reference"
    schema = "contract_test_double(Tensor x) -> Tensor"
    with pytest.raises(TypeError, match="fake"):
        register_op(schema, reference=double, autocast=())
    op = register_op(schema, reference=double, fake=torch.empty_like, autocast=())
    try:
        assert missing(op.name) == ["samples for opcheck"]
        testing.sample_inputs(op.name)(lambda make: [("one", (make.randn(2),))])
        assert missing(op.name) == ["backward"]
    finally:
        del OPS[op.name]
        testing._SAMPLES.pop(op.name, None)


@pytest.mark.parametrize("name", ALL_OPS)
def test_opcheck(name, device):
    op = OPS[name]
    for sample in samples(name, Make(device=device)):
        with naming(f"{name}[{sample.label}]"):
            args = with_grad(sample.args)
            differentiable = op.backward is not None and float_leaves(args)
            # torch's own test_schema and test_aot_dispatch compare inputs in ways that float8 lacks, and the latter
            # adds up results in place, which fails for a float that follows an integer.
            results = pytree.tree_leaves(run(op, sample.args))
            has_float8 = any(getattr(t, "dtype", None) == torch.float8_e4m3fn for t in (*args, *results))
            unsummable = has_float8 or (differentiable and not results[0].is_floating_point())
            utils = ("test_autograd_registration", "test_faketensor") if unsummable else ALL_CHECKS
            opcheck(op.overload, (*(args if differentiable else sample.args), "auto"), test_utils=utils)


@pytest.mark.parametrize("name", [n for n in ALL_OPS if OPS[n].backward is not None])
def test_gradcheck(name):
    for sample in samples(name, Make(torch.float64)):
        with naming(f"{name}[{sample.label}]"):
            args = with_grad(sample.args)
            # Scales stay float32 by contract; finite differences need float64, so they are checked by value elsewhere.
            tensors = [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            for t in tensors:
                if t.requires_grad and t.dtype != torch.float64:
                    t.requires_grad_(False)
            if not any(t.requires_grad for t in tensors):
                continue

            # gradcheck sees no tensors in lists, and takes infinity minus infinity (lse of rows that see nothing).
            flat, spec = pytree.tree_flatten(args)

            def call(*flat, name=name, spec=spec):
                results = float_leaves(run(OPS[name], pytree.tree_unflatten(flat, spec)))
                results = [t for t in results if t.requires_grad and t.dtype == torch.float64]
                return tuple(t.masked_fill(t.isinf(), 0) for t in results)

            if call(*flat):
                assert torch.autograd.gradcheck(call, flat, fast_mode=True), sample.label


@pytest.mark.parametrize("name", [n for n in ALL_OPS if n.endswith("_backward")])
def test_second_derivative_is_refused_not_cut(name):
    sample = samples(name)[0]
    results = float_leaves(run(OPS[name], with_grad(sample.args)))
    with pytest.raises(RuntimeError, match="has no derivative"):
        sum(r.sum() for r in results if r.requires_grad).backward()


@pytest.mark.parametrize("name", ALL_OPS)
def test_compile_equals_eager(name):
    """fullgraph, dynamic, forward and backward; AOTAutograd traces what Inductor would."""
    op = OPS[name]

    def call(*args):
        return run(op, args)

    for sample in samples(name):
        with naming(f"{name}[{sample.label}]"):
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
            eager_args = compiled_args = sample.args
            if op.backward is not None:  # else AOTAutograd would trace the derivative that is refused
                eager_args, compiled_args = with_grad(sample.args), with_grad(sample.args)
            eager, traced = call(*eager_args), compiled(*compiled_args)
            torch.testing.assert_close(traced, eager, rtol=0, atol=0, equal_nan=True)
            if op.backward is None:
                continue
            grads = gradients(compiled_args, traced), gradients(eager_args, eager)
            torch.testing.assert_close(*grads, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ALL_OPS)
def test_export(name):
    """Every dimension that may be dynamic is; the exported program holds the op itself."""
    op, sample = OPS[name], samples(name)[0]
    leaves, spec = pytree.tree_flatten(sample.args)
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    tensors = tuple(leaf for leaf, t in zip(leaves, is_tensor, strict=True) if t)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            given = iter(tensors)
            args = [next(given) if t else leaf for leaf, t in zip(leaves, is_tensor, strict=True)]
            return run(op, pytree.tree_unflatten(args, spec))

    shapes = tuple(dict.fromkeys(range(t.dim()), torch.export.Dim.AUTO) for t in tensors)
    program = torch.export.export(Module(), tensors, dynamic_shapes=(shapes,))
    torch.testing.assert_close(program.module()(*tensors), run(op, sample.args), rtol=0, atol=0)
    assert any(f"vidmem.{name}" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("name", ALL_OPS)
def test_autocast_casts_what_it_declares(name):
    op = OPS[name]
    seen = {}
    original = op.reference

    def spy(*args):
        seen.update(zip(op.arguments, args, strict=True))
        return original(*args)

    object.__setattr__(op, "reference", spy)
    try:
        for sample in samples(name):
            seen.clear()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                run(op, sample.args, "reference")
            for argument, given in zip(op.arguments, sample.args, strict=True):
                for got, was in zip(pytree.tree_leaves(seen[argument]), pytree.tree_leaves(given), strict=True):
                    if not isinstance(was, torch.Tensor):
                        continue
                    lowered = argument in op.autocast and testing.is_differentiable(was)  # not rows of 8 bits
                    assert got.dtype == (torch.bfloat16 if lowered else was.dtype), argument
    finally:
        object.__setattr__(op, "reference", original)


def backends_of(op, device):
    return [
        backend
        for backend in _dispatch.BACKENDS
        if backend != "reference" and _dispatch.unavailable(op, backend, device) is None
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("name", ALL_OPS)
def test_backends_agree_with_reference(name, dtype, device):
    """Forward and backward of every backend, within the budget that the reference's own error gives."""
    op = OPS[name]
    backends = [b for b in backends_of(op, device) if (b, device) != ("triton", "cpu")]  # see below
    if not backends:
        reasons = (f"{b}: {_dispatch.unavailable(op, b, device)}" for b in _dispatch.LADDERS[device][:-1])
        pytest.skip(reason=f"no kernel of {name} to compare ({'; '.join(reasons)})")
    for backend in backends:
        testing.check_backend(op, backend, dtype, device)


def drawn():
    """Every op and dtype. The interpreter is slow: make test takes one dtype of an op, make test-long the others."""
    for name in ALL_OPS:
        one = random.Random(name).choice([torch.float32, torch.bfloat16, torch.float16])
        for dtype in DTYPES:
            marks = () if dtype == one else pytest.mark.long
            yield pytest.param(name, dtype, marks=marks, id=f"{name}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize(("name", "dtype"), drawn())
def test_interpreted_kernels_agree_with_reference(name, dtype):
    """Triton's kernels where there is no GPU, within the same budget."""
    reason = _dispatch.unavailable(OPS[name], "triton", "cpu")
    if reason is not None:
        pytest.skip(reason=reason)
    testing.check_backend(OPS[name], "triton", dtype, "cpu")


@pytest.mark.parametrize("name", ["gather_tokens", "scatter_add_tokens", "merge_tokens", "cross_attention"])
def test_a_wrong_gradient_is_found(name):
    """The comparison of backends judges op.backward by autograd through the reference, not by itself."""
    op = OPS[name]
    right = op.backward

    def wrong(ops, ctx, *grads):
        found = right(ops, ctx, *grads)
        return tuple(g * 3 if isinstance(g, torch.Tensor) else g for g in found)

    object.__setattr__(op, "backward", wrong)
    try:
        with pytest.raises(AssertionError, match="gradient of"):
            testing.check_backend(op, "reference", torch.float32)
    finally:
        object.__setattr__(op, "backward", right)


def test_fallback_is_logged_once(caplog, monkeypatch):
    name = next((n for n in ALL_OPS if not backends_of(OPS[n], "cpu")), None)
    if name is None:
        pytest.skip(reason="every op has a CPU kernel")
    monkeypatch.setattr(_dispatch, "_logged", set())
    with caplog.at_level(logging.INFO, logger="vidmem_kernels"):
        for _ in range(3):
            run(OPS[name], samples(name)[0].args)
    lines = [r.message for r in caplog.records if r.message.startswith(f"{name} runs its")]
    assert len(lines) == 1
