"""Runs commands within a time limit, and ends all processes that they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

GRACE_SECONDS = 8.0  # between asking a command to end and killing it
OUT_OF_TIME = 124  # exit code, as of `timeout`


def run(
    command: Sequence[str],
    seconds: float,
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    ask: signal.Signals = signal.SIGTERM,
    output: Path | None = None,
) -> int:
    """Runs a command in its own process group.

    Args:
        command: program and arguments.
        seconds: time limit; GRACE_SECONDS before it (or half way, if that is later) the command is asked to end.
        log: file to append stdout and stderr to.
        environment: variables besides those of this process.
        ask: the signal that asks; at SIGINT, pytest reports what it has.
        output: file for stdout alone.

    Returns:
        Its exit code, 128 + n if signal n ended it, OUT_OF_TIME if the time limit ended it, 127 if there is no such
        program.
    """
    with contextlib.ExitStack() as files:
        told = files.enter_context(log.open("ab"))
        out = files.enter_context(output.open("wb")) if output else told
        try:
            process = subprocess.Popen(
                command, stdout=out, stderr=told, env=os.environ | (environment or {}), start_new_session=True
            )
        except OSError as error:
            told.write(f"{command[0]}: {error}\n".encode())
            return 127
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(max(seconds - GRACE_SECONDS, seconds / 2))
            return 128 - code if code < 0 else code
        _signal(process, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(GRACE_SECONDS, seconds / 2))
        return OUT_OF_TIME
    except BaseException:  # an interrupt: the command may still write its results
        _signal(process, ask)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
        raise
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
