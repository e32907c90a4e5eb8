"""Compiles every Triton kernel and every CUDA file ahead of time, without a GPU, and tabulates their resource usage.

    python benchmarks/compile_kernels.py [--only triton|cuda] [--archs 80 90 100] [--json FILE] [--table FILE]
                                         [--sample N] [--kernels NAME] [--candidates]

Exits 1 if a kernel does not compile, has no entry in its module's AOT table, spills registers, needs more shared memory
than the architecture has, if ptxas serialises its tensor-core instructions, or if it should have specialised warps and
has none. Must not run under TRITON_INTERPRET=1.

An entry of an AOT table is (pointer types, constants, how), for every architecture, or (pointer types, constants, how,
architectures). `how` is a number of warps, or (Tunable, fields): then every tile that may be launched is compiled, i.e.
the kernel's default and the one in the table of that architecture (with --candidates, all that tuning tries).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import ptxas  # noqa: E402


class Usage(NamedTuple):
    """Resources of a compiled kernel: registers and spilled bytes per thread, shared memory per block, and faults."""

    kernel: str
    variant: str
    arch: int
    registers: int
    spills: int
    shared: int
    faults: list[str]


def triton_modules() -> list:
    """The modules of Triton kernels: those of every family and the shared ones."""
    paths = sorted((ROOT / "vidmem_kernels").rglob("*triton_*.py"))
    return [importlib.import_module(".".join(p.relative_to(ROOT).with_suffix("").parts)) for p in paths]


class Job(NamedTuple):
    """One compilation; the variant is an entry of the module's AOT table for that kernel."""

    module: str
    kernel: str
    variant: int
    arch: int
    integer: str  # type of sizes and strides: i32, or i64 from 2**31 on
    tile: dict  # constants that the entry does not set, num_warps, num_stages


def tiles_of(how, arch: int, candidates: bool) -> list[dict]:
    """The tiles of an entry: see the AOT tables."""
    if isinstance(how, int):
        return [{"num_warps": how}]
    tunable, fields = how
    tiles = tunable.shipped(arch, **fields)
    if candidates:
        tiles += [tile for tile in tunable.candidates(arch, **fields) if tile not in tiles]
    return tiles


