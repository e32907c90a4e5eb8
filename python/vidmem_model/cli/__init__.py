"""The command `vidmem`: runs a command, and turns errors and signals into one line and an exit code.

A mistake of the user prints one line on stderr and exits with 2, an interrupt with 130. VIDMEM_DEBUG=1 shows
tracebacks. Results go to stdout, progress to stderr if that is a terminal. If stdout cannot be written, the exit code
is 2 and the files that were written stay. Modules that import torch are imported inside the commands, so that help and
usage errors are fast.
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

# The commands register with `app` on import, in the order of the help.
# isort: off
from . import memory, train, evaluate, generate, profile, plot, info  # noqa: F401
# isort: on

# Older versions of typer depend on click, newer ones contain a copy: the base class of usage errors is found in both.
_UsageProblem: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
_INTERRUPTED = 130
# Signals that end a command, with exit code 128 + number, unless they are ignored (as nohup ignores SIGHUP).
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program name; by default those of the process.

    Returns:
        Exit code: 0 for success, 1 for a bug in vidmem, 2 for a mistake of the user, 130 for an interrupt. SIGTERM and
        SIGHUP raise SystemExit with 143 and 129.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _streams(), _stoppable() as stops:
        try:
            return _run(arguments, stops)
        except KeyboardInterrupt as stop:  # its message says what was kept
            _say(f"vidmem: interrupted; {str(stop) or 'nothing was written'}")
            return _INTERRUPTED


@contextmanager
def _stoppable() -> Iterator[list[int]]:
    """Let signals raise exceptions, so that temporary files are removed; yields the list of received signals."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return

    def stop(number: int, _: object) -> NoReturn:
        came.append(number)
        _stop(number)

    def unraisable(what: Any) -> None:
        if came and isinstance(what.exc_value, (KeyboardInterrupt, SystemExit)):
            # The signal came inside a C library or a destructor, which cannot raise: send it again, a little later.
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
    """The results of a command could not be written to stdout."""


class _Stream:
    """A standard stream that may be closed, full, or a pipe without a reader.

    Args:
        stream: The stream, or None if it is closed.
        lost: Called with the error if something cannot be written.
    """

    def __init__(self, stream: TextIO | None, lost: Callable[[OSError], None]) -> None:
        self._closed = stream is None
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115 (open until the process ends)
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
    """Wrap the standard streams, so that messages that cannot be written do not stop the work."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes this number, which the next opened file would get otherwise

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
    except BrokenPipeError:  # the reader of stdout has ended (`vidmem info | head`)
        _give_up_stdout()
        return 0
    except _ResultsLost as error:
        _give_up_stdout()
        _say(f"vidmem: error: the results cannot be printed to stdout ({error}); files that were written stay")
        return 2
    except Exception as error:
        if stops:  # C++ libraries turn the exception of a signal into another error
            _stop(stops[0])
        if os.environ.get("VIDMEM_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        command = " ".join(filter(None, ["vidmem", getattr(context, "invoked_subcommand", None)]))
        message, code = _explain(error, command)
        _say(f"vidmem: error: {message}")
        return code


def _give_up_stdout() -> None:
    """Keep Python from flushing the rest of its buffer at exit."""
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
        return f"the package {package} does not load ({str(error).partition(chr(10))[0]}); reinstall it", 2
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}", 2
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return f"a file cannot be written ({error.strerror}); make room on the disk", 2
    what = f"{type(error).__name__}: {error}"
    return f"this is a bug: {what}; please report it, with the traceback that VIDMEM_DEBUG=1 shows", 1
