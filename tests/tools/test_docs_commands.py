"""Every command in the documentation, in blocks and in the text, has the options that it is shown with."""

from __future__ import annotations

import re

import pytest
from docs_commands import commands, wrong
from docs_helpers import blocks, pages, prose

PAGES = pages()
SHELL = ("bash", "sh", "console", "")


def shown(page: str) -> list[list[str]]:
    """Commands of a page's blocks and of its inline code."""
    found = [words for block in blocks(page, PAGES[page]) if block.language in SHELL for words in commands(block.text)]
    return found + [words for code in re.findall(r"`([^`\n]+)`", prose(PAGES[page])) for words in commands(code)]


@pytest.mark.parametrize("page", [page for page in PAGES if shown(page)])
def test_commands_exist(page):
    pytest.importorskip("typer")
    if page == "docs/adding_an_op.md":  # makes what its commands name: test_walkthrough.py runs them
        return
    lost = [f"{page}: {' '.join(words)}: {what}" for words in shown(page) if (what := wrong(words))]
    assert not lost, "\n".join(lost)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("vidmem compress VIDEO -o memory.safetensors --method merge", None),
        ("vidmem --backend cpu retrieve m.safetensors --frame 100 -o frame.png", None),
        ("vidmem evaluate retrieval --model PATH", None),
        ("vidmem compress VIDEO --outputt m", "No such option"),
        ("vidmem compres VIDEO", "no command compres"),
        ("vidmem retrieve m.safetensors --frame ten", "integer"),
        ("make test", None),
        ("make .venv/built", None),
        ("make fuzz SECONDS=600", None),
        ("make tests", "no target tests"),
        ("make fuzz SECOND=600", "no variable SECOND"),
        ('pip install "vidmem-kernels[diffusers]"', None),
        ('pip install "./python[diffuser]"', "no extra diffuser"),
        (".venv/bin/python benchmarks/run.py --ops merge_tokens", None),
        ("python benchmarks/run.py --opps merge_tokens", "no option --opps"),
        ("python benchmarks/runs.py", "no script"),
        ("python -m vidmem_kernels.info", None),
        ("python -m vidmem_kernels.infos", "no module"),
        ("benchmarks/gpu_suite.sh OUT --device cpu", None),
        ("pytest tests/tools/test_nothing.py", "no tests/tools/test_nothing.py"),
    ],
)
def test_what_is_not_there_is_found(line, what):
    pytest.importorskip("typer")
    (words,) = commands(line)
    found = wrong(words)
    assert found is None if what is None else what in (found or ""), found
