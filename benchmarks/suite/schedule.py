"""In which order and within which limits the contenders of all rows are measured, on a clock that tests can fake.

Ours of every row comes first, those of `targets` before the others, then where the time of ours goes, then the
alternatives: one for every row of `targets`, then the rest. Each step that must be reached has seconds of its own that
no other can take, however long that hangs: a limit is what is left less what the steps to come are owed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from ..registry import BENCHMARKS
from ..targets import BY_KEY, TARGETS

OURS, DETAIL, BASELINE = "ours", "detail", "baseline"
# Seconds that a step is owed, and that it may take at most: warm, one takes 1 to 3.
OWED = {OURS: 3.0, DETAIL: 1.0, BASELINE: 2.5}
LEAST = 1.0  # of a step that is owed nothing
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
        owed: seconds that are kept for it; 0: it gets what is left over.
        most: seconds after which it is stopped.
    """

    kind: str
    row: Row
    contender: str
    owed: float
    most: float


def rows(device: str, dtypes: Sequence[str], ops: Sequence[str] | None = None, shape: str | None = None) -> list[Row]:
    """Rows to measure, those of `targets` first and in their order.

    Args:
        device: type of device, whose default shapes are taken.
        dtypes: names.
        ops: names of benchmarks; None: all.
        shape: its name, where one is taken for all ops: of every op the one row then stands for its targets.
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
    """Every step of these rows, in the order of their worth."""
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
    """Names of the baselines of a row: those that can run and that its target names first, the absent ones last."""
    known = BENCHMARKS[row.op].baselines(device, compiled)
    target = BY_KEY.get((row.op, row.shape, row.which))
    wanted = [name for name in target.faster if name] if target else []
    order = sorted(known, key=lambda b: (b.missing() is not None, not any(name in b.name for name in wanted)))
    return [b.name for b in order]


def plan(todo: Sequence[Step], seconds: float, clock: Callable[[], float]) -> Iterator[tuple[Step, float]]:
    """Gives every step its limit when its turn comes.

    Args:
        todo: steps in order.
        seconds: for all of them.
        clock: the time now, in seconds.

    Yields:
        (step, seconds that it may take); 0 where none are left: the step is left out.
    """
    owed = sum(step.owed for step in todo)
    share = min(1.0, seconds / owed) if owed else 1.0  # with less time than that, everyone gets less
    end = clock() + seconds
    for step in todo:
        owed -= step.owed
        left = end - clock() - share * owed
        least = share * step.owed or LEAST
        yield step, min(step.most, left) if left >= least - 1e-6 else 0.0
