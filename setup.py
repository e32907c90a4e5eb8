"""Builds vidmem_kernels._C: the CPU kernels always, the CUDA kernels where this torch has CUDA.

    VIDMEM_BUILD=0                compile nothing: every op runs its reference
    VIDMEM_BUILD_CUDA=auto|0|1    auto (default): build CUDA when torch was built with it and nvcc is found
    VIDMEM_CUDA_ARCHS="80 90"     architectures to compile (default: the GPUs that are visible, else all supported)
    MAX_JOBS=2                    parallel compiler processes (default: the number of cores, 8 at most)

A CPU kernel file (csrc/cpu/*_kernels.cpp) is compiled once for every instruction set below and chosen at run
time; nothing is built with -march=native. When compiling fails the package still installs: every op then runs
its reference, and `python -m vidmem_kernels.info` tells why.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
TORCH_TARGET_VERSION = "0x020b000000000000"  # stable ABI of torch 2.11
CUDA_ARCHS = ["80", "89", "90", "100", "120"]

if platform.machine() in ("x86_64", "AMD64"):
    CPU_CAPABILITIES = {
        "baseline": [],
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
    }
else:
    CPU_CAPABILITIES = {"baseline": []}


def cuda_archs(torch) -> list[str]:
    if os.environ.get("VIDMEM_CUDA_ARCHS"):
        return os.environ["VIDMEM_CUDA_ARCHS"].split()
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}{minor}" for major, minor in sorted(found)]
    return CUDA_ARCHS


def wants_cuda(torch) -> bool:
    choice = os.environ.get("VIDMEM_BUILD_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"VIDMEM_BUILD_CUDA: must be auto, 0 or 1, got {choice!r}")
    if choice == "auto":
        return torch.version.cuda is not None and shutil.which("nvcc") is not None
    if choice == "1" and shutil.which("nvcc") is None:
        raise SystemExit("VIDMEM_BUILD_CUDA=1: nvcc is not on PATH")
    return choice == "1"


def compile_jobs(torch, build_dir: Path, cuda: bool) -> list[tuple[list[str], Path, Path]]:
    """(command without source and object, source, object) of everything that goes into _C."""
    import pybind11
    from torch.utils import cpp_extension

    archs = cuda_archs(torch) if cuda else []
    includes = [f"-I{CSRC}", *[f"-I{d}" for d in cpp_extension.include_paths()]]
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        *[f"-DVIDMEM_HAS_{name.upper()}" for name in CPU_CAPABILITIES],
    ]
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-c"]
    compiler.append("-ffp-contract=off")  # results shall not depend on what a compiler fuses: kernels do so by hand
    cxx = [*compiler, *defines, *includes]
    module = [  # no header of torch: it brings an older pybind11
        *compiler,
        f'-DVIDMEM_TORCH_VERSION="{torch.__version__}"',
        f'-DVIDMEM_CUDA_ARCHS="{" ".join(archs)}"',
        f'-DVIDMEM_CPU_CAPABILITIES="{" ".join(CPU_CAPABILITIES)}"',
        *[f"-I{d}" for d in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))],
    ]

    jobs = [(module, CSRC / "module.cpp", build_dir / "module.o")]
    for source in sorted((CSRC / "cpu").glob("*.cpp")):
        if not source.stem.endswith("_kernels"):
            jobs.append((cxx, source, build_dir / f"cpu_{source.stem}.o"))
            continue
        for name, flags in CPU_CAPABILITIES.items():
            fuses = "attention" in source.stem  # sums of products within a budget, not to the bit
            command = [*cxx, *(["-ffp-contract=fast"] if fuses else []), *flags, f"-DVIDMEM_ISA={name}"]
            jobs.append((command, source, build_dir / f"cpu_{source.stem}_{name}.o"))
    if cuda:
        nvcc = ["nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        nvcc += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        lowest = min(archs, key=lambda a: int(a.rstrip("af")))  # its PTX serves GPUs that are not in the list
        nvcc += [f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]
        nvcc += ["-DUSE_CUDA", *defines, *includes, "-c"]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            jobs.append((nvcc, source, build_dir / f"cuda_{source.stem}.o"))
    return jobs


class BuildExtension(build_ext):
    def build_extension(self, ext):
        try:
            import torch
        except ImportError as error:
            raise SystemExit("vidmem_kernels: torch must be installed to build from source") from error
        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cuda = wants_cuda(torch)
        if cuda and self.try_build(torch, build_dir, target, cuda=True, otherwise="CPU kernels only"):
            return
        if cuda and os.environ.get("VIDMEM_BUILD_CUDA") == "1":
            raise SystemExit("VIDMEM_BUILD_CUDA=1: the CUDA kernels do not compile")
        if not self.try_build(torch, build_dir, target, cuda=False, otherwise="every op will run its reference"):
            target.unlink(missing_ok=True)

    def copy_extensions_to_source(self):
        for stale in (ROOT / "vidmem_kernels").glob("_C*.so"):  # a failed build must not leave an old library
            stale.unlink()
        super().copy_extensions_to_source()

    def try_build(self, torch, build_dir: Path, target: Path, cuda: bool, otherwise: str) -> bool:
        try:
            self.compile_and_link(torch, build_dir, target, cuda)
        except (OSError, subprocess.CalledProcessError) as error:
            missing = isinstance(error, OSError)
            why = f"{error.filename} was not found" if missing else "the compiler failed, its output is above"
            print(f"vidmem_kernels: WARNING: {otherwise}: {why}", file=sys.stderr)
            return False
        return True

    def compile_and_link(self, torch, build_dir: Path, target: Path, cuda: bool) -> None:
        headers = [p for suffix in ("*.h", "*.cuh") for p in CSRC.rglob(suffix)]
        newest_header = max([p.stat().st_mtime for p in headers] + [Path(__file__).stat().st_mtime])

        def compile_one(job):
            command, source, obj = job
            stamp = obj.with_suffix(".cmd")
            line = " ".join(map(str, command))
            fresh = obj.exists() and stamp.exists() and stamp.read_text() == line
            if fresh and obj.stat().st_mtime > max(source.stat().st_mtime, newest_header):
                return
            stamp.unlink(missing_ok=True)
            subprocess.run([*command, str(source), "-o", str(obj)], check=True)
            stamp.write_text(line)

        jobs = compile_jobs(torch, build_dir, cuda)
        workers = int(os.environ.get("MAX_JOBS", min(8, os.cpu_count() or 1)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(compile_one, jobs))

        # nvcc knows where its runtime is, and links the static one.
        linker = ["nvcc"] if cuda else [os.environ.get("CXX", "g++")]
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10", *(["-ltorch_cuda"] if cuda else [])]
        objects = [str(obj) for _, _, obj in jobs]
        torch_lib = Path(torch.__file__).parent / "lib"
        subprocess.run([*linker, "-shared", *objects, f"-L{torch_lib}", *libraries, "-o", str(target)], check=True)


# Optional: without it every op runs its reference.
EXTENSION = Extension("vidmem_kernels._C", ["csrc/module.cpp"], optional=True)

setup(
    packages=find_packages(include=["vidmem_kernels*"]) + find_packages("python"),
    package_dir={"vidmem_model": "python/vidmem_model"},
    package_data={"vidmem_model": ["recipes/*.yaml", "checkpoints/*"]},
    ext_modules=[] if os.environ.get("VIDMEM_BUILD") == "0" else [EXTENSION],
    cmdclass={"build_ext": BuildExtension},
)
