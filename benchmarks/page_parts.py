"""Parts of pages that a command writes: what stands between <!-- NAME:begin --> and <!-- NAME:end -->."""

from __future__ import annotations

from collections.abc import Iterable


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a part."""
    return f"<!-- {name}:begin -->", f"<!-- {name}:end -->"


def with_part(page: str, name: str, made: str) -> str:
    """A page with one of its parts replaced.

    Raises:
        ValueError: the page does not have the part once.
    """
    begin, end = marks(name)
    before, _, rest = page.partition(f"{begin}\n")
    _, _, after = rest.partition(f"{end}\n")
    if [page.count(f"{mark}\n") for mark in (begin, end)] != [1, 1] or len(before) > page.index(end):
        raise ValueError(f"the page must have the lines {begin} and {end}, each once and in this order")
    # Without the empty lines Python-Markdown takes no table for one.
    return f"{before}{begin}\n\n{made.strip()}\n\n{end}\n{after}"


def table(heads: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first `left` are aligned to the right."""
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
