"""The commands that train models: pretrain-vae, pretrain (Stage I), finetune (Stage II), export."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import show
from ..errors import UserError
from ..progress import note
from .app import app

Config = Annotated[Path, typer.Argument(help="Training recipe, a YAML file.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard the run in the output folder and start from step 0.")]


@app.command()
def pretrain_vae(config: Config, restart: Restart = False) -> None:
    """Train the small causal VAE; run the same command again to resume."""
    from ..train import vae as stage
    from ..train.recipe import read_pretrain_vae

    _run(stage.pretrain_vae, _read(read_pretrain_vae, config), restart)


@app.command()
def pretrain(config: Config, restart: Restart = False) -> None:
    """Train a memory to reconstruct any frame of a history (Stage I); run the same command again to resume."""
    from ..train import retrieval as stage
    from ..train.recipe import read_pretrain

    _run(stage.pretrain, _read(read_pretrain, config), restart)


@app.command()
def finetune(config: Config, restart: Restart = False) -> None:
    """Train a pretrained memory to continue a video (Stage II); run the same command again to resume."""
    from ..train import continuation as stage
    from ..train.recipe import read_finetune

    _run(stage.finetune, _read(read_finetune, config), restart)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Output folder of a finished training run.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Model file to write; the VAE is written beside it as vae.safetensors."),
    ],
    dtype: Annotated[
        str, typer.Option(help="Storage format of the weights: float32, float16, or int8 with one scale per row.")
    ] = "int8",
    base: Annotated[
        str | None,
        typer.Option(
            help="File name of an exported Stage I model in the folder of --output; only the LoRA adapters of Stage II "
            "are stored then."
        ),
    ] = None,
) -> None:
    """Export a trained model and its VAE to small files."""
    from ..files import make_folder, outputs
    from ..model.export import store
    from ..model.file import VAE_FILE, files_of, model_path
    from ..model.lora import LORA_FILE, check_base
    from ..weights import DTYPES

    if dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {show(dtype)}")
    target = model_path(output)
    if base is not None:
        check_base(base, target)
    make_folder(target.parent)
    if base is None:
        read, written = files_of(run), [target, target.with_name(VAE_FILE)]
    else:
        read, written = [run / LORA_FILE, *files_of(target.with_name(base))], [output]
    outputs(read, written)
    for file in store(run, output, dtype, base):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def _read(reader: Callable[[Path], Any], recipe: Path) -> Any:
    """Read a recipe, and print its DeprecationWarnings as notes: Python does not show them by default."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", DeprecationWarning)
        warnings.showwarning = lambda message, *_: note([str(message)] if _is_first() else [])
        return reader(recipe)


def _is_first() -> bool:
    """Whether this is the only process, or the first of those that torchrun started; the others print nothing."""
    return os.environ.get("RANK", "0") == "0"


def _run(train: Callable[[Any, bool], Path | None], config: Any, restart: bool) -> None:
    from ..train.distributed import Interrupted

    try:
        file = train(config, restart)
    except Interrupted as stop:
        if _is_first():
            kept = f"the checkpoint is in {config.output}; run the same command again to resume"
            print(f"vidmem: stopped after step {stop.step}, {kept}", file=sys.stderr)
        raise typer.Exit(128 + stop.signal) from stop
    except KeyboardInterrupt as stop:
        # While videos are encoded, every finished block of latents is kept in the cache.
        raise KeyboardInterrupt("run the same command again to resume") from stop
    if file:
        print(file)
