"""What the gather is compiled to, seen without a GPU: vectors, several on their way, none through shared memory."""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

COMPILE = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vidmem_kernels.sparse_gather import triton_gather

kernel = triton_gather._gather_tokens_fwd_kernel
found = []
for pointers, fixed, (tunable, fields), *archs in triton_gather.AOT["_gather_tokens_fwd_kernel"]:
    if fields["out"] != "bf16" or "bank_stride_c" not in fixed or (archs and 90 not in archs[0]):
        continue
    tile = tunable.default(90, **fields)
    warps = tile.pop("num_warps")
    constants = {**fixed, **tile}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    result = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    found.append((fields["bank"], result.asm["ptx"], result.metadata.shared))
print(json.dumps(found))
"""


def test_rows_move_by_vectors():
    """bfloat16 by 16 bytes; int8 and float8 by 8, of which the store makes 16; 4 of them before the first store."""
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {bank for bank, *_ in found} == {"bf16", "i8", "fp8"}
    for bank, ptx, shared in found:
        accesses = re.findall(r"(ld|st)\.global(?:\.\w+)*\.(v[24])\.b32", ptx)
        load, row = ("ld", "v4") if bank == "bf16" else ("ld", "v2"), ("st", "v4")
        stores = [i for i, access in enumerate(accesses) if access == row]
        assert shared == 0 and len(stores) >= 4, bank
        assert accesses[: stores[0]].count(load) >= 4, (bank, accesses)
