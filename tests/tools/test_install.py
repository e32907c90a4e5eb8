"""What an import costs, and that the package works without its compiled kernels and without Triton."""

import json
import os
import subprocess
import sys

import pytest
import torch
from backend_helpers import compiled

import vidmem_kernels
from vidmem_kernels import _extension

# Makes modules look not installed: no finder finds them.
HIDE = """
import sys
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name in HIDDEN or name.split('.')[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Finder(f) for f in sys.meta_path]
"""

CALLS = """
import torch, vidmem_kernels as vk
bank = torch.arange(12.0).view(1, 4, 3).requires_grad_()
out = vk.gather_tokens(bank, torch.tensor([[3, -1, 3]]))
out.sum().backward()
assert out.tolist() == [[[9, 10, 11], [0, 0, 0], [9, 10, 11]]], out
assert bank.grad[0, :, 0].tolist() == [0, 0, 0, 2], bank.grad
compiled = torch.compile(lambda b, i: vk.gather_tokens(b, i) * 2, fullgraph=True, backend="aot_eager")
assert compiled(bank, torch.tensor([[1]])).tolist() == [[[6, 8, 10]]]
"""


def python(code, **env):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result


def test_import_is_light():
    """No Triton, and little time beyond torch's own import."""
    code = """
import sys, time, torch
start = time.perf_counter()
import vidmem_kernels
print(time.perf_counter() - start, "triton" in sys.modules)
"""
    seconds, triton = python(code).stdout.split()
    assert float(seconds) < 2
    assert triton == "False"


def test_works_without_compiled_kernels():
    result = python(HIDE.replace("HIDDEN", "{'vidmem_kernels._C'}") + CALLS)
    lines = [line for line in result.stderr.splitlines() if "vidmem_kernels" in line]
    assert len(lines) == 1 and "is not built" in lines[0] and "reference" in lines[0]


def test_works_without_triton():
    code = HIDE.replace("HIDDEN", "{'triton'}") + CALLS
    code += """
try:
    vk.gather_tokens(bank, torch.tensor([[1]]), backend="triton")
except vk.BackendError as error:
    assert "triton" in str(error) and "reference" in str(error), error
else:
    raise AssertionError("an explicit backend must not fall back")
"""
    python(code, TRITON_INTERPRET="1")


def test_info_json_lists_every_op():
    from vidmem_kernels._op import OPS

    result = subprocess.run(
        [sys.executable, "-m", "vidmem_kernels.info", "--json"], capture_output=True, text=True, check=True
    )
    info = json.loads(result.stdout)
    assert set(info["ops"]) == set(OPS)
    assert info["versions"]["torch"] == torch.__version__
    assert info["versions"]["vidmem_kernels"] == vidmem_kernels.__version__
    gather = info["ops"]["gather_tokens"]["cpu"]
    assert gather["auto"] == ("cpu" if _extension.module else "reference")
    assert gather["backends"]["reference"] is None
    assert gather["backends"]["cuda"]


@compiled
@pytest.mark.parametrize("capability", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(capability):
    """The kernels compiled for each instruction set pass the tests that compare backends."""
    if capability not in _extension.module.available_cpu_capabilities():
        pytest.skip(reason=f"this processor lacks {capability}")
    from vidmem_kernels._op import OPS
    from vidmem_kernels.testing import check_backend

    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(capability)
    assert _extension.module.cpu_capability() == capability
    try:
        for op in OPS.values():
            if _extension.has_kernel(op.name, "cpu"):
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    check_backend(op, "cpu", dtype)
    finally:
        _extension.module.set_cpu_capability(before)


@compiled
def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="set_isa: this build and processor offer baseline.*, got sse9"):
        _extension.module.set_cpu_capability("sse9")
