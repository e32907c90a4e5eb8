"""Hooks of MkDocs: what API pages show, files outside docs/ that pages link to, and pictures that open when clicked."""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, os.path.dirname(__file__))
from public_names import ROOT, SUMMARY, names, with_every_name  # noqa: E402

REPOSITORY = "repository/"  # where files outside docs/ lie in the site
IN_NAVIGATION = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
SHOWN_AS_CODE = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".toml": "toml"}
_LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<path>[^)#\s:]+)(?P<after>(?:#[^)\s]*)?\))")

_PICTURE = re.compile(r"^!\[[^\]]*\]\(([^)#\s]+)\)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/ that pages link to, and those that these link to."""
    for path in IN_NAVIGATION:
        files.append(_added(path, config, InclusionLevel.INCLUDED))
    waiting = list(files.documentation_pages())
    while waiting:
        file = waiting.pop()
        for match in _LINK.finditer(file.content_string):
            path = _in_repository(file, match["path"])
            if path is None or _in_site(path) in files.src_uris or not (ROOT / path).is_file():
                continue
            new = _added(path, config, InclusionLevel.NOT_IN_NAV)
            files.append(new)
            if path.endswith(".md"):
                waiting.append(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links to where their files lie in the site; gives an API page its table."""
    if SUMMARY in markdown:
        markdown = with_every_name(markdown).replace(SUMMARY, _summary(names(markdown), config))

    def pointed(match: re.Match) -> str:
        path = _in_repository(page.file, match["path"])
        if path is None or not (ROOT / path).exists():
            return match[0]
        if (ROOT / path).is_dir():
            return re.sub(r"^!?\[(.*)\]\($", r"\1", match["before"])  # a folder is named, there is no page of it
        relative = posixpath.relpath(_in_site(path), posixpath.dirname(page.file.src_uri) or ".")
        return match["before"] + relative + match["after"]

    return _PICTURE.sub(r"[\g<0>](\1)", _LINK.sub(pointed, markdown))


def _in_repository(file: File, link: str) -> str | None:
    """The path in the repository that a link of a page leads to; None where it leads out of it."""
    name = file.src_uri
    here = name.removeprefix(REPOSITORY) if name.startswith(REPOSITORY) else f"docs/{name}"
    path = posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
    return None if path.startswith("..") else path


def _in_site(path: str) -> str:
    """Where a file of the repository lies in the site."""
    if path == "README.md":
        return "index.md"  # the home page takes the place of the README
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    path = path.replace("README.md", "readme.md")  # README.md would become the first page of its section
    return REPOSITORY + path + (".md" if Path(path).suffix in SHOWN_AS_CODE else "")


def _added(path: str, config: MkDocsConfig, inclusion: InclusionLevel) -> File:
    language = SHOWN_AS_CODE.get(Path(path).suffix)
    if language is None:
        return File.generated(config, _in_site(path), abs_src_path=os.fspath(ROOT / path), inclusion=inclusion)
    content = f"# `{path}`\n\n````{language}\n{(ROOT / path).read_text()}````\n"
    return File.generated(config, _in_site(path), content=content, inclusion=inclusion)


def _summary(shown: list[str], config: MkDocsConfig) -> str:
    """A table of what an API page holds: the first sentence of every docstring."""
    handler = config.plugins["mkdocstrings"].get_handler("python")
    rows = []
    for name in shown:
        docstring = handler.collect(name, handler.get_options({})).docstring
        first = " ".join(docstring.value.split("\n\n")[0].split()).replace("|", "\\|")
        rows.append(f"| [`{name.rpartition('.')[2]}`](#{name}) | {first} |")
    return "\n".join(["| | |", "|---|---|", *rows])
