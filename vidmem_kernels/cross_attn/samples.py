"""Sample inputs of the cross-attention ops."""

import math

import torch

from .. import testing
from .._numerics import accumulate_dtype
from . import api, reference

PLAIN = {
    "key_bias": None, "num_sinks": 0, "q_time": None, "k_time": None, "window": None,
    "block_index": None, "block_size": (2, 3), "scale": 0.5,
}  # fmt: skip


def _cases(make):
    """Yields (label, q, k, v, the other arguments by name)."""

    def qkv(queries=5, keys=7, heads=2, size=4, value_size=4, batch=2):
        return (
            make.randn(batch, queries, heads, size),
            make.randn(batch, keys, heads, size),
            make.randn(batch, keys, heads, value_size),
        )

    def times(*values):
        return torch.tensor(values, dtype=torch.float32, device=make.device)

    bias = make.randn(2, 7)
    blocks = make.randint(-1, 3, (2, 2, 3, 2))
    windowed = {
        "q_time": times(0, 1, 2, 3, 9),
        "k_time": times(0, 0, 1, 1, 2, 2, 3),
        "window": (1.25, 0.5),
    }
    yield "plain", *qkv(), {}
    yield "other Dv, one query", *qkv(1, 9, 3, 5, 2), {"scale": 1.0}
    yield "long", *qkv(40, 70, 1, 8, 8, 1), {}
    yield "key_bias", *qkv(), {"key_bias": bias}
    hidden = make.randn(2, 2, 7, dtype=accumulate_dtype(make.dtype))
    hidden[0, :, 3] = -torch.inf
    yield "key_bias a head, infinite", *qkv(), {"key_bias": hidden}
    yield "window", *qkv(), windowed
    frames = {
        "q_time": torch.arange(10, device=make.device).view(2, 5) // 2,
        "k_time": torch.arange(7, device=make.device, dtype=torch.int32) // 2,
        "window": (math.inf, 0),
    }
    yield "int times a batch, causal, sinks", *qkv(), {**frames, "num_sinks": 2}
    yield "block_index", *qkv(), {"block_index": blocks}
    shared = blocks[:, :1].long()
    yield "int64 blocks for all heads, sinks", *qkv(), {"block_index": shared, "num_sinks": 1}
    together = {**windowed, "key_bias": bias, "block_index": blocks, "num_sinks": 1}
    yield "all together", *qkv(), together
    yield "nothing visible", *qkv(), {"block_index": torch.full_like(blocks, -1)}
    yield "no block", *qkv(), {"block_index": blocks[..., :0], "num_sinks": 3}
    spread = {n: make.strided(t) if isinstance(t, torch.Tensor) else t for n, t in together.items()}
    yield "strided", *map(make.strided, qkv()), spread
    yield "strided, plain", *map(make.strided, qkv()), {}
    far = {"q_time": torch.arange(70, device=make.device), "k_time": torch.arange(230, device=make.device) // 3}
    some = {"key_bias": make.randn(1, 2, 230), "num_sinks": 2, "window": (20, 1.5)}
    yield "long, window, sinks", *qkv(70, 230, 2, 7, 9, 1), {**far, **some}
    yield "no key", *qkv(keys=0), {}
    yield "no query", *qkv(0), {"key_bias": bias}
    yield "no batch", *qkv(batch=0), {"key_bias": bias[:0]}


@testing.sample_inputs("cross_attention")
def cross_attention(make):
    for label, q, k, v, options in _cases(make):
        yield label, (q, k, v, *{**PLAIN, **options}.values())


def _quantized(x, dtype):
    """8-bit rows (B, Lk, H, C) with the memory layout of x, and their scales (B, Lk)."""
    x = x.detach().to(torch.float32)
    largest = x.flatten(2).abs().amax(2) if x.numel() else x.new_zeros(x.shape[:2])
    scale = largest / (127 if dtype == torch.int8 else 448)
    rows = x / scale.clamp(min=1e-30)[:, :, None, None]
    rows = (rows.round() if dtype == torch.int8 else rows).to(dtype)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device).copy_(rows), scale


_MIXED = {  # the cases that 8-bit rows, or results of another dtype, may affect
    "plain": None,
    "key_bias a head, infinite": torch.float8_e4m3fn,
    "int64 blocks for all heads, sinks": None,
    "all together": None,
    "strided": torch.int8,
    "long, window, sinks": None,
    "no key": torch.int8,
    "no batch": torch.float8_e4m3fn,
}


