"""What ptxas says of the kernels that Triton compiles: registers, spills, and what makes it serialise tensor cores."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may use
SPILL_LIMIT = 0  # bytes a thread
# C7510: wgmma.mma_async instructions are serialised; C7512: its registers are, for want of a wait.
SERIALISED = ("C7510", "C7512")


class Report(NamedTuple):
    """Of one kernel: registers a thread, bytes of its stack frame (spills are there), complaints that cost speed."""

    registers: int
    spills: int
    complaints: tuple[str, ...]


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """Collects what ptxas prints while Triton compiles; what comes out of Triton's cache says nothing."""
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        yield log


def read(log: str) -> dict[str, list[Report]]:
    """Kernel -> a report each time that it was compiled, of a log of `ptxas -v`."""
    found: dict[str, list[Report]] = {}
    for part in re.split(r"(?=ptxas info\s+: \d+ bytes gmem)", log):
        name = re.search(r"Compiling entry function '(\w+)'", part)
        if name is None:
            continue
        registers = re.search(r"Used (\d+) registers", part)
        stack = re.search(r"(\d+) bytes stack frame", part)
        complaints = tuple(sorted({code for code in SERIALISED if code in part}))
        found.setdefault(name.group(1), []).append(Report(int(registers.group(1)), int(stack.group(1)), complaints))
    return found


def threads_of(ptx: str) -> int:
    """Threads of a block that a kernel is compiled for: more than its warps have where warps are specialised."""
    return int(re.search(r"\.reqntid (\d+)", ptx).group(1))


def faults(report: Report, shared: int, threads: int, arch: int, num_warps: int, specialised: bool) -> list[str]:
    """Why a compiled kernel must not be shipped or timed."""
    found = []
    if report.spills > SPILL_LIMIT:
        found.append(f"spills {report.spills} B a thread")
    if shared > SHARED_LIMIT[arch]:
        found.append(f"needs {shared} B of shared memory, sm_{arch} has {SHARED_LIMIT[arch]}")
    found += [f"ptxas {code}: tensor-core instructions are serialised" for code in report.complaints]
    if specialised and threads <= 32 * num_warps:
        found.append(f"is compiled for {threads} threads: no warp is specialised")
    return found
