"""Commands that train: pretrain (Stage I) and finetune (Stage II)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..checks import show
from ..errors import UserError
from .app import app

Config = Annotated[Path, typer.Argument(help="A YAML file.")]
Restart = Annotated[bool, typer.Option("--restart", help="Begin anew although the output folder holds a run.")]


@app.command()
def pretrain_vae(config: Config, restart: Restart = False) -> None:
    """Train the small causal VAE; run again to go on."""
    from ..train import vae as stage
    from ..train.recipe import read_pretrain_vae

    _run(stage.pretrain_vae, read_pretrain_vae(config), restart)


@app.command()
def pretrain(config: Config, restart: Restart = False) -> None:
    """Train a memory to give back any frame of a history (Stage I); run again to go on."""
    from ..train import retrieval as stage
    from ..train.recipe import read_pretrain

    _run(stage.pretrain, read_pretrain(config), restart)


@app.command()
def finetune(config: Config, restart: Restart = False) -> None:
    """Train a pretrained memory to continue video (Stage II); run again to go on."""
    from ..train import continuation as stage
    from ..train.recipe import read_finetune

    _run(stage.finetune, read_finetune(config), restart)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Model's file to write; vae.safetensors beside it.")],
    dtype: Annotated[str, typer.Option(help="float32, float16 or int8 (one scale a row).")] = "int8",
    base: Annotated[
        str | None,
        typer.Option(help="The stored model of Stage I in OUTPUT's folder: store only the adapters of Stage II."),
    ] = None,
) -> None:
    """Store a trained model and its VAE in fewer bits."""
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


def _run(train: Callable[[Any, bool], Path | None], config: Any, restart: bool) -> None:
    from ..train.distributed import Interrupted

    try:
        file = train(config, restart)
    except Interrupted as stop:
        if os.environ.get("RANK", "0") == "0":  # of the processes that torchrun started, one speaks
            kept = f"all of it kept in {config.output}; the same command goes on from there"
            print(f"vidmem: stopped after step {stop.step}, {kept}", file=sys.stderr)
        raise typer.Exit(128 + stop.signal) from stop
    except KeyboardInterrupt as stop:
        # While films are encoded; each block is kept when it is done.
        raise KeyboardInterrupt("the same command goes on from there") from stop
    if file:
        print(file)
