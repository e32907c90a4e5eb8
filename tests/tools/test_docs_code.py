"""Every block of Python, YAML and JSON in the documentation is right: what can run is run, in the order of its page.

The blocks of a page share one namespace, as if a reader typed one after the other, in a folder that holds film.mp4, a
clip of 5 seconds. Commands of `vidmem` that take seconds run between them. tests/helpers/docs_helpers.py has the
comments that change this for a block.
"""

from __future__ import annotations

import doctest
import json
import sys
from pathlib import Path

import pytest
import yaml
from docs_commands import QUICK, commands, run_vidmem
from docs_helpers import Block, blocks, pages
from paths import ROOT

# Their blocks are run by tests that ask more of them.
ELSEWHERE = {
    "README.md": "tests/tools/test_readme.py",
    "docs/adding_an_op.md": "tests/tools/test_walkthrough.py",
    "docs/attention_recipes.md": "tests/kernels/test_recipes.py",
    "docs/memory_recipes.md": "tests/kernels/test_recipes.py",
}
BLOCKS = {page: blocks(page, text) for page, text in pages().items() if page not in ELSEWHERE}
LANGUAGES = {"python", "pycon", "bash", "sh", "yaml", "json", "text", "diff", "cpp", ""}
MOST_NOT_RUN = 2


def is_run(block: Block) -> bool:
    quick = block.language in ("bash", "") and any(words[0] == "vidmem" for words in commands(block.text))
    return block.not_run is None and (block.language in ("python", "pycon") or quick)


RUN = {page: [block for block in found if is_run(block)] for page, found in BLOCKS.items()}
LONG = {page for page, found in RUN.items() if any(block.comment == "long" for block in found)}
CASES = [(page, False) for page, found in RUN.items() if found]
CASES += [pytest.param(page, True, marks=pytest.mark.long) for page in sorted(LONG)]


def run_session(block: Block, scope: dict) -> None:
    """Checks that a session prints what the page shows."""
    said = []
    test = doctest.DocTestParser().get_doctest(block.text, scope, block.where, block.page, block.line)
    assert test.examples, f"{block.where} has no >>>"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append, clear_globs=False)
    scope.update(test.globs)
    assert not runner.failures, "".join(said)


@pytest.mark.parametrize(("page", "long"), CASES)
def test_blocks_run(page, long, tmp_path, monkeypatch):
    """In order; without `long`, the long ones are left out."""
    pytest.importorskip("av")
    from film_helpers import make_video

    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "film.mp4", frames=120)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules[__name__])  # what a block defines can be pickled
    scope = {"__name__": "__main__"}
    for block in RUN[page]:
        if block.comment == "long" and not long:
            continue
        if block.language == "python":
            exec(compile("\n" * block.line + block.text, block.page, "exec"), scope)
        elif block.language == "pycon":
            run_session(block, scope)
        else:
            for words in commands(block.text):
                if words[0] == "vidmem" and words[1] in QUICK:
                    run_vidmem(words[1:])


def test_every_block_is_looked_at():
    """Nothing is left out but with a reason, and few are."""
    everything = [block for found in BLOCKS.values() for block in found]
    strange = [block.where for block in everything if block.language not in LANGUAGES]
    assert not strange, f"blocks of another language than {LANGUAGES}: {strange}"
    left_out = {block.where: block.not_run for block in everything if block.not_run is not None}
    assert all(left_out.values()), f"say why, as in <!-- not run: needs a GPU -->: {left_out}"
    assert len(left_out) <= MOST_NOT_RUN, left_out
    comments = {block.comment for block in everything if block.comment.startswith(("long", "not"))}
    assert all(each == "long" or each.startswith("not run:") for each in comments), comments
    assert {page for page in ELSEWHERE if not (ROOT / page).exists()} == set()
    for page, test in ELSEWHERE.items():
        assert any(name in (ROOT / test).read_text() for name in (Path(page).name, "{name}_recipes.md")), page


def test_every_block_can_be_read():
    for found in BLOCKS.values():
        for block in found:
            if block.language == "yaml":
                assert yaml.safe_load(block.text), block.where
            elif block.language == "json":
                assert json.loads(block.text), block.where
            elif block.language == "python":
                compile(block.text, block.where, "exec")  # those that are not run, too
