"""What the user looks at: PNG files, the contact sheet, the plots.

Pictures of frames are written with zlib alone; the contact sheet and the plot need matplotlib.
"""

from __future__ import annotations

import importlib.util
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .files import replacing

SHEET_BYTES = 1_450_000
_WIDEST, _NARROWEST = 264, 96
# |difference| is drawn on one scale in every row: at 64 of 255 the colours end.
_DIFFERENCE_END = 64.0
_DIFFERENCE_STEPS = 32
# Okabe and Ito's colours, told apart in all common kinds of colour vision; so are the markers.
_LINES = {
    "whole history": ("#D55E00", "o"),
    "sliding window": ("#0072B2", "s"),
    "linear attention": ("#009E73", "^"),
    "compressed memory": ("#000000", "D"),
}


def plots_missing() -> str | None:
    """Why there can be no plots, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'vidmem-model[bench]'"
    return None


def write_png(path: Path, image: torch.Tensor | np.ndarray) -> None:
    """Write a PNG file, whole or not at all.

    Args:
        path: file to write.
        image: uint8 (H, W, 3), RGB.

    Raises:
        ValueError: image is of another shape or dtype.
        UserError: the path cannot be written.
    """
    pixels = np.ascontiguousarray(torch.as_tensor(image).numpy())
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8:
        raise ValueError(f"write_png: image must be uint8 (H, W, 3), got {pixels.dtype} {pixels.shape}")
    height, width, _ = pixels.shape
    rows = pixels.reshape(height, -1)
    # Filter "Up": each row as its difference from the one above, modulo 256.
    above = np.vstack([np.zeros_like(rows[:1]), rows[:-1]])
    lines = np.hstack([np.full((height, 1), 2, np.uint8), rows - above])
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    with replacing(path) as part:
        part.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + _png_chunk(b"IHDR", header)
            + _png_chunk(b"IDAT", zlib.compress(lines.tobytes(), 6))
            + _png_chunk(b"IEND", b"")
        )


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


@dataclass(frozen=True)
class SheetRow:
    """One row of the contact sheet.

    Attributes:
        label: what the row is of, drawn on the left; may have several lines.
        source: uint8 (H, W, 3).
        retrieved: for each method, the frame read back and its caption.
    """

    label: str
    source: torch.Tensor
    retrieved: dict[str, tuple[torch.Tensor, str]]


def _thumbnail(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    small = F.interpolate(
        image.permute(2, 0, 1)[None].to(torch.float32),
        size=(height, width),
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )
    return small[0].permute(1, 2, 0).clamp_(0, 255)


def write_contact_sheet(path: Path, rows: Sequence[SheetRow], title: str) -> None:
    """Draw source, retrieved frames and their differences, a row a frame, as a PNG below 1.5 MB.

    Args:
        path: file to write.
        rows: all with the same methods and frame size.
        title: one line above.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots_missing` first.
        UserError: the path cannot be written.
    """
    with replacing(path) as part:
        width = _WIDEST
        _draw_sheet(part, rows, title, width)
        while (size := part.stat().st_size) > SHEET_BYTES and width > _NARROWEST:
            # Bytes grow a little slower than the area: smaller pictures have more detail a pixel.
            width = max(_NARROWEST, int(0.95 * width * math.sqrt(SHEET_BYTES / size)))
            _draw_sheet(part, rows, title, width)


def _draw_sheet(path: Path, rows: Sequence[SheetRow], title: str, width: int) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    rows_in, columns_in = rows[0].source.shape[:2]
    height = max(1, round(width * rows_in / columns_in))
    methods = list(rows[0].retrieved)
    colours = colormaps["inferno"]
    left, gap, caption, top, bottom = 92, 8, 22, 66, 62
    columns = 1 + 2 * len(methods)
    sheet_width = left + columns * (width + gap)
    sheet_height = top + len(rows) * (height + caption) + bottom
    dpi = 100
    figure = Figure((sheet_width / dpi, sheet_height / dpi), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    # One pixel of a thumbnail is one pixel of the sheet; text sizes follow from pixels too.
    points = 72 / dpi
    body = min(13, max(8, width / 18)) * points

    def text(x: float, y: float, what: str, **style: Any) -> None:
        style = {"fontsize": body, "va": "center", "ha": "center", **style}
        figure.text(x / sheet_width, 1 - y / sheet_height, what, **style)

    def place(column: int, row: int, pixels: np.ndarray) -> float:
        x = left + column * (width + gap)
        y = top + row * (height + caption)
        figure.figimage(pixels, x, sheet_height - y - height, origin="upper")
        return x + width / 2

    text(sheet_width / 2, 20, title, fontsize=16 * points if width > 150 else body)
    for r, row in enumerate(rows):
        y = top + r * (height + caption)
        text(left / 2, y + height / 2, row.label, linespacing=1.4)
        thumbnail = _thumbnail(row.source, height, width)
        centre = place(0, r, thumbnail.round().to(torch.uint8).numpy())
        headings = [(centre, "source")]
        for m, method in enumerate(methods):
            image, words = row.retrieved[method]
            shown = _thumbnail(image, height, width).round().to(torch.uint8).numpy()
            centre = place(1 + 2 * m, r, shown)
            headings.append((centre, f"{method}, retrieved"))
            text(centre, y + height + caption / 2, words)
            difference = (image.to(torch.float32) - row.source.to(torch.float32)).abs()
            level = _thumbnail(difference, height, width).mean(2).div(_DIFFERENCE_END)
            # Steps of 2 of 255: nobody sees them, and the file is much smaller.
            level = level.clamp(0, 1).mul(_DIFFERENCE_STEPS).round().div(_DIFFERENCE_STEPS)
            painted = colours(level.numpy(), bytes=True)[..., :3]
            centre = place(2 + 2 * m, r, painted)
            headings.append((centre, f"|{method} − source|"))
        if r == 0:
            for centre, heading in headings:
                text(centre, top - 13, heading, weight="bold")
    scale_width = min(400, sheet_width * 0.4)
    bar = figure.add_axes(
        ((sheet_width - scale_width) / 2 / sheet_width, 36 / sheet_height, scale_width / sheet_width, 12 / sheet_height)
    )
    mappable = ScalarMappable(Normalize(0, _DIFFERENCE_END), colours)
    scale = figure.colorbar(mappable, cax=bar, orientation="horizontal", extend="max")
    scale.set_ticks([0, 16, 32, 48, 64])
    scale.ax.tick_params(labelsize=body, length=2, pad=1)
    text((sheet_width - scale_width) / 2 - 12, sheet_height - 42, "mean |difference| of R, G, B (of 255)", ha="right")
    canvas.print_png(path)


def write_memory_plot(path: Path, result: dict[str, Any]) -> None:
    """Plot what `profile.profile` measured: peak memory and time against length, log axes.

    Args:
        path: PNG file to write.
        result: as returned by `profile.profile`.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure = Figure((11.5, 5.6), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    memory, clock = figure.subplots(1, 2)
    points = result["points"]
    lengths = sorted({point["seconds"] for point in points})
    tokens = {point["seconds"]: point["context_tokens"] for point in points}
    handles = []
    for strategy in dict.fromkeys(point["strategy"] for point in points):
        mine = sorted((p for p in points if p["strategy"] == strategy), key=lambda p: p["seconds"])
        colour, marker = _LINES[strategy]
        x = [p["seconds"] for p in mine]
        style = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.8}
        (line,) = memory.plot(x, [p["peak_bytes"] / 2**20 for p in mine], label=strategy, **style)
        memory.plot(
            x,
            [p["held_bytes_computed"] / 2**20 for p in mine],
            color=colour,
            linewidth=1.2,
            linestyle=(0, (1, 2)),
        )
        clock.plot(x, [p["call_seconds"] * 1e3 for p in mine], **style)
        handles.append(line)
    handles += memory.plot([], [], color="0.35", linewidth=1.2, linestyle=(0, (1, 2)), label="held, from shapes")
    for axes, title, unit in (
        (memory, "Peak memory: held K/V or state, workspace, output", "MiB"),
        (clock, "Time of one call", "ms"),
    ):
        axes.set(xscale="log", yscale="log", xlabel="history (s of video; below: patch tokens)")
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(unit)
        axes.set_xticks(lengths, [f"{s:g} s\n{_thousands(tokens[s])}" for s in lengths])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
        axes.grid(which="major", color="0.85", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    config, device = result["config"], result["device"]
    rows, columns = config["grid"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    figure.suptitle(
        f"One attention layer ({config['heads']} heads of {config['head_dim']}, {config['dtype']}) "
        f"reads the history for one latent frame ({rows}×{columns} queries)\n"
        f"{device['name']}{threads}, torch {result['versions']['torch']}",
        fontsize=11,
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    with replacing(path) as part:
        canvas.print_png(part)


# Rows of the retrieval table: trained ones have full lines, the others dashed or dotted ones.
_ROW_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_ROW_MARKERS = "osD^vPX*"


def write_retrieval_plot(path: Path, result: dict[str, Any]) -> None:
    """Plot what `evaluate.evaluate_retrieval` measured: each measure against the position in the history.

    Args:
        path: PNG file to write.
        result: as returned by `evaluate.evaluate_retrieval`.

    Raises:
        ModuleNotFoundError: matplotlib is missing; ask `plots_missing` first.
        UserError: the path cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((13.5, 5.2), dpi=110, layout="constrained", facecolor="white")
    canvas = FigureCanvasAgg(figure)
    better = {"psnr": "PSNR (dB), higher", "ssim": "SSIM, higher", "stlpips": "ST-LPIPS, lower"}
    seconds = result["config"]["history"] / result["fps"]
    panels = figure.subplots(1, len(better))
    for axes, (measure, title) in zip(panels, better.items(), strict=True):
        for i, (name, row) in enumerate(result["rows"].items()):
            curve = row[measure]["curve"]
            axes.plot(
                [(p + 0.5) * seconds / len(curve) for p in range(len(curve))],
                curve,
                label=name,
                color=_ROW_COLOURS[i % len(_ROW_COLOURS)],
                marker=_ROW_MARKERS[i // 2 % len(_ROW_MARKERS)],
                markevery=max(1, len(curve) // 8),
                markersize=5,
                linewidth=1.6,
                linestyle="-" if row["trained"] else (0, (4, 2)),
            )
        axes.set_title(f"{title} is better", fontsize=11)
        axes.set_xlabel("position in the history (s)")
        axes.grid(color="0.88", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    height, width = result["frame_size"]
    figure.suptitle(
        f"Frames read back from {seconds:g} s of held-out video ({height}×{width}, {result['fps']:g} fps): "
        f"means over {len(result['clips'])} histories",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    with replacing(path) as part:
        canvas.print_png(part)


def _thousands(count: int) -> str:
    return f"{count / 1000:.3g}k" if count >= 1000 else str(count)
