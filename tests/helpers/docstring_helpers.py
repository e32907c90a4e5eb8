"""The form of a docstring in Google style: its sections, what they describe, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples", "Equivalent PyTorch")


def sections(text: str) -> tuple[str, dict[str, list[str]]]:
    """The text above the first section, and the lines of each section by its name."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.MULTILINE)
    body = {}
    for title, lines in zip(parts[1::2], parts[2::2], strict=True):
        body[title] = re.match(r"(?:(?:    .*)?\n|    .*$)*", lines)[0].split("\n")
    return parts[0], body


def entries(lines: list[str]) -> list[str]:
    """Names that a section describes, in order."""
    return [m[1] for line in lines if (m := re.match(r"    (\*{0,2}\w+): \S", line))]


def arguments(value: Any) -> list[str]:
    """Parameters as the documentation writes them."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(value).parameters.values()
    return [stars.get(p.kind, "") + p.name for p in parameters if p.name not in ("self", "cls")]


def members(public: dict[str, Any]) -> Iterator[tuple[str, Any, type | None]]:
    """(name, object, class it belongs to or None) of public objects, and of the methods and properties of classes."""
    for name, value in sorted(public.items()):
        yield name, value, None
        if inspect.isclass(value):
            for member, inner in vars(value).items():
                inherited = any(hasattr(base, member) for base in value.__mro__[1:])
                function = inner.__func__ if isinstance(inner, classmethod | staticmethod) else inner
                ours = isinstance(function, property) or inspect.isfunction(function)
                if ours and not member.startswith("_") and (function.__doc__ or not inherited):
                    yield f"{name}.{member}", function, value


def faults(value: Any, owner: type | None, fields: str = "Attributes", required: tuple[str, ...] = ()) -> Iterator[str]:
    """What is wrong with the docstring of a public object.

    Args:
        value: The object.
        owner: The class that it is a method or property of, or None.
        fields: Name of the section that describes the fields of a dataclass or named tuple.
        required: Names of further sections that it must have.

    Yields:
        One line for each fault.
    """
    head, body = sections(inspect.getdoc(value) or "")
    summary, _, rest = head.partition("\n")
    if not summary.rstrip().endswith((".", "`.")) or rest.split("\n")[0].strip():
        yield f"the first line must be one sentence that ends in a period, got {summary!r}"
    if isinstance(value, property):
        return
    if inspect.isclass(value) and (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
        names = list(getattr(value, "_fields", ())) or [field.name for field in dataclasses.fields(value)]
        if entries(body.get(fields, [])) != names:
            yield f"{fields} must be {names}, got {entries(body.get(fields, []))}"
        return
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    wanted, found = arguments(value), entries(body.get("Args", []))
    if wanted != found:
        yield f"Args must be {wanted}, got {found}"
    result = "" if inspect.isclass(value) else str(inspect.signature(value).return_annotation)
    section = "Yields" if "Iterator" in result else "Returns"
    if result not in ("", "None") and section not in body and not (section == "Yields" and owner):
        yield f"a section {section} must say what {result} is, got none"
    for section in required:
        if section not in body:
            yield f"a section {section} must be there, got none"
