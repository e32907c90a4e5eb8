"""Every link of the documentation leads to a file that is there and, with a #, to a title in it."""

from __future__ import annotations

import re

import pytest
import yaml
from docs_helpers import anchors, pages, prose
from paths import ROOT

PAGES = pages()
LINK = re.compile(
    r"""\]\(<?([^)\s>]+)>?(?: "[^"]*")?\)|^\[[^\]]+\]: (\S+)|(?:src|href)=["']([^"']+)["']""", re.MULTILINE
)


def links(text: str) -> list[str]:
    """All that a page links to or shows, without what stands in code."""
    text = re.sub(r"`[^`\n]*`", "", prose(text))
    return ["".join(match) for match in LINK.findall(text)]


def wrong(page: str, link: str) -> str | None:
    """What is wrong with a link, if anything."""
    path, _, anchor = link.partition("#")
    if "://" in link or link.startswith("mailto:"):
        return None
    if path.startswith("/"):
        return "begins with /"
    target = (ROOT / page).parent / path if path else ROOT / page
    if not target.exists():
        return "no such file"
    if anchor and target.suffix == ".md" and anchor not in anchors(target):
        return f"no such title; there are {', '.join(sorted(anchors(target)))}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    found = {link: wrong(page, link) for link in links(PAGES[page])}
    lost = [f"{page}: {link}: {why}" for link, why in found.items() if why]
    assert not lost, "\n".join(lost)


def test_a_link_that_leads_nowhere_is_found():
    page = "docs/determinism.md"
    title = sorted(anchors(ROOT / page))[0]
    assert wrong(page, f"#{title}") is None and wrong("README.md", f"{page}#{title}") is None
    assert wrong(page, f"#{title}x") and wrong("README.md", "docs/determinisme.md") and wrong(page, "/README.md")
    text = '[a](b.md) ![c](d.png) `[e](f.md)` <img src="g.png">\n\n```\n[h](i.md)\n```\n\n[k]: l.md\n'
    assert links(text) == ["b.md", "d.png", "g.png", "l.md"]


def test_paths_that_are_named_are_there():
    """Those without a placeholder; the walk-through makes some."""
    for name, text in PAGES.items():
        named = re.findall(r"`((?:tests|vidmem_kernels|csrc|benchmarks|docs|examples|python)/[\w./]+)", text)
        made = re.findall(r"^`(\S+)`:$", text, re.MULTILINE)
        lost = [path for path in named if not (ROOT / path).exists() and path not in made]
        assert not lost, f"{name} names {lost}"


def entries(nav: object) -> list[str]:
    """The files of a navigation of MkDocs."""
    if isinstance(nav, str):
        return [nav]
    return [file for item in (nav.values() if isinstance(nav, dict) else nav) for file in entries(item)]


def test_the_site_shows_every_page():
    """make docs fails where the navigation and docs/ differ; here it is told without MkDocs."""
    nav = re.search(r"^nav:\n.*?^(?=\w)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE | re.DOTALL)[0]
    shown = entries(yaml.safe_load(nav)["nav"])
    inside = {file for file in shown if not file.startswith("repository/")}
    there = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")}
    assert inside == there and len(shown) == len(set(shown))
    for file in set(shown) - inside:
        path = file.removeprefix("repository/").replace("readme.md", "README.md")
        assert (ROOT / path).exists(), f"mkdocs.yml names {file}"
