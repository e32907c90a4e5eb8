"""The command `info`: versions, devices and backends of this installation."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .. import __version__
from .app import app


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show versions, devices, and for every op which backends run here, or why not."""
    from vidmem_kernels.info import collect, render

    found = collect()
    found["versions"]["vidmem_model"] = __version__  # vidmem_model may be importable without being installed
    print(json.dumps(found, indent=2) if as_json else render(found))
