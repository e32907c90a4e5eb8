"""Plot of `measure.attention` (memory and time against context length), and a check for matplotlib."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from .figure import LINES, label_ends, log_axis, plain, plot, seconds_axis


def plots_missing() -> str | None:
    """Reason why plots are not available, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'vidmem-model[bench]'"
    return None


def write_memory_plot(path: Path, result: dict[str, Any], columns: int = 2) -> None:
    """Plot what `attention.profile` measured: peak memory and time against length, log axes.

    A label at the end of each line gives the ratio to the whole history, at the longest length of both.

    Args:
        path: File to write; the suffix selects PNG, PDF or SVG.
        result: Result of `attention.profile`.
        columns: Width of the plot in columns of a paper, 1 or 2.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots_missing` first.
        UserError: The suffix is another, or the file cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    lines = {
        strategy: sorted((p for p in result["points"] if p["strategy"] == strategy), key=lambda p: p["seconds"])
        for strategy in dict.fromkeys(point["strategy"] for point in result["points"])
    }
    tokens = {point["seconds"]: point["context_tokens"] for point in result["points"]}
    longest = max(tokens)
    unit, factor = seconds_axis(point["call_seconds"] for point in result["points"])
    title = "Peak memory and time of one attention layer against the length of the history it reads"
    with plot(path, columns, 2.9 if columns == 2 else 5.2, title) as figure:
        memory, clock = figure.subplots(*((1, 2) if columns == 2 else (2, 1)))
        for strategy, points in lines.items():
            seconds = [p["seconds"] for p in points]
            memory.plot(seconds, [p["peak_bytes"] / 2**20 for p in points], **LINES[strategy])
            held = [p["held_bytes_computed"] / 2**20 for p in points]
            memory.plot(seconds, held, color=LINES[strategy]["color"], linewidth=1.0, linestyle="dotted")
            clock.plot(seconds, [p["call_seconds"] * factor for p in points], **LINES[strategy])
        ends: dict[Any, list[tuple[float, str, str]]] = {}
        for axes, label, value, less in (
            (memory, "peak memory (MiB)", lambda p: p["peak_bytes"] / 2**20, "less"),
            (clock, f"time of one call ({unit})", lambda p: p["call_seconds"] * factor, "faster"),
        ):
            axes.set(xlabel=f"history (s of video; {plain(longest)} s: {tokens[longest]:,} tokens)", ylabel=label)
            log_axis(axes, "x", sorted(tokens))
            log_axis(axes, "y")
            ends[axes] = []
            for strategy, points in lines.items():
                ratio = _less(points, lines.get("whole history", []), value)
                words = f"\n{ratio}× {less}" if ratio else ""
                ends[axes].append((value(points[-1]), f"{strategy}{words}", LINES[strategy]["color"]))
        kinds = (("solid", "measured"), ("dotted", "held between calls, computed"))
        handles = [memory.plot([], [], color="0.35", linestyle=style, label=what)[0] for style, what in kinds]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        label_ends(figure, ends)


def _less(points: list[dict[str, Any]], whole: list[dict[str, Any]], value: Any) -> str | None:
    """How many times less than the whole history at the longest length of both, or None if it is not less."""
    by_length = {p["seconds"]: value(p) for p in whole}
    shared = [(by_length[p["seconds"]], value(p)) for p in points if p["seconds"] in by_length]
    if not shared or points is whole or shared[-1][1] * 1.05 > shared[-1][0]:
        return None
    ratio = shared[-1][0] / shared[-1][1]
    return f"{ratio:.1f}" if ratio < 9.95 else f"{float(f'{ratio:.2g}'):,.0f}"
