"""The command `vidmem`.

A mistake of the user ends in one line on stderr and exit code 2, an interrupt in one line and 130.
Results go to stdout, progress to stderr where that is a terminal. VIDMEM_DEBUG=1 shows tracebacks.
Modules that import torch are imported inside the commands, so that help and usage errors are quick.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, NoReturn

import typer

from ..checks import shorten
from ..errors import OptionError, UserError

# Typer brought click along as a dependency once and carries a copy now: the base class of usage
# errors is found from either.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_INTERRUPTED = 130
_TERMINATED = 143

app = typer.Typer(
    name="vidmem",
    help="Compress a video's history to a short context and read it back.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit code: 0, 2 for a mistake of the user, 1 for one of this program, 130 if interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _terminable():
        return _run(arguments)


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporary files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run(arguments: list[str]) -> int:
    context = None
    try:
        with typer.main.get_command(app).make_context("vidmem", arguments) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except KeyboardInterrupt:
        _say("vidmem: interrupted; nothing was written")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of stdout has gone (`vidmem info | head`); keep Python from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if os.environ.get("VIDMEM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        command = " ".join(filter(None, ["vidmem", getattr(context, "invoked_subcommand", None)]))
        message, code = _explain(error, command)
        _say(f"vidmem: error: {message}")
        return code


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(_TERMINATED)


def _say(line: str) -> None:
    print(shorten(line, 1000), file=sys.stderr)


def _explain(error: Exception, command: str) -> tuple[str, int]:
    """One line for an error of a command, and the exit code."""
    if isinstance(error, OptionError):
        return f"{error}; see `{command} --help`", 2
    if isinstance(error, UserError):
        return str(error), 2
    if isinstance(error, _UsageProblem):
        where = getattr(getattr(error, "ctx", None), "command_path", "vidmem")
        return f"{shorten(error.format_message(), 400).rstrip('.')}; see `{where} --help`", 2
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        return "out of memory; take fewer --seconds or a smaller --size", 2
    if type(error).__name__ == "OutOfMemoryError":
        return "out of GPU memory; give shorter --lengths or --device cpu", 2
    if type(error).__name__ == "BackendError":
        return f"{error}; choose another --backend or leave it out", 2
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("vidmem"):
        return f"the package {error.name} is not installed; add it with pip", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    what = f"{type(error).__name__}: {error}"
    return f"this is a bug: {what}; VIDMEM_DEBUG=1 shows where, please report it", 1


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    backend: Annotated[
        str | None,
        typer.Option(
            envvar="VIDMEM_BACKEND",
            help="Kernels to use: auto, cpu, triton, cuda, library or reference.",
        ),
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        from vidmem_kernels import __version__

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


# The commands register themselves with `app` on import, in the order of the help.
from . import memory, train, evaluate, generate, profile, info  # noqa: E402, F401, I001
