"""Shared parts of all plots: file types, paper sizes, colours, ticks, and labels at the ends of lines.

A plot has no title, because it gets a caption. The same plot can be written for a paper (PDF) or a page (PNG or SVG);
equal numbers give equal bytes. matplotlib is imported by the functions that draw.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
# Width of one and of two columns of a paper, in inches.
WIDTHS = {1: 3.3, 2: 6.8}

# Okabe and Ito's colours, which are distinguishable in all common kinds of colour vision, as are the markers.
ORANGE, BLUE, GREEN, PURPLE, YELLOW, BLACK = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#000000"
# "merged" is wide and lies below the others: "compressed memory" takes as much memory, and both are to be seen.
LINES: dict[str, dict[str, Any]] = {
    "whole history": {"color": ORANGE, "marker": "o"},
    "sliding window": {"color": BLUE, "marker": "s"},
    "merged": {"color": PURPLE, "marker": "v", "linewidth": 2.8, "markersize": 6.0, "zorder": 1.9},
    "linear attention": {"color": GREEN, "marker": "^"},
    "compressed memory": {"color": BLACK, "marker": "D"},
}

_STYLE = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.8,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.which": "major",
    "grid.color": "0.88",
    "grid.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "white",
    # Text is stored as text, so that it can be searched and edited.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # Otherwise the ids of SVG elements are random.
    "svg.hashsalt": "vidmem",
}
_DPI = 200
# Height of a line of text, and distance between two texts, in points.
_LINE_HEIGHT, _BETWEEN = 9.6, 3.0


def check_plot(path: Path) -> None:
    """Raise UserError unless the suffix is that of a plot; long work calls this before it starts."""
    if path.suffix.lower() not in SUFFIXES:
        got = path.suffix or "no suffix"
        raise UserError(f"{path}: a plot must be a .png, .pdf or .svg file, got {got}; choose another name")


@contextmanager
def plot(path: Path, columns: int, height: float, title: str) -> Iterator[Figure]:
    """Yield a figure to draw in, and write it as PNG, PDF or SVG, by the suffix of `path`.

    Args:
        path: File to write.
        columns: Width in columns of a paper, 1 or 2.
        height: Height in inches.
        title: Title for the metadata of the file only.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots.plots_missing` first.
        UserError: The suffix is another, or the file cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    check_plot(path)
    if columns not in WIDTHS:
        raise ValueError(f"plot: columns must be 1 or 2, got {columns!r}")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower()[1:]
    # Without the date, equal numbers give equal files.
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with rc_context(), replacing(path) as part:
        _use_style()
        figure = Figure((WIDTHS[columns], height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        smaller = {"pil_kwargs": {"optimize": True}} if kind == "png" else {}
        figure.savefig(part, format=kind, metadata={"Title": title, **undated}, **smaller)


def _use_style() -> None:
    from matplotlib import rcdefaults, rcParams

    # Start from matplotlib's defaults, not from the settings of the user.
    rcdefaults()
    rcParams.update(_STYLE)


def log_axis(axes: Axes, which: str, ticks: Sequence[float] | None = None, labels: Sequence[str] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers at three round values or more.

    Call it after everything is drawn.

    Args:
        axes: Axes of the figure.
        which: "x" or "y".
        ticks: Positions of the ticks, instead of automatic ones.
        labels: Labels of these ticks.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set(**{f"{which}scale": "log"})
    axis = getattr(axes, f"{which}axis")
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    if ticks is not None:
        axis.set_major_locator(FixedLocator(list(ticks)))
        if labels is not None:
            axis.set_ticklabels(labels)
        return
    low, high = axis.get_view_interval()
    for subs in ((1.0,), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)):
        locator = LogLocator(subs=subs, numticks=12)
        if sum(low <= tick <= high for tick in locator.tick_values(low, high)) >= 3:
            break
    else:
        locator = MaxNLocator(4)
    axis.set_major_locator(locator)


def seconds_axis(times: Iterable[float]) -> tuple[str, float]:
    """Best unit for times in seconds, and the factor to multiply them by."""
    return ("s", 1.0) if max(times, default=1.0) >= 1.0 else ("ms", 1e3)


def plain(value: float) -> str:
    """A number without an exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.10f}".rstrip("0").rstrip(".")


def label_ends(figure: Figure, ends: Mapping[Axes, Sequence[tuple[float, str, str]]], gap: float = 4.0) -> None:
    """Write labels to the right of panels, each at the height of its line's end, moved where they would overlap.

    Call it after everything is drawn and scaled; the labels take part in the layout.

    Args:
        figure: Figure of the panels.
        ends: For each panel (y value, text of one or more lines, colour).
        gap: Distance between axes and text, in points.
    """
    notes = {
        axes: [
            axes.annotate(
                text,
                (1.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(gap, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                linespacing=1.15,
                annotation_clip=False,
            )
            for y, text, colour in lines
        ]
        for axes, lines in ends.items()
    }
    # The text's width decides about the axes' size, and that about the heights.
    figure.draw_without_rendering()
    points = 72 / figure.dpi
    for axes, lines in ends.items():
        heights = [_LINE_HEIGHT * (text.count("\n") + 1) + _BETWEEN for _, text, _ in lines]
        places = [axes.transData.transform((1, y))[1] * points for y, _, _ in lines]
        for note, place, moved in zip(notes[axes], places, spread(places, heights), strict=True):
            note.set_position((gap, moved - place))


def spread(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move intervals apart, as little as possible, so that none overlap and their order stays.

    Args:
        places: Centres of the intervals.
        heights: Lengths of the intervals.

    Returns:
        The new centres, in the given order.
    """
    order = sorted(range(len(places)), key=lambda i: places[i])
    # Groups of intervals that touch: members, and where the group's lower end should be by the mean of its members.
    groups: list[tuple[list[int], float]] = []
    for i in order:
        members, start = [i], places[i] - heights[i] / 2
        while groups and groups[-1][1] + sum(heights[j] for j in groups[-1][0]) > start:
            below, their = groups.pop()
            # Each member would like the group to start so that it lies at its own place.
            start = (their * len(below) + (start - sum(heights[j] for j in below)) * len(members)) / (
                len(below) + len(members)
            )
            members = below + members
        groups.append((members, start))
    moved = [0.0] * len(places)
    for members, start in groups:
        for i in members:
            moved[i] = start + heights[i] / 2
            start += heights[i]
    return moved
