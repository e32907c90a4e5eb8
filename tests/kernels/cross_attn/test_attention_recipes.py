"""docs/attention_recipes.md is so: every block of it runs, with the assertions that it ends with."""

import re

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "attention_recipes.md"
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text):
    return BLOCK.findall(text)


def test_every_block_is_run():
    shared, *_ = blocks(PAGE.read_text())
    assert "def reference" in shared
    assert len(blocks(PAGE.read_text())) == 1 + sum(len(blocks(text)) for _, text in SECTIONS)
    assert all("assert_close(" in block for _, text in SECTIONS for block in blocks(text))


@pytest.mark.parametrize(("name", "text"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_recipe(name, text):
    shared, *_ = blocks(PAGE.read_text())
    for block in blocks(text):
        scope = {}
        exec(compile(shared, str(PAGE), "exec"), scope)
        exec(compile(block, f"{PAGE}: {name}", "exec"), scope)
