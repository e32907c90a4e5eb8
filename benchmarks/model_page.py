"""What docs/model.md, docs/retrieval.md and docs/cost.md show of the JSON files beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vidmem_model.measure.parts import STRATEGIES, CostConfig, StrategyBench
from vidmem_model.model.config import PRESETS
from vidmem_model.show.tables import retrieval_markdown

from .page_parts import table

# Rows of docs/retrieval.json that are of the model that comes with the package, and what a reader calls them.
SHIPPED = {
    "both 4×4×2, int8": "learned",
    "dct 4×4×2": "*dct*",
    "merge 4×4×2": "*merge*, and the row of every patch",
    "mean frame": "mean frame",
    "VAE alone": "its VAE alone",
}
# Frames a second of Wan 2.1's own videos, and of the film of the demo.
RATES = (16.0, 24.0)
SECONDS = (20.0, 60.0)
BUDGET = 24e9  # bytes of a card of 24 GB

Result = dict[str, Any]


def _read(root: Path, name: str) -> Result:
    return json.loads((root / "docs" / name).read_text(encoding="utf-8"))


def retrieval(root: Path) -> str:
    """All rows of docs/retrieval.json."""
    return retrieval_markdown(_read(root, "retrieval.json"))


def shipped(root: Path) -> str:
    """Its rows that a user of the package gets without training."""
    result = _read(root, "retrieval.json")
    rows = [line.split(" | ") for line in retrieval_markdown(result).splitlines()[2:]]
    cells = {row[0].removeprefix("| "): row for row in rows}
    found = [[name, *(cells[row][i].rstrip(" |") for i in (1, 3, 4, 5))] for row, name in SHIPPED.items()]
    return table(["memory", "tokens", "PSNR dB ↑", "SSIM ↑", "ST-LPIPS ↓"], found)


def cost(root: Path) -> str:
    """Time and peak memory of a denoising step and of appending, by the length of the history."""
    result = _read(root, "cost.json")
    points = {(p["part"], p["strategy"], p["seconds"]): p for p in result["points"]}
    skipped = {(p["part"], p["strategy"], p["seconds"]) for p in result["skipped"]}
    lengths = sorted({seconds for _, _, seconds in points})
    tokens = {seconds: p["history_tokens"] for (_, _, seconds), p in points.items()}
    own, other = result["config"]["model"]["fps"], next(r for r in RATES if r != result["config"]["model"]["fps"])

    def cell(*key: Any) -> str:
        if key in points:
            return f"{_seconds(points[key]['call_seconds'])}, {points[key]['peak_bytes'] / 2**20:,.0f} MiB"
        return "left out" if key in skipped else ""

    rows = [["patch tokens of the history", *(f"{tokens[s]:,}" for s in lengths)]]
    rows += [[f"seconds at {other:g} frames a second", *(f"{s * own / other:.3g}" for s in lengths)]]
    for part in ("first step", "next step", "append"):
        strategies = [s for s in STRATEGIES if any((part, s) == key[:2] for key in points)]
        rows += [[f"{part}, {s}", *(cell(part, s, seconds) for seconds in lengths)] for s in strategies]
    heads = [f"seconds at {own:g} frames a second", *(f"{seconds:g}" for seconds in lengths)]
    reasons: dict[str, list[str]] = {}
    for p in result["skipped"]:
        reasons.setdefault(f"{p['part']}, {p['strategy']}: {p['reason']}", []).append(f"{p['seconds']:g} s")
    device = result["device"]
    title = (
        f"{result['model']}, {result['depth']} of its {result['depth_of_model']} blocks, {result['config']['dtype']}, "
        f"{device['name']}, {device['threads']} threads, torch {result['versions']['torch']}; "
        f"{own:g} frames a second."
    )
    left = "\n".join(f"- {reason} ({', '.join(lengths)})" for reason, lengths in reasons.items())
    return "\n\n".join([title, table(heads, rows), "Left out:", left])


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value >= 1 else f"{value:.2f} s"


def kept(root: Path) -> str:
    """From sizes alone: keys and values of a history in all blocks of Wan 1.3B, and whether 24 GB hold them."""
    rows = []
    weights = StrategyBench(_wan(RATES[0]), "compressed memory", torch.device("meta")).weights_bytes()
    for seconds in SECONDS:
        for fps in RATES:
            config = _wan(fps)
            frames = config.latent_frames(seconds)
            cells = [f"{seconds:g} s at {fps:g} frames a second, {frames} latent frames"]
            for count in (frames * config.frame_tokens, config.memory_tokens(frames)):
                size = config.kv_bytes(count)
                fits = "" if size + sum(weights.values()) < BUDGET else ": more than 24 GB"
                cells.append(f"{count:,} tokens, {size / 2**30:.1f} GiB{fits}")
            rows.append(cells)
    told = " and ".join(f"{size / 2**20:,.0f} MiB for the {part}" for part, size in weights.items())
    heads = ["history", "whole history", "compressed memory, 4×4×2"]
    return f"{table(heads, rows)}\n\nThe weights take {told}. *More than 24 GB* counts them, too."


def _wan(fps: float) -> CostConfig:
    return CostConfig(model=replace(PRESETS["wan-1.3b"], fps=fps), dtype="bfloat16")
