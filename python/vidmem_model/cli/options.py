"""Options that several commands share, and the functions that parse and check option values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ..checks import conform, positive, shorten, show
from ..errors import OptionError, UserError

if TYPE_CHECKING:
    from ..model.config import Compression

T = TypeVar("T")


def configured(kind: Callable[..., T], **values: Any) -> T:
    """Build a configuration from option values; turn its ValueError into an OptionError."""
    try:
        return kind(**values)
    except ValueError as error:
        raise OptionError(str(error).partition(": ")[2]) from error


def checked(declared: Any, option: str, value: T) -> T:
    """Check an option's value against a declaration of checks.py; raise OptionError if it does not fit."""
    try:
        return conform(declared, value, option)
    except ValueError as error:
        raise OptionError(str(error)) from error


def parse_numbers(option: str, text: str, form: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    """Split `text` at the separator of `form`, an example such as "480x832"."""
    separator, count = ("x", form.count("x") + 1) if "x" in form else (",", None)
    try:
        # Python's int() also reads the digits of other scripts, so anything but ASCII is refused.
        values = tuple(parse(part) for part in text.lower().split(separator)) if text.isascii() else ()
    except ValueError:
        values = ()
    if not values or (count is not None and len(values) != count):
        raise UserError(f"{option} must look like {form}, got {show(text)}")
    return values


def parse_size(text: str) -> tuple[int | None, int | None]:
    return (None, None) if text == "source" else parse_numbers("--size", text, "480x832", int)


def parse_rate(text: str) -> Compression:
    """Parse --rate: height x width x time, such as "4x4x2".

    A valid text imports torch, which takes a second: call this after the other parsers.

    Raises:
        UserError: the text has another form.
        OptionError: a number is not in [1, 128].
    """
    numbers = parse_numbers("--rate", text, "4x4x2", int)
    height, width, time = checked(Annotated[tuple[int, int, int], positive(128)], "--rate", numbers)
    from ..model.config import Compression

    return Compression(time, height, width)


def parse_fps(text: str) -> float | None:
    if text == "source":
        return None
    try:
        return float(text)
    except ValueError as error:
        raise UserError(f"--fps must be a number or source, got {show(text)}") from error


def parse_lengths(text: str) -> tuple[float, ...]:
    return parse_numbers("--lengths", text, "1,2,5,10,20", float)


Video = Annotated[Path, typer.Argument(help="Video file to compress.")]
Seconds = Annotated[float, typer.Option(help="Length of the part to compress, in seconds.")]
Device = Annotated[str, typer.Option(help="Device: cpu, cuda, cuda:N, or auto for the first GPU, else the CPU.")]


def parse_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not (number.isascii() and number.isdigit())):
        raise UserError(f"--device must be auto, cpu, cuda or cuda:N, got {show(name)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and (len(number) > 4 or int(number or 0) >= count):
        raise UserError(f"--device {shorten(name, 40)}: this machine has {count} CUDA devices; try --device cpu")
    return name
