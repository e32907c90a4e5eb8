"""The loss curve of a training run: its CSV, its plot, and the progress shown while it grows."""

from __future__ import annotations

import csv
import datetime
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checks import shorten
from .errors import UserError
from .files import cannot_write, replacing

_COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds")


class Curve:
    """The CSV of a run: a row a step.

    Args:
        path: the file; rows after step `done` of an earlier run are dropped.
        done: steps done.
    """

    def __init__(self, path: Path, done: int) -> None:
        rows = [row for row in read_curve(path) if row["step"] <= done] if path.is_file() else []
        self.path = path
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        self._last = (math.nan, math.nan)
        self._told = self.seconds  # at the last flush
        self._rows: list[tuple[Any, ...]] = []
        with replacing(path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(_written(*(row[name] for name in _COLUMNS)) for row in rows)

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, lr: float, seconds: float) -> None:
        """Note a step; tensors are read later, so that a GPU is not waited for."""
        self.seconds += seconds
        self._rows.append((step, loss, norm, lr, self.seconds))

    def flush(self) -> tuple[float, float]:
        """Write what was noted; the mean loss of the last rows, and the seconds of a step."""
        rows = [(step, float(loss), float(norm), lr, seconds) for step, loss, norm, lr, seconds in self._rows]
        if rows:
            try:
                with self.path.open("a", newline="") as file:
                    csv.writer(file).writerows(_written(*row) for row in rows)
            except OSError as error:
                raise cannot_write(self.path, error) from error
            count = len(rows)
            self._last = (sum(row[1] for row in rows) / count, (self.seconds - self._told) / count)
            self._told, self._rows = self.seconds, []
        return self._last


def _written(step: int, loss: float, norm: float, lr: float, seconds: float) -> tuple[Any, ...]:
    # Nine digits tell every float32 from every other.
    return step, f"{loss:.9g}", f"{norm:.9g}", f"{lr:.9g}", f"{seconds:.3f}"


def read_curve(path: Path) -> list[dict[str, float]]:
    """Rows of a run's CSV.

    Raises:
        UserError: the file is missing or is no such CSV.
    """
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name]) for name in _COLUMNS} for row in csv.DictReader(file) if row["seconds"]]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (OSError, KeyError, ValueError, TypeError, OverflowError, csv.Error) as error:
        reason = shorten(error)
        raise UserError(f"{path}: cannot be read as a training curve ({reason}); --restart begins anew") from error


@contextmanager
def progress(steps: int, done: int, visible: bool) -> Iterator[Callable[[int, float, float], None]]:
    """Show loss and time left on stderr: a bar on a terminal, else a line a call.

    Args:
        steps: of the whole run.
        done: steps of it that were done before.
        visible: False for all processes but the first.

    Returns:
        Function of the step, the mean loss since the call before, and the seconds of a step.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not visible or not console.is_terminal:

        def line(step: int, loss: float, seconds: float) -> None:
            left = datetime.timedelta(seconds=round((steps - step) * seconds))
            print(
                f"step {step}/{steps}  loss {loss:.4f}  {seconds:.2f} s a step  {left} left",
                file=sys.stderr,
                flush=True,
            )

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("training", total=steps, completed=done)
        yield lambda step, loss, seconds: bars.update(task, completed=step, description=f"loss {loss:.4f}")


def write_curve_plot(path: Path, rows: list[dict[str, float]]) -> None:
    """Plot loss and gradient norm of a run against its steps.

    Args:
        path: PNG file to write.
        rows: from `read_curve`, at least one.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `report.plots_missing` first.
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
