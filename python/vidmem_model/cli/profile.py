"""Command that measures memory and time against context length."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import app
from .options import (
    Device,
    configured,
    parse_device,
    parse_lengths,
    progress_bar,
)


@app.command()
def profile(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for JSON and plot.")] = Path("profile_output"),
    lengths: Annotated[str, typer.Option(help="Seconds of history.")] = "1,2,5,10,20",
    heads: Annotated[int, typer.Option(help="Attention heads.")] = 12,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.")] = 128,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32; auto: float32 on the CPU.")] = "auto",
    device: Device = "auto",
) -> None:
    """Measure memory and time against context length on this device."""
    lengths_ = parse_lengths(lengths)
    from .. import profile as profile_
    from .. import report
    from ..tables import print_profile

    config = configured(profile_.ProfileConfig, lengths=lengths_, heads=heads, head_dim=head_dim, dtype=dtype)
    device_ = parse_device(device)
    with report.output_folder(output) as folder, progress_bar() as tell:
        result = profile_.profile(config, device_, progress=tell)
        report.write_json(folder / "memory_vs_context.json", result)
        skipped = report.plots_missing()
        if skipped is None:
            report.write_memory_plot(folder / "memory_vs_context.png", result)
    print_profile(result, output, skipped)
