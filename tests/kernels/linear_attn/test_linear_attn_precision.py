"""Linear attention's Triton kernels with the arithmetic of a real tensor core: float32 results keep float32's error."""

import os
import random
import subprocess
import sys

import pytest
import torch

from vidmem_kernels import _dispatch, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import Make

pytest.importorskip("triton")

import triton
import triton.language as tl
from tensor_core import tensor_core

from vidmem_kernels.linear_attn import triton_parts

if _dispatch.unavailable(OPS["linear_attention"], "triton", "cpu") is not None:
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# dtype, length, heads, D, Dv, feature map, causal, block, normalize: of the kinds that were over budget on an H200.
FOUND = [
    (F32, 7, 2, 4, 4, "relu", False, 1, True),
    (F32, 300, 1, 16, 24, "elu1", True, 1, True),
    (F32, 20, 1, 64, 64, "elu1", True, 1, True),
    (BF16, 300, 1, 2, 2, "elu1", True, 5, True),
    (BF16, 2100, 1, 16, 16, "relu", True, 1560, True),
    (F16, 7, 2, 4, 4, "relu", False, 1, True),
    # Heads so large that denominators are summed without a product.
    (BF16, 70, 1, 144, 24, "elu1", True, 3, True),
    (F16, 70, 1, 130, 40, "relu", False, 1, True),
]


def drawn(seed):
    rng = random.Random(seed)
    # Signed features are not normalised: near a denominator of 0 the bound says nothing.
    feature_map = rng.choice(("relu", "elu1", "identity"))
    sizes = rng.choice((3, 16, 33)), rng.choice((2, 16, 40))
    block = rng.choice((1, 3, 16, 50, 400))
    return (
        rng.choice((F32, BF16, F16)), rng.choice((20, 150, 300)), 1, *sizes, feature_map, rng.random() < 0.6, block,
        feature_map != "identity" and rng.random() < 0.7,
    )  # fmt: skip


@pytest.mark.sample(8)
@pytest.mark.parametrize("case", [*FOUND, *map(drawn, range(6))], ids=lambda case: "-".join(map(str, case)))
def test_within_the_budget(case):
    dtype, length, heads, size, value_size, *options = case
    make = Make(dtype, seed=0)
    tokens, lanes = (1 if length > 10 else 2, length, heads), (1 if length > 10 else 2, heads, size)
    q, k, v = make.randn(*tokens, size), make.randn(*tokens, size), make.randn(*tokens, value_size)
    args = (q, k, v, None, None)
    grads = make.randn(*tokens, value_size), make.randn(*lanes, value_size, dtype=F32), make.randn(*lanes, dtype=F32)
    for name, given in (("linear_attention", args), ("linear_attention_backward", (*grads, *args))):
        op = OPS[name]
        with tensor_core():
            got = testing.run(op, (*given, *options), "triton")
        at_dtype = testing.yardstick(name, given)(*given, *options)
        exact = op.reference(*testing.to_float64(given), *options)
        testing.assert_within_budget(got, at_dtype, exact, name)


@triton.jit
def _exp_kernel(x, out, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, triton_parts.exp_negative(tl.load(x + at, at < N, other=0.0)), at < N)


def test_exp():
    """As the C++ kernels': to a rounding and a half, subnormal results included, NaN stays."""
    values = torch.cat([-torch.logspace(-8, 2.05, 4000), torch.tensor([0.0, -0.0, -87.4, -103.9, -104.5, -torch.inf])])
    out = torch.empty_like(values)
    _exp_kernel[(triton.cdiv(len(values), 512),)](values, out, len(values), BLOCK=512)
    exact = values.double().exp()
    assert ((out - exact).abs() <= torch.maximum(1.5 * 2**-23 * exact, torch.tensor(2.0**-149).double())).all()
    nan = torch.full((4,), torch.nan)
    _exp_kernel[(1,)](nan, nan, 4, BLOCK=16)
    assert nan.isnan().all()


COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidmem_kernels.linear_attn import triton_states

kernel = triton_states._linear_sums_kernel
for i in (0, 3):
    pointers, constants, (tunable, fields) = triton_states.AOT["_linear_sums_kernel"][i]
    tile = tunable.default(90, **fields)
    options = {"num_warps": tile.pop("num_warps")}
    constants = constants | tile
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    sys.stdout.write(compiled.asm["ttgir"])
"""


def test_sums_are_apart_when_compiled():
    """No product of the sums' kernel, of exact or of weighted factors, takes the loop's sum as its accumulator.

    Of weighted factors there are two parts."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if "warp_group_dot " in line]
    starts = [line.split("warp_group_dot ")[1].split("{")[0].split(", ")[2].strip() for line in lines]
    assert len(starts) == 3 and all(start.startswith("%cst") for start in starts)
