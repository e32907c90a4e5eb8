"""What the user looks at: PNG files, the contact sheet, the plots.

Pictures of frames are written with zlib alone; the contact sheet and the plot need matplotlib.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..files import replacing

# Okabe and Ito's colours, told apart in all common kinds of colour vision; so are the markers.
_LINES = {
    "whole history": ("#D55E00", "o"),
    "sliding window": ("#0072B2", "s"),
    "linear attention": ("#009E73", "^"),
    "compressed memory": ("#000000", "D"),
}


def plots_missing() -> str | None:
    """Why there can be no plots, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'vidmem-model[bench]'"
    return None


def write_memory_plot(path: Path, result: dict[str, Any]) -> None:
    """Plot what `attention.profile` measured: peak memory and time against length, log axes.

    Args:
        path: PNG file to write.
        result: as returned by `attention.profile`.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure((11.5, 5.6), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    memory, clock = figure.subplots(1, 2)
    points = result["points"]
    lengths = sorted({point["seconds"] for point in points})
    tokens = {point["seconds"]: point["context_tokens"] for point in points}
    handles = []
    for strategy in dict.fromkeys(point["strategy"] for point in points):
        mine = sorted((p for p in points if p["strategy"] == strategy), key=lambda p: p["seconds"])
        colour, marker = _LINES[strategy]
        x = [p["seconds"] for p in mine]
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.8}
        (line,) = memory.plot(x, [p["peak_bytes"] / 2**20 for p in mine], label=strategy, **style)
        memory.plot(
            x,
            [p["held_bytes_computed"] / 2**20 for p in mine],
            color=colour,
            linewidth=1.2,
            linestyle=(0, (1, 2)),
        )
        clock.plot(x, [p["call_seconds"] * 1e3 for p in mine], **style)
        handles.append(line)
    handles += memory.plot([], [], color="0.35", linewidth=1.2, linestyle=(0, (1, 2)), label="held, from shapes")
    for axes, title, unit in (
        (memory, "Peak memory: held K/V or state, workspace, output", "MiB"),
        (clock, "Time of one call", "ms"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="history (s of video; below: patch tokens)")
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xticks(lengths, [f"{s:g} s\n{_thousands(tokens[s])}" for s in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.grid(which="major", color="0.85", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    config, device = result["config"], result["device"]
    rows, columns = config["grid"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    figure.suptitle(
        f"One attention layer ({config['heads']} heads of {config['head_dim']}, {config['dtype']}) "
        f"reads the history for one latent frame ({rows}×{columns} queries)\n"
        f"{device['name']}{threads}, torch {result['versions']['torch']}",
        fontsize=11,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with replacing(path) as part:
        canvas.print_png(part)


# Rows of the retrieval table: trained ones have full lines, the others dashed or dotted ones.
_ROW_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_ROW_MARKERS = "osD^vPX*"


def write_retrieval_plot(path: Path, result: dict[str, Any]) -> None:
    """Plot what `retrieval.evaluate_retrieval` measured: each measure against the position in the history.

    Args:
        path: PNG file to write.
        result: as returned by `retrieval.evaluate_retrieval`.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((13.5, 5.2), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    better = {"psnr": "PSNR (dB), higher", "ssim": "SSIM, higher", "stlpips": "ST-LPIPS, lower"}
    seconds = result["config"]["history"] / result["fps"]
    panels = figure.subplots(1, len(better))
    for axes, (measure, title) in zip(panels, better.items(), strict=True):
        for i, (name, row) in enumerate(result["rows"].items()):
            curve = row[measure]["curve"]
            axes.plot(
                [(p + 0.5) * seconds / len(curve) for p in range(len(curve))],
                curve,
                label=name,
                color=_ROW_COLOURS[i % len(_ROW_COLOURS)],
                marker=_ROW_MARKERS[i // 2 % len(_ROW_MARKERS)],
                markevery=max(1, len(curve) // 8),
                markersize=5,
                linewidth=1.6,
                linestyle="-" if row["trained"] else (0, (4, 2)),
            )
        axes.set_title(f"{title} is better", fontsize=11)
        axes.set_xlabel("position in the history (s)")
        axes.grid(color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    height, width = result["frame_size"]
    figure.suptitle(
        f"Frames read back from {seconds:g} s of held-out video ({height}×{width}, {result['fps']:g} fps): "
        f"means over {len(result['clips'])} histories",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    with replacing(path) as part:
        canvas.print_png(part)


def _thousands(count: int) -> str:
    return f"{count / 1000:.3g}k" if count >= 1000 else str(count)
