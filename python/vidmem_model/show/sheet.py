"""The contact sheet: source frames, frames read back, and their differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..files import replacing

SHEET_BYTES = 1_450_000
_WIDEST, _NARROWEST = 264, 96
# Upper end of the colour scale of |difference|, of 255, in all rows.
_DIFFERENCE_END = 64.0
_DIFFERENCE_STEPS = 32


@dataclass(frozen=True)
class SheetRow:
    """One row of the contact sheet.

    Attributes:
        label: Label on the left; may have several lines.
        source: uint8 (H, W, 3), the source frame.
        retrieved: For each method the frame read back and its caption.
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
    """Draw source, retrieved frames and their differences, one row per frame, as a PNG below 1.5 MB.

    Args:
        path: File to write.
        rows: Rows of the same methods and frame size.
        title: One line above the rows.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; check `plots_missing` first.
        UserError: The file cannot be written.
    """
    with replacing(path) as part:
        width = _WIDEST
        _draw_sheet(part, rows, title, width)
        while (size := part.stat().st_size) > SHEET_BYTES and width > _NARROWEST:
            # Bytes grow slightly slower than the area, because smaller pictures have more detail per pixel.
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
    # One pixel of a thumbnail is one pixel of the sheet; text sizes are in pixels, too.
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
            # Invisible steps of 2 of 255, which make the file much smaller.
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


def write_memories_sheet(
    path: Path, result: dict[str, Any], sources: torch.Tensor, retrieved: dict[str, list[torch.Tensor]]
) -> None:
    """Draw the contact sheet of one part of the demo.

    Args:
        path: File to write.
        result: Result of the part, as in report.json.
        sources: uint8 (N, H, W, 3), the frames of the video.
        retrieved: For each method the N frames read back.

    Raises:
        ModuleNotFoundError: As for `write_contact_sheet`.
        UserError: As for `write_contact_sheet`.
    """
    entries = {method: result["methods"][method]["retrieved"] for method in retrieved}
    rows = []
    for i, source in enumerate(sources):
        first = next(iter(entries.values()))[i]
        pictures = {m: (images[i], _caption(entries[m][i])) for m, images in retrieved.items()}
        rows.append(SheetRow(f"frame {first['frame']}\n{first['seconds']:.2f} s", source, pictures))
    after = " and ".join(f"{n:,}" for n in dict.fromkeys(m["context_tokens_after"] for m in result["methods"].values()))
    video = result["video"]
    title = (
        f"{video['seconds']:.3g} s of {video['source']}: {result['context_tokens_before']:,} tokens "
        f"→ {after}; frames read back from the memory file, PSNR in dB"
    )
    write_contact_sheet(path, rows, title)


def _caption(entry: dict[str, Any]) -> str:
    value = entry["psnr_db"]
    return ("equal" if value is None else f"PSNR {value:.2f}") + f"   SSIM {entry['ssim']:.3f}"
