"""The command `profile`: memory and time against history length, of one attention layer or a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from ..progress import note, progress_bar
from .app import app
from .options import Device, configured, parse_device, parse_lengths


@app.command()
def profile(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Output folder for the JSON file and the plot.")
    ] = Path("profile_output"),
    lengths: Annotated[str, typer.Option(help="History lengths to measure, in seconds.")] = "1,2,5,10,20",
    heads: Annotated[
        int | None, typer.Option(help="Attention heads of the layer; not allowed with --model.", show_default="12")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Channels per head; not allowed with --model.", show_default="128")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Compute dtype: bfloat16, float16, float32, or auto for float32 on the CPU, else bfloat16."),
    ] = "auto",
    device: Device = "auto",
    model: Annotated[
        str | None,
        typer.Option(
            help="Measure every part of a model instead of one layer: a preset (demo, wan-1.3b, ...) or a model file."
        ),
    ] = None,
    depth: Annotated[
        int | None, typer.Option(help="Number of DiT blocks to measure; requires --model.", show_default="all")
    ] = None,
    segment: Annotated[
        int | None, typer.Option(help="Latent frames denoised together; requires --model.", show_default="4")
    ] = None,
    max_seconds: Annotated[
        float | None,
        typer.Option(
            "--max-seconds",
            help="Skip measurements whose call is expected to take longer, in seconds; requires --model.",
            show_default="60",
        ),
    ] = None,
    most_seconds: Annotated[
        float | None, typer.Option("--most-seconds", hidden=True, help="Former name of --max-seconds.")
    ] = None,
) -> None:
    """Measure memory and time against history length on this device."""
    if most_seconds is not None:
        if max_seconds is not None:
            raise UserError("--most-seconds is the former name of --max-seconds; give --max-seconds only")
        note(["--most-seconds is deprecated; use --max-seconds"])
        max_seconds = most_seconds
    lengths_ = parse_lengths(lengths)
    of_layer = {"heads": heads, "head_dim": head_dim}
    of_model = {"depth": depth, "segment": segment, "max_seconds": max_seconds}
    for name, value in (of_model if model is None else of_layer).items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} requires --model" if model is None else f"{option} is not allowed with --model")
    chosen = {k: v for k, v in (of_layer if model is None else of_model).items() if v is not None}
    if model is None:
        _profile_layer(output, dict(lengths=lengths_, dtype=dtype, **chosen), device)
    else:
        _profile_model(output, model, dict(lengths=lengths_, dtype=dtype, **chosen), device)


def _profile_layer(output: Path, values: dict, device: str) -> None:
    from ..files import output_folder, outputs, write_json
    from ..measure.attention import ProfileConfig
    from ..measure.attention import profile as profile_layer
    from ..show.plots import plots_missing, write_memory_plot
    from ..show.tables import print_profile

    config = configured(ProfileConfig, **values)
    device_ = parse_device(device)
    outputs(folders={output: ("memory_vs_context.*",)})
    stops: list[BaseException] = []
    with output_folder(output) as folder, progress_bar() as tell:
        result = profile_layer(config, device_, progress=tell, interrupts=stops)
        write_json(folder / "memory_vs_context.json", result)
        skipped = plots_missing()
        if skipped is None:
            write_memory_plot(folder / "memory_vs_context.png", result)
    print_profile(result, output, skipped)
    _end(result, stops)


def _profile_model(output: Path, model: str, values: dict, device: str) -> None:
    from ..files import output_folder, outputs, write_json
    from ..measure.model import profile_model
    from ..measure.parts import CostConfig
    from ..model.config import PRESETS
    from ..show.cost import print_cost, write_cost_plot
    from ..show.plots import plots_missing

    sizes = PRESETS.get(model)
    if sizes is None:
        from ..model.file import load_model

        if not Path(model).exists():
            raise UserError(f"--model {model}: no such file or preset; presets are {', '.join(PRESETS)}")
        sizes = load_model(model).config
    config = configured(CostConfig, model=sizes, **values)
    device_ = parse_device(device)
    outputs([Path(model)], folders={output: ("model_cost.*",)})
    stops: list[BaseException] = []
    with output_folder(output) as folder, progress_bar() as tell:
        result = profile_model(config, Path(model).name, device_, progress=tell, interrupts=stops)
        write_json(folder / "model_cost.json", result)
        skipped = plots_missing()
        if skipped is None and result["points"]:
            write_cost_plot(folder / "model_cost.png", result)
    print_cost(result, output, skipped)
    _end(result, stops)


def _end(result: dict, stops: list[BaseException]) -> None:
    """Raise the interrupt of a command whose measurements so far have been written."""
    for stop in stops:
        if isinstance(stop, KeyboardInterrupt):
            kept = f"the measurements so far are written, {len(result['missing'])} are missing"
            raise KeyboardInterrupt(kept) from stop
        raise stop
