"""What docs/benchmarks.md shows of benchmarks/results: the newest row of every op, shape, dtype and pass, by device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import cases, op_table, record, report  # noqa: F401  (cases registers the benchmarks)
from .page_parts import table
from .registry import BENCHMARKS

RESULTS = "benchmarks/results"
AUTO = "vidmem (auto)"  # the row of ours that a user gets; files may have others, of one backend each
PASSES = {"fwd": "forward", "bwd": "gradient", "fwd+bwd": "forward and gradient"}

Row = dict[str, Any]


class Measured(NamedTuple):
    """A row of ours, with the fastest alternative of the same run.

    Attributes:
        path: the file, from the root of the repository.
        result: the content of the file.
        ours, other: rows; `other` is None where nothing else was timed.
    """

    path: str
    result: Row
    ours: Row
    other: Row | None

    @property
    def device(self) -> str:
        """What its milliseconds may be compared with."""
        device = self.result["device"]
        threads = f", {device['threads']} threads" if device["type"] == "cpu" else ""
        return f"{device['name']}{threads}, {self.ours['dtype']}"

    @property
    def place(self) -> tuple[int, ...]:
        """Where the row stands in its table: by public function, benchmark, shape and pass."""
        ours, orders = self.ours, (op_table.names(), BENCHMARKS, BENCHMARKS[self.ours["op"]].shapes, PASSES)
        keys = (ours["covers"], ours["op"], ours["shape"], ours["pass"])
        return tuple(list(order).index(key) for order, key in zip(orders, keys, strict=True))


def results(root: Path) -> list[tuple[str, Row]]:
    """All result files of run.py, lengths.py and gpu_suite.sh with their contents, the oldest first."""
    files = [path for path in (root / RESULTS).rglob("*.json") if path.parent.name != "integrations"]
    found = [(path.relative_to(root).as_posix(), json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return sorted(found, key=lambda each: (each[1]["date"], each[0]))


def measured(root: Path) -> tuple[list[Measured], int]:
    """The newest row of every op, shape, dtype, pass and device, and how many rows are of shapes that are no more."""
    newest: dict[tuple[str, ...], Measured] = {}
    for path, result in results(root):
        for ours in result["rows"]:
            if ours.get("contender") != AUTO or ours["status"] != "ok":
                continue
            other = next((r for r in result["rows"] if report.is_best(r, ours)), None)
            row = Measured(path, result, ours, other)
            newest[row.device, ours["op"], ours["shape"], ours["pass"]] = row
    shapes = {name: bench.shapes for name, bench in BENCHMARKS.items()}
    known = [row for row in newest.values() if row.ours["shape"] in shapes.get(row.ours["op"], {})]
    return sorted(known, key=lambda row: row.place), len(newest) - len(known)


def _size(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "×".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _sizes(row: Row) -> str:
    sizes = [f"{name} {_size(value)}" for name, value in row["sizes"].items() if (name, value) != ("B", 1)]
    return f"`{row['shape']}`: {', '.join(sizes)}"


def _memory(row: Measured) -> str:
    peaks = [r.get("peak_bytes") for r in (row.ours, row.other) if r]
    return " / ".join("?" if peak is None else f"{peak / 2**20:,.0f}" for peak in peaks)


def _ratio(row: Measured) -> str:
    if row.other is None:
        return ""
    ratio = row.ours["speedup"]
    return f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}, slower**"


def _checked(row: Row) -> str:
    """Rows without a check have no time; those of gpu_suite.sh are checked at smaller sizes that run the same code."""
    at = row.get("verified_at")
    return "yes" if at in (None, row["sizes"]) else "yes, with fewer tokens"


def changed(row: Measured, now: dict[str, dict[str, str]]) -> str:
    """Whether the sources of a row's kernel are others now than when it was measured."""
    backend = row.ours["backend"]
    if backend not in now:
        return "no kernel of ours"
    then = row.result.get("kernels", {}).get(backend, {})
    ops = [row.ours["covers"]]
    if row.ours["pass"] != "fwd":
        ops.append(f"{ops[0]}_backward")
    pairs = [(then.get(op), now[backend].get(op)) for op in ops if op in then or op in now[backend]]
    if row.result["dirty"] or not pairs or any(before is None for before, _ in pairs):
        return "not known"
    return "no" if all(before == after for before, after in pairs) else "yes"


