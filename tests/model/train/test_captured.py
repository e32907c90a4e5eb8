"""Steps as CUDA graphs: real ones on a GPU, on the CPU stand-ins that run the pass again when replayed."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from training_helpers import curve, train

from vidmem_model.train import loop, step
from vidmem_model.train.step import CapturedPass, Pass


class Graph:
    """Stands in for a CUDA graph: what it has captured is run again."""

    run: CapturedPass
    captured = replayed = 0

    def replay(self):
        Graph.replayed += 1
        given, loss = next(entry[1:] for entry in Graph.run._graphs.values() if entry[0] is self)
        loss.copy_(Pass.__call__(Graph.run, given))


@pytest.fixture
def graphs(monkeypatch):
    """Let a training on the CPU capture such graphs; the arguments of its captures."""
    captures = []

    @contextlib.contextmanager
    def capture(graph, **arguments):
        captures.append(arguments)
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    def captured(objective, config, dtype, device):
        Graph.run = CapturedPass(objective, dtype, device)
        return Graph.run

    monkeypatch.setattr(Graph, "replayed", 0)
    monkeypatch.setattr(loop, "_pass", captured)
    for name, stand_in in {
        "CUDAGraph": Graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": capture,
        "graph_pool_handle": lambda: "pool",
    }.items():
        monkeypatch.setattr(step.torch.cuda, name, stand_in)
    return captures


def numbers(folder):
    return [[float(x) for x in row.split(",")] for row in curve(folder)[1:]]


def close(ours, theirs):
    for one, two in zip(numbers(ours), numbers(theirs), strict=True):
        assert one == pytest.approx(two, rel=2e-3)  # prompts are padded further, and rounding grows with the steps


def test_a_captured_training_is_the_same(graphs, tmp_path):
    train(tmp_path / "captured", steps=8, cuda_graph=True, draw_ahead=1)
    assert graphs == [{"pool": "pool", "capture_error_mode": "thread_local"}], "all batches have one shape"
    assert Graph.replayed == 8
    speed = json.loads((tmp_path / "captured" / "speed.json").read_text())
    assert speed["cuda_graph"] is True and speed["flops_per_step"] > 1e6 and speed["flops_per_second"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_pass", lambda objective, config, dtype, device: Pass(objective, dtype, device))
        train(tmp_path / "plain", steps=8)
    close(tmp_path / "captured", tmp_path / "plain")


def test_what_cannot_be_captured_is_launched(graphs, tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def fails(graph, **arguments):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(step.torch.cuda, "graph", fails)
    train(tmp_path / "captured", steps=5, cuda_graph=True)
    assert capsys.readouterr().err.count("cannot be captured as a CUDA graph (operation not permitted when") == 1
    assert json.loads((tmp_path / "captured" / "speed.json").read_text())["cuda_graph"] is False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_pass", lambda objective, config, dtype, device: Pass(objective, dtype, device))
        train(tmp_path / "plain", steps=5)
    close(tmp_path / "captured", tmp_path / "plain")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_on_a_gpu(tmp_path):
    given = {"steps": 30, "device": "cuda", "draw_ahead": 2}
    train(tmp_path / "plain", **given)
    train(tmp_path / "captured", cuda_graph=True, **given)
    speed = json.loads((tmp_path / "captured" / "speed.json").read_text())
    assert speed["cuda_graph"] is True and speed["flops_per_second"] > 0
    for one, two in zip(numbers(tmp_path / "captured"), numbers(tmp_path / "plain"), strict=True):
        assert one == pytest.approx(two, rel=0.05)
