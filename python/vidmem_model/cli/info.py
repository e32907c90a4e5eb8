"""Command that tells what runs here."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import __version__
from .app import app


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """Show versions, devices, and which kernels run here or why not."""
    from vidmem_kernels.info import collect, render

    found = collect()
    found["versions"]["vidmem_model"] = __version__  # also where it is not installed, only importable
    print(json.dumps(found, indent=2) if as_json else render(found))
