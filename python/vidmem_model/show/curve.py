"""Plot of the loss curve of a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .figure import BLUE, log_axis, plain, plot


def write_curve_plot(path: Path, rows: list[dict[str, float]], columns: int = 2) -> None:
    """Plot loss and gradient norm of a run against its steps.

    Args:
        path: File to write; the suffix selects PNG, PDF or SVG.
        rows: Rows from `read_curve`, at least one.
        columns: Width of the plot in columns of a paper, 1 or 2.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots.plots_missing` first.
        UserError: The suffix is another, or the file cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    steps = np.array([row["step"] for row in rows])
    # The loss of a step depends on its timesteps, so the line is a moving average.
    width = max(1, len(rows) // 50)
    with plot(path, columns, 2.4 if columns == 2 else 4.0, "Loss and gradient norm of a training run") as figure:
        panels = figure.subplots(*((1, 2) if columns == 2 else (2, 1)))
        for axes, name, label in zip(panels, ("loss", "grad_norm"), ("loss", "norm of the gradient"), strict=True):
            values = np.array([row[name] for row in rows])
            smooth = np.convolve(values, np.ones(width) / width, mode="valid")
            axes.plot(steps, values, color="0.8", linewidth=0.5, label="a step")
            mean = f"mean of the last {width} steps" if width > 1 else None
            axes.plot(steps[width - 1 :], smooth, color=BLUE, marker="." if len(rows) == 1 else None, label=mean)
            axes.set(xlabel="step", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
            if (values > 0).all():
                log_axis(axes, "y")
        if width > 1:
            figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