def _link(path: str, result: Row) -> str:
    """To a result file, for pages in docs/."""
    dirty = " with changes" if result["dirty"] else ""
    return f"[{result['date'][:10]}, {result['commit']}{dirty}](../{path})"


def _line(row: Measured, now: dict[str, dict[str, str]]) -> list[str]:
    other = row.other
    backend = f" ({row.ours['backend']})"
    name = "" if other is None else "our reference in PyTorch" if other["kind"] == "reference" else other["contender"]
    return [
        f"`{row.ours['op']}`",
        _sizes(row.ours),
        PASSES[row.ours["pass"]],
        report.time_of(row.ours["median_ms"]) + backend,
        f"{name}, {report.time_of(other['median_ms'])}" if other else "none was timed",
        _ratio(row),
        _memory(row),
        _checked(row.ours),
        changed(row, now),
        _link(row.path, row.result),
    ]


HEADS = ["op", "shape", "pass", "ours (backend)", "fastest alternative", "ratio", "MiB, ours / theirs"]
HEADS += ["checked", "kernel changed since", "file"]


def tables(root: Path) -> str:
    """A table for each device and dtype."""
    rows, gone = measured(root)
    now = record.kernels(root)
    parts = []
    for device in sorted({row.device for row in rows}):
        own = [row for row in rows if row.device == device]
        slower = [row.ours for row in own if row.other is not None and row.ours["speedup"] < 1]
        told = [f"`{r['op']}` {r['shape']} {PASSES[r['pass']]} ({r['speedup']:.2f})" for r in slower]
        parts += [
            f"### {device}",
            f"{len(own)} rows; ours is slower in {len(slower)} of them{': ' * bool(told)}{', '.join(told)}.",
        ]
        parts.append(table(HEADS, (_line(row, now) for row in own), left=len(HEADS)))
        parts += _wanting(own, root)
    if gone:
        parts.append(f"Left out: {gone} rows of shapes that the benchmarks do not have any more.")
    return "\n\n".join(parts)


def _wanting(rows: list[Measured], root: Path) -> Iterator[str]:
    """Shapes that the runs of a device left out when their time was up, and that no other run of it measured."""
    have = {(r.ours["op"], r.ours["shape"], r.ours["dtype"]) for r in rows}
    files = {row.path for row in rows}
    left: dict[str, list[str]] = {}
    for each in dict.fromkeys(each for path, result in results(root) if path in files for each in result["not_begun"]):
        op, shape, dtype = each.split()
        if (op, shape, dtype) not in have:
            left.setdefault(op, []).append(shape)
    if left:
        listed = ", ".join(f"`{op}` ({', '.join(shapes)})" for op, shapes in left.items())
        yield f"Not measured, because the time of the run was up: {listed}."


def lengths(root: Path) -> str:
    """The newest sweep of lengths of every op and device."""
    newest = {}
    for path, result in results(root):
        if "break_even" in result:
            newest[result["op"], result["device"]["name"]] = (path, result)
    parts = []
    for (op, device), (path, result) in newest.items():
        heads, rows, says = report.length_rows(result)
        parts += [f"`{op}` on {device}, {report.length_title(result)}. {_link(path, result)}"]
        parts += [table(heads, rows, left=2), "\n".join(says)]
    return "\n\n".join(parts)


def files(root: Path) -> str:
    """All result files, for benchmarks/README.md."""
    rows = []
    for path, result in results(root):
        ours = [r for r in result["rows"] if r.get("kind") == "ours"]
        ops = dict.fromkeys(r["op"] for r in ours or result["rows"])
        what = f"{', '.join(f'`{op}`' for op in ops)}: {len(ours)} rows" if ours else f"lengths of {', '.join(ops)}"
        name = path.removeprefix("benchmarks/")
        rows.append([f"[{name.removeprefix('results/')}]({name})", report.title(result), what])
    return table(["file", "measured on", "what"], rows, left=3)
