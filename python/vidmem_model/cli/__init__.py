"""The command `vidmem`.

A mistake of the user ends in one line on stderr and exit code 2, an interrupt in one line and 130.
Results go to stdout, progress to stderr where that is a terminal. VIDMEM_DEBUG=1 shows tracebacks.
Results that stdout does not take end in one line and 2 too: the files that were written stay.
Modules that import torch are imported inside the commands, so that help and usage errors are quick.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import typer

from ..checks import shorten
from ..errors import OptionError, UserError
from .app import app

# The commands register themselves with `app` on import, in the order of the help.
# isort: off
from . import memory, train, evaluate, generate, profile, plot, info  # noqa: F401
# isort: on

# Typer brought click along as a dependency once and carries a copy now: the base class of usage
# errors is found from either.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_INTERRUPTED = 130
# They end a command unless they are ignored, as SIGHUP is under nohup; its exit code is 128 and the signal's number.
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; by default those of the process.

    Returns:
        Exit code: 0, 2 for a mistake of the user, 1 for one of this program, 130 if interrupted. SIGTERM and SIGHUP
        raise SystemExit with 143 and 129.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _streams(), _stoppable() as stops:
        try:
            return _run(arguments, stops)
        except KeyboardInterrupt as stop:  # says what was kept, if anything was
            _say(f"vidmem: interrupted; {str(stop) or 'nothing was written'}")
            return _INTERRUPTED


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let signals unwind the stack, so that temporary files go; gives those that came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, _: object) -> NoReturn:
        came.append(number)
        _stop(number)

    def unraisable(what: Any) -> None:
        if came and isinstance(what.exc_value, (KeyboardInterrupt, SystemExit)):
            # It came while a library in C or a destructor ran, which cannot pass it on: once more, a little later.
            again.append(threading.Timer(0.05, signal.raise_signal, (came[0],)))
            again[-1].start()
        else:
            hook(what)

    again: list[threading.Timer] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    previous = {number: signal.getsignal(number) for number in _STOPS}
    for number, handler in previous.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield came
    finally:
        for timer in again:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in previous.items():
            signal.signal(number, handler)


class _ResultsLost(Exception):
    """What a command printed did not get to stdout."""


class _Stream:
    """A standard stream, also where that is closed, full, or its reader has gone.

    Args:
        stream: what Python has made of it, None where it is closed.
        lost: called with the error of what could not be written.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[OSError], None]) -> None:
        self._closed = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (as long as the process)
        self._lost = lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            if self._closed:
                raise OSError(errno.EBADF, "it is closed")
            return self._stream.write(text)
        except OSError as error:
            self._lost(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)


@contextmanager
def _streams() -> Iterator[None]:
    """Stand between the commands and the standard streams: messages that are lost do not stop the work."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, which else the next file would

    def fail(error: OSError) -> NoReturn:
        if isinstance(error, BrokenPipeError):
            raise error
        raise _ResultsLost(error.strerror or str(error)) from error

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(before[0], fail), _Stream(before[1], lambda _: None)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def _stop(number: int) -> NoReturn:
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)


def _run(arguments: list[str], stops: list[int]) -> int:
    context = None
    try:
        with typer.main.get_command(app).make_context("vidmem", arguments) as context:
            context.command.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:  # the reader of stdout has gone (`vidmem info | head`)
        _give_up_stdout()
        return 0
    except _ResultsLost as error:
        _give_up_stdout()
        _say(f"vidmem: error: the results cannot be printed to stdout ({error}); files that were written stay")
        return 2
    except Exception as error:
        if stops:  # libraries in C++ turn what a signal raises into an error of their own
            _stop(stops[0])
        if os.environ.get("VIDMEM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        command = " ".join(filter(None, ["vidmem", getattr(context, "invoked_subcommand", None)]))
        message, code = _explain(error, command)
        _say(f"vidmem: error: {message}")
        return code


def _give_up_stdout() -> None:
    """Keep Python from flushing what is left in its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    if isinstance(error, ImportError) and error.name == "vidmem_kernels":
        return str(error), 2
    library = isinstance(error, OSError) and "cannot open shared object" in str(error)
    if library or (isinstance(error, ImportError) and not str(error.name).startswith("vidmem")):
        package = (getattr(error, "name", None) or "a package").partition(".")[0]
        return f"{package} does not load ({str(error).partition(chr(10))[0]}); install it again", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"a file cannot be written ({error.strerror}); make room", 2
    what = f"{type(error).__name__}: {error}"
    return f"this is a bug: {what}; VIDMEM_DEBUG=1 shows where, please report it", 1
