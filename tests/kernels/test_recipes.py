"""The pages of recipes in docs are so: every block of them runs, with the assertions that it ends with."""

import re

import pytest
from paths import ROOT

PAGES = {name: (ROOT / "docs" / f"{name}_recipes.md").read_text() for name in ("attention", "memory")}
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
RECIPES = [(page, name, BLOCK.findall(text)) for page, whole in PAGES.items() for name, text in SECTION.findall(whole)]


def shared(page):
    """What stands before the first section, for all blocks of a page."""
    return BLOCK.findall(PAGES[page].split("\n## ")[0])


def test_every_block_is_run():
    found = sum(len(BLOCK.findall(text)) for text in PAGES.values())
    assert found == len(shared("attention")) + sum(len(blocks) for *_, blocks in RECIPES) > 9
    assert all("assert_close(" in block for *_, blocks in RECIPES for block in blocks)


@pytest.mark.parametrize(("page", "name", "blocks"), RECIPES, ids=[name for _, name, _ in RECIPES])
def test_recipe(page, name, blocks):
    for block in blocks:
        scope = {}
        for code in (*shared(page), block):
            exec(compile(code, f"{page}_recipes.md: {name}", "exec"), scope)
