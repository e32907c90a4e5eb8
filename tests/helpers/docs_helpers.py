"""Reads the pages of the documentation: their blocks of code, their commands and their anchors.

An author writes plain blocks. An HTML comment in the line above a block changes how it is tested:

    <!-- long -->                   it takes minutes: run by make test-long only
    <!-- not run: needs a GPU -->   it cannot run here, for this reason
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from paths import ROOT

sys.path.insert(0, str(ROOT / "docs" / "site"))
from public_names import names  # noqa: E402

_FENCE = re.compile(
    r"(?:^ *<!-- *(?P<comment>[^>]*?) *-->\n+)?"
    r"^(?P<indent> *)(?P<fence>`{3,})(?P<language>\w*)[^\n`]*\n(?P<text>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    comment: str  # of the line above: "long", "not run: reason", or nothing that concerns tests
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def not_run(self) -> str | None:
        """Why it is not run, if it is not."""
        kind, _, reason = self.comment.partition(":")
        return reason.strip() if kind == "not run" else None


def pages() -> dict[str, str]:
    """Every page that is read on its own or in the site, by its path."""
    paths = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "python/README.md"]
    paths += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
    return {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}


def blocks(page: str, text: str) -> list[Block]:
    """The fenced blocks of a page, in order. A block that begins with >>> is a session of Python, whatever it says."""
    found = []
    for match in _FENCE.finditer(text):
        code = textwrap.dedent(match["text"])
        language = "pycon" if code.startswith(">>> ") else match["language"]
        line = text.count("\n", 0, match.start("fence")) + 1
        found.append(Block(page, line, language, match["comment"] or "", code))
    return found


def prose(text: str) -> str:
    """A page without its blocks; inline code stays."""
    return _FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """What a link into a page may name after its #: titles as GitHub and the site spell them, and explicit ids."""
    text = path.read_text(encoding="utf-8")
    found = set(names(text))
    text = prose(text)
    found |= set(re.findall(r"""(?:id|name)=["']([^"']+)["']""", text))
    for title in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        explicit = re.search(r"\{ *#([\w-]+)[^}]*\}$", title)
        title = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", title)
        found.add(explicit[1] if explicit else re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-"))
    return found
