"""A killed run resumes exactly: the same curve and weights, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from paths import HELPERS
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from training_helpers import MODEL, TRAIN, curve, train

from vidmem_model.errors import UserError
from vidmem_model.model.config import PRESETS, EncoderConfig, ModelConfig
from vidmem_model.train import checkpoint, distributed
from vidmem_model.train import loop as training
from vidmem_model.train.config import TrainConfig
from vidmem_model.train.curve import Curve
from vidmem_model.train.retrieval import PretrainConfig
from vidmem_model.train.run import run_settings

PROGRAM = HELPERS / "training_helpers.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder and weights of a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder).state_dict()


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_kill_in_a_step(whole, tmp_path):
    at = random.SystemRandom().randrange(5, 12)
    killed = subprocess.run([sys.executable, PROGRAM, tmp_path, "12", str(at), "4"], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "checkpoints")) == at // 4 * 4
    # Rows after the checkpoint were written when the log was due; they must not stay.
    with (tmp_path / "curve.csv").open("a") as file:
        file.write("12,9,9,9,9\n")
    model = train(tmp_path)
    assert curve(tmp_path) == curve(whole[0]), f"killed at {at}"
    assert same(model.state_dict(), whole[1]), f"killed at {at}"


def test_kill_after_a_linear_start(tmp_path):
    command = [sys.executable, PROGRAM, tmp_path / "killed", "8", "6", "4", "linear"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "killed" / "checkpoints")) == 4
    model = train(tmp_path / "killed", steps=8, linear=True)
    reference = train(tmp_path / "whole", steps=8, linear=True).state_dict()
    assert curve(tmp_path / "killed") == curve(tmp_path / "whole")
    assert same(model.state_dict(), reference)


def test_kill_at_any_moment(tmp_path):
    """SIGKILL from outside, in a run that writes a checkpoint after every step."""
    rarely = {"steps": 16, "checkpoint_every": 100}
    reference = train(tmp_path / "whole", **rarely).state_dict()
    folder = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, PROGRAM, folder, "16", "-1", "1"], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while checkpoint.newest(folder / "checkpoints") is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(random.SystemRandom().random())
    finally:
        child.kill()
        child.wait()
    done = checkpoint.step_of(checkpoint.newest(folder / "checkpoints"))
    assert len(curve(folder)) >= 1 + done, "the curve is written before the checkpoint"
    model = train(folder, **rarely)
    assert curve(folder) == curve(tmp_path / "whole"), f"killed after {done}"
    assert same(model.state_dict(), reference), f"killed after {done}"


def test_checkpoints_hold_the_last_two(whole):
    names = sorted(os.listdir(whole[0] / "checkpoints"))
    assert names == ["step-00000008", "step-00000012"]


def test_a_finished_run_is_not_run_again(whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    monkeypatch.setattr(training.FlowMatching, "forward", None)
    assert same(train(folder).state_dict(), whole[1])
    assert curve(folder) == curve(whole[0])


def test_another_setting_is_refused_until_restart(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    with pytest.raises(UserError, match=r"holds a run with lr=0.003, this run has lr=0.001; .*--restart"):
        train(folder, lr=1e-3)
    train(folder, steps=2, lr=1e-3, restart=True)
    assert len(curve(folder)) == 1 + 2
    assert curve(folder)[1] != curve(whole[0])[1]
    assert os.listdir(folder / "checkpoints") == ["step-00000002"]


@pytest.mark.parametrize("seed", range(5))
def test_a_setting_that_is_not_named_has_its_default(whole, tmp_path, seed, monkeypatch):
    """Runs of older versions lack keys of newer ones, at any depth."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        model: ModelConfig
        optimisation: TrainConfig
        output: str = "here"

    draw = random.Random(seed)
    encoders = (*PRESETS["tiny"].encoders, EncoderConfig(branches="lr"))
    config = Config(dataclasses.replace(PRESETS["tiny"], encoders=encoders), TRAIN)
    settings = run_settings(config)
    assert "model.encoders.1.branches" in settings and "output" not in settings
    named = {key: value for key, value in settings.items() if settings.defaults.get(key, ...) != value}
    droppable = sorted(settings.keys() - named.keys())
    dropped = draw.sample(droppable, draw.randrange(1, len(droppable)))
    before = {key: value for key, value in settings.items() if key not in dropped}
    monkeypatch.setattr(checkpoint, "newest", lambda folder: tmp_path)
    monkeypatch.setattr(checkpoint, "load", lambda path, state: 7)
    monkeypatch.setattr(checkpoint, "settings_of", lambda path: before)
    assert training._resume(tmp_path, {}, settings, False) == 7
    # As a list of mappings, which is how checkpoints of before hold the encoders.
    monkeypatch.setattr(
        checkpoint, "settings_of", lambda path: {"model.encoders": json.loads(json.dumps([{}, {"branches": "lr"}]))}
    )
    with pytest.raises(UserError, match="holds a run with "):
        training._resume(tmp_path, {}, settings, False)
    key = draw.choice(dropped)
    for changed in ({key: "other"}, {"model.new.key": 1}, {"model.encoders.2.window": 1}):
        monkeypatch.setattr(checkpoint, "settings_of", lambda path, changed=changed: {**before, **changed})
        (name, value) = next(iter(changed.items()))
        with pytest.raises(UserError) as error:
            training._resume(tmp_path, {}, settings, False)
        now = settings.get(name, "not set")
        assert str(error.value) == (
            f"{tmp_path}: holds a run with {name}={value!r}, this run has {name}={now!r}; choose another output, "
            "or --restart to discard it"
        )


