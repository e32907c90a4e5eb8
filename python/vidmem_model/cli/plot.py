"""Command that draws the plot of a result file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import OptionError, UserError
from .app import app


@app.command()
def plot(
    result: Annotated[
        Path,
        typer.Argument(
            help="JSON file written by profile, demo or evaluate retrieval, or the curve.csv of a training run."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Plot to write (.png, .pdf or .svg).")],
    columns: Annotated[int, typer.Option(help="Width in columns of a paper: 1 (3.3 inches) or 2 (6.8 inches).")] = 2,
    positions: Annotated[
        bool,
        typer.Option(
            "--positions", help="Draw quality against frame position; requires a result of evaluate retrieval."
        ),
    ] = False,
) -> None:
    """Draw a plot from a result file, for a page or a paper."""
    from ..files import outputs
    from ..show.figure import WIDTHS, check_plot
    from ..show.plots import plots_missing
    from ..show.redraw import read_result, redraw
    from ..train.curve import read_curve

    outputs([result], [output])
    check_plot(output)
    if columns not in WIDTHS:
        raise OptionError(f"--columns must be 1 or 2, got {columns}")
    if missing := plots_missing():
        raise UserError(missing)
    content = read_curve(result) if result.suffix.lower() == ".csv" else read_result(result)
    redraw(result, content, output, columns, positions)
    print(output)
