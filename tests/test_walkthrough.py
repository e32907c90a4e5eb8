"""docs/adding_an_op.md is so: what it writes, in its order, is green after every step, in a copy of this repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from install_helpers import ROOT, copy_source

TEXT = (ROOT / "docs" / "adding_an_op.md").read_text()
MOST_FILES, MOST_LINES = 9, 200


class Block(NamedTuple):
    """A fenced block: the file it is for ("" of a command), its language and its text."""

    path: str
    language: str
    text: str


class Step(NamedTuple):
    title: str
    blocks: list[Block]


def steps() -> list[Step]:
    """The numbered sections."""
    found = []
    for section in re.split(r"^## (?=\d\. )", TEXT, flags=re.MULTILINE)[1:]:
        blocks = re.findall(r"(?:^`(\S+)`:\n\n)?^```(\w+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        found.append(Step(section.splitlines()[0], [Block(*block) for block in blocks]))
    return found


def edit(text: str, diff: str) -> str:
    """`text` with the one place changed that the lines of a diff stand for; "…" is the rest of a line."""
    lines = diff.splitlines()
    before = "".join(re.escape(line[1:]) + "\n" for line in lines if line[0] != "+").replace("…", ".*")
    (place,) = re.finditer(f"^{before}", text, re.MULTILINE)
    there = iter(place.group().splitlines())
    after = [line[1:] if line[0] == "+" else next(there) for line in lines if line[0] != "-" or not next(there)]
    return text[: place.start()] + "\n".join(after) + "\n" + text[place.end() :]


def apply(block: Block, tree: Path) -> int:
    """Writes a block to its file; the number of lines that this adds."""
    path = tree / block.path
    was = path.read_text() if path.exists() else ""
    now = edit(was, block.text) if block.language == "diff" else f"{was}\n\n{block.text}" if was else block.text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(now)
    return len(now.splitlines()) - len(was.splitlines())


def shell(tree: Path, command: str, **env: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'python'}", "PATH": paths, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        ["bash", "-ec", command], cwd=tree, env=variables, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done


@pytest.fixture
def tree(tmp_path):
    """This repository, without what no kernel needs, and with what was compiled."""
    copy = copy_source(tmp_path / "tree", without=("checkpoints", "results", "*.png"))
    for built in (ROOT / "vidmem_kernels").glob("_C*.so"):
        shutil.copy2(built, copy / "vidmem_kernels")
    return copy


def test_an_op_takes_few_files_and_lines(tmp_path):
    """Tests, benchmark and documentation included."""
    blocks = [block for step in steps() for block in step.blocks if block.path]
    for path in {block.path for block in blocks}:
        if (ROOT / path).exists():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, tmp_path / path)
    lines = sum(apply(block, tmp_path) for block in blocks)
    files = {block.path for block in blocks}
    named = [path for path in files if "shift_tokens" in "".join(b.text for b in blocks if b.path == path)]
    spelled = sum(block.text.count("shift_tokens") for block in blocks)
    print(f"{len(files)} files, {lines} lines, the name {spelled} times in {len(named)} files")
    assert len(files) <= MOST_FILES and lines <= MOST_LINES
