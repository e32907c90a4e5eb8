"""What the README says is so: its table has every op, its code runs, its links lead somewhere."""

import re

import torch
from paths import ROOT

import vidmem_kernels

TEXT = (ROOT / "README.md").read_text()


def test_table_lists_every_public_op():
    rows = re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)
    public = {name for name in vidmem_kernels.__all__ if name == "MemoryBank" or hasattr(torch.ops.vidmem, name)}
    assert sorted(rows) == sorted(public)


def test_table_names_the_kernels_there_are():
    from vidmem_kernels._registry import OPS

    for name, cpu, gpu in re.findall(r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \|", TEXT, re.MULTILINE):
        if name == "MemoryBank":
            continue
        op = OPS[name]
        assert ("Triton" in gpu) == (op.triton is not None), name
        assert ("SDPA" in cpu) == (op.library is not None), name
        for cell, files in ((cpu, "cpu/*/*.cpp"), (gpu, "cuda/*.cu")):
            sources = "".join(p.read_text() for p in (ROOT / "csrc").glob(files))
            assert ("C++" in cell) == (f'm.impl("{name}"' in sources), name


def test_table_names_the_runs_that_gpu_kernels_passed():
    from vidmem_kernels._registry import OPS

    rows = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]*) \|[^|]*\|[^|]*\| ([^|]*) \|$", TEXT, re.MULTILINE)
    assert len(rows) > 10
    for name, gpu, told in rows:
        if name == "MemoryBank":
            continue
        backends = ["triton", "cuda"] if "CUDA C++" in gpu else ["triton"]
        runs = {str(OPS[name].verified_on(backend) or "not yet") for backend in backends}
        assert told == "; ".join(sorted(runs)), name


def test_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    block, memory = (each for each in blocks if "vidmem_model" not in each)  # test_public_model.py runs those
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


def test_links_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "python/README.md", "benchmarks/README.md", "docs/retrieval.md"):
        folder = (ROOT / name).parent
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            if "://" not in link:
                assert (folder / link).exists(), f"{name}: {link}"