def test_seconds_a_step_are_those_of_all_rows(tmp_path):
    """Also with one row per flush, and after resuming."""
    draw = random.Random(0)
    curve, total, step = Curve(tmp_path / "curve.csv", 0), 0.0, 0
    for count in (1, 1, 3, 1, 7, 1):
        times = [draw.uniform(0.1, 9) for _ in range(count)]
        for seconds in times:
            step, total = step + 1, total + seconds
            curve.add(step, torch.tensor(1.0 * step), torch.tensor(1.0), 1e-3, seconds)
        assert curve.flush() == pytest.approx((step - (count - 1) / 2, sum(times) / count))
        assert curve.flush() == pytest.approx((step - (count - 1) / 2, sum(times) / count)), "nothing new"
        curve = Curve(tmp_path / "curve.csv", step) if count == 3 else curve
    assert curve.seconds == pytest.approx(total, abs=1e-2)


def test_damaged_checkpoint_is_one_line(whole, tmp_path):
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    for file in (folder / "checkpoints" / "step-00000012").glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"step-00000012: cannot be read; give --restart to discard"):
        train(folder)


class Calls:
    """What a pickle calls when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(kind, marker):
    write = f"open({str(marker)!r}, 'w').close()"
    if kind == "bytes":  # torch would read these by an unpickler of their own
        return BytesStorageMetadata()
    if kind == "dotted":  # a way through a module that is allowed
        return pickle.PROTO + b"\x04" + b"ctorch.distributed.checkpoint.metadata\nos.system\n."
    return {"eval": Calls(eval, write), "exec": Calls(exec, write), "system": Calls(os.system, f"touch {marker}")}[kind]


@pytest.mark.parametrize("kind", ["eval", "exec", "system", "bytes", "dotted"])
def test_a_checkpoint_calls_nothing(whole, tmp_path, kind):
    folder, marker = shutil.copytree(whole[0], tmp_path / "copy"), tmp_path / "called"
    file = folder / "checkpoints" / "step-00000012" / ".metadata"
    description = pickle.loads(file.read_bytes())
    made = hostile(kind, marker)
    if not isinstance(made, bytes):
        description.state_dict_metadata[next(iter(description.state_dict_metadata))] = made
        made = pickle.dumps(description)
    file.write_bytes(made)
    with pytest.raises(UserError, match=r"step-00000012: cannot be read; give --restart to discard"):
        train(folder)
    assert not marker.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_a_run_after_its_step(whole, tmp_path, number, monkeypatch):
    forward, calls = training.FlowMatching.forward, []

    def interrupting(self, batch):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    monkeypatch.setattr(training.FlowMatching, "forward", interrupting)
    before = signal.getsignal(number)
    with pytest.raises(distributed.Interrupted) as stop:
        train(tmp_path)
    assert (stop.value.step, stop.value.signal) == (6, number)
    assert signal.getsignal(number) is before
    assert len(curve(tmp_path)) == 1 + 6
    model = train(tmp_path)
    assert curve(tmp_path) == curve(whole[0])
    assert same(model.state_dict(), whole[1])


def test_keys_that_are_newer_than_a_run_mean_their_defaults(whole, tmp_path):
    """Missing settings mean defaults: a run resumes without `weight_decay`, but not with another `ema_decay`."""
    folder = shutil.copytree(whole[0], tmp_path / "copy")
    settings = folder / "checkpoints" / "step-00000012" / "settings.json"
    before = json.loads(settings.read_text())
    settings.write_text(json.dumps({k: v for k, v in before.items() if k not in ("weight_decay", "seed")}))
    assert same(train(folder).state_dict(), whole[1])
    settings.write_text(json.dumps({k: v for k, v in before.items() if k != "ema_decay"}))
    with pytest.raises(UserError, match="holds a run with ema_decay=0.999, this run has ema_decay=0.9;"):
        train(folder)


def test_keys_of_encoders_have_defaults_too():
    config = PretrainConfig(MODEL, "out")
    settings = run_settings(config)
    assert json.loads(json.dumps(settings)) == settings
    now, defaults = settings, settings.defaults
    assert defaults.keys() <= now.keys() and now.keys() - defaults.keys() == set()
    assert defaults["model.encoders.0.shortcut"] == 0 and defaults["model.dit.depth"] == 4
    assert [now[f"model.encoders.0.compression.{axis}"] for axis in ("time", "height", "width")] == [2, 2, 2]
