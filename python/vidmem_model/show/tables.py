"""Tables that commands print on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from ..memory import trained

_WIDEST = 1000


def _table(*columns: str, title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _print_table(console: Console, table: Table) -> None:
    """Print a table without wrapping cells, even if it is wider than the terminal."""
    least = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
    console.width = max(console.width, least)
    console.print(table)


def _decibel(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f}"


def _mebi(count: int) -> str:
    return f"{count / 2**20:,.1f}" if count < 100 * 2**20 else f"{count / 2**20:,.0f}"


def print_demo(result: dict[str, Any], folder: Path) -> None:
    """Print the result of `demo.run_demo`.

    Args:
        result: Content of report.json.
        folder: Folder of the files.
    """
    console = Console(highlight=False)
    for part in (result, *(result[name] for name in trained())):
        if part:
            _print_memories(console, part)
    table = _table("stage", "s", "peak MiB", "above start MiB", title="Time and resident memory")
    for stage in result["stages"]:
        table.add_row(
            stage["stage"],
            f"{stage['seconds']:.2f}",
            _mebi(stage["peak_rss_bytes"]),
            _mebi(stage["grown_bytes"]),
        )
    total = sum(stage["seconds"] for stage in result["stages"])
    table.add_row("all", f"{total:.2f}", _mebi(result["peak_rss_bytes"]), "")
    _print_table(console, table)
    _print_files(console, folder, result["files"], result["skipped"])


def _print_memories(console: Console, result: dict[str, Any]) -> None:
    """Print one part of the demo: video, memories, and frames read back."""
    video, methods = result["video"], result["methods"]
    before = result["context_tokens_before"]
    console.print(
        f"{video['source']}, {video['seconds']:.2f} s from {video['start_seconds']:g} s: "
        f"{video['frames']} frames of {video['height']}x{video['width']} at {video['fps']:g} fps (height x width)",
        soft_wrap=True,
    )
    if video["shorter_than_asked"]:
        console.print("the video is shorter than asked; all of it was used", soft_wrap=True)

    table = _table("memory", "tokens", "fewer", "MB on disk", "PSNR dB", "SSIM", title="Context")
    table.add_row("none", f"{before:,}", "", "", "", "")
    for name, method in methods.items():
        table.add_row(
            name,
            f"{method['context_tokens_after']:,}",
            f"{method['compression']:.1f}x",
            f"{method['bytes_on_disk'] / 1e6:.1f}",
            _decibel(method["mean_psnr_db"]),
            f"{method['mean_ssim']:.3f}",
        )
    _print_table(console, table)

    columns = [f"{name}\n{unit}" for name in methods for unit in ("dB", "SSIM", "ms")]
    table = _table("frame", *columns, title="Frames read back from the memory file")
    for rows in zip(*(method["retrieved"] for method in methods.values()), strict=True):
        cells = [str(rows[0]["frame"])]
        for row in rows:
            cells += [_decibel(row["psnr_db"]), f"{row['ssim']:.3f}"]
            cells.append(f"{row['retrieve_seconds'] * 1e3:.0f}")
        table.add_row(*cells)
    _print_table(console, table)


def print_profile(result: dict[str, Any], folder: Path, skipped: str | None) -> None:
    """Print the result of `attention.profile`.

    Args:
        result: Content of memory_vs_context.json.
        folder: Folder of the files.
        skipped: Reason why there is no plot, or None.
    """
    console = Console(highlight=False)
    strategies = list(dict.fromkeys(point["strategy"] for point in result["points"]))
    for title, cell in (
        ("Peak memory, MiB", lambda p: _mebi(p["peak_bytes"])),
        ("Time of one call, ms", lambda p: f"{p['call_seconds'] * 1e3:,.1f}"),
    ):
        table = _table("history", "tokens", *(s.replace(" ", "\n") for s in strategies), title=title)
        for seconds in sorted({p["seconds"] for p in result["points"]}):
            row = {p["strategy"]: p for p in result["points"] if p["seconds"] == seconds}
            tokens = next(iter(row.values()))["context_tokens"]
            cells = [cell(row[s]) if s in row else "-" for s in strategies]
            table.add_row(f"{seconds:g} s", f"{tokens:,}", *cells)
        _print_table(console, table)
    if result["noisy"]:
        console.print("times differ much between repeats; the machine may be busy with other work", soft_wrap=True)
    names = ["memory_vs_context.json"] + ([] if skipped else ["memory_vs_context.png"])
    _print_files(console, folder, names, skipped)


def _spread(measured: dict[str, Any], digits: int) -> str:
    spread = "" if measured["spread"] is None else f" ± {measured['spread']:.{digits}f}"
    return f"{measured['mean']:.{digits}f}{spread}"


_MEASURES = {"psnr": ("PSNR dB ↑", 2), "ssim": ("SSIM ↑", 3), "stlpips": ("ST-LPIPS ↓", 3)}


def _retrieval_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in result["rows"].items():
        cells = [name, f"{row['tokens']:,}" if row["tokens"] else "", str(len(row["runs"])) if row["trained"] else ""]
        rows.append(cells + [_spread(row[key], digits) for key, (_, digits) in _MEASURES.items()])
    return rows


def print_retrieval(result: dict[str, Any]) -> None:
    """Print the result of `retrieval.evaluate_retrieval`.

    Args:
        result: Content of retrieval.json.
    """
    seconds = result["config"]["history"] / result["fps"]
    title = f"Frames read back, {len(result['clips'])} held-out histories of {seconds:g} s"
    table = _table("memory", "tokens", "runs", *(heading for heading, _ in _MEASURES.values()), title=title)
    for row in _retrieval_rows(result):
        table.add_row(*row)
    _print_table(Console(highlight=False), table)


def retrieval_markdown(result: dict[str, Any]) -> str:
    """Return the same table in Markdown."""
    headings = ["memory", "tokens", "runs", *(heading for heading, _ in _MEASURES.values())]
    rows = [headings, ["---", *["---:"] * (len(headings) - 1)], *_retrieval_rows(result)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _print_files(console: Console, folder: Path, names: list[str], skipped: str | None) -> None:
    for name in names:
        size = (folder / name).stat().st_size
        console.print(f"{folder / name}  ({size / 1e6:.2f} MB)", soft_wrap=True, markup=False)
    if skipped:
        console.print(f"no pictures: {skipped}", soft_wrap=True, markup=False)
