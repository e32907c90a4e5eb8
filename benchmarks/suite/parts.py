"""The parts: each runs within its seconds, returns how it went, and leaves its results in the folder."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from . import outbox, sanitize
from .process import run

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = -1  # instead of an exit code: the part cannot run here, which is not an error


@dataclass
class Context:
    """Where a part runs.

    Attributes:
        out: folder for results.
        scratch: folder for temporary files.
        device: "cuda", or "cpu" for a dry run.
        seconds: time limit of the part.
        log: file for everything that it prints.
        note: text for the table, besides how it ended.
    """

    out: Path
    scratch: Path
    device: str
    seconds: float
    log: Path
    note: str = ""
    started: float = field(default_factory=monotonic)

    @property
    def left(self) -> float:
        return max(1.0, self.seconds - (monotonic() - self.started))

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def python(
        self,
        *arguments: object,
        keep: float = 0.0,
        environment: dict[str, str] | None = None,
        ask: signal.Signals = signal.SIGTERM,
        output: Path | None = None,
    ) -> int:
        """Runs Python within the remaining seconds, less those to `keep`; see `process.run`."""
        command = [sys.executable, *map(str, arguments)]
        return run(
            command, max(1.0, self.left - keep), self.log, environment=environment, ask=ask, output=output
        )  # fmt: skip


def build(here: Context) -> int:
    """Compiles in place, then reports what runs each op, even after a failed build, because the report says why."""
    environment = {"VIDMEM_BUILD_CUDA": "1" if here.on_gpu else "0"}
    code = here.python("setup.py", "build_ext", "--inplace", keep=20, environment=environment)
    return here.python("-m", "vidmem_kernels.info", "--json", output=here.out / "info.json") or code


def tests(here: Context) -> int:
    """All tests for a GPU, in one process per core: Triton compiles some 900 kernels for them."""
    report = here.scratch / "tests.xml"
    command = ["-m", "pytest", "-m", "gpu" if here.on_gpu else "not gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
    # A test file that needs a missing package must not stop the others.
    command += ["--continue-on-collection-errors", "--durations=10", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        here.note = "pytest-xdist is missing: one process ran all tests"
    if not here.on_gpu:
        command += ["tests/tools/test_install.py"]
    code = here.python(*command, keep=15, environment={"OMP_NUM_THREADS": "1"}, ask=signal.SIGINT)
    if here.on_gpu:
        code = here.python("benchmarks/verified.py", report, "-o", here.out / "verified.json") or code
    return code


def bench(here: Context) -> int:
    """Every row of targets.py and then the rest; keeps its own time limits."""
    options: list[object] = ["--device", here.device, "--seconds", max(1.0, here.seconds - 12)]
    if not here.on_gpu:
        options += ["--shape", "smoke", "--ops", "gather_tokens", "quantize_rows", "--round-seconds", 0.01]
    return here.python("-m", "benchmarks.suite.bench", *options, "-o", here.out / "bench.json")


def tune(here: Context) -> int:
    """The fastest tile of every kernel."""
    options: list[object] = ["--seconds", max(1.0, here.seconds - 15), "--device", here.device]
    environment = {}
    if not here.on_gpu:
        options += ["--shapes", "smoke", "--ops", "gather_tokens", "--workers", 0]
        environment = {"TRITON_INTERPRET": "1"}
    return here.python("benchmarks/tune.py", *options, "-o", here.out / "tuned.json", environment=environment)


def profile(here: Context) -> int:
    """Memory and time against length: of an attention layer, and of linear attention compared with SDPA."""
    layer: list[object] = ["-m", "vidmem_model", "profile", "--device", here.device, "-o", here.scratch / "profile"]
    lengths: list[object] = ["--device", here.device, "--seconds", 0.2, "--limit", 0.3, "-o", here.out / "lengths.json"]
    if not here.on_gpu:
        layer += ["--lengths", "0.2,0.4", "--heads", 2, "--head-dim", 32, "--dtype", "float32"]
        lengths += ["--lengths", 32, 64, "--heads", 1, "--channels", 8]
    code = here.python(*layer, keep=here.seconds / 3)
    measured = here.scratch / "profile" / "memory_vs_context.json"
    if measured.is_file():
        shutil.copy(measured, here.out / "profile.json")
    return here.python("benchmarks/lengths.py", *lengths) or code


def sanitized(here: Context) -> int:
    """compute-sanitizer over a few tests of every family."""
    tool = sanitize.find()
    if not here.on_gpu or tool is None:
        here.note = "compute-sanitizer is not installed" if here.on_gpu else "needs a GPU"
        return LEFT_OUT
    return sanitize.check(tool, here.out / "sanitize.json", here.log, here.left)


def train(here: Context) -> int:
    """Continues the training from its earlier results."""
    command = ["benchmarks/gpu_train.sh", str(here.out), "--minutes", f"{max(0.1, (here.seconds - 30) / 60):.2f}"]
    if not (ROOT / command[0]).is_file():
        here.note = f"there is no {command[0]}"
        return LEFT_OUT
    if not here.on_gpu:
        command += ["--device", "cpu"]
    outbox.unpack(here.out)  # the weights to continue from
    return run(command, here.left, here.log, environment={"PYTHON": sys.executable})


@dataclass(frozen=True)
class Part:
    """A part.

    Attributes:
        run: function that runs it; returns an exit code, or LEFT_OUT.
        seconds: default time limit.
        results: names of the JSON files that it leaves.
        log: name of its log; default: its own.
        goes_on: whether it continues from earlier results, which are otherwise removed.
    """

    run: Callable[[Context], int]
    seconds: float
    results: tuple[str, ...] = ()
    log: str | None = None
    goes_on: bool = False


PARTS = {
    "build": Part(build, 70, ("info.json",)),
    "tests": Part(tests, 195, ("verified.json",)),
    "bench": Part(bench, 185, ("bench.json",)),
    "tune": Part(tune, 240, ("tuned.json",)),
    "profile": Part(profile, 120, ("profile.json", "lengths.json")),
    "sanitize": Part(sanitized, 180, ("sanitize.json",)),
    "train": Part(
        train, 240, ("train.json",), "gpu_train.log", goes_on=True
    ),  # in addition to gpu_train.sh's own train.log
}
DEFAULT = ("build", "tests", "bench")  # with the wheels at most 8 minutes
WHEELS_SECONDS = 30.0
