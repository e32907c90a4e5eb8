"""What the user sees of `model.profile_model`: the plot and the tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import replacing
from ..measure.parts import EVERY, PARTS
from .tables import _mebi, _print_files, _print_table, _table

# Okabe and Ito's colours, told apart in all common kinds of colour vision; so are the markers.
_LINES = {
    "whole history": ("#D55E00", "o"),
    "sliding window": ("#0072B2", "s"),
    "merged": ("#CC79A7", "v"),
    "linear attention": ("#009E73", "^"),
    "compressed memory": ("#000000", "D"),
    EVERY: ("#E69F00", "P"),
}
_DASHES = {
    "first step": "solid",
    "next step": (0, (1, 1.5)),
    "memory encode": "solid",
    "append": (0, (1, 1.5)),
    "VAE encode": "dashed",
}
_ROWS = (("Denoising", ("first step", "next step")), ("Encoding", ("VAE encode", "memory encode", "append")))


def _blocks(result: dict[str, Any]) -> str:
    measured, all_ = result["depth"], result["depth_of_model"]
    return f"{all_} blocks" if measured == all_ else f"measured with {measured} of its {all_} blocks"


def write_cost_plot(path: Path, result: dict[str, Any]) -> None:
    """Plot what `model.profile_model` measured: time and peak memory against length, log axes.

    Args:
        path: PNG file to write.
        result: as returned by `profile_model`.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots.plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure((11.5, 9.2), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    points = result["points"]
    lengths = sorted({point["seconds"] for point in points})
    tokens = {point["seconds"]: point["history_tokens"] for point in points}
    for (title, parts), (clock, memory) in zip(_ROWS, figure.subplots(2, 2), strict=True):
        lines = {(p["part"], p["strategy"]): [] for p in points if p["part"] in parts}
        for point in points:
            if point["part"] in parts:
                lines[point["part"], point["strategy"]].append(point)
        for (part, strategy), mine in lines.items():
            colour, marker = _LINES[strategy]
            style = {"color": colour, "marker": marker, "linestyle": _DASHES[part], "markersize": 5, "linewidth": 1.7}
            x = [p["seconds"] for p in mine]
            clock.plot(x, [p["call_seconds"] * 1e3 for p in mine], **style)
            memory.plot(x, [p["peak_bytes"] / 2**20 for p in mine], **style)
        for axes, what in ((clock, "time, ms"), (memory, "peak memory above the weights, MiB")):
            axes.set(xscale="log", yscale="log", xlabel="history (s of video; below: patch tokens)")
            axes.set_title(f"{title}: {what}", fontsize=11)
            axes.set_xticks(lengths, [f"{s:g} s\n{tokens[s]:,}" for s in lengths])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
            axes.grid(which="major", color="0.85", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        drawn = [part for part in parts if any(part == p for p, _ in lines)]
        handles = [Line2D([], [], color="0.3", linestyle=_DASHES[part], label=part) for part in drawn]
        clock.legend(handles=handles, frameon=False, fontsize=9)
    device, config = result["device"], result["config"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    figure.suptitle(
        f"Model {result['model']} ({_blocks(result)}, {config['dtype']}, random weights), a segment of "
        f"{config['segment']} latent frames of {config['model']['height']}×{config['model']['width']}\n"
        f"{device['name']}{threads}, torch {result['versions']['torch']}",
        fontsize=11,
    )
    used = {point["strategy"] for point in points}
    handles = [Line2D([], [], color=c, marker=m, label=s) for s, (c, m) in _LINES.items() if s in used]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with replacing(path) as part:
        canvas.print_png(part)


def print_cost(result: dict[str, Any], folder: Path, skipped: str | None) -> None:
    """Print what `model.profile_model` returned.

    Args:
        result: the content of model_cost.json.
        folder: where the files are.
        skipped: why there is no plot, or None.
    """
    console = Console(highlight=False)
    weights = ", ".join(f"{name} {_mebi(size)} MiB" for name, size in result["weights_bytes"].items())
    console.print(f"model {result['model']}, {_blocks(result)}; weights: {weights}", soft_wrap=True)
    if not result["next_step_is_exact"]:
        console.print(
            "its history sees the video: a next step is an approximation, the exact one is the first again",
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
        console.print("times differ much between repeats: is the machine busy with other work?", soft_wrap=True)
    names = ["model_cost.json"] + ([] if skipped or not points else ["model_cost.png"])
    _print_files(console, folder, names, skipped)
