"""The plot of a training's loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..files import replacing


def write_curve_plot(path: Path, rows: list[dict[str, float]]) -> None:
    """Plot loss and gradient norm of a run against its steps.

    Args:
        path: PNG file to write.
        rows: from `read_curve`, at least one.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots.plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((11.5, 4.6), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    steps = np.array([row["step"] for row in rows])
    for axes, name, title in zip(
        figure.subplots(1, 2),
        ("loss", "grad_norm"),
        ("Loss (velocity, mean square)", "Norm of the gradient"),
        strict=True,
    ):
        values = np.array([row[name] for row in rows])
        # Single steps differ by their timesteps alone: the line is the mean of a hundredth of the run.
        width = max(1, len(rows) // 100)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps, values, color="0.8", linewidth=0.6)
        axes.plot(steps[width - 1 :], smooth, color="#0072B2", linewidth=1.8)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=11)
        if (values > 0).all():
            axes.set_yscale("log")
        axes.grid(which="major", color="0.85", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as part:
        canvas.print_png(part)
