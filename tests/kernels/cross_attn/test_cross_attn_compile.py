"""cross_attention in graphs of torch.compile whose options change: no new graph for a new value."""

import math
import random

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vidmem_kernels import cross_attention

INF = math.inf
Q, K, V = (torch.randn(2, n, 2, 4, generator=torch.Generator().manual_seed(n)) for n in (8, 9, 9))
TIMES = {"q_time": torch.arange(8), "k_time": torch.arange(9)}
BLOCKS = {"block_index": torch.zeros(2, 1, 4, 2, dtype=torch.int32), "block_size": (2, 3)}
NAMES = ("window", "scale", "num_sinks", "key_bias")


def call(q, k, v, rest, window, scale, num_sinks, key_bias):
    return cross_attention(
        q, k, v, **rest, window=window, scale=scale, num_sinks=num_sinks, key_bias=key_bias, return_lse=True
    )


def graphs(calls, rest, dynamic=None, backend="aot_eager"):
    """How many graphs the calls have made, after each; results and gradients are compared with eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    found = []
    for options in calls:
        results = []
        for function in (compiled, call):
            leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
            out, lse = function(*leaves, rest, *(options[name] for name in NAMES))
            grads = torch.autograd.grad((out * out).sum() + lse.exp().sum(), leaves)
            results.append((out, lse, *grads))
        assert all(map(torch.equal, *results)), options
        found.append(counter.frame_count)
    return found


def draw(rng, kind):
    def number(low, high):
        return {"int": rng.randint(low + 2, high), "float": rng.uniform(low, high)}[kind]

    return {
        "window": tuple(rng.choice([INF, number(0, 9)]) if kind == "float" else number(0, 9) for _ in range(2)),
        "scale": number(0, 4),
        "num_sinks": rng.randint(2, 9),
        "key_bias": torch.randn(2, 9),
    }


@pytest.mark.parametrize("kind", ["int", "float"])
@pytest.mark.parametrize("rest", [TIMES, {**TIMES, **BLOCKS}], ids=["window", "window and blocks"])
def test_new_values_make_no_new_graph(kind, rest):
    """Of all options at once, more often than torch would compile anew. Two graphs: torch takes the first values of
    a call for constants until they change, and with the second ones infinity is one of many floats."""
    rng = random.Random(kind)
    calls = [draw(rng, kind) for _ in range(14)]
    if kind == "float":  # no infinity: torch keeps the graph of one
        calls[0]["window"], calls[1]["window"] = (1.5, 2.5), (0.75, 3.5)
    found = graphs(calls, rest)
    assert found[1:] == [2] * (len(calls) - 1), found
    assert graphs(calls[1:], rest, dynamic=True) == [1] * (len(calls) - 1)


@pytest.mark.parametrize("name", NAMES)
def test_one_option_that_changes(name):
    rng = random.Random(name)
    fixed = draw(rng, "float") | {"window": (2.0, 1.0)}
    calls = [fixed | {name: draw(rng, "float")[name]} for _ in range(10)]
    if name == "window":
        calls[0][name], calls[1][name] = (1.5, 2.5), (0.75, 3.5)
    found = graphs(calls, TIMES)
    assert max(found) <= 2, found


def test_options_that_stay_are_constants_of_the_graph():
    """So that a graph has no tensor on the CPU, which would keep CUDA graphs from it."""
    seen = []

    def keep(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph

    torch._dynamo.reset()
    options = {"window": (2.5, INF), "scale": 0.3, "num_sinks": 1, "key_bias": None}
    compiled = torch.compile(call, fullgraph=True, backend=keep)
    for _ in range(3):
        compiled(Q, K, V, TIMES, *options.values())
    assert len(seen) == 1
    assert not any("symbolic" in target or "zeros" in target for target in seen[0])


@pytest.mark.parametrize("window", [(-1.0, 0.0), (math.nan, 0.0), (0.0, -INF)])
def test_a_bad_window_is_refused_in_a_graph_too(window):
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for good in ((1.5, 2.5), (2.5, 3.5), (3.5, 4.5)):
        compiled(Q, K, V, TIMES, good, 0.5, 0, None)
    with pytest.raises(Exception, match="window must hold two numbers of at least 0"):
        compiled(Q, K, V, TIMES, window, 0.5, 0, None)


def test_autocast_with_values_that_change():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for scale in (0.1, 0.2, 0.3, 0.4):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, expected = (f(Q, K, V, TIMES, (2.0, 1.0), scale, 0, None) for f in (compiled, call))
        assert got[0].dtype == torch.bfloat16
        assert all(map(torch.equal, got, expected))
    assert counter.frame_count == 2
