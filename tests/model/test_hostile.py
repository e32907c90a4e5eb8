"""Hostile files of every format end in a short line, without a bug, a hang or excessive memory."""

from __future__ import annotations

import json

import pytest
from hostile import FORMATS, draw
from hostile_worker import Case, Worker

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


@pytest.mark.parametrize(
    ("command", "model", "more", "says"),
    [
        ("pretrain", {"height": 8}, {}, "must fill a box of encoders[0]"),
        (
            "pretrain",
            {"encoders": [{"rate": [64, 64, 2]}]},
            {},
            "must fill a box of encoders[0]",
        ),
        ("pretrain", {"encoders": [{"rate": [2, 2, 128]}]}, {}, "latent frames is shorter than a box of 128"),
        ("pretrain", {"vae": {"kind": "dct", "channels": 4096}}, {}, "must be at most 768 for kind dct"),
        ("pretrain", {"dit": {"unfold": 1}}, {}, "the model cannot be made (DiT: unfold must be at least the 32"),
        ("pretrain", {"dit": {"patch": 3}}, {}, "dit.patch: must be 2"),
        ("pretrain-vae", {}, {"frames": 400}, "no block of the videos has 400 frames, the longest has 24"),
        ("pretrain-vae", {"height": 48}, {"frames": 8}, "model.height must be a multiple of 32 and model.width of 32"),
        (
            "pretrain-vae",
            {"vae": {"stride": [1, 1, 1]}},
            {"frames": 8},
            "at most 3, the numbers of a block of pixels, got 8",
        ),
    ],
)
def test_sizes_that_do_not_go_together(worker, command, model, more, says, tmp_path):
    recipe = {"model": {"preset": "tiny", **model}, "output": "new", **more}
    recipe["data"] = {"videos": ["film.mkv"], "block_seconds": 3.0, "shortest": 4, "cache": "c"}
    recipe["optimisation"] = {"steps": 1, "device": "cpu"}
    result = worker.case(Case({"r.yaml": json.dumps(recipe).encode()}, [command, "r.yaml"]), tmp_path / "a")
    assert result.fault() is None and result.code == 2 and says in result.stderr
