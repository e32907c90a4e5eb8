"""What the README says is so: its table has every op, its code runs."""

import inspect
import re
import sys

import pytest
from paths import ROOT

import vidmem_kernels
from vidmem_kernels._op import OPS
from vidmem_kernels._verified import cuda_fingerprints
from vidmem_kernels.testing import public_functions

sys.path.insert(0, str(ROOT))

from benchmarks import op_table  # noqa: E402
from benchmarks.page_parts import with_part  # noqa: E402

TEXT = (ROOT / "README.md").read_text()


# `op` | what it does | CPU | GPU | backward
ROWS = {line.split("`")[1]: line for line in TEXT.splitlines() if re.match(r"^\| `\w+` \|", line)}


def test_table_has_the_row_of_every_public_op():
    """As it is generated, with the kernels that there are."""
    made = op_table.short(ROOT)
    missing = [line for line in made.splitlines() if line not in TEXT.splitlines()]
    assert not missing, "\n".join(["README.md must have, under Ops:", *missing, "Run python benchmarks/pages.py"])
    assert with_part(TEXT, "ops", made) == TEXT, "README.md, Ops: run python benchmarks/pages.py"
    assert ROWS.keys() == public_functions() and len(ROWS) > 10
    assert all(TEXT.count(f"\n| `{name}` |") == 1 for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_row_says_what_the_code_has(name):
    """Looked up in the sources, in other ways than the table was made."""
    op = OPS[name]
    what, cpu, gpu, backward = (cell.strip() for cell in ROWS[name].split("|")[2:-1])
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cpu").rglob("*.cpp"))
    cuda = "".join(path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.cu"))
    registered = f'm.impl("{name}"'
    assert ("C++" in cpu, "SDPA" in cpu) == (registered in sources, op.library is not None)
    kernels = (op.triton is not None, registered in cuda, op.library is not None)
    assert ("Triton" in gpu, "CUDA C++" in gpu, "libraries" in gpu) == kernels
    assert (backward == "indices only") == (op.backward is None)
    arguments = set(re.findall(r"`(\w+)`", backward))
    function = getattr(vidmem_kernels, name)
    assert arguments <= inspect.signature(function).parameters.keys() and bool(arguments) == bool(op.backward)
    assert " ".join(function.__doc__.split()).startswith(what)


def test_runs_on_gpus_are_told_as_they_were():
    """The last column of the table in docs/backends.md."""
    table = (ROOT / "docs/backends.md").read_text().split("<!-- ops:begin -->")[1].split("<!-- ops:end -->")[0]
    told = {line.split("`")[1]: line.split("|")[-2].strip() for line in table.splitlines() if line.startswith("| `")}
    in_cuda = cuda_fingerprints(ROOT / "csrc")
    assert len(told) > 10
    for name, runs in told.items():
        backends = ("triton", "cuda") if name in in_cuda else ("triton",)
        right = {str(OPS[name].verified_on(backend) or "compiled, not run") for backend in backends}
        assert runs == "; ".join(sorted(right)), f"docs/backends.md: {name}"


def test_it_is_short():
    assert len(TEXT.splitlines()) + 1 < 120  # with room for the row of a new op


def test_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert 2 * scope["merged"].shape[1] == scope["x"].shape[1]
    assert all(parameter.grad.abs().sum() > 0 for parameter in scope["block"].parameters())
    assert (scope["x"].grad != 1).any()
