"""What the suite's part bench is to reach, and that its plan does on a faked clock, whatever hangs."""

import random
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import cases, report  # noqa: E402, F401  (registers the benchmarks)
from benchmarks.registry import BENCHMARKS  # noqa: E402
from benchmarks.suite import schedule  # noqa: E402
from benchmarks.suite.schedule import BASELINE, DETAIL, OURS, plan  # noqa: E402
from benchmarks.targets import BY_KEY, TARGETS  # noqa: E402
from benchmarks.timing import Rates  # noqa: E402


def test_targets_are_rows_of_the_benchmarks_with_the_floors_that_they_name():
    rates = Rates(4.3e12, {"bfloat16": 790e12})
    assert len(BY_KEY) == len(TARGETS)
    for target in TARGETS:
        entry = BENCHMARKS[target.op]
        shape = entry.shapes[target.shape]
        assert "cuda" in shape.devices and target.which in entry.passes, target
        if target.floor_ms is not None:
            floor = 1e3 * rates.floor(entry.work_of(target.which, shape.sizes, 2), "bfloat16")
            assert target.floor_ms == pytest.approx(floor, rel=0.06), target
        names = [b.name for b in entry.baselines("cuda", compiled=True)]
        assert all(any(part in name for name in names) for part in target.faster), target
        assert target.of_floor or target.max_ms or target.faster, target


def test_targets_tell_what_is_wanting():
    target = BY_KEY["merge_tokens", "clip480p", "fwd"]
    ours = {"median_ms": 0.1, "floor_fraction": 0.8}
    fast, slow = ({"contender": "ToMe, scatter_reduce", "over_ours": ratio} for ratio in (3.5, 2.0))
    assert target.unmet(ours, [fast, {"contender": "index_add", "over_ours": 1.0}]) == []
    assert target.unmet(ours, [slow]) == ["2.00x ToMe, scatter_reduce, not 3x"]
    assert target.unmet(ours | {"floor_fraction": 0.5}, []) == [
        "50% of the floor, not 75%",
        "not compared with scatter_reduce",
    ]
    slower = BY_KEY["match_tokens_window", "history60s", "fwd"]
    assert slower.unmet(ours | {"median_ms": 1.5}, []) == ["1.5 ms, not 1"]


def test_the_table_of_targets():
    where = {"op": "merge_tokens", "shape": "clip480p", "dtype": "bfloat16", "pass": "fwd", "status": "ok"}
    split = {"kernels_ms": 0.09, "library_ms": 0.0, "planning_ms": 0.002, "host_ms": 0.03}
    ours = {"kind": "ours", "contender": "vidmem (auto)", "median_ms": 0.1, "floor_ms": 0.07, "floor_fraction": 0.7}
    ours |= {"split": split, "first_call_ms": 800.0, "side_stream": {"works": True, "equal": True}}
    ours |= {"graph": {"works": False, "reason": "RuntimeError: a wait for the device"}}
    other = {"kind": "baseline", "contender": "index_add", "median_ms": 0.2, "over_ours": 2.0}
    text = report.targets({"rows": [where | ours, where | other]})
    line = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert line[:6] == ["merge half", "fwd", "0.1 ms", "0.07 ms", "index_add, 0.2 ms", "2.00x"]
    assert line[6:12] == ["0.09 ms", "0 ms", "0.002 ms", "0.03 ms", "800 ms", "equal"]
    assert line[12:] == [
        "RuntimeError: a wait for the device",
        "70% of the floor, not 75%; not compared with scatter_reduce",
    ]
    assert report.targets({"rows": []}) == ""


def todo():
    return schedule.steps(schedule.rows("cuda", ["bfloat16"]), "cuda", compiled=True)


def walk(steps, seconds, takes):
    """(limits by step, seconds used) of a plan on a clock that a step moves by what it takes, at most by its limit."""
    hands, limits = [100.0], {}
    for step, limit in plan(steps, seconds, lambda: hands[0]):
        limits[step] = limit
        hands[0] += min(limit, takes(step))
    return limits, hands[0] - 100.0


def reached(limits):
    """Keys of targets whose own row, and one alternative of it, were given time."""
    began = {kind: {s.row for s, limit in limits.items() if limit > 0 and s.kind == kind} for kind in (OURS, BASELINE)}
    return {(row.op, row.shape, row.which) for row in began[OURS] & began[BASELINE]} & set(BY_KEY)


@pytest.mark.parametrize("seconds", [120, 170, 240])
def test_the_plan_reaches_every_target_whatever_hangs(seconds):
    steps, draw = todo(), random.Random(seconds)
    for part_that_hangs in (0.0, 0.1, 0.3, 0.6, 1.0):
        for _ in range(5):
            hangs = {step for step in steps if draw.random() < part_that_hangs}
            limits, used = walk(steps, seconds, lambda s, hangs=hangs: 1e9 if s in hangs else draw.uniform(0.3, 2.5))
            assert reached(limits) == set(BY_KEY)
            assert used <= seconds + 1e-6
            assert all(limit <= step.max_seconds for step, limit in limits.items())


def test_where_nothing_hangs_all_is_reached():
    limits, used = walk(todo(), 195, lambda step: {OURS: 1.5, DETAIL: 0.5, BASELINE: 0.5}[step.kind])
    assert all(limit > 0 for limit in limits.values()) and used < 195


def test_with_less_time_every_target_gets_less():
    steps = todo()
    limits, used = walk(steps, 30, lambda step: 1e9)
    assert reached(limits) == set(BY_KEY) and used <= 30 + 1e-6
    assert not any(limit > 0 for step, limit in limits.items() if step.owed == 0)


def test_ours_come_first_and_targets_before_the_rest():
    steps = todo()
    kinds = [step.kind for step in steps]
    assert kinds[: kinds.index(DETAIL)] == [OURS] * kinds.count(OURS)
    ours = [(s.row.op, s.row.shape, s.row.which) for s in steps if s.kind == OURS]
    assert ours[: len(TARGETS)] == [target.key() for target in TARGETS] and len(set(ours)) == len(ours)
    assert {row for row in schedule.rows("cuda", ["bfloat16"])} == {s.row for s in steps if s.kind == OURS}
    later = kinds.index(BASELINE)
    assert {s.row for s in steps[later : later + len(TARGETS)]} == {s.row for s in steps if s.owed}
    # What a target is to be compared with is asked before others that run.
    first = next(s for s in steps if s.kind == BASELINE and s.row.op == "cross_attention_blocks")
    assert "FlexAttention" in first.contender


def test_a_dry_run_takes_one_shape_for_all():
    found = schedule.rows("cpu", ["float32"], ["match_tokens", "merge_tokens"], "smoke")
    assert [str(row) for row in found] == [
        "match_tokens smoke float32 fwd",
        "merge_tokens smoke float32 fwd",
        "merge_tokens smoke float32 bwd",
    ]
    steps = schedule.steps(found, "cpu", compiled=False)
    assert [bool(s.owed) for s in steps if s.kind == OURS] == [True, True, False]
