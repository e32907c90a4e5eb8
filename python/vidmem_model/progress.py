"""Show the progress of long work on stderr: bars, lines and notes."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(steps: int, done: int, visible: bool) -> Iterator[Callable[[int, float, float], None]]:
    """Show loss and time left of a training on stderr: a bar on a terminal, otherwise one line per call.

    Args:
        steps: Steps of the whole run.
        done: Steps done before.
        visible: False for all processes but the first.

    Yields:
        A function of (step, mean loss since the last call, seconds per step).
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not visible or not console.is_terminal:

        def line(step: int, loss: float, seconds: float) -> None:
            left = datetime.timedelta(seconds=round((steps - step) * seconds))
            print(
                f"step {step}/{steps}  loss {loss:.4f}  {seconds:.2f} s/step  {left} left",
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
    """A transient progress bar on stderr that names the current stage; None without a terminal."""
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
    """Print notes on stderr, such as warnings about an input."""
    for line in lines:
        print("vidmem: note:", " ".join(line.split()), file=sys.stderr)