@testing.sample_inputs("cross_attention_mixed")
def cross_attention_mixed(make):
    for label, q, k, v, options in _cases(make):
        if label not in _MIXED:
            continue
        options, kind = {**PLAIN, **options}, _MIXED[label]
        k_scale = v_scale = None
        if kind is not None:
            (k, k_scale), (v, v_scale) = _quantized(k, kind), _quantized(v, kind)
        sums = kind is None or "bias" in label
        out_dtype = accumulate_dtype(make.dtype) if sums else make.dtype
        yield f"{label}, {kind}", (q, k, v, k_scale, v_scale, *options.values(), out_dtype)


@testing.sample_inputs("cross_attention_backward")
def cross_attention_backward(make):
    for label, q, k, v, options in _cases(make):
        key_bias, *rest = {**PLAIN, **options}.values()
        out, lse = reference.cross_attention(q, k, v, key_bias, *rest)
        grad_lse = None if options == {} else make.randn(*lse.shape, dtype=lse.dtype)
        yield label, (make.randn(*out.shape), grad_lse, q, k, v, key_bias, out, lse, *rest)


def _states(make):
    """Yields (label, outs, lses)."""
    wide = accumulate_dtype(make.dtype)

    def states(count, *shape):
        batch, length, heads, _ = shape
        lses = [make.randn(batch, heads, length, dtype=wide) for _ in range(count)]
        return [make.randn(*shape) for _ in range(count)], lses

    yield "two", *states(2, 2, 5, 3, 4)
    outs, lses = states(3, 2, 5, 3, 4)
    for out, lse in zip(outs, lses, strict=True):  # row 0 of all, row 1 of the last two
        lse[:, :, 0], out[:, 0] = -torch.inf, 0
    for out, lse in zip(outs[1:], lses[1:], strict=True):
        lse[:, :, 1], out[:, 1] = -torch.inf, 0
    yield "nothing visible", outs, lses
    yield "one", *states(1, 2, 5, 3, 4)
    outs, lses = states(2, 2, 5, 3, 4)
    yield "strided", [make.strided(t) for t in outs], [make.strided(t) for t in lses]
    yield "no query", *states(2, 2, 0, 3, 4)
    yield "no batch", *states(2, 0, 5, 3, 4)


@testing.sample_inputs("merge_attention_states")
def merge_attention_states(make):
    for label, outs, lses in _states(make):
        yield label, (outs, lses)


@testing.sample_inputs("merge_attention_states_backward")
def merge_attention_states_backward(make):
    for label, outs, lses in _states(make):
        out, lse = reference.merge_attention_states(outs, lses)
        grad_lse = None if label == "one" else make.randn(*lse.shape, dtype=lse.dtype)
        yield label, (make.randn(*out.shape), grad_lse, outs, lses, lse)


ATTENTION = ("B Lq H 4", "B Lk H 4", "B Lk H 6")


def attention_tensors(*more):
    """Makes the tensors of `ATTENTION`, and of `more` (functions of Make and sizes)."""

    def make(m, s):
        qkv = [m.randn(s["B"], s[length], s["H"], c) for length, c in (("Lq", 4), ("Lk", 4), ("Lk", 6))]
        return *qkv, *(f(m, s) for f in more)

    return make


def attend(*names, **options):
    """A call of cross_attention with names for the tensors after q, k and v."""
    return lambda q, k, v, *rest: api.cross_attention(q, k, v, **dict(zip(names, rest, strict=True)), **options)


