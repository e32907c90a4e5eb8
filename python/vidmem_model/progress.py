"""What long work shows on stderr: bars, lines and notes."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(steps: int, done: int, visible: bool) -> Iterator[Callable[[int, float, float], None]]:
    """Show loss and time left on stderr: a bar on a terminal, else a line a call.

    Args:
        steps: of the whole run.
        done: steps of it that were done before.
        visible: False for all processes but the first.

    Returns:
        Function of the step, the mean loss since the call before, and the seconds of a step.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not visible or not console.is_terminal:

        def line(step: int, loss: float, seconds: float) -> None:
            left = datetime.timedelta(seconds=round((steps - step) * seconds))
            print(
                f"step {step}/{steps}  loss {loss:.4f}  {seconds:.2f} s a step  {left} left",
                file=sys.stderr,
                flush=True,
            )

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("training", total=steps, completed=done)
        yield lambda step, loss, seconds: bars.update(task, completed=step, description=f"loss {loss:.4f}")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int | None], None] | None]:
    """A bar on stderr that tells of the present step and vanishes; None where there is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description:24}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        step = ""

        def tell(description: str, done: int, total: int | None) -> None:
            nonlocal step
            if description != step:
                step = description
                bars.reset(task, description=description)
            bars.update(task, completed=done, total=total)

        yield tell


def note(lines: Iterable[str]) -> None:
    """Say on stderr what the user may have done unawares."""
    for line in lines:
        print("vidmem: note:", " ".join(line.split()), file=sys.stderr)
