"""What all plots share: file types, paper sizes, colours, ticks and labels at the ends of lines.

A plot has no title inside: its caption says what it shows. The same picture goes into a paper (PDF) and onto a page
(PNG or SVG); the same numbers always give the same bytes. matplotlib is imported by the functions that draw.
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
# Inches: of one column of a paper, and of two.
WIDTHS = {1: 3.3, 2: 6.8}

# Okabe and Ito's colours, told apart in all common kinds of colour vision; so are the markers.
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
    # Text stays text, so that it can be searched, and edited by a journal.
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    # Names of an SVG's elements would be random.
    "svg.hashsalt": "vidmem",
}
_DPI = 200
# Of a line of text, and between two texts, in points.
_LINE_HEIGHT, _BETWEEN = 9.6, 3.0


def check_plot(path: Path) -> None:
    """Raise UserError unless a plot can be written to a file of this name; long work asks before it starts."""
    if path.suffix.lower() not in SUFFIXES:
        got = path.suffix or "no suffix"
        raise UserError(f"{path}: a plot must be a .png, .pdf or .svg file, got {got}; choose another name")


@contextmanager
def plot(path: Path, columns: int, height: float, title: str) -> Iterator[Figure]:
    """Give a figure to draw in; it is written as PNG, PDF or SVG, by the suffix of `path`.

    Args:
        path: file to write.
        columns: 1 or 2 of a paper.
        height: inches.
        title: what the picture shows, for the file's metadata alone.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots.plots_missing` first.
        UserError: the suffix is another, or the path cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    check_plot(path)
    if columns not in WIDTHS:
        raise ValueError(f"plot: columns must be 1 or 2, got {columns!r}")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kind = path.suffix.lower()[1:]
    # The date would make two files of the same numbers differ.
    undated = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}[kind]
    with rc_context(), replacing(path) as part:
        _use_style()
        figure = Figure((WIDTHS[columns], height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(part, format=kind, metadata={"Title": title, **undated})


def _use_style() -> None:
    from matplotlib import rcdefaults, rcParams

    # What the user has set for other plots does not change these.
    rcdefaults()
    rcParams.update(_STYLE)


def log_axis(axes: Axes, which: str, ticks: Sequence[float] | None = None, labels: Sequence[str] | None = None) -> None:
    """Make an axis logarithmic, with plain numbers at three round values or more.

    Call it when all is drawn.

    Args:
        axes: of the figure.
        which: "x" or "y".
        ticks: where they are to be in place of that.
        labels: of those ticks.
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
    """The unit that times in seconds are best shown in, and what to multiply them by."""
    return ("s", 1.0) if max(times, default=1.0) >= 1.0 else ("ms", 1e3)


def plain(value: float) -> str:
    """A number without an exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.10f}".rstrip("0").rstrip(".")


def label_ends(figure: Figure, ends: Mapping[Axes, Sequence[tuple[float, str, str]]], gap: float = 4.0) -> None:
    """Write labels to the right of panels, each at the height of its line's end, moved where they would overlap.

    Call it when all is drawn and the axes are scaled; the labels take part in the layout.

    Args:
        figure: of the panels.
        ends: for each panel value of y, text of one or more lines, and colour.
        gap: points between axes and text.
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
        places: the middle of each.
        heights: the length of each.

    Returns:
        The new middles, in the order given.
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
