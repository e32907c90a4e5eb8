"""Plots drawn again from the result files of commands."""

from __future__ import annotations

from pathlib import Path

from ..checks import parse_json
from ..errors import UserError
from ..train.curve import read_curve
from .cost import write_cost_plot
from .curve import write_curve_plot
from .figure import check_plot
from .plots import write_memory_plot
from .retrieval import write_positions_plot, write_retrieval_plot

_BY_FORMAT = {
    "vidmem.memory_vs_context": write_memory_plot,
    "vidmem.model_cost": write_cost_plot,
    "vidmem.retrieval": write_retrieval_plot,
}


def redraw(result: Path, path: Path, columns: int = 2, positions: bool = False) -> None:
    """Draw the plot of a result file, of any version.

    Args:
        result: JSON file of `vidmem profile`, `demo` (memory_vs_context.json) or `evaluate retrieval`, or the
            curve.csv of a training run.
        path: PNG, PDF or SVG file to write, by its suffix.
        columns: of a paper that the plot is as wide as, 1 or 2.
        positions: of `evaluate retrieval`, quality against the position in the history in place of tokens.

    Raises:
        UserError: the suffix of `path` is another, `result` is no such file or has no numbers, or a file cannot be
            read or written.
    """
    check_plot(path)
    try:
        if result.suffix.lower() == ".csv":
            draw, content = write_curve_plot, read_curve(result)
            empty, kind = not content, "curve"
        else:
            content = parse_json(result.read_text(encoding="utf-8"), str(result))
            kind = content.get("format") if isinstance(content, dict) else None
            if kind not in _BY_FORMAT:
                kinds = ", ".join(_BY_FORMAT)
                raise UserError(f"{result}: must be curve.csv or JSON of one of the formats {kinds}; got {kind!r}")
            draw, empty = _BY_FORMAT[kind], not content.get("points", content.get("rows"))
    except OSError as error:
        raise UserError(f"{result}: cannot be read ({error.strerror})") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{result}: is damaged: {error}") from error
    if empty:
        raise UserError(f"{result}: has no measurements to draw")
    if positions:
        if kind != "vidmem.retrieval":
            raise UserError("--positions requires a result of vidmem evaluate retrieval")
        draw = write_positions_plot
    try:
        draw(path, content, columns)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{result}: is no whole result of its kind ({type(error).__name__}: {error})") from error
