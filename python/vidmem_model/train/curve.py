"""The loss curve of a training run, a CSV file."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import torch

from ..checks import shorten
from ..errors import UserError
from ..files import cannot_write, replacing

_COLUMNS = ("step", "loss", "grad_norm", "lr", "seconds")


class Curve:
    """Writes the CSV of a run, one row per step.

    Args:
        path: The file; rows of an earlier run after step `done` are dropped.
        done: Steps done.
    """

    def __init__(self, path: Path, done: int) -> None:
        rows = [row for row in read_curve(path) if row["step"] <= done] if path.is_file() else []
        self.path = path
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        self._last = (math.nan, math.nan)
        self._told = self.seconds  # time of the last flush
        self._rows: list[tuple[Any, ...]] = []
        with replacing(path) as part, part.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(_COLUMNS)
            writer.writerows(_written(*(row[name] for name in _COLUMNS)) for row in rows)

    def add(self, step: int, loss: torch.Tensor, norm: torch.Tensor, lr: float, seconds: float) -> None:
        """Add a step; tensors are read in `flush`, to avoid a synchronisation with the GPU."""
        self.seconds += seconds
        self._rows.append((step, loss, norm, lr, self.seconds))

    def flush(self) -> tuple[float, float]:
        """Write the added steps; return their mean loss and the seconds per step."""
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
    # Nine digits represent every float32 exactly.
    return step, f"{loss:.9g}", f"{norm:.9g}", f"{lr:.9g}", f"{seconds:.3f}"


def read_curve(path: Path) -> list[dict[str, float]]:
    """Read the rows of a run's CSV.

    Raises:
        UserError: The file is missing or is not such a CSV.
    """
    try:
        with path.open(newline="") as file:
            rows = [{name: float(row[name]) for name in _COLUMNS} for row in csv.DictReader(file) if row["seconds"]]
        return [{**row, "step": int(row["step"])} for row in rows]
    except (OSError, KeyError, ValueError, TypeError, OverflowError, csv.Error) as error:
        reason = shorten(error)
        raise UserError(
            f"{path}: cannot be read as a training curve ({reason}); give --restart to discard the run and start again"
        ) from error
