"""Draw plots from the result files of commands, for `vidmem plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checks import parse_json, shorten
from ..errors import UserError
from .cost import write_cost_plot
from .curve import write_curve_plot
from .plots import write_memory_plot
from .retrieval import write_positions_plot, write_retrieval_plot

_BY_FORMAT = {
    "vidmem.memory_vs_context": write_memory_plot,
    "vidmem.model_cost": write_cost_plot,
    "vidmem.retrieval": write_retrieval_plot,
}


def read_result(path: Path) -> dict[str, Any]:
    """Read a JSON file of `vidmem profile`, `demo` (memory_vs_context.json) or `evaluate retrieval`, of any version.

    Raises:
        UserError: The file cannot be read, or is none of these.
    """
    try:
        content = parse_json(path.read_text(encoding="utf-8"), "it")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a result file") from error
    except ValueError as error:
        raise UserError(f"{path}: is not a result file ({error}); give JSON of a vidmem command") from error
    kind = content.get("format") if isinstance(content, dict) else None
    if not isinstance(kind, str) or kind not in _BY_FORMAT:
        kinds = ", ".join(_BY_FORMAT)
        raise UserError(f"{path}: must be curve.csv or JSON of one of the formats {kinds}; got {kind!r}")
    return content


def redraw(
    name: Path, result: dict[str, Any] | list[dict[str, float]], path: Path, columns: int = 2, positions: bool = False
) -> None:
    """Draw the plot of a result.

    Args:
        name: File of the result, for messages.
        result: From `read_result` or `read_curve`.
        path: File to write; the suffix selects PNG, PDF or SVG.
        columns: Width of the plot in columns of a paper, 1 or 2.
        positions: For `evaluate retrieval`: quality against position in the history, instead of tokens.

    Raises:
        UserError: The suffix of `path` is another, the result is empty, incomplete or damaged, or `path` cannot be
            written.
    """
    kind = "curve" if isinstance(result, list) else result["format"]
    if not (result if isinstance(result, list) else result.get("points") or result.get("rows")):
        raise UserError(f"{name}: has no measurements to draw")
    draw = _BY_FORMAT.get(kind, write_curve_plot)
    if positions:
        if kind != "vidmem.retrieval":
            raise UserError(f"--positions requires a result of vidmem evaluate retrieval, got {name}")
        draw = write_positions_plot
    try:
        draw(path, result, columns)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise UserError(f"{name}: cannot be drawn, it is incomplete or damaged ({reason})") from error
