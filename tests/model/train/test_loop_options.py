"""Options of the loop that do not change the result: time limits and batches drawn ahead; and starting from weights."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import time

import pytest
import torch
from training_helpers import MODEL, QUERIES, TRAIN, curve, latents, train

from vidmem_model.errors import UserError
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.train import checkpoint
from vidmem_model.train import loop as training
from vidmem_model.train.ahead import ahead
from vidmem_model.train.curve import read_curve
from vidmem_model.train.loop import FlowMatching, schedule
from vidmem_model.train.retrieval import FrameQueries
from vidmem_model.train.step import change_tensors, tensors


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_batches_drawn_ahead_come_in_order(threads):
    draw, seen = random.Random(threads), []

    def batch(step):
        time.sleep(draw.random() / 200)
        seen.append(threading.current_thread())
        if step == 17:
            raise ValueError("no such batch")
        return step

    came = []
    with pytest.raises(ValueError, match="no such batch"), ahead(batch, range(3, 30), threads) as batches:
        came.extend(batches)
    assert came == list(range(3, 17))
    assert (threading.current_thread() in seen) == (threads == 0)
    assert len(seen) <= 15 + 2 * threads, "no thread runs far ahead"


def test_a_training_that_stops_draws_no_more():
    drawn = []
    with ahead(drawn.append, range(1000), 2) as batches:
        next(batches)
    assert len(drawn) < 10


def test_drawing_ahead_changes_nothing(tmp_path):
    one = train(tmp_path / "one", steps=6).state_dict()
    two = train(tmp_path / "two", steps=6, draw_ahead=2).state_dict()
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_time_is_up_and_the_run_goes_on(tmp_path, monkeypatch):
    """Calls that stop after some steps each, and one that does not: the same curve and weights."""
    whole = train(tmp_path / "whole").state_dict()
    clock, calls = iter(range(1000)), 0
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    while True:
        calls += 1
        parts = train(tmp_path / "parts", max_seconds=float(random.Random(calls).randint(2, 5)))
        last = checkpoint.step_of(checkpoint.newest(tmp_path / "parts" / "checkpoints"))
        assert last == read_curve(tmp_path / "parts" / "curve.csv")[-1]["step"]
        if last == TRAIN.steps:
            break
    assert calls > 2 and curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.state_dict().items())


def test_speed_is_written(tmp_path):
    train(tmp_path, steps=2)
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert speed["steps"] == [0, 2] and speed["timed_steps"] == 2 and speed["steps_per_second"] > 0
    assert (speed["cuda_graph"], speed["flops_per_step"], speed["precision"]) == (False, None, "float32")
    train(tmp_path, steps=2)
    assert json.loads((tmp_path / "speed.json").read_text()) == speed, "a run that has all its steps is not timed"


def trained_weights(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def test_beginning_with_weights_and_a_step(tmp_path):
    """Steps continue, the learning rate warms up again, and a later kill changes nothing."""
    settings = {"schedule": "constant", "checkpoint_every": 2}
    model = train(tmp_path / "before", steps=6, **settings)
    weights = trained_weights(model)
    for name in ("whole", "parts"):
        checkpoint.begin_with(tmp_path / name / "checkpoints", 6, weights)
    whole = train(tmp_path / "whole", steps=11, **settings)
    rows = read_curve(tmp_path / "whole" / "curve.csv")
    assert [row["step"] for row in rows] == [7, 8, 9, 10, 11]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, 3e-3, 3e-3, 3e-3])
    batch = FrameQueries(latents(), MODEL.encoders, QUERIES)(6, range(4))
    assert rows[0]["loss"] == pytest.approx(FlowMatching(model)(batch).item(), rel=1e-6)
    assert checkpoint.first_step(tmp_path / "whole" / "checkpoints") == 6
    train(tmp_path / "parts", steps=11, max_seconds=1e-9, **settings)
    parts = train(tmp_path / "parts", steps=11, **settings)
    assert curve(tmp_path / "whole") == curve(tmp_path / "parts")
    assert all(torch.equal(p, parts.state_dict()[n]) for n, p in whole.state_dict().items())
    train(tmp_path / "whole", steps=1, restart=True)
    assert checkpoint.first_step(tmp_path / "whole" / "checkpoints") == 0


def test_beginning_with_what_does_not_fit(tmp_path):
    weights = trained_weights(train(tmp_path / "before", steps=1))
    name = random.Random(0).choice(sorted(weights))
    wrong = ({**weights, name: torch.zeros(3, 5, 7)}, {n: w for n, w in weights.items() if n != name})
    for number, each in enumerate((*wrong, {**weights, "more": torch.zeros(1)})):
        checkpoint.begin_with(tmp_path / str(number) / "checkpoints", 4, each)
        with pytest.raises(
            UserError, match=r"beginning.safetensors: holds the weights of another model; give --restart"
        ):
            train(tmp_path / str(number), steps=6)
    file = tmp_path / "0" / "checkpoints" / "beginning.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"beginning.safetensors: cannot be read; give --restart to discard"):
        train(tmp_path / "0", steps=6)


def test_the_rate_rises_from_where_there_are_no_moments():
    config = dataclasses.replace(TRAIN, steps=100, warmup_steps=10)
    for at in (0, 25, 60):
        rates = [schedule(config, step, at) / (schedule(config, step) if step >= 10 else 1) for step in range(at, 100)]
        assert rates[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
        assert at == 0 or rates[10:] == pytest.approx([1.0] * len(rates[10:]))


def test_a_graph_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="cuda_graph requires one process with a CUDA device, got a training on cpu"):
        train(tmp_path, cuda_graph=True)


def test_fixed_batches_hold_tensors_of_one_shape_and_mean_the_same():
    """What a graph is captured of: whatever the prompts say, and with the same loss."""
    torch.manual_seed(0)
    objective = FlowMatching(MemoryModel(MODEL))
    for weight in objective.parameters():  # of a new model the text changes nothing
        torch.nn.init.normal_(weight, std=0.1)
    draw, shapes, lengths = FrameQueries(latents(), MODEL.encoders, QUERIES), set(), set()
    for step in range(6):
        batch = draw(step, [0])
        fixed = objective.fixed(batch)
        lengths.add(objective.model.text(batch.prompts)[0].shape[1])
        shapes.add(tuple(tensor.shape for tensor in tensors(fixed)))
        assert not any(isinstance(part, str) for part in fixed.prompts)
        torch.testing.assert_close(objective(fixed), objective(batch), rtol=1e-5, atol=1e-6)
    assert len(shapes) == 1 and len(lengths) > 1


def test_tensors_of_a_batch_are_changed_where_they_are():
    batch = FrameQueries(latents(), MODEL.encoders, QUERIES)(0, range(2))
    doubled = change_tensors(batch, lambda tensor: 2 * tensor)
    assert type(doubled) is type(batch) and type(doubled.history) is type(batch.history)
    assert doubled.prompts == batch.prompts and doubled.window is None
    pairs = list(zip(tensors(batch), tensors(doubled), strict=True))
    assert len(pairs) == 6 and all(torch.equal(2 * one, two) for one, two in pairs)
