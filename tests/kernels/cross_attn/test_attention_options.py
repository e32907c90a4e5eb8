"""Masks, batches of 1, grouped queries, causal sinks, rows of 8 bits and dtypes of results, drawn together, against a
plain computation in torch that shares nothing with them."""

import math
import random

import pytest
import torch
from torch import Tensor

from vidmem_kernels import _dispatch, cross_attention, quantize_rows, testing
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import HALF, product

INF = math.inf
TENSORS = ("q", "k", "v", "key_bias", "k_scale", "v_scale")  # those with gradients


def dense(a, dtype):
    """(out, lse) of a call from its whole matrix of scores; factors of products are rounded to a half dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    batch, queries, heads, size = a["q"].shape
    keys, group = a["k"].shape[1], heads // a["k"].shape[2]

    def rows(name):
        x, scale = a[name].to(wide), a.get(f"{name}_scale")
        x = x if scale is None else x * scale[..., None, None].to(wide)
        return x.expand(batch, -1, -1, -1).transpose(1, 2).repeat_interleave(group, 1)

    def by_head(x, axis=1):  # of a head of queries, of keys, or of all
        return x if x.shape[axis] in (1, heads) else x.repeat_interleave(group, axis)

    scale = a.get("scale")
    scores = product(a["q"].to(wide).transpose(1, 2), rows("k").mT, dtype) * (size**-0.5 if scale is None else scale)
    if "key_bias" in a:
        bias = a["key_bias"] if a["key_bias"].dim() == 3 else a["key_bias"].unsqueeze(1)
        scores = scores + by_head(bias).unsqueeze(2).to(wide)
    seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    causal = seen
    if "window" in a:
        at, when = a["q_time"].expand(batch, -1)[:, None, :, None], a["k_time"].expand(batch, -1)[:, None, None]
        causal = when <= at + a["window"][1]
        seen = seen & (at - a["window"][0] <= when) & causal
    if "block_index" in a:
        (rows_of, columns), index = a["block_size"], by_head(a["block_index"]).expand(batch, heads, -1, -1)
        block = torch.arange(keys) // columns
        listed = (index.unsqueeze(-1) == torch.arange(-(-keys // columns))).any(3)
        seen = seen & listed[:, :, torch.arange(queries) // rows_of][..., block]
    sink = torch.arange(keys) < a.get("num_sinks", 0)
    seen = seen | (sink & causal if a.get("causal_sinks") else sink)
    if "key_mask" in a:
        seen = seen & a["key_mask"][:, None, None]
    scores = scores.masked_fill(~seen, -INF)
    none = ~(scores > -INF).any(3, keepdim=True)
    weight = scores.masked_fill(none, 0).softmax(3).masked_fill(none, 0)
    lse = scores.masked_fill(none, 0).logsumexp(3).masked_fill(none.squeeze(3), -INF)
    out = product(weight, rows("v"), dtype).transpose(1, 2)
    return out.to(a.get("out_dtype") or dtype) if dtype != torch.float64 else out, lse


def drawn(rng, dtype, small=False, **fixed):
    """Arguments of any sizes and options; `fixed` says of some options that they are there, or not.

    In half precision of not too few numbers, for a budget is derived from the largest errors of two computations.
    """

    def has(name, chance):
        return fixed.get(name, rng.random() < chance)

    batch, key_heads, group = rng.randint(1, 3), rng.randint(1, 2), rng.choice([1, 2, 3])
    if small:
        batch, key_heads = min(batch, 2), 1
    fewest = (16, 40) if dtype in HALF else (0, 1)
    queries, keys, heads = rng.randint(fewest[0], 33), rng.randint(fewest[1], 70), key_heads * group
    one = lambda: rng.choice([1, batch])  # noqa: E731
    size, value_size, shared = rng.randint(1, 20), rng.randint(1, 20), one()
    a = {
        "q": (torch.randn(batch, queries, heads, size) / 2).to(dtype),
        "k": torch.randn(shared, keys, key_heads, size).to(dtype),
        "v": torch.randn(shared, keys, key_heads, value_size).to(dtype),
    }
    if has("scales", 0.4):
        for name in ("k", "v"):
            kind = torch.int8 if batch % 2 else torch.float8_e4m3fn
            rows, scale = quantize_rows(a[name].float().flatten(2), kind)
            a |= {name: rows.view(a[name].shape), f"{name}_scale": scale}
    if has("bias", 0.4):
        shape = (one(), keys) if rng.random() < 0.4 else (one(), rng.choice([heads, key_heads]), keys)
        a["key_bias"] = torch.randn(shape).to(rng.choice([dtype, torch.float32]))
        a["key_bias"][..., ::5] = -INF
    if has("mask", 0.4):
        a["key_mask"] = torch.rand(one(), keys) < 0.7
    if has("window", 0.5):
        for name, length in (("q_time", queries), ("k_time", keys)):
            shape = rng.choice([(length,), (one(), length)])
            a[name] = torch.randint(0, 20, shape).sort(-1).values.to(rng.choice([torch.int64, torch.float32]))
        a["window"] = rng.choice([0, 2.5, 6, INF]), rng.choice([0, 1.5, INF])
        a["causal_sinks"] = rng.random() < 0.7
    if has("sinks", 0.5):
        a["num_sinks"] = rng.randint(0, min(keys, 9))
    if has("blocks", 0.4):
        a["block_size"] = rng.choice([(4, 8), (16, 16), (7, 5)])
        rows, blocks = (-(-n // s) for n, s in zip((queries, keys), a["block_size"], strict=True))
        shape = one(), rng.choice([1, key_heads, heads]), rows, rng.randint(0, 3)
        a["block_index"] = torch.randint(-1, blocks, shape)
    if has("wide", 0.4):
        a["out_dtype"] = torch.float32
    if rng.random() < 0.3:
        a["scale"] = rng.choice([0.3, 1.0])
    return a


def leaves(a, dtype=None):
    """The call with leaves of the graph for what has a gradient, in a dtype of their own or another one."""
    found = dict(a)
    for name in TENSORS:
        if name in a and testing.is_differentiable(a[name]):
            found[name] = a[name].detach().to(dtype or a[name].dtype).requires_grad_()
    return found


def with_gradients(f, a, dtype=None):
    """Results, and gradients of a projection of them by name."""
    a = leaves(a, dtype)
    out, lse = f(a)
    torch.manual_seed(3)
    seen = lse > -INF
    weight = torch.randn(out.shape).bfloat16().float()  # no dtype of out rounds it
    total = (out.float() * weight).sum() + (lse.masked_fill(~seen, 0) * torch.randn(lse.shape)).sum()
    named = [name for name in TENSORS if isinstance(a.get(name), Tensor) and a[name].requires_grad]
    grads = torch.autograd.grad(total, [a[n] for n in named], allow_unused=True)
    named_grads = zip(named, grads, strict=True)
    return (out.detach(), lse.detach()), {n: torch.zeros_like(a[n]) if g is None else g for n, g in named_grads}


def run(backend):
    return lambda a: cross_attention(**a, return_lse=True, backend=backend)


def worse(first, second, exact):
    """Of two computations the one that errs more."""

    def error(x):
        return (x.double() - exact.double()).nan_to_num(0, 0, 0).abs().amax() if x.numel() else 0

    return first if error(first) >= error(second) else second


def check(a, backend):
    """In half precision within the budget of the composition of torch. Gradients of q, k, v and the bias also contain
    the rounding of lse and out: their budget may be that of the reference with gradients by the op."""
    dtype = a["q"].dtype
    got, grads = with_gradients(run(backend), a)
    exact, exact_grads = with_gradients(lambda a: dense(a, torch.float64), a, torch.float64)
    compared = {"out": (got[0], exact[0]), "lse": (got[1], exact[1])}
    compared |= {f"gradient of {n}": (grads[n], exact_grads[n]) for n in grads}
    if dtype in HALF:
        rough, rough_grads = with_gradients(lambda a: dense(a, dtype), a)
        _, other_grads = with_gradients(run("reference"), a)
        budgets = [*rough]
        for n, plain in rough_grads.items():
            budgets.append(plain if n.endswith("_scale") else worse(plain, other_grads[n], exact_grads[n]))
    else:
        budgets = [None] * len(compared)
    for (name, (mine, true)), plain in zip(compared.items(), budgets, strict=True):
        options = sorted(set(a) - {"q", "k", "v"})
        what = f"{name} of {tuple(a['q'].shape)} and {tuple(a['k'].shape)} with {options} on {backend}"
        if dtype in HALF:
            testing.assert_within_budget(mine, plain, true, what)
        else:
            largest = max(1.0, true.masked_fill(true.isinf(), 0).abs().max().item()) if true.numel() else 1.0
            same = {"rtol": 1e-4, "atol": 2e-5 * largest, "check_dtype": False}
            torch.testing.assert_close(mine, true, **same, msg=lambda m, w=what: f"{w}: {m}")


BACKENDS = [b for b in ("cpu", "reference") if _dispatch.unavailable(OPS["cross_attention_mixed"], b, "cpu") is None]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_drawn(dtype):
    for seed in range(24):
        torch.manual_seed(seed)
        check(drawn(random.Random(f"{seed} {dtype}"), dtype), BACKENDS[seed % len(BACKENDS)])


@pytest.mark.long
@pytest.mark.parametrize("option", ["scales", "blocks", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_drawn_in_triton(option, dtype):
    """On its interpreter."""
    if reason := _dispatch.unavailable(OPS["cross_attention_mixed"], "triton", "cpu"):
        pytest.skip(reason)
    torch.manual_seed(5)
    check(drawn(random.Random(f"{option} {dtype}"), dtype, small=True, **{option: True}), "triton")


def check_scales(a, backend):
    """Gradients of scales err by roundings of float32, measured by the terms that they sum and that mostly cancel."""
    scales = {n for n in ("k_scale", "v_scale") if n in a}
    _, grads = with_gradients(run(backend), a)
    _, exact = with_gradients(lambda a: dense(a, torch.float64), a, torch.float64)
    rows = {n: a[n].double() * a[f"{n}_scale"].double()[..., None, None] for n in "kv"}
    _, of_rows = with_gradients(
        lambda x: dense(x, torch.float64), {n: x for n, x in (a | rows).items() if n not in scales}, torch.float64
    )
    for name in sorted(scales):
        terms = (of_rows[name[0]] * a[name[0]].double()).abs().sum((2, 3))
        errors = (grads[name].double() - exact[name]).abs()
        assert (errors <= 2**-18 * (terms + terms.amax())).all(), f"{name} on {backend}: {(errors / terms).max():.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_gradients_of_scales_are_summed_in_float32(dtype):
    for seed in range(8):
        torch.manual_seed(seed)
        check_scales(drawn(random.Random(f"scales {seed} {dtype}"), dtype, scales=True), BACKENDS[seed % len(BACKENDS)])


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.long) for d in (torch.float32, torch.float16))],
    ids=str,
)
def test_gradients_of_scales_are_summed_in_float32_in_triton(dtype):
    """On its interpreter."""
    if reason := _dispatch.unavailable(OPS["cross_attention_mixed"], "triton", "cpu"):
        pytest.skip(reason)
    torch.manual_seed(7)
    a = drawn(random.Random(f"scales {dtype}"), dtype, small=True, scales=True, blocks=False)
    check_scales(a, "triton")
