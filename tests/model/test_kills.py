"""Commands killed at random moments and run again give the same results and leave no temporary files."""

from __future__ import annotations

import random
import signal
import time

import pytest
from process_helpers import COMMANDS, results, stage

KILLS = 10
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


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
