"""What docs/integrations.md shows of the results of integrations.py; needs no diffusers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from .page_parts import table

PART = "merging"
TITLES = {
    "tiny": "tiny: 4 blocks of 4 heads of 32",
    "wan-1.3b": "one block of Wan 1.3B: 12 heads of 128",
}

Row = dict[str, Any]


def newest(root: Path) -> str:
    """The tables of the newest result."""
    found = [json.loads(path.read_text()) for path in (root / "benchmarks/results/integrations").glob("*.json")]
    return tables(max(found, key=lambda result: result["date"]))


def tables(result: Row) -> str:
    """The tables of the page, Markdown."""
    return "\n\n".join([*_error_tables(result["rows"]), *_cost_tables(result["rows"])])


def _error_tables(rows: list[Row]) -> Iterator[str]:
    rows = [row for row in rows if row["kind"] == "error"]
    for name in dict.fromkeys(row["model"] for row in rows):
        noises = sorted({row["noise"] for row in rows})
        lines = []
        for ratio, reused in sorted({(row["kv_ratio"], row["reused"]) for row in rows}):
            cells = [f"{ratio:g}{', plan of the step before' if reused else ''}"]
            for noise in noises:
                own = {"model": name, "noise": noise, "kv_ratio": ratio, "reused": reused}
                found = [row for row in rows if own.items() <= row.items()]
                errors = (mean(row[key] for row in found) for key in ("attention_error", "prediction_error"))
                cells.append(" / ".join(f"{error:.2%}" for error in errors))
            lines.append(cells)
        yield table([TITLES[name], *(f"{noise:.0%} noise" for noise in noises)], lines)


def _cost_tables(rows: list[Row]) -> Iterator[str]:
    rows = [row for row in rows if row["kind"] == "cost"]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        lengths = sorted({row["tokens"] for row in own})
        lines = []
        for ratio, reused in sorted({(row["kv_ratio"], row["reused"]) for row in own}):
            cells = [f"{ratio:g}{', plan kept' if reused else ''}"]
            for tokens in lengths:
                row = next(r for r in own if (r["tokens"], r["kv_ratio"], r["reused"]) == (tokens, ratio, reused))
                share = row["attention_ms"] / row["median_ms"]
                plain = f"{row['median_ms']:,.0f} ms, {share:.0%} in self-attention"
                cells.append(f"{row['speedup']:.2f}×" if ratio else plain)
                cells[-1] += f", {row['peak_bytes'] / 2**20:,.0f} MiB"
            lines.append(cells)
        yield table([TITLES[name], *(f"{tokens:,} tokens" for tokens in lengths)], lines)
