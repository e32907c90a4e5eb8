"""Reads the output of ptxas for Triton kernels: registers, spills, and serialised tensor-core instructions."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a block may use
SPILL_LIMIT = 16  # bytes per thread: four registers, not measurable outside of loops
# C7510: wgmma.mma_async instructions are serialised; C7512: its registers are, because a wait is missing.
SERIALISED = ("C7510", "C7512")


class Report(NamedTuple):
    """The report on a kernel: registers and spilled bytes per thread, warnings, shared bytes per block.

    The shared memory is the part known at compile time (that of Triton kernels is not).
    """

    registers: int
    spills: int
    complaints: tuple[str, ...] = ()
    shared: int = 0


@contextlib.contextmanager
def listening() -> Iterator[io.StringIO]:
    """Collects what ptxas prints while Triton compiles; for kernels in Triton's cache it prints nothing."""
    from triton import knobs

    log = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        yield log


def read(log: str) -> dict[str, list[Report]]:
    """Parses a log of `ptxas -v` (or ptxas-blackwell): kernel -> one report for each time that it was compiled."""
    found: dict[str, list[Report]] = {}
    for run in re.split(r"(?=ptxas\S* info\s+: \d+ bytes gmem)", log):
        complaints = tuple(code for code in SERIALISED if code in run)
        for part in run.split("Compiling entry function '")[1:]:
            registers = int(re.search(r"Used (\d+) registers", part).group(1))
            spills = max(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", part))
            shared = re.search(r"(\d+) bytes smem", part)
            report = Report(registers, spills, complaints, int(shared.group(1)) if shared else 0)
            found.setdefault(part[: part.index("'")], []).append(report)
    return found


def threads_of(ptx: str) -> int:
    """Threads of a block that a kernel is compiled for: more than num_warps implies if warps are specialised."""
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
