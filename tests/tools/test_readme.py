"""What the README says is so: its table has every op, its code runs."""

import re
from pathlib import Path

import pytest
import torch
from paths import ROOT

from vidmem_kernels._op import OPS
from vidmem_kernels._verified import cuda_fingerprints
from vidmem_kernels.testing import public_functions

TEXT = (ROOT / "README.md").read_text()


# `op` | CPU | GPU | dtypes | backward | GPU kernels verified on
ROWS = {line.split("`")[1]: line for line in TEXT.splitlines() if re.match(r"^\| `\w+` \|", line)}


def told(cell: str, kernels: dict[str, bool]) -> str:
    """The cell as it stands, if it names these kernels and no other of them."""
    right = cell and all((kernel in cell) == there for kernel, there in kernels.items())
    return cell if right else ", ".join(kernel for kernel, there in kernels.items() if there) or "ref"


def row(name: str) -> str:
    """What the table must say of an op; its words for dtypes and gradients are taken as they are."""
    op = OPS[name]
    new = f"| | | | f | {'yes' if op.backward else 'indices only'} | |"
    cpu, gpu, dtypes, backward, _ = (cell.strip() for cell in ROWS.get(name, new).split("|")[2:-1])
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cpu").rglob("*.cpp"))
    in_cuda = name in cuda_fingerprints(ROOT / "csrc")
    cpu = told(cpu, {"C++": f'm.impl("{name}"' in sources, "SDPA": op.library is not None})
    gpu = told(gpu, {"Triton": op.triton is not None, "CUDA C++": in_cuda})
    runs = {str(op.verified_on(backend) or "compiled, not run") for backend in ("triton", "cuda")[: 1 + in_cuda]}
    return f"| `{name}` | {cpu} | {gpu} | {dtypes} | {backward} | {'; '.join(sorted(runs))} |"


def test_table_has_the_row_of_every_public_op():
    """With the kernels that there are, and the runs on GPUs that they passed."""
    rows = {name: row(name) for name in sorted(public_functions())}
    wrong = [right for name, right in rows.items() if ROWS.get(name) != right]
    assert not wrong, "\n".join(["README.md must have, under Ops:", *wrong])
    assert ROWS.keys() == rows.keys() | {"MemoryBank"} and len(rows) > 10
    assert all(TEXT.count(f"\n| `{name}` |") == 1 for name in ROWS)


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    # test_public_model.py runs those of vidmem_model, test_code_for_other_models_runs that of diffusers
    block, memory = (each for each in blocks if "vidmem_model" not in each and "diffusers" not in each)
    scope = {"x": torch.randn(1, 5, 1536), "memory": torch.randn(1, 7, 1536), "size": torch.full((1, 7), 4.0)}
    x = scope["x"]
    exec(memory, scope)
    assert torch.equal(scope["x"], x) and scope["x"] is not x  # the gate is closed
    parameters = {name.split(".")[0] for name, _ in scope["read"].named_parameters()}
    assert parameters == set(re.search(r"# parameters: (.*)", memory).group(1).split(", "))
    exec(block, scope)
    linear = torch.nn.Linear(16, 16)
    x = torch.randn(2, 4 * 6 * 6, 16, requires_grad=True)
    out = scope["MergedBlock"](linear, (4, 6, 6))(x)
    out.sum().backward()
    assert out.shape == x.shape
    assert (x.grad != 1).any() and linear.weight.grad.abs().sum() > 0


def test_code_for_other_models_runs(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers_helpers import inputs_of, tiny_wan

    (code,) = (each for each in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "diffusers" in each)
    monkeypatch.chdir(tmp_path)
    model = tiny_wan()
    inputs = inputs_of(model, (3, 4, 5))
    before = model(**inputs)[0]
    exec(code, {"model": model, "tokens": torch.randn(1, 7, 64)})
    assert torch.equal(model(**inputs)[0], before)  # the gate is closed
    assert Path("memory.safetensors").stat().st_size > 0
