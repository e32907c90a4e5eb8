"""Commands that are killed at random moments, then run again: results as if nothing had happened, and no leftovers."""

from __future__ import annotations

import random
import signal
import time

import pytest
from process_helpers import COMMANDS, Nursery, results, stage

KILLS = 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    made = Nursery(tmp_path_factory.mktemp("logs"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def whole(nursery, tmp_path_factory):
    """The results of a command that nothing disturbs, and its seconds."""
    known = {}

    def run(name):
        if name not in known:
            folder = stage(tmp_path_factory.mktemp(name) / "whole")
            began = time.monotonic()
            done = nursery.run(folder, *COMMANDS[name])
            assert done.code == 0, done.err
            known[name] = results(folder), time.monotonic() - began
        return known[name]

    return run


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.long
def test_two_clean_runs_are_equal(nursery, whole, tmp_path, name):
    folder = stage(tmp_path / "again")
    done = nursery.run(folder, *COMMANDS[name])
    assert done.code == 0, done.err
    expected, _ = whole(name)
    found = results(folder)
    assert found.keys() == expected.keys()
    assert [key for key in found if found[key] != expected[key]] == []


@pytest.mark.sample(3)
@pytest.mark.parametrize("seed", range(KILLS))
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(nursery, whole, tmp_path, name, seed):
    draw = random.Random(f"{name} {seed}")
    expected, seconds = whole(name)
    folder = stage(tmp_path / "killed")
    for number in [draw.choice(SIGNALS) for _ in range(draw.choice([1, 1, 2]))]:
        child = nursery.start(folder, *COMMANDS[name])
        at = draw.uniform(0, seconds)
        time.sleep(at)
        child.kill(number)
        child.end()
        told = f"{number.name} after {at:.2f} of {seconds:.2f} s: {child.err}"
        assert child.code in (0, -number, 128 + number), told
        assert "Traceback" not in child.err and "this is a bug" not in child.err, told
    done = nursery.run(folder, *COMMANDS[name])
    assert done.code == 0, done.err
    found = results(folder)
    assert found.keys() == expected.keys(), told
    assert [key for key in found if found[key] != expected[key]] == [], told
