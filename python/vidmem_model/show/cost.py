"""Plot and tables of `measure.model.profile_model`."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from rich.console import Console

from ..measure.parts import EVERY, PARTS
from .figure import LINES, YELLOW, log_axis, plain, plot, seconds_axis
from .tables import _mebi, _print_files, _print_table, _table

_CROSS = {"marker": "x", "markersize": 5.5, "markeredgewidth": 1.6}
# Parts that share a scale.
_GROUPS = (("VAE encode", "memory encode", "append"), ("first step", "next step"))
_LINES = LINES | {EVERY: {"color": YELLOW, "marker": "P"}}


def _blocks(result: dict[str, Any]) -> str:
    measured, all_ = result["depth"], result["depth_of_model"]
    return f"{all_} blocks" if measured == all_ else f"measured with {measured} of its {all_} blocks"


def write_cost_plot(path: Path, result: dict[str, Any], columns: int = 2) -> None:
    """Plot what `model.profile_model` measured: time and peak memory of each part against length, log axes.

    Memory is the peak above the weights. A cross at the upper edge marks a skipped point; a line below gives the
    reason.

    Args:
        path: File to write; the suffix selects PNG, PDF or SVG.
        result: Result of `profile_model`, with at least one point.
        columns: Width of the plot in columns of a paper, 1 or 2.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots.plots_missing` first.
        UserError: The suffix is another, or the file cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    points, skipped = result["points"], result["skipped"]
    parts = [part for part in PARTS if any(p["part"] == part for p in points)]
    used = [strategy for strategy in _LINES if any(p["strategy"] == strategy for p in points)]
    below = _left_out(skipped, 112 if columns == 2 else 50)
    title = f"Time and peak memory of the parts of {result['model']} against the length of the history"
    height = (3.7 if columns == 2 else 0.9 + 1.4 * len(parts)) + 0.14 * len(below)
    with plot(path, columns, height, title) as figure:
        grid = figure.subplots(*((2, len(parts)) if columns == 2 else (len(parts), 2)), squeeze=False)
        cells = dict(zip(parts, grid.T if columns == 2 else grid, strict=True))
        for group in _GROUPS:
            shown = [part for part in parts if part in group]
            unit, factor = seconds_axis(p["call_seconds"] for p in points if p["part"] in group)
            for i, (name, value) in enumerate(
                (
                    (f"time ({unit})", lambda p, factor=factor: p["call_seconds"] * factor),
                    ("memory (MiB)", lambda p: p["peak_bytes"] / 2**20),
                )
            ):
                values = [value(p) for p in points if p["part"] in group]
                for part in shown:
                    axes = cells[part][i]
                    _draw(axes, part, points, skipped, value)
                    # One scale for similar parts, with room for the crosses above.
                    axes.set_ylim(min(values) / 1.15, max(values) * 1.4)
                    log_axis(axes, "y")
                    if columns == 1 or part == shown[0]:
                        axes.set_ylabel(name)
        for part, (first, _) in cells.items():
            first.set_title(part, loc="left")
        figure.supxlabel("\n".join(["history (s of video)", *below]), fontsize=8, linespacing=1.3)
        handles = [figure.axes[0].plot([], [], label=s, **_LINES[s])[0] for s in used]
        if any(each["part"] in parts for each in skipped):
            handles += figure.axes[0].plot([], [], label="left out", color="0.35", linestyle="none", **_CROSS)
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=len(handles) if columns == 2 else 2,
            columnspacing=1.0,
            handletextpad=0.4,
        )


def _draw(axes: Any, part: str, points: list[dict[str, Any]], skipped: list[dict[str, Any]], value: Any) -> None:
    """Draw one part: one line per strategy, and crosses for skipped points."""
    for strategy, style in _LINES.items():
        mine = [p for p in points if (p["part"], p["strategy"]) == (part, strategy)]
        if mine:
            axes.plot([p["seconds"] for p in mine], [value(p) for p in mine], **style)
        lost = [s["seconds"] for s in skipped if (s["part"], s["strategy"]) == (part, strategy)]
        edge = axes.get_xaxis_transform()
        axes.plot(lost, [0.95] * len(lost), transform=edge, color=style["color"], linestyle="none", **_CROSS)
    lengths = sorted({p["seconds"] for p in points + skipped})
    log_axis(axes, "x", lengths)
    axes.set_xlim(lengths[0] / 1.25, lengths[-1] * 1.25)


def _left_out(skipped: list[dict[str, Any]], width: int) -> list[str]:
    """Lines of skipped points and reasons, each at most `width` long; parts with the same reason share a line."""
    lengths: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in skipped:
        lengths.setdefault((each["strategy"], each["part"]), []).append(each)
    parts: dict[tuple[str, str, str], list[str]] = {}
    for (strategy, part), lost in lengths.items():
        where = " and ".join(f"{plain(each['seconds'])} s" for each in lost)
        where = where if len(lost) < 3 else f"{plain(lost[0]['seconds'])} s and more"
        parts.setdefault((strategy, where, lost[0]["reason"]), []).append(part)
    lines = [
        f"left out: {' and '.join(each)} ({strategy}) at {where}: {reason}"
        for (strategy, where, reason), each in parts.items()
    ]
    return [line for each in lines for line in textwrap.wrap(each, width)]


def print_cost(result: dict[str, Any], folder: Path, skipped: str | None) -> None:
    """Print the result of `model.profile_model`.

    Args:
        result: Content of model_cost.json.
        folder: Folder of the files.
        skipped: Reason why there is no plot, or None.
    """
    console = Console(highlight=False)
    weights = ", ".join(f"{name} {_mebi(size)} MiB" for name, size in result["weights_bytes"].items())
    console.print(f"model {result['model']}, {_blocks(result)}; weights: {weights}", soft_wrap=True)
    if not result["next_step_is_exact"]:
        console.print(
            "the model has history_sees_video: a next step is approximate, an exact one costs as much as the first",
            soft_wrap=True,
        )
    points = {(p["part"], p["strategy"], p["seconds"]): p for p in result["points"]}
    known = result["points"] + result["skipped"]
    lengths = sorted({p["seconds"] for p in known})
    lines = sorted(dict.fromkeys((p["part"], p["strategy"]) for p in known), key=lambda line: PARTS.index(line[0]))
    if not points:
        console.print("nothing was measured: every part at every length was left out", soft_wrap=True)
    for title, cell in (
        ("Time of one call, ms", lambda p: f"{p['call_seconds'] * 1e3:,.1f}"),
        ("Peak memory above the weights, MiB", lambda p: _mebi(p["peak_bytes"])),
        ("Context or memory, tokens", lambda p: f"{p['context_tokens']:,}"),
    ):
        table = _table("part, strategy", *(f"{seconds:g} s" for seconds in lengths), title=title)
        for part, strategy in lines:
            mine = [points.get((part, strategy, seconds)) for seconds in lengths]
            table.add_row(f"{part}, {strategy}", *("-" if p is None else cell(p) for p in mine))
        if points:
            _print_table(console, table)
    for left_out in result["skipped"]:
        console.print(
            f"left out: {left_out['part']}, {left_out['strategy']}, {left_out['seconds']:g} s: {left_out['reason']}",
            soft_wrap=True,
            markup=False,
        )
    if result["noisy"]:
        console.print("times differ much between repeats; the machine may be busy with other work", soft_wrap=True)
    names = ["model_cost.json"] + ([] if skipped or not points else ["model_cost.png"])
    _print_files(console, folder, names, skipped)
