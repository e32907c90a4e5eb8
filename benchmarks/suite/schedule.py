"""Orders the contenders of all rows and sets their time limits, on a clock that tests can replace.

Ours of every row come first, those of `targets` before the others, then where the time of ours goes, then the
alternatives: one for every row of `targets`, then the rest. Each step that must be reached has reserved seconds that no
other step can use, even if it hangs: a limit is the time left minus what is reserved for later steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..registry import BENCHMARKS
from ..targets import BY_KEY, TARGETS

OURS, DETAIL, BASELINE = "ours", "detail", "baseline"
# Reserved and maximum seconds of a step; warm, a step takes 1 to 3.
OWED = {OURS: 3.0, DETAIL: 1.0, BASELINE: 2.5}
LEAST = 1.0  # of a step without reserved time
MOST = {OURS: 20.0, DETAIL: 10.0, BASELINE: 15.0}


class Row(NamedTuple):
    """What is measured: an op at a shape of shapes.py, a dtype, a pass."""

    op: str
    shape: str
    dtype: str
    which: str

    def __str__(self) -> str:
        return " ".join(self)


class Step(NamedTuple):
    """One contender of a row.

    Attributes:
        kind: "ours", "detail" (where the time of ours goes) or "baseline".
        contender: its name.
        owed: seconds reserved for it; 0: it gets what is left over.
        max_seconds: seconds after which it is stopped.
    """

    kind: str
    row: Row
    contender: str
    owed: float
    max_seconds: float


def rows(device: str, dtypes: Sequence[str], ops: Sequence[str] | None = None, shape: str | None = None) -> list[Row]:
    """Rows to measure, those of `targets` first and in their order.

    Args:
        device: device type, whose default shapes are used.
        dtypes: names of dtypes.
        ops: names of benchmarks; None: all.
        shape: name of one shape to use for all ops; each op then has one row for all its targets.

    Returns:
        The rows.
    """
    first = [(t.op, shape or t.shape, t.which) for t in TARGETS]
    rest = [
        (name, chosen, which)
        for name, bench in BENCHMARKS.items()
        for chosen, known in bench.shapes.items()
        for which in bench.passes
        if which != "fwd+bwd" and (chosen == shape if shape else device in known.devices)
    ]
    wanted = [row for row in dict.fromkeys([*first, *rest]) if row in rest and (ops is None or row[0] in ops)]
    return [Row(op, chosen, dtype, which) for op, chosen, which in wanted for dtype in dtypes]


def steps(todo: Sequence[Row], device: str, compiled: bool) -> list[Step]:
    """Every step of these rows, the most important ones first."""
    wanted = {(t.op, t.which) for t in TARGETS}

    def is_target(row: Row) -> bool:
        """Also at another shape, where a dry run takes one for all."""
        return (row.op, row.shape, row.which) in BY_KEY or (row.shape == "smoke" and (row.op, row.which) in wanted)

    def step(kind: str, row: Row, contender: str, must: bool) -> Step:
        return Step(kind, row, contender, OWED[kind] if must else 0.0, MOST[kind])

    targets = [row for row in todo if is_target(row)]
    others = [row for row in todo if not is_target(row)]
    against = {row: _alternatives(row, device, compiled) for row in todo}
    first = [step(BASELINE, row, names[0], True) for row in targets if (names := against[row])]
    later = [step(BASELINE, row, name, False) for row in targets for name in against[row][1:]]
    return [
        *(step(OURS, row, "vidmem (auto)", row in targets) for row in (*targets, *others)),
        *(step(DETAIL, row, "vidmem (auto)", row in targets) for row in targets),
        *first,
        *later,
        *(step(BASELINE, row, name, False) for row in others for name in against[row]),
        *(step(DETAIL, row, "vidmem (auto)", False) for row in others),
    ]


def _alternatives(row: Row, device: str, compiled: bool) -> list[str]:
    """Names of the baselines of a row: those that can run and that its target names first, the missing ones last."""
    known = BENCHMARKS[row.op].baselines(device, compiled)
    target = BY_KEY.get((row.op, row.shape, row.which))
    wanted = [name for name in target.faster if name] if target else []
    order = sorted(known, key=lambda b: (b.missing() is not None, not any(name in b.name for name in wanted)))
    return [b.name for b in order]


def plan(todo: Sequence[Step], seconds: float, clock: Callable[[], float]) -> Iterator[tuple[Step, float]]:
    """Computes the time limit of every step when its turn comes.

    Args:
        todo: steps in order.
        seconds: time for all of them.
        clock: returns the current time, in seconds.

    Yields:
        (step, seconds that it may take); 0 if no time is left and the step is left out.
    """
    owed = sum(step.owed for step in todo)
    share = min(1.0, seconds / owed) if owed else 1.0  # with less time, all reservations shrink
    end = clock() + seconds
    for step in todo:
        owed -= step.owed
        left = end - clock() - share * owed
        least = share * step.owed or LEAST
        yield step, min(step.max_seconds, left) if left >= least - 1e-6 else 0.0
