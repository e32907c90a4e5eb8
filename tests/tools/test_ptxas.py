"""What the gate takes from the words of ptxas."""

import random
import sys

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT))

from benchmarks import ptxas  # noqa: E402


def said(kernel, registers, stack, complaint=""):
    return (
        f"ptxas info    : {random.randint(0, 99)} bytes gmem\n"
        f"{complaint}"
        f"ptxas info    : Compiling entry function '{kernel}' for 'sm_90a'\n"
        f"ptxas info    : Function properties for {kernel}\n"
        f"    {stack} bytes stack frame, {stack} bytes spill stores, {stack} bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 1 barriers\n"
        "ptxas info    : Compile time = 11.5 ms\n"
    )


SERIALISED = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the wgmma pipeline in the function '_b'\n"
)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tool", ["ptxas", "ptxas-blackwell"])
def test_every_kernel_of_a_log(seed, tool):
    rng = random.Random(seed)
    parts = [
        (rng.choice(["_a", "_b"]), rng.randint(16, 255), rng.choice([0, 8, 400]), rng.random() < 0.3) for _ in range(8)
    ]
    log = "".join(said(*part[:3], SERIALISED if part[3] else "") for part in parts).replace(
        "ptxas info", f"{tool} info"
    )
    expected = {}
    for kernel, registers, stack, serial in parts:
        report = ptxas.Report(registers, stack, ("C7510",) if serial else ())
        expected.setdefault(kernel, []).append(report)
    assert ptxas.read(log) == expected


@pytest.mark.parametrize("arch", ptxas.SHARED_LIMIT)
def test_faults(arch):
    clean = ptxas.Report(255, ptxas.SPILL_LIMIT)
    limit = ptxas.SHARED_LIMIT[arch]
    assert ptxas.faults(clean, limit, 128, arch, 4, False) == []
    assert ptxas.faults(clean, 0, 384, arch, 4, True) == []
    assert ptxas.faults(clean, 0, 128, arch, 4, True) == ["is compiled for 128 threads: no warp is specialised"]
    assert ptxas.faults(clean, limit + 1, 128, arch, 4, False) == [
        f"needs {limit + 1} B of shared memory, sm_{arch} has {limit}"
    ]
    bad = ptxas.faults(ptxas.Report(255, ptxas.SPILL_LIMIT + 4, ("C7510", "C7512")), 0, 128, arch, 4, False)
    assert bad[0] == f"spills {ptxas.SPILL_LIMIT + 4} B a thread"
    assert [why.split(":")[0] for why in bad[1:]] == ["ptxas C7510", "ptxas C7512"]
