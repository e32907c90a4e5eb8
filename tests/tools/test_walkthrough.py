"""docs/adding_an_op.md is so: what it writes, in its order, is green after every step, in a copy of this repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from install_helpers import ROOT, copy_source

from vidmem_kernels import _extension

TEXT = (ROOT / "docs" / "adding_an_op.md").read_text()
NAME = "shift_tokens"
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
        section = section.split("\n## ")[0]
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


def shell(tree: Path, command: str, code: int = 0, **env: str) -> str:
    """What a command prints in the copy, with this Python as `python`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "TRITON", "VIDMEM"))}
    kept |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]), "OMP_NUM_THREADS": "1"}
    kept |= {"PYTHONPATH": os.pathsep.join([str(tree), str(tree / "python")]), "PYTHONDONTWRITEBYTECODE": "1"} | env
    done = subprocess.run(["bash", "-ec", command], cwd=tree, env=kept, capture_output=True, text=True, timeout=1500)
    assert done.returncode == code, f"{command}\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture
def tree(tmp_path):
    """This repository without the weights of models, with what was compiled."""
    copy = copy_source(tmp_path / "tree", without=("*.safetensors",))
    for built in (ROOT / "vidmem_kernels").glob("_C*"):
        shutil.copy2(built, copy / "vidmem_kernels")
    if (ROOT / "build").exists():
        shutil.copytree(ROOT / "build", copy / "build")
    return copy


def follow(step: Step, tree: Path) -> list[str]:
    """What the commands of a step print."""
    said = []
    for block in step.blocks:
        if block.path:
            apply(block, tree)
        else:
            said += [shell(tree, command) for command in block.text.splitlines()]
    return said


def test_an_op_takes_few_files_and_lines(tmp_path):
    """Tests, benchmark and documentation included."""
    blocks = [block for step in steps() for block in step.blocks if block.path]
    files = {block.path for block in blocks}
    for path in files:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / path).exists():
            shutil.copy(ROOT / path, tmp_path / path)
    lines = sum(apply(block, tmp_path) for block in blocks)
    spelled = sum(block.text.count(NAME) for block in blocks)
    print(f"{len(files)} files, {lines} lines, the name {spelled} times")
    assert len(files) <= MOST_FILES and lines <= MOST_LINES


def test_steps_in_python(tree):
    """The first two: reference and op."""
    for step in steps()[:2]:
        for said in follow(step, tree):
            assert " passed" in said and "failed" not in said, said


MISSING = {  # a test each that says what a function lacks that is exported, and nothing else
    "tests/kernels/test_export.py -k every_public": f"declare a public_call of {NAME} in the family's samples.py",
    "tests/kernels/test_fuzz.py -k every_op": f"{NAME}: write a Case and, of the function's name, a @generator",
    "tests/tools/test_benchmarks.py -k every_public": f"benchmarks/cases/<family>.py: no benchmark covers {NAME}",
    "tests/tools/test_readme.py": rf"README.md must have, under Ops:\s+(E\s+)?\| `{NAME}` \| .+ \| C\+\+ \| Triton \|",
}
OTHERS = "test_transforms test_dtensor test_zero_sizes test_fast_path test_contract"

USE = f"""
import torch, vidmem_kernels as vk
x = torch.randn(2, 5, 3, 9).mT.contiguous().mT.requires_grad_()
print(*vk.explain(vk.{NAME}, x, 2), sep="; ")
for backend in ("reference", "cpu", "triton"):
    out = vk.{NAME}(x, 2, backend=backend)
    (grad,) = torch.autograd.grad(out.square().sum(), x)
    print(backend, out.double().sum().item(), grad.double().sum().item())
"""


@pytest.mark.long
@pytest.mark.skipif(_extension.module is None, reason="needs what compiles the CPU kernels")
def test_all_steps(tree):
    """To C++, Triton, a compiled kernel for GPUs and a public function; what is missing on the way is told."""
    pytest.importorskip("triton")
    *first, last = steps()
    # By the compiler of this run; ccache may note headers by where the tree lay.
    stamps = [path.read_text() for path in (tree / "build").rglob("*.cmd")]
    is_built = "CXX" not in os.environ and stamps and all(stamp.startswith("g++ ") for stamp in stamps)
    began = time.time()
    said = [follow(step, tree) for step in first]
    if is_built:  # a tree that was moved is not compiled anew
        anew = {path.name for path in (tree / "build").rglob("*.o") if path.stat().st_mtime > began}
        assert anew == {f"{NAME}.o"}
    assert f"no kernel of {NAME} to compare" not in "".join(map(str, said[2:]))
    assert re.search(rf"_{NAME}_fwd_kernel \| .* \| 100 \| [1-9]", said[3][-1])

    public = [block for block in last.blocks if block.path.endswith("api.py")]
    for block in public:
        apply(block, tree)
    for tests, message in MISSING.items():
        said = shell(tree, f"python -m pytest {tests}", code=1)
        assert re.search(message, said) and said.count("FAILED") == 1, said
    shell(tree, f"python -m pytest {' '.join(f'tests/kernels/{n}.py' for n in OTHERS.split())} -k '{NAME} or every'")

    follow(last._replace(blocks=[block for block in last.blocks if block not in public]), tree)
    assert re.search(rf"{NAME} +yes \*", shell(tree, "python -m vidmem_kernels.info"))
    chosen, *results = shell(tree, f"python -c '{USE}'", TRITON_INTERPRET="1").splitlines()
    assert chosen == f"{NAME} on cpu: cpu; {NAME} on cpu: cpu"  # the gradient is the op again
    assert [line.split()[0] for line in results] == ["reference", "cpu", "triton"]
    assert len({tuple(line.split()[1:]) for line in results}) == 1
    if shutil.which("ruff", path=str(Path(sys.executable).parent)):
        shell(tree, "ruff check vidmem_kernels tests benchmarks && ruff format --check vidmem_kernels tests benchmarks")
