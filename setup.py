"""Builds vidmem_kernels._C: always the CPU kernels, and the CUDA kernels if this torch has CUDA.

    VIDMEM_BUILD=1|0              0 compiles nothing: every op runs its reference
    VIDMEM_BUILD_CUDA=auto|0|1    auto (default): build CUDA if torch was built with it and nvcc is found
    VIDMEM_CUDA_ARCHS="80 90"     architectures to compile (default: those of the visible GPUs, else all supported)
    MAX_JOBS=2                    parallel compiler processes (default: the number of cores, at most 8)
    CXX=clang++                   the C++ compiler (default: g++)

A CPU kernel file (csrc/cpu/*/*_kernels.cpp) is compiled once for every instruction set below, and one is chosen at run
time; nothing is built with -march=native. A later build compiles only what changed, including headers, which the
compiler records for each file. If compiling fails, the package is still installed: every op then runs its reference,
and `import vidmem_kernels` and `python -m vidmem_kernels.info` show the reason. If a package that the build needs is
missing or too old, the build ends with a line that names it.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent
REQUIRES = re.search(r"^requires = (.*)$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
MINIMUM = dict(requirement.split(">=") for requirement in ast.literal_eval(REQUIRES))
NEEDED = runpy.run_path(str(ROOT / "vidmem_kernels" / "_requirements.py"))


def require(*packages: str) -> None:
    """Ends the build unless all packages are present: pip does not check them with --no-build-isolation."""
    if line := NEEDED["missing"]({package: MINIMUM[package] for package in packages}):
        raise SystemExit(f"vidmem_kernels: building {line}")


require("setuptools")
import setuptools  # noqa: E402
from setuptools.command.build_ext import build_ext  # noqa: E402
from setuptools.command.build_py import build_py  # noqa: E402

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
# Kernels for which the compiler may fuse multiplication and addition: their results must be within an error budget. All
# others must give the same bits with every instruction set.
FUSED = {
    "cross_attention_backward_kernels",
    "cross_attention_kernels",
    "linear_attention_backward_kernels",
    "linear_attention_kernels",
    "merge_attention_states_kernels",
}
# Written next to the package's files instead of _C, for vidmem_kernels/_extension.py.
NOT_BUILT = "_C_not_built.txt"


class CannotCompile(Exception):
    """The reason why _C cannot be built."""


def setting(name: str, default: str, pattern: str, rule: str) -> str:
    value = os.environ.get(name) or default
    if not re.fullmatch(pattern, value):
        raise SystemExit(f"{name}: must be {rule}, got {value!r}")
    return value


def cxx_compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["g++"]


def run(command: list[str], what: str) -> None:
    try:
        subprocess.run(command, check=True, cwd=ROOT)
    except FileNotFoundError:
        raise CannotCompile(f"{command[0]} was not found; install g++, or set CXX to a C++ compiler") from None
    except OSError as error:
        raise CannotCompile(f"{command[0]} does not start: {error.strerror}") from None
    except subprocess.CalledProcessError as error:
        failed = f"{command[0]} failed on {what} with exit status {error.returncode}"
        raise CannotCompile(f"{failed}; pip install -v shows its output") from None


def cuda_archs(torch) -> list[str]:
    archs = setting("VIDMEM_CUDA_ARCHS", "", r"\s*(\d+[af]?\s*)*", "architectures as in '80 90'").split()
    if archs:
        return archs
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return [f"{major}{minor}" for major, minor in sorted(found)]
    return CUDA_ARCHS


def wants_cuda(torch) -> bool:
    choice = setting("VIDMEM_BUILD_CUDA", "auto", "auto|0|1", "auto, 0 or 1")
    if choice == "auto":
        return torch.version.cuda is not None and shutil.which("nvcc") is not None
    if choice == "1" and shutil.which("nvcc") is None:
        raise SystemExit("VIDMEM_BUILD_CUDA=1: nvcc is not on PATH")
    return choice == "1"


def compile_jobs(torch, build_dir: Path, cuda: bool) -> list[tuple[list[str], Path, Path]]:
    """(command without source and object, source, object) for every file of _C."""
    import pybind11
    from torch.utils import cpp_extension

    cuda_fingerprints = runpy.run_path(str(ROOT / "vidmem_kernels" / "_verified.py"))["cuda_fingerprints"]

    python_headers = sysconfig.get_path("include")
    if not Path(python_headers, "Python.h").exists():
        raise CannotCompile(f"{python_headers} has no Python.h; install python3-dev, python3-devel on Fedora")
    if not (CSRC / "module.cpp").exists():
        raise SystemExit(f"vidmem_kernels: {CSRC} has no module.cpp; this copy of the source is not complete")
    archs = cuda_archs(torch) if cuda else []
    includes = ["-Icsrc", *[f"-I{d}" for d in cpp_extension.include_paths()]]
    defines = [
        f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
        *[f"-DVIDMEM_HAS_{name.upper()}" for name in CPU_CAPABILITIES],
    ]
    compiler = [*cxx_compiler(), "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-c"]
    compiler.append("-ffp-contract=off")  # results must not depend on what a compiler fuses; kernels fuse explicitly
    cxx = [*compiler, *defines, *includes]
    module = [  # without torch's headers, which include an older pybind11
        *compiler,
        f'-DVIDMEM_TORCH_VERSION="{torch.__version__}"',
        f'-DVIDMEM_CUDA_ARCHS="{" ".join(archs)}"',
        f'-DVIDMEM_CPU_CAPABILITIES="{" ".join(CPU_CAPABILITIES)}"',
        f'-DVIDMEM_CUDA_FINGERPRINTS="{" ".join(f"{op}={each}" for op, each in cuda_fingerprints(CSRC).items())}"',
        *[f"-I{d}" for d in ("csrc", pybind11.get_include(), python_headers)],
    ]

    def job(command: list[str], source: Path, variant: str = "") -> tuple[list[str], Path, Path]:
        return command, source, build_dir / source.relative_to(CSRC).with_suffix(f"{variant}.o")

    jobs = [job(module, CSRC / "module.cpp")]
    for source in sorted((CSRC / "cpu").rglob("*.cpp")):
        if not source.stem.endswith("_kernels"):
            jobs.append(job(cxx, source))
            continue
        contract = ["-ffp-contract=fast"] if source.stem in FUSED else []
        for name, flags in CPU_CAPABILITIES.items():
            jobs.append(job([*cxx, *contract, *flags, f"-DVIDMEM_ISA={name}"], source, f".{name}"))
    if cuda:
        nvcc = ["nvcc", "-std=c++20", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        nvcc += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        lowest = min(archs, key=lambda a: int(a.rstrip("af")))  # its PTX runs on later GPUs that are not in the list
        nvcc += [f"-gencode=arch=compute_{lowest},code=compute_{lowest}"]
        nvcc += ["-DUSE_CUDA", *defines, *includes, "-c"]
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            jobs.append(job(nvcc, source))
    return jobs


def is_fresh(obj: Path, line: str) -> bool:
    """Whether an object was compiled by this command line from files that have not changed since."""
    stamp, depends = obj.with_suffix(".cmd"), obj.with_suffix(".d")
    if not (obj.exists() and stamp.exists() and depends.exists()) or stamp.read_text() != line:
        return False
    _, _, names = depends.read_text().replace("\\\n", " ").partition(": ")
    files = [ROOT / re.sub(r"\\(.)", r"\1", name) for name in re.findall(r"(?:\\.|\S)+", names)]
    built = obj.stat().st_mtime
    return all(file.exists() and file.stat().st_mtime < built for file in files)


class BuildPackage(build_py):
    def run(self):
        if not self.editable_mode:  # otherwise a file of an earlier build would be packed too
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(build_ext):
    def build_extension(self, ext):
        require("pybind11", "torch")
        import torch

        build_dir = Path(self.build_temp).resolve()
        build_dir.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        not_built = target.with_name(NOT_BUILT)
        not_built.unlink(missing_ok=True)
        no_cuda = None
        if wants_cuda(torch):
            try:
                return self.compile_and_link(torch, build_dir, target, cuda=True)
            except CannotCompile as why:
                if os.environ.get("VIDMEM_BUILD_CUDA") == "1":
                    raise SystemExit(f"VIDMEM_BUILD_CUDA=1: the CUDA kernels do not compile: {why}") from None
                no_cuda = why
        try:
            self.compile_and_link(torch, build_dir, target, cuda=False)
        except CannotCompile as why:
            print(f"vidmem_kernels: WARNING: every op will run its reference: {why}", file=sys.stderr)
            target.unlink(missing_ok=True)
            not_built.write_text(f"{why}\n")
        else:
            if no_cuda:
                print(f"vidmem_kernels: WARNING: CPU kernels only: {no_cuda}", file=sys.stderr)

    def copy_extensions_to_source(self):
        package = ROOT / "vidmem_kernels"
        for stale in [*package.glob("_C*.so"), package / NOT_BUILT]:  # left by an earlier build
            stale.unlink(missing_ok=True)
        super().copy_extensions_to_source()
        built = Path(self.build_lib).resolve() / "vidmem_kernels" / NOT_BUILT
        if built.exists():
            shutil.copy(built, package)

    def compile_and_link(self, torch, build_dir: Path, target: Path, cuda: bool) -> None:
        def compile_one(job):
            command, source, obj = job
            name = os.path.relpath(
                source, ROOT
            )  # headers are also recorded by relative path, so that a moved tree stays fresh
            line = " ".join([*command, name])
            if is_fresh(obj, line):
                return
            stamp, depends = obj.with_suffix(".cmd"), obj.with_suffix(".d")
            stamp.unlink(missing_ok=True)
            obj.parent.mkdir(parents=True, exist_ok=True)
            run([*command, "-MMD", "-MF", str(depends), name, "-o", str(obj)], name)
            stamp.write_text(line)

        jobs = compile_jobs(torch, build_dir, cuda)
        workers = int(setting("MAX_JOBS", str(min(8, os.cpu_count() or 1)), "0*[1-9][0-9]*", "a number of processes"))
        with ThreadPoolExecutor(workers) as pool:
            try:
                for done in [pool.submit(compile_one, job) for job in jobs]:
                    done.result()
            except BaseException:  # the other files would fail in the same way
                pool.shutdown(cancel_futures=True)
                raise

        # nvcc finds its runtime and links it statically.
        linker = ["nvcc"] if cuda else cxx_compiler()
        libraries = ["-ltorch", "-ltorch_cpu", "-lc10", *(["-ltorch_cuda"] if cuda else [])]
        objects = [str(obj) for _, _, obj in jobs]
        torch_lib = Path(torch.__file__).parent / "lib"
        run([*linker, "-shared", *objects, f"-L{torch_lib}", *libraries, "-o", str(target)], "linking")


builds = setting("VIDMEM_BUILD", "1", "0|1", "0 or 1") == "1"
if builds and "dist_info" in sys.argv:  # pip's first step, before it downloads the dependencies
    require("pybind11", "torch")
packs = {"bdist_wheel", "dist_info", "editable_wheel"} & set(sys.argv)
if packs and NEEDED["numbers"](setuptools.__version__) < (70, 1) and (line := NEEDED["missing"]({"wheel": ""})):
    raise SystemExit(f"vidmem_kernels: with setuptools {setuptools.__version__} building {line}")

# An SPDX expression, for which pyproject.toml has no form that setuptools reads both before and after 77.
LICENSE = {"license_expression" if NEEDED["numbers"](setuptools.__version__) >= (77,) else "license": "Apache-2.0"}

setuptools.setup(
    # Optional: without it every op runs its reference.
    ext_modules=[setuptools.Extension("vidmem_kernels._C", ["csrc/module.cpp"], optional=True)] if builds else [],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
    **LICENSE,
)
