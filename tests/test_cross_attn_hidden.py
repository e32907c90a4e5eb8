"""What a window, a block list or a bias of -inf hides touches nothing, to the bit; what is visible has its effect.

NaN and infinities are put into drawn places of drawn calls. Results and gradients of pairs that they do not reach must
have the bits of the same call with numbers in their stead.
"""

import math
import random

import pytest
import torch
from test_cross_attn_kernels import CAPABILITIES, visible

from vidmem_kernels import _extension, cross_attention

INF, NAN = math.inf, math.nan
SEEDS = range(40)


@pytest.fixture(params=[*(c for c in CAPABILITIES if c != "baseline"), "reference"])
def backend(request):
    """The C++ kernels of every instruction set that the op runs, and the reference."""
    if request.param == "reference":
        yield "reference"
        return
    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(request.param)
    yield "cpu"
    _extension.module.set_cpu_capability(before)


class Draw(random.Random):
    """One call: `inputs` that have gradients, the other `options`, and gradients of the results."""

    def __init__(self, seed, largest=(90, 230)):
        super().__init__(seed)
        torch.manual_seed(seed)
        self.batch, self.heads = self.randint(1, 2), self.randint(1, 3)
        self.queries = self.choice([1, 2, 7, 24, 25, self.randint(1, largest[0])])
        self.keys = self.randint(1, largest[1])
        self.size, self.value_size = self.randint(1, 40), self.randint(1, 40)
        self.dtype = self.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
        q, k, v = (
            torch.randn(self.batch, n, self.heads, size).to(self.dtype)
            for n, size in ((self.queries, self.size), (self.keys, self.size), (self.keys, self.value_size))
        )
        self.inputs = {"q": q, "k": k, "v": v}
        self.options = {"scale": self.size**-0.5, "num_sinks": self.choice([0, 0, self.randint(0, min(3, self.keys))])}
        kinds = self.choice(["window", "blocks", "bias", "window blocks", "window bias", "window blocks bias"])
        if "window" in kinds:
            self.options |= self.window()
        if "blocks" in kinds:
            self.options |= self.blocks()
        if "bias" in kinds:
            shape = self.choice([(self.batch, self.keys), (self.batch, self.heads, self.keys)])
            bias = torch.randn(shape)
            self.inputs["key_bias"] = bias.masked_fill(torch.rand(shape) < self.choice([0.0, 0.3, 1.0]), -INF)
        self.grads = [
            torch.randn(self.batch, self.queries, self.heads, self.value_size).to(self.dtype),
            torch.randn(self.batch, self.heads, self.queries),
        ]

    def window(self):
        def times(count):
            shape = self.choice([(count,), (self.batch, count)])
            values = torch.randint(0, 40, shape)
            values = values.sort(-1).values if self.random() < 0.5 else values
            values = values.to(self.choice([torch.int32, torch.int64, torch.float32, torch.float64]))
            if values.is_floating_point():
                for special in (NAN, INF, -INF):
                    values[torch.rand(shape) < self.choice([0.0, 0.1])] = special
            return values

        sides = [self.choice([0, 2.5, self.randint(0, 20), INF]) for _ in range(2)]
        return {"q_time": times(self.queries), "k_time": times(self.keys), "window": sides}

    def blocks(self):
        size = (self.randint(1, 40), self.randint(1, 40))
        rows, blocks = -(-self.queries // size[0]), -(-self.keys // size[1])
        shape = (self.batch, self.choice([1, self.heads]), rows, self.randint(0, 4))
        return {"block_index": torch.randint(-1, blocks, shape), "block_size": size}

    def seen(self):
        """(B, H, Lq, Lk)"""
        names = ("q_time", "k_time", "window", "block_index", "block_size")
        options = {"num_sinks": 0, **dict.fromkeys(names), **self.options}
        for name in ("q_time", "k_time"):
            if options[name] is not None and not options["q_time"].dtype == options["k_time"].dtype == torch.float32:
                options[name] = options[name].double()
        seen = visible(self.inputs["q"], self.inputs["k"], options)
        if "key_bias" in self.inputs:
            bias = self.inputs["key_bias"]
            seen = seen & ((bias if bias.dim() == 3 else bias[:, None]) != -INF)[:, :, None]
        return seen

    def poison(self):
        """NaN and infinities somewhere in the inputs and the gradients; where no bias of -inf is, which hides."""
        for x in (*self.inputs.values(), *self.grads):
            there = (torch.rand(x.shape) < self.choice([0.0, 0.0, 1 / max(1, x.numel()), 0.003, 0.03])) & (x > -INF)
            specials = torch.tensor(self.choice([[NAN], [INF], [NAN, INF, -INF]]), dtype=x.dtype)
            if x is self.inputs.get("key_bias"):
                specials = torch.tensor([NAN, INF])
            x[there] = specials[torch.randint(len(specials), (int(there.sum()),))]


def poisoned(x):
    """Which rows of (B, L, H, C), as (B, H, L), or elements of the rest hold no number."""
    bad = ~x.isfinite()
    return bad.any(3).transpose(1, 2) if x.dim() == 4 else bad


def run(draw, inputs, grads, backend):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    results = cross_attention(**leaves, **draw.options, return_lse=True, backend=backend)
    found = torch.autograd.grad(results, list(leaves.values()), grads)
    return [*(t.detach() for t in results), *found]


def reach(draw):
    """Whether poison reaches the results and gradients of a query, (B, H, Lq), and the gradients of a key."""
    seen = draw.seen()
    keys = poisoned(draw.inputs["k"]) | poisoned(draw.inputs["v"])
    if "key_bias" in draw.inputs:
        bad = draw.inputs["key_bias"].isnan() | (draw.inputs["key_bias"] == INF)
        keys = keys | (bad if bad.dim() == 3 else bad[:, None])
    forward = poisoned(draw.inputs["q"]) | (seen & keys[:, :, None]).any(3)
    some = seen.any(3)
    forward = forward & some
    backward = (forward | poisoned(draw.grads[0]) | poisoned(draw.grads[1])) & some
    return forward, backward, (seen & backward[..., None]).any(2)


def assert_same_where(a, b, reached, what):
    """Equal bits but in the rows (B, H, L) that poison reaches."""
    a, b = ((x.transpose(1, 2) if x.dim() == 4 else x) for x in (a, b))
    if a.dim() < reached.dim():  # the gradient of a bias for all heads
        reached = reached.any(1)
    left = ~reached
    assert torch.equal(a[left], b[left]), what


@pytest.mark.sample(40)
@pytest.mark.parametrize("seed", SEEDS)
def test_hidden_content_touches_nothing(seed, backend):
    draw = Draw(seed)
    draw.poison()
    dirty = run(draw, draw.inputs, draw.grads, backend)
    finite = {n: torch.where(x.isfinite() | (x == -INF) & (n == "key_bias"), x, 0.7) for n, x in draw.inputs.items()}
    clean = run(draw, finite, [g.nan_to_num(0.3, 0.4, 0.5) for g in draw.grads], backend)
    assert all(x.isfinite().all() for x in clean[2:])
    forward, backward, keys = reach(draw)
    names = ("out", "lse", "dq", "dk", "dv", "dbias")
    reached = (forward, forward, backward, keys, keys, keys)
    for name, a, b, r in zip(names, dirty, clean, reached, strict=False):
        assert_same_where(a, b, r, f"{name} of seed {seed}")
    unseen = ~draw.seen().any(3)
    assert (dirty[0].transpose(1, 2)[unseen] == 0).all()
    assert (dirty[1][unseen] == -INF).all()
    assert (dirty[2].transpose(1, 2)[unseen] == 0).all()


def pair_by_pair(draw):
    """(out, lse), no pair of a query and a hidden key ever in one product or sum; IEEE arithmetic in float64."""
    q, k, v = (draw.inputs[n].double().transpose(1, 2) for n in "qkv")
    seen = draw.seen()
    score = (q[:, :, :, None] * k[:, :, None]).sum(4) * draw.options["scale"]
    if "key_bias" in draw.inputs:
        bias = draw.inputs["key_bias"].double()
        score = score + (bias if bias.dim() == 3 else bias[:, None])[:, :, None]
    score = score.masked_fill(~seen, -INF)
    largest = score.amax(3, keepdim=True)
    largest = largest.masked_fill(largest == -INF, 0)
    weight = (score - largest).masked_fill(~seen, -INF).exp()
    total = weight.sum(3)
    terms = torch.where(seen[..., None], weight[..., None] * v[:, :, None], 0).sum(3)
    out = terms / total.masked_fill(total == 0, 1)[..., None]
    return out.transpose(1, 2), largest[..., 0] + total.log()


@pytest.mark.sample(40)
@pytest.mark.parametrize("seed", SEEDS)
def test_visible_content_has_its_effect(seed, backend):
    draw = Draw(1000 + seed, (40, 60))
    draw.poison()
    results = run(draw, draw.inputs, draw.grads, backend)
    for got, expected in zip(results, pair_by_pair(draw), strict=False):
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2, equal_nan=True)
    # The gradients of a query with a result that is no number are none either, nor are those of the keys that it sees.
    lost = results[1].isnan()
    grad_q, grad_k = (g.transpose(1, 2) for g in results[2:4])
    assert grad_q[lost].isnan().all()
    assert grad_k[(draw.seen() & lost[..., None]).any(2)].isnan().all()
    reference = run(draw, draw.inputs, draw.grads, "reference")
    for got, expected in zip(results, reference, strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite()), f"seed {seed}"
