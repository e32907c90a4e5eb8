"""Plots of `evaluate.retrieval`: quality against tokens, and against position in the history."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .figure import BLACK, BLUE, GREEN, ORANGE, PURPLE, YELLOW, label_ends, log_axis, plain, plot

# Metrics and labels of their axes; the arrow points to better values.
_MEASURES = {"psnr": "PSNR (dB) ↑", "ssim": "SSIM ↑", "stlpips": "ST-LPIPS ↓"}
_STYLES = {
    "learned": {"color": BLUE, "marker": "o"},
    "dct": {"color": ORANGE, "marker": "s"},
    "merge": {"color": GREEN, "marker": "^"},
    "VAE alone": {"color": BLACK, "linestyle": "dashed"},
    "mean frame": {"color": "0.45", "linestyle": "dashed"},
}
# Styles of other methods.
_OTHERS = ({"color": PURPLE, "marker": "v"}, {"color": YELLOW, "marker": "P"})


def methods_of(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Group the rows of a result by the line that they are drawn as.

    All trained models are one method, "learned": for each number of tokens the row with the highest PSNR.

    Args:
        result: Result of `retrieval.evaluate_retrieval`, of any version.

    Returns:
        The rows of each method, in order of tokens; a method without tokens has one row.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {"learned": {}}
    for name, row in result["rows"].items():
        method = "learned" if row["trained"] else name.rsplit(" ", 1)[0] if row["tokens"] else name
        rows = found.setdefault(method, {})
        best = rows.setdefault(row["tokens"], row)
        if row["psnr"]["mean"] > best["psnr"]["mean"]:
            rows[row["tokens"]] = row
    return {method: [rows[tokens] for tokens in sorted(rows)] for method, rows in found.items() if rows}


def _styles(methods: dict[str, Any]) -> dict[str, dict[str, Any]]:
    unknown = [method for method in methods if method not in _STYLES]
    return _STYLES | {method: _OTHERS[i % len(_OTHERS)] for i, method in enumerate(unknown)}


def _panels(figure: Any, columns: int) -> Any:
    """One large panel and two small ones, beside it or (with one column) below it."""
    if columns == 1:
        return figure.subplots(3, 1, sharex=True, height_ratios=(1.5, 1, 1))
    grid = figure.add_gridspec(2, 2, width_ratios=(1.35, 1))
    large = figure.add_subplot(grid[:, 0])
    return large, figure.add_subplot(grid[0, 1], sharex=large), figure.add_subplot(grid[1, 1], sharex=large)


def write_retrieval_plot(path: Path, result: dict[str, Any], columns: int = 2) -> None:
    """Plot what `retrieval.evaluate_retrieval` measured: each measure against the tokens of the memory.

    A bar is the standard deviation over the seeds of trained models.

    Args:
        path: File to write; the suffix selects PNG, PDF or SVG.
        result: as returned by `retrieval.evaluate_retrieval`.
        columns: of a paper that the plot is as wide as, 1 or 2.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots.plots_missing` first.
        UserError: The suffix is another, or the file cannot be written.
        ValueError: columns is neither 1 nor 2.
    """
    methods = methods_of(result)
    styles = _styles(methods)
    tokens = sorted({row["tokens"] for rows in methods.values() for row in rows} - {0})
    title = f"Quality of frames read back against the tokens of the memory: {', '.join(methods)}"
    with plot(path, columns, 3.2 if columns == 2 else 5.4, title) as figure:
        panels = _panels(figure, columns)
        ends: dict[Any, list[tuple[float, str, str]]] = {}
        for axes, (measure, name) in zip(panels, _MEASURES.items(), strict=True):
            ends[axes] = []
            for method, rows in methods.items():
                values = [row[measure]["mean"] for row in rows]
                if rows[0]["tokens"]:
                    spreads = [row[measure]["spread"] or math.nan for row in rows]
                    axes.errorbar([row["tokens"] for row in rows], values, spreads, capsize=2, **styles[method])
                else:
                    axes.axhline(values[0], linewidth=1.0, **styles[method])
                ends[axes].append((values[-1], method, styles[method]["color"]))
            axes.set_ylabel(name)
            if tokens:
                log_axis(axes, "x", tokens, [plain(n) for n in tokens])
                axes.set_xlim(tokens[0] / 1.15, tokens[-1] * 1.15)
            if axes in (panels[-1], panels[0] if columns == 2 else None):
                axes.set_xlabel("tokens of the memory")
            else:
                axes.tick_params(labelbottom=False)
        label_ends(figure, ends)


def write_positions_plot(path: Path, result: dict[str, Any], columns: int = 2) -> None:
    """Plot each measure against the position in the history, a line a method, of the memories with fewest tokens.

    Args, Raises: as `write_retrieval_plot`.
    """
    methods = {method: rows[0] for method, rows in methods_of(result).items()}
    styles = _styles(methods)
    seconds = result["config"]["history"] / result["fps"]
    tokens = " and ".join(plain(n) for n in sorted({row["tokens"] for row in methods.values()} - {0}))
    where = "position in the history (s)" + (f"\nmemories of {tokens} tokens" if tokens else "")
    title = f"Quality of frames read back against their position in {seconds:g} s of video: {', '.join(methods)}"
    with plot(path, columns, 3.2 if columns == 2 else 5.4, title) as figure:
        panels = _panels(figure, columns)
        ends: dict[Any, list[tuple[float, str, str]]] = {}
        for axes, (measure, name) in zip(panels, _MEASURES.items(), strict=True):
            ends[axes] = []
            for method, row in methods.items():
                curve = row[measure]["curve"]
                places = [(p + 0.5) * seconds / len(curve) for p in range(len(curve))]
                axes.plot(places, curve, markevery=max(1, len(curve) // 8), **styles[method])
                ends[axes].append((curve[-1], method, styles[method]["color"]))
            axes.set_ylabel(name)
            axes.set_xlim(0, seconds)
            if axes in (panels[-1], panels[0] if columns == 2 else None):
                axes.set_xlabel(where)
            else:
                axes.tick_params(labelbottom=False)
        label_ends(figure, ends)
