"""Renders result files as Markdown.

    python benchmarks/report.py benchmarks/results/*/*.json [--contenders]

By default there is one line per op, shape, dtype and pass: ours, the best alternative, the floor. `--contenders` prints
a line for every contender.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.targets import TARGETS  # noqa: E402

Row = dict[str, Any]


def time_of(ms: float) -> str:
    """Milliseconds, or seconds from one on."""
    return f"{ms:.3g} ms" if ms < 1000 else f"{ms / 1000:.3g} s"


def _markdown(header: list[str], lines: Iterable[list[str]]) -> str:
    cells = [header, *lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    text = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([text[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *text[1:]])


def _bytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**20:,.0f} MiB"


def _where(row: Row) -> list[str]:
    return [row["op"], row["shape"], row["dtype"], row["pass"] or ""]


def _rate(row: Row) -> str:
    """The rate of what limits it: bandwidth, or arithmetic."""
    by_bytes = row["bytes"] / max(row["flops"], 1) > 0.05
    return f"{row['gb_s']:.3g} GB/s" if by_bytes else f"{row['tflop_s']:.3g} TFLOP/s"


def title(result: Row) -> str:
    """One line: device, versions, date and commit."""
    device, versions = result["device"], result["versions"]
    parts = [device["name"]]
    if device["type"] == "cpu":
        parts.append(f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}")
    parts.append(f"torch {versions['torch']}")
    if device["type"] == "cuda":
        parts.append(f"triton {versions['triton']}")
    parts += [result["date"][:10], result["commit"] + (" with changes" if result["dirty"] else "")]
    return ", ".join(parts)


def table(result: Row) -> str:
    """Ours compared with the best alternative."""
    header = ["op", "shape", "dtype", "pass", "backend", "ours", "rate", "of floor", "best alternative", "speed-up"]
    peaks = any(row.get("peak_bytes") is not None for row in result["rows"])
    lines = []
    for row in result["rows"]:
        if row["kind"] != "ours" or row["status"] != "ok":
            continue
        other = next((r for r in result["rows"] if is_best(r, row)), None)
        line = [*_where(row), row["backend"], time_of(row["median_ms"]), _rate(row), f"{row['floor_fraction']:.0%}"]
        line += (
            [f"{other['contender']}, {time_of(other['median_ms'])}", f"{row['speedup']:.2f}x"] if other else ["", ""]
        )
        if peaks:
            line += [_bytes(row["peak_bytes"]), _bytes(other["peak_bytes"]) if other else ""]
        lines.append(line)
    return _markdown([*header, *(["peak", "its peak"] if peaks else [])], lines)


def is_best(candidate: Row, ours: Row) -> bool:
    """Whether a row is that of the fastest alternative to ours."""
    same = all(candidate[key] == ours[key] for key in ("op", "shape", "dtype", "pass"))
    return same and candidate["kind"] != "ours" and candidate["contender"] == ours.get("best_baseline")


def contenders(result: Row) -> str:
    """A line for every timed contender; `over ours` is the median ratio of its time to ours."""
    header = ["op", "shape", "dtype", "pass", "contender", "median", "over ours", "p20", "p80", "rate", "of floor"]
    lines = []
    for row in result["rows"]:
        if row["status"] == "ok":
            name = row["contender"] + (f": {row['backend']}" if row["kind"] == "ours" else "")
            ratio = f"{row['over_ours']:.2f}x" if "over_ours" in row else ""
            times = [time_of(row["median_ms"]), ratio, time_of(row["p20_ms"]), time_of(row["p80_ms"])]
            rate = [_rate(row), f"{row['floor_fraction']:.0%}", _bytes(row["peak_bytes"]), str(row["rounds"])]
            lines.append([*_where(row), name, *times, *rate])
    return _markdown([*header, "peak", "rounds"], lines)


def length_title(result: Row) -> str:
    """What lengths.py measured."""
    return f"{result['heads']} heads of {result['channels']}, {result['dtype']}; softmax: SDPA of the same tokens"


def length_rows(result: Row) -> tuple[list[str], list[list[str]], list[str]]:
    """A line for each length of benchmarks/lengths.py under its heads, and from which length on ours is the better."""
    header = ["op", "pass", "tokens", "ours", "softmax", "ratio", "peak", "its peak"]
    lines = []
    for ours in (r for r in result["rows"] if r["contender"] == "ours"):
        same = [r for r in result["rows"] if (r["pass"], r["length"]) == (ours["pass"], ours["length"])]
        other = next((r for r in same if r["contender"] == "softmax"), None)
        line = [ours["op"], ours["pass"], f"{ours['length']:,}", time_of(ours["median_ms"])]
        line += [time_of(other["median_ms"]), f"{other['median_ms'] / ours['median_ms']:.2f}x"] if other else ["", ""]
        lines.append([*line, _bytes(ours["peak_bytes"]), _bytes(other["peak_bytes"]) if other else ""])
    says = [
        f"- {which}: faster: {found['median_ms']['says']}; less memory: {found['peak_bytes']['says']}"
        for which, found in result["break_even"].items()
    ]
    return header, lines, says


def lengths(result: Row) -> str:
    """A line for each length of benchmarks/lengths.py, and the length from which ours is better."""
    header, lines, says = length_rows(result)
    return "\n".join([length_title(result), "", _markdown(header, lines), "", *says])


def targets(result: Row) -> str:
    """A line for every measured row of targets.py: where its time goes, and which goals it misses."""
    header = ["target", "pass", "ours", "floor", "best alternative", "speed-up", "kernels", "library", "planning"]
    header += ["host", "first call", "side stream", "CUDA graph", "still wanting"]
    lines = []
    for target in TARGETS:
        here = [r for r in result["rows"] if (r["op"], r["shape"], r["pass"]) == target.key() and r["status"] == "ok"]
        for row in (r for r in here if r["kind"] == "ours"):
            others = [r for r in here if "over_ours" in r and r["dtype"] == row["dtype"]]
            best = min(others, key=lambda r: r["over_ours"], default=None)
            split = row.get("split", {})
            parts = [split.get(part) for part in ("kernels_ms", "library_ms", "planning_ms", "host_ms")]
            line = [target.title, target.which, time_of(row["median_ms"]), time_of(row["floor_ms"])]
            line += [f"{best['contender']}, {time_of(best['median_ms'])}" if best else ""]
            line += [f"{best['over_ours']:.2f}x" if best else ""]
            line += ["" if ms is None else time_of(ms) for ms in parts]
            line += [time_of(row["first_call_ms"]) if "first_call_ms" in row else ""]
            line += [_works(row.get(name, {})) for name in ("side_stream", "graph")]
            lines.append([*line, "; ".join(target.unmet(row, others)) or "nothing"])
    return _markdown(header, lines) if lines else ""


def _works(told: Row) -> str:
    """The result of breakdown.py for a side stream or a graph."""
    if told.get("works"):
        return "equal" if told.get("equal") else f"differs by {told['difference']:.1g}"
    return " ".join(str(told.get("reason", "")).split())[:60]


def notes(result: Row) -> str:
    """The rates measured for the floor, the failures, and what was left out."""
    lines = [result["note"]] if result["note"] else []
    if "rates" in result:
        gemm = ", ".join(f"{name} {rate:.3g}" for name, rate in result["rates"]["gemm_tflop_s"].items())
        lines.append(f"Measured in this run: copy {result['rates']['copy_gb_s']:.3g} GB/s; matmul TFLOP/s: {gemm}.")
    for status in ("error", "hung", "skipped"):
        for row in result["rows"]:
            if row["status"] == status:
                reason = " ".join(str(row["reason"]).split())
                lines.append(f"- {status}: {' '.join(_where(row))} {row['contender'] or ''}: {reason}")
    reasons: dict[str, list[str]] = {}
    for left in result.get("left_out", []):
        reasons.setdefault(left["reason"], []).append(f"{' '.join(_where(left))} {left['contender']}")
    lines += [f"- left out, {reason}: {'; '.join(names)}" for reason, names in reasons.items()]
    if result["not_begun"]:
        lines.append(f"- not begun within the time limit: {'; '.join(result['not_begun'])}")
    elif not result["complete"]:
        lines.append("- interrupted: incomplete")
    return "\n".join(lines)


def summary(result: Row, every_contender: bool = False) -> str:
    """What run.py and lengths.py print."""
    if "break_even" in result:
        return "\n\n".join([title(result), lengths(result)])
    body = [targets(result), table(result), contenders(result) if every_contender else ""]
    return "\n\n".join([title(result), *filter(None, body), notes(result)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--contenders", action="store_true", help="a line for every contender")
    args = parser.parse_args()
    for path in args.results:
        try:
            result = json.loads(path.read_text())
            if "break_even" in result:
                print(f"### {summary(result)}\n")
                continue
            body = contenders(result) if args.contenders else table(result)
            print(f"### {title(result)}\n\n{body}\n\n{notes(result)}\n")
        except (OSError, ValueError, KeyError) as error:
            print(f"{path}: not a result of run.py or lengths.py ({type(error).__name__}: {error})", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
