"""What the README says is so: its table has every op, its code runs."""

import re

from paths import ROOT

from vidmem_kernels._op import OPS
from vidmem_kernels._verified import cuda_fingerprints
from vidmem_kernels.testing import public_functions

TEXT = (ROOT / "README.md").read_text()


# `op` | what it does | CPU | GPU | backward
ROWS = {line.split("`")[1]: line for line in TEXT.splitlines() if re.match(r"^\| `\w+` \|", line)}


def told(cell: str, kernels: dict[str, bool]) -> str:
    """The cell as it stands, if it names these kernels and no other of them."""
    right = cell and all((kernel in cell) == there for kernel, there in kernels.items())
    return cell if right else ", ".join(kernel for kernel, there in kernels.items() if there) or "ref"


def row(name: str) -> str:
    """What the table must say of an op; its words for what it does and for gradients are taken as they are."""
    op = OPS[name]
    new = f"| | what it does | | | {'yes' if op.backward else 'indices only'} |"
    what, cpu, gpu, backward = (cell.strip() for cell in ROWS.get(name, new).split("|")[2:-1])
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cpu").rglob("*.cpp"))
    in_cuda = name in cuda_fingerprints(ROOT / "csrc")
    cpu = told(cpu, {"C++": f'm.impl("{name}"' in sources, "SDPA": op.library is not None})
    gpu = told(gpu, {"Triton": op.triton is not None, "CUDA C++": in_cuda, "libraries": op.library is not None})
    if (backward == "indices only") == bool(op.backward):
        backward = "yes" if op.backward else "indices only"
    return f"| `{name}` | {what} | {cpu} | {gpu} | {backward} |"


def test_table_has_the_row_of_every_public_op():
    """With the kernels that there are."""
    rows = {name: row(name) for name in sorted(public_functions())}
    wrong = [right for name, right in rows.items() if ROWS.get(name) != right]
    assert not wrong, "\n".join(["README.md must have, under Ops:", *wrong])
    assert ROWS.keys() == rows.keys() and len(rows) > 10
    assert all(TEXT.count(f"\n| `{name}` |") == 1 for name in ROWS)


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
    assert len(TEXT.splitlines()) < 120


def test_code_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    scope = {}
    exec(code, scope)
    assert 2 * scope["merged"].shape[1] == scope["x"].shape[1]
    assert all(parameter.grad.abs().sum() > 0 for parameter in scope["block"].parameters())
    assert (scope["x"].grad != 1).any()
