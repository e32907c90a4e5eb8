"""Hostile files of every format end in a short line: no bug, no hang, no memory without limit."""

from __future__ import annotations

import pytest
from hostile import FORMATS, draw
from hostile_worker import Worker

LONG = 500  # files of each format; make test takes the first ones, of formats that train or make video fewer
SHORT = {"memory": 10, "options": 10, "film": 6, "storyboard": 4, "recipe": 4, "captions": 2}


@pytest.fixture(scope="module")
def worker():
    with Worker() as worker:
        yield worker


def faults(worker, name, seeds, folder):
    """What is wrong with these cases, a line each; and what the slowest and the largest took."""
    results = {seed: worker.case(draw(name, seed), folder / str(seed)) for seed in seeds}
    slowest = max(results, key=lambda seed: results[seed].seconds)
    largest = max(results, key=lambda seed: results[seed].grown)
    print(
        f"{name}: {len(results)} files, slowest {results[slowest].seconds:.1f} s (seed {slowest}), "
        f"most memory {results[largest].grown >> 20} MiB (seed {largest})"
    )
    return [
        f"{name} {seed}: {fault}; {each.stderr[-300:]}" for seed, each in results.items() if (fault := each.fault())
    ]


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "run"])
def test_hostile_files_are_told_in_a_line(worker, name, tmp_path):
    assert not faults(worker, name, range(SHORT.get(name, 3)), tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_many_hostile_files(worker, name, tmp_path):
    assert not faults(worker, name, range(LONG), tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_cases_are_drawn_anew_from_their_seed(name):
    if name != "run":  # of which the latents are encoded first
        assert draw(name, 3) == draw(name, 3)
        assert len({repr(draw(name, seed)) for seed in range(20)}) > 10


def test_the_worker_tells_of_each_fault(worker, tmp_path):
    assert worker.run(tmp_path, ["--version"]).fault() is None
    assert worker.run(tmp_path, ["nonsense"]).fault() is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hostile_worker.MEMORY", -1)
        assert worker.run(tmp_path, ["--version"]).fault().endswith("MiB")