def compile_triton(job: Job) -> Usage:
    """Compiles one variant as for a call with aligned pointers and sizes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module = importlib.import_module(job.module)
    kernel = getattr(module, job.kernel)
    pointers, fixed, how, *_ = module.AOT[job.kernel][job.variant]
    options = {name: value for name, value in job.tile.items() if name in ("num_warps", "num_stages")}
    constants = fixed | {name: value for name, value in job.tile.items() if name not in options}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else pointers.get(name, job.integer) for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    try:
        with ptxas.listening() as log:
            compiled = triton.compile(source, target=GPUTarget("cuda", job.arch, 32), options=options)
        report = ptxas.read(log.getvalue())[job.kernel][-1]
    except Exception as error:  # Triton's own errors cannot be pickled
        raise RuntimeError(f"{job}: {error}") from None
    strides = {name for name in names if "_stride_" in name}
    strided = ["strided"] if strides and not strides & constants.keys() else []  # no stride is known to be 1
    variant = " ".join([*(t.lstrip("*") for t in pointers.values()), *strided, job.integer])
    if not isinstance(how, int):
        variant = f"{how[0].key(**how[1])} {job.integer}: {' '.join(f'{k}={v}' for k, v in job.tile.items())}"
    shared = compiled.metadata.shared
    threads = ptxas.threads_of(compiled.asm["ptx"])
    specialised = bool(job.tile.get("WARP_SPECIALIZE"))
    faults = ptxas.faults(report, shared, threads, job.arch, job.tile["num_warps"], specialised)
    return Usage(job.kernel, variant, job.arch, report.registers, report.spills, shared, faults)


def drawn(jobs: list, sample: int | None) -> list:
    """`sample` of the jobs, always the same ones; all of them if it is None."""
    return jobs if sample is None else random.Random(0).sample(jobs, min(sample, len(jobs)))


def triton_jobs(archs: list[int], part: str = "", candidates: bool = False) -> list[Job]:
    """Every compilation of the kernels with `part` in their name."""
    jobs = []
    for module in triton_modules():
        jitted = {name: f for name, f in vars(module).items() if name.endswith("_kernel") and hasattr(f, "arg_names")}
        kernels = {name for name, f in jitted.items() if f.fn.__module__ == module.__name__}
        entries = getattr(module, "AOT", {})  # a module may hold helpers or launch functions only
        if lacking := sorted(kernels - entries.keys()):
            raise SystemExit(f"{module.__name__}: no AOT entry for {', '.join(lacking)}")
        targets = [(arch, "i32") for arch in archs] + [(archs[-1], "i64")]
        jobs += [
            Job(module.__name__, kernel, variant, arch, integer, tile)
            for kernel, variants in entries.items()
            if part in kernel
            for variant, (_, _, how, *held) in enumerate(variants)
            for arch, integer in targets
            if not held or arch in held[0]
            for tile in tiles_of(how, arch, candidates)
        ]
    if not jobs:
        raise SystemExit(f"--kernels: no Triton kernel has {part!r} in its name")
    return jobs


def all_triton(jobs: list[Job]) -> list[Usage]:
    with tempfile.TemporaryDirectory() as cache:  # an empty cache: ptxas prints nothing for cached kernels
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            return list(pool.map(compile_triton, jobs, chunksize=min(8, len(jobs) // 16 + 1)))


def compile_cuda(source: Path, arch: int, folder: Path) -> list[Usage]:
    """Compiles one .cu file for one architecture; a row for each kernel template, for its largest instance."""
    from torch.utils.cpp_extension import include_paths

    binary = folder / f"{source.stem}-{arch}.o"
    command = ["nvcc", "-std=c++20", "-O3", "-Xcompiler", "-fPIC", "-DUSE_CUDA", f"-I{ROOT / 'csrc'}"]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *[f"-I{p}" for p in include_paths()]]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xptxas=-v", "-c", str(source), "-o", str(binary)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"nvcc fails on {source.name} for sm_{arch}:\n{done.stderr}")
    largest: dict[str, Usage] = {}
    for mangled, (report,) in ptxas.read(done.stderr).items():
        name = re.search(r"\d+([a-z_]+_kernel)", mangled).group(1)
        faults = ptxas.faults(report, report.shared, 0, arch, 0, False)
        row = Usage(name, source.name, arch, report.registers, report.spills, report.shared, faults)
        if name not in largest or (row.spills, row.registers) > (largest[name].spills, largest[name].registers):
            largest[name] = row
    return list(largest.values())


def all_cuda(archs: list[int], folder: Path, sample: int | None) -> list[Usage]:
    jobs = [(source, arch) for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) for arch in archs]
    jobs = drawn(jobs, sample)
    with ThreadPoolExecutor(2) as pool:
        return [u for rows in pool.map(lambda job: compile_cuda(*job, folder), jobs) for u in rows]


def table(usages: list[Usage]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| kernel | variant | sm | registers | spills (B/thread) | shared (B/block) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {u.kernel} | {u.variant} | {u.arch} | {u.registers} | {u.spills} | {u.shared} |" for u in usages]
    return "\n".join(lines)


def heading() -> str:
    """The heading of the table, with the compilers that were used."""
    import triton

    nvcc = shutil.which("nvcc") and subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", nvcc) if nvcc else None
    compilers = f"Triton {triton.__version__}" + (f" and nvcc {release.group(1)}" if release else "")
    return (
        f"# Compiled kernels\n\nWritten by `python benchmarks/compile_kernels.py --table FILE` with {compilers}.\n"
        "Compiled, not run: registers a thread, register spills, shared memory known at compile time.\n"
        "Of a CUDA C++ template the instance that uses most.\n\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["triton", "cuda"])
    parser.add_argument("--archs", type=int, nargs="+", default=list(ptxas.SHARED_LIMIT), choices=ptxas.SHARED_LIMIT)
    parser.add_argument("--sample", type=int, metavar="N", help="compile N variants of Triton kernels and N CUDA files")
    parser.add_argument("--kernels", metavar="NAME", default="", help="only Triton kernels with this in their name")
    parser.add_argument("--candidates", action="store_true", help="also the tiles that tuning tries")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--table", type=Path, help="also write the table, with what compiled it, to this file")
    args = parser.parse_args()
    usages: list[Usage] = []
    with tempfile.TemporaryDirectory() as folder:
        if args.only != "cuda":
            usages += all_triton(drawn(triton_jobs(args.archs, args.kernels, args.candidates), args.sample))
        if args.only != "triton" and not args.kernels:
            if shutil.which("nvcc") is None:
                raise SystemExit("nvcc is not on PATH; --only triton compiles the rest")
            usages += all_cuda(args.archs, Path(folder), args.sample)
    print(table(usages))
    if args.table:
        args.table.write_text(heading() + table(usages) + "\n")
    if args.json:
        args.json.write_text(json.dumps([u._asdict() for u in usages], indent=1))
    bad = [u for u in usages if u.faults]
    for u in bad:
        print(f"{u.kernel} ({u.variant}) sm_{u.arch}: {'; '.join(u.faults)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
