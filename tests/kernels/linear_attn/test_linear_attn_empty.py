"""Linear attention of nothing: every size 0, in any combination, in every backend.

Apart, in a process of their own, because what went wrong with no channels was the end of the process.
"""

import itertools
import os
import random
import subprocess
import sys

import pytest
import torch
from backend_helpers import CAPABILITIES
from paths import HELPERS

from vidmem_kernels import _dispatch, linear_attention, testing
from vidmem_kernels._op import OPS

SIZES = {"B": 2, "L": 70, "H": 1, "D": 5, "Dv": 4}
FAR = 2**62


def zeroed():
    """Sizes of which some are 0, none too."""
    for count in range(len(SIZES) + 1):
        for names in itertools.combinations(SIZES, count):
            yield {**SIZES, **dict.fromkeys(names, 0)}


def options():
    """(feature map, causal, block size, normalize, scale): small and large blocks, longer than all too."""
    for causal, block in ((False, 1), (True, 1), (True, 7), (True, 40), (True, 10_000)):
        yield ("relu", "elu1")[block % 2], causal, block, True, 1.0
        yield "identity", causal, block, False, -0.5


def arguments(make, sizes, with_state):
    batch, length, heads, size, value_size = sizes.values()
    tokens, lanes = (batch, length, heads), (batch, heads, size)
    wide = torch.float64 if make.dtype == torch.float64 else torch.float32
    S, z = make.randn(*lanes, value_size, dtype=wide), make.rand(*lanes, dtype=wide)
    grads = make.randn(*tokens, value_size), make.randn(*lanes, value_size, dtype=wide), make.randn(*lanes, dtype=wide)
    args = make.randn(*tokens, size), make.randn(*tokens, size), make.randn(*tokens, value_size)
    return (*args, *((S, z) if with_state else (None, None))), grads


def far(tensor):
    """What is empty with strides that no memory has."""
    if tensor is None or tensor.numel():
        return tensor
    return tensor.as_strided(tensor.shape, (FAR,) * tensor.dim())


def check(backend, dtype, seed, each):
    """Runs all sizes with some of the options; returns how many calls."""
    rng, chosen, ran = random.Random(seed), list(options()), 0
    for sizes, (with_state, change) in itertools.product(zeroed(), ((False, lambda t: t), (True, far))):
        if min(sizes.values()):
            continue
        args, grads = arguments(testing.Make(dtype), sizes, with_state)
        for given in rng.sample(chosen, each):
            for name, tensors in (("linear_attention", args), ("linear_attention_backward", (*grads, *args))):
                op = OPS[name]
                with testing.poisoned_memory():
                    got = testing.run(op, (*map(change, tensors), *given), backend)
                exact = op.reference(*testing.to_float64(tensors), *given)
                what = f"{name} {sizes} {given} {backend}"
                testing.assert_within_budget(got, op.reference(*tensors, *given), exact, what)
                assert all(t.is_contiguous() for t in got), what
                if sizes["D"] == 0:  # nothing is found
                    assert not any(t.any() for t in got if t.dim() == 4 and t.shape == tensors[-3].shape), what
                ran += 1
    return ran


def run(code, env):
    folder = os.path.dirname(__file__)
    env["PYTHONPATH"] = os.pathsep.join([str(HELPERS), *filter(None, [env.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:] or f"ended by signal {-done.returncode}"
    return done.stdout


def in_a_process(backend, dtype, capability=None, each=4):
    env = dict(os.environ, OMP_NUM_THREADS="2")
    if capability:
        env["VIDMEM_CPU_CAPABILITY"] = capability
    call = f"import torch, test_linear_attn_empty as t; print(t.check({backend!r}, {dtype}, 0, {each}))"
    assert int(run(call, env)) == 31 * 2 * 2 * each


@pytest.mark.parametrize("capability", [c for c in CAPABILITIES if c != "baseline"])
def test_cpu(capability):
    in_a_process("cpu", torch.float32 if capability == "avx512" else torch.bfloat16, capability)


BASELINE = """
import torch, test_linear_attn_empty as t
from vidmem_kernels import testing
for sizes in t.zeroed():
    for state in (False, True):
        args, grads = t.arguments(testing.Make(), sizes, state)
        for given in t.options():
            out = torch.ops.vidmem_cpp.linear_attention(*map(t.far, args), *given)
            back = torch.ops.vidmem_cpp.linear_attention_backward(*map(t.far, (*grads, *args)), *given)
            assert [x.shape for x in back[:3]] == [x.shape for x in args[:3]] and out[0].shape == args[2].shape
"""


@pytest.mark.skipif("baseline" not in CAPABILITIES, reason="vidmem_kernels._C is not built")
def test_baseline_called_directly():
    run(BASELINE, dict(os.environ, VIDMEM_CPU_CAPABILITY="baseline"))


def test_reference():
    in_a_process("reference", torch.float16)


def test_triton():
    reason = _dispatch.unavailable(OPS["linear_attention"], "triton", "cpu")
    if reason is not None:
        pytest.skip(reason=reason)
    in_a_process("triton", torch.float32, each=1)


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_any_number_of_tokens_of_nothing(backend):
    """Expanded: no memory, and 2**40 tokens that nobody walks along."""
    x = torch.ones(1, 1, 1, 1)
    reason = _dispatch.refusal(OPS["linear_attention"], backend, x.device, (x, x, x, None, None, "relu", True, 1, True))
    if reason is not None:
        pytest.skip(reason=reason)
    length = 2**40
    for shape in ((0, length, 2, 4), (2, length, 0, 4), (2, length, 3, 0)):
        x = torch.zeros(1).as_strided(shape, (0, 0, 0, 0)).requires_grad_()
        for causal in (False, True):
            out, state = linear_attention(x, x, x, causal=causal, block_size=8, return_state=True, backend=backend)
            assert out.shape == shape and state.z.shape == (shape[0], *shape[2:])
            out.sum().backward()
            assert x.grad.shape == shape


def test_public_call_and_its_gradients():
    """No channels: zeros, and gradients of zero for the values."""
    q, v = torch.ones(2, 9, 3, 0, requires_grad=True), torch.ones(2, 9, 3, 4, requires_grad=True)
    for causal, normalize in itertools.product((True, False), (True, False)):
        out, state = linear_attention(q, q, v, causal=causal, normalize=normalize, return_state=True)
        assert torch.equal(out, torch.zeros_like(v)) and state.S.shape == (2, 3, 0, 4) and state.z.shape == (2, 3, 0)
        grad_q, grad_v = torch.autograd.grad(out.sum(), (q, v))
        assert grad_q.shape == q.shape and torch.equal(grad_v, torch.zeros_like(v))
