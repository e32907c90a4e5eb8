"""Float32 errors of cross_attention's CPU kernels where sums are long: wide heads, many keys, many queries.

Results with their own gradients, through the public function, as in the oracle's tests.
"""

import random

import pytest
import torch
from attention_helpers import arguments, by_sdpa, op_of, results_and_gradients
from backend_helpers import CAPABILITIES, compiled

from vidmem_kernels import testing

# float32 does not run on the baseline: see refuse_products.
FUSED = [name for name in CAPABILITIES if name != "baseline"]
pytestmark = [compiled, pytest.mark.parametrize("capability", FUSED, indirect=True)]


def within_budget(which, queries, keys, size, value_size, heads=1):
    *args, options = arguments(which, 1, queries, keys, heads, size, value_size)
    options = {name: value for name, value in options.items() if value is not None}
    exact, rough, got = (
        results_and_gradients(f, *args, options, dtype)
        for f, dtype in ((by_sdpa, torch.float64), (op_of("reference"), None), (op_of("cpu"), None))
    )
    what = f"{which} Lq={queries} Lk={keys} D={size} Dv={value_size}"
    testing.assert_within_budget(got[0], rough[0], exact[0], what)
    for name, grad in got[1].items():
        testing.assert_within_budget(grad, rough[1][name], exact[1][name], f"gradient of {name}, {what}")


@pytest.mark.parametrize("seed", range(12))
def test_wide_heads(seed, capability):
    rng = random.Random(seed)
    for size, value_size in ((512, 512), (256, 256), (rng.randint(129, 1100), rng.randint(129, 1100))):
        within_budget("", rng.choice([40, 33, 60]), rng.randint(40, 90), size, value_size)


@pytest.mark.parametrize("seed", range(4))
def test_wide_heads_of_few_queries(seed, capability):
    rng = random.Random(seed)
    for size in (512, rng.randint(129, 1100)):
        within_budget("", rng.randint(4, 24), rng.randint(40, 90), size, rng.choice([64, 512]), heads=2)


@pytest.mark.parametrize("which", ["", "bias"])
def test_many_keys_and_many_queries(which, capability):
    """The gradient of a bias is a sum over all queries."""
    within_budget(which, 40, 6000, 32, 48)
    within_budget(which, 1500, 1200, 24, 16)
