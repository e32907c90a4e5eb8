"""What a window, a block list or a bias of -inf hides touches nothing, to the bit; what is visible has its effect.

NaN and infinities are put into drawn places of drawn calls. Results and gradients of pairs that they do not reach must
have the bits of the same call with numbers in their stead.
"""

import math
import random

import pytest
import torch
from attention_helpers import visible
from backend_helpers import CAPABILITIES, backend_called

from vidmem_kernels import _dispatch, cross_attention
from vidmem_kernels._op import OPS
from vidmem_kernels.cross_attn import reference

INF, NAN = math.inf, math.nan
SEEDS = range(40)


@pytest.fixture(params=[*(c for c in CAPABILITIES if c != "baseline"), "reference"])
def backend(request):
    """The C++ kernels of every instruction set that the op runs, and the reference."""
    with backend_called(request.param) as name:
        yield name


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
                specials = torch.tensor([NAN, INF], dtype=x.dtype)
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


# --- the reference under torch.func ---


@pytest.mark.parametrize("seed", range(12))
def test_hidden_content_under_torch_func(seed):
    """Derivatives of the reference itself, of any kind, keep hidden content out as its own gradient formula does."""
    draw = Draw(2000 + seed, (20, 30))
    draw.inputs = {n: x.double() for n, x in draw.inputs.items()}
    draw.grads = [g.double() for g in draw.grads]
    projection = draw.grads[0].clone()
    draw.poison()
    draw.grads = [projection, torch.ones(draw.batch, draw.heads, draw.queries)]
    names = list(draw.inputs)
    bias, q, k, v = (draw.inputs.get(n) for n in ("key_bias", "q", "k", "v"))
    rest = [draw.options.get(n) for n in ("num_sinks", "q_time", "k_time", "window", "block_index", "block_size")]

    def loss(leaves):
        return (reference_of(leaves, rest, draw)[0] * projection).sum()

    def derivatives(inputs):
        found = torch.func.grad(loss)(inputs)
        _, tangent = torch.func.jvp(lambda i: reference_of(i, rest, draw)[0], (inputs,), (finite_of(inputs),))
        return [found[n] for n in names], tangent

    dirty = derivatives(draw.inputs)
    clean = derivatives(finite_of(draw.inputs))
    forward, _, keys = reach(draw)
    assert_same_where(dirty[1], clean[1], forward, "tangent of out")
    for name, a, b in zip(names, dirty[0], clean[0], strict=True):
        assert_same_where(a, b, forward if name == "q" else keys, f"gradient of {name}")
    assert bias is None or bias.dtype == q.dtype == k.dtype == v.dtype


def finite_of(inputs):
    return {n: torch.where(x.isfinite() | (x == -INF) & (n == "key_bias"), x, 0.7) for n, x in inputs.items()}


def reference_of(leaves, rest, draw):
    return reference.cross_attention(
        leaves["q"], leaves["k"], leaves["v"], leaves.get("key_bias"), *rest[:5], list(rest[5] or (1, 1)),
        draw.options["scale"],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_reference_is_twice_differentiable_and_maps(seed):
    draw = Draw(3000 + seed, (4, 6))
    draw.batch, draw.heads, draw.queries, draw.keys, draw.size, draw.value_size = 2, 1, 3, 5, 2, 2
    draw.dtype = torch.float64
    inputs = {n: torch.randn(2, n_rows, 1, 2, dtype=torch.float64) for n, n_rows in (("q", 3), ("k", 5), ("v", 5))}
    inputs["key_bias"] = torch.randn(2, 5, dtype=torch.float64)
    draw.options = {"scale": 0.7, "num_sinks": seed % 2, **draw.window(), **draw.blocks()}
    draw.options["window"] = [12.0, 30.0]
    draw.options["q_time"], draw.options["k_time"] = torch.arange(3) * 9, torch.arange(5) * 7
    rest = [draw.options.get(n) for n in ("num_sinks", "q_time", "k_time", "window", "block_index", "block_size")]
    rest[4] = None if seed < 2 else draw.options["block_index"]
    leaves = [x.requires_grad_() for x in inputs.values()]

    def call(*args):
        out, lse = reference_of(dict(zip(inputs, args, strict=True)), rest, draw)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    if rest[4] is None:  # the check of a block index reads it
        stacked = [torch.stack([x, 2 * x]) for x in leaves]
        mapped = torch.vmap(call)(*stacked)
        torch.testing.assert_close([m[1] for m in mapped], list(call(*(2 * x for x in leaves))))


# --- Triton ---


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", range(10))
def test_triton_loads_nothing_that_no_query_of_the_tile_sees(seed, device):
    """Of keys that nobody sees, and queries that see nobody, whether or not others of their tiles do."""
    pytest.importorskip("triton")
    reason = _dispatch.unavailable(OPS["cross_attention"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)
    draw = Draw(4000 + seed, (40, 150))
    kind = seed % 3
    draw.options = {"scale": 0.3, "num_sinks": draw.choice([0, min(2, draw.keys)])}
    draw.inputs.pop("key_bias", None)
    if kind != 1:
        first = draw.randint(0, draw.keys // 2)
        q_time, k_time = torch.arange(draw.queries) % 7 + first, torch.arange(draw.keys)
        if draw.random() < 0.5:
            k_time = k_time[torch.randperm(draw.keys)]
        draw.options |= {"q_time": q_time, "k_time": k_time, "window": (draw.randint(1, 9), draw.randint(0, 9))}
        draw.options["q_time"][:: draw.randint(2, 9)] = 10**6  # which see sinks alone
    if kind != 0:
        draw.options |= draw.blocks()
    seen = draw.seen()
    unseen, blind = ~seen.any(2), ~seen.any(3)
    dirty = {n: x.clone() for n, x in draw.inputs.items()}
    grads = [g.clone() for g in draw.grads]
    for name, rows in (("q", blind), ("k", unseen), ("v", unseen)):
        dirty[name].transpose(1, 2)[rows] = draw.choice([NAN, INF])
    grads[0].transpose(1, 2)[blind], grads[1][blind] = NAN, NAN
    move = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in draw.options.items()}
    draw.options = move
    got, clean = (
        run(draw, {n: x.to(device) for n, x in i.items()}, [x.to(device) for x in g], "triton")
        for i, g in ((dirty, grads), (draw.inputs, draw.grads))
    )
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), got, clean, strict=True):
        assert torch.equal(a, b), name
