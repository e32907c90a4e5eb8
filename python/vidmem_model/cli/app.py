"""The typer application that the commands register with, and its global options."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..errors import UserError

app = typer.Typer(
    name="vidmem",
    help="Compress a video's history to a short context and read it back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    backend: Annotated[
        str | None,
        typer.Option(
            envvar="VIDMEM_BACKEND",
            help="Backend of the kernels: auto, cpu, triton, cuda, library or reference.",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        print(f"vidmem {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit
    if backend:
        from vidmem_kernels import use_backend

        try:
            context.with_resource(use_backend(backend))
        except ValueError as error:
            reason = str(error).partition(": ")[2]
            raise UserError(f"--backend (or VIDMEM_BACKEND) {reason}") from error