def blocks_of(m, s, heads=None, rows=4):
    return m.randint(-1, -(-s["Lk"] // 3), (s["B"], heads or s["H"], -(-s["Lq"] // rows), s["K"]))


def _bias(m, s):
    return m.randn(s["B"], s["Lk"])


def _q_times(m, s):
    return torch.arange(s["Lq"])


def _k_times(m, s):
    return torch.arange(s["Lk"], dtype=torch.float32).repeat(s["B"], 1) / 2


def _two_states(m, s):
    outs = [m.randn(s["B"], s["L"], s["H"], s["D"]) for _ in range(2)]
    return *outs, *(m.randn(s["B"], s["H"], s["L"], dtype=accumulate_dtype(m.dtype)) for _ in range(2))


testing.public_call("cross_attention", "plain, lse", attend(return_lse=True), *ATTENTION)
testing.public_call(
    "cross_attention", "key_bias", attend("key_bias"), *ATTENTION, "B Lk", make=attention_tensors(_bias)
)
testing.public_call(
    "cross_attention",
    "key_bias a head",
    attend("key_bias", return_lse=True),
    *(*ATTENTION, "B H Lk"),
    make=attention_tensors(lambda m, s: m.randn(s["B"], s["H"], s["Lk"])),
)
testing.public_call(
    "cross_attention",
    "window, sinks",
    attend("q_time", "k_time", window=(1.25, math.inf), num_sinks=1),
    *(*ATTENTION, "Lq", "B Lk"),
    make=attention_tensors(_q_times, _k_times),
    constant=(4,),
    Lk=1,
)
testing.public_call(
    "cross_attention",
    "blocks",
    attend("block_index", block_size=(4, 3), num_sinks=1),
    *(*ATTENTION, "B H Lq/4 K"),
    make=attention_tensors(blocks_of),
    Lk=1,
)
testing.public_call(
    "cross_attention",
    "blocks of all heads",
    attend("block_index", block_size=(4, 3)),
    *(*ATTENTION, "B 1 Lq/4 K"),
    make=attention_tensors(lambda m, s: blocks_of(m, s, heads=1)),
)
testing.public_call(
    "cross_attention",
    "all",
    attend(
        "key_bias",
        "q_time",
        "k_time",
        "block_index",
        window=(2, 1),
        num_sinks=1,
        block_size=(4, 3),
        scale=0.5,
        return_lse=True,
    ),
    *(*ATTENTION, "B Lk", "Lq", "B Lk", "B H Lq/4 K"),
    make=attention_tensors(_bias, _q_times, _k_times, blocks_of),
    constant=(5,),
    Lk=1,
)


def _one_memory(m, s):
    k, v = (m.randn(1, s["Lk"], 2, c) for c in (4, 6))
    return m.randn(s["B"], s["Lq"], 4, 4), k, v, m.randint(0, 2, (1, s["Lk"])) > 0


def _in_8_bits(m, s):
    wide = (m.randn(s["B"], s["Lk"], s["H"], c, dtype=torch.float32) for c in (4, 6))
    (k, k_scale), (v, v_scale) = (_quantized(x, torch.int8) for x in wide)
    return m.randn(s["B"], s["Lq"], s["H"], 4), k, v, k_scale, v_scale


testing.public_call(
    "cross_attention",
    "one memory for a batch and groups, mask",
    attend("key_mask", return_lse=True),
    *("B Lq 4 4", "1 Lk 2 4", "1 Lk 2 6", "1 Lk"),
    make=_one_memory,
)
testing.public_call(
    "cross_attention",
    "causal sinks",
    attend("q_time", "k_time", window=(1.25, 0), num_sinks=2, causal_sinks=True),
    *(*ATTENTION, "Lq", "B Lk"),
    make=attention_tensors(_q_times, _k_times),
    constant=(4,),
    Lk=2,
)
testing.public_call(
    "cross_attention",
    "blocks of their own lengths",
    lambda q, k, v, index, sizes: api.cross_attention(
        q, k, v, block_index=index, block_size=(3, 3), block_sizes=sizes, num_sinks=1, return_lse=True
    ),
    # Two heads, because ranks that share the heads of a call gather all of them.
    *("B 7 2 4", "B 7 2 4", "B 7 2 6", "B 2 3 2", "3"),
    make=lambda m, s: (
        *(m.randn(s["B"], 7, 2, channels) for channels in (4, 4, 6)),
        m.randint(-1, 3, (s["B"], 2, 3, 2)),
        torch.tensor([3, 2, 2], device=m.device),
    ),
)
testing.public_call(
    "cross_attention",
    "rows of 8 bits",
    attend("k_scale", "v_scale"),
    *(*ATTENTION, "B Lk", "B Lk"),
    make=_in_8_bits,
    constant=(3, 4),
)
testing.public_call(
    "merge_attention_states",
    "two",
    lambda a, b, c, d: api.merge_attention_states([a, b], [c, d]),
    *("B L H D", "B L H D", "B H L", "B H L"),
    make=_two_states,
)
