"""The worker that reads hostile files: it has imported the program and runs each command in a separate fork."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pkgutil
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from paths import GOLDEN, ROOT

MEMORY = 1 << 30  # bytes that a case may take beyond what the worker has
SECONDS = 10.0  # of processor time; whatever waits for something is killed after four times that


@dataclasses.dataclass
class Case:
    """What is run: files to write into a copy of the golden training folder, and the command line."""

    files: dict[str, bytes]
    command: list[str]


def link_golden(folder: Path) -> None:
    """Let golden film, recipe and results be found in a folder; the film's place names the cache of its latents."""
    for name in ("film.mkv", "captions.yaml", "one.yaml", "finished"):
        os.symlink(GOLDEN / "training" / name, folder / name)


@dataclasses.dataclass
class Result:
    """How a case ended: exit code (negative for a signal), what it said, seconds of work, bytes beyond the worker."""

    code: int
    stderr: str
    seconds: float
    grown: int

    def fault(self) -> str | None:
        """What is wrong with it, or None."""
        if self.code == -signal.SIGKILL or self.seconds > SECONDS:
            return f"still running after {self.seconds:.0f} s of work"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        if "this is a bug" in self.stderr or "Traceback" in self.stderr:
            return "this is a bug"
        lines = self.stderr.splitlines()
        if len(lines) > 6 or any(len(line) > 700 or not line.isprintable() for line in lines):
            return "more than a few short lines"
        if self.code == 2 and not any(line.startswith("vidmem: error: ") for line in lines):
            return "exit code 2 without a word"
        return f"{self.grown >> 20} MiB" if self.grown > MEMORY else None


class Worker:
    """A process that has imported the program and runs each command in a fork."""

    def __enter__(self) -> Worker:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PIP_NO_INDEX": "1", "VIDMEM_CACHE": os.devnull}
        command = [sys.executable, str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def run(self, folder: Path, command: list[str]) -> Result:
        """Run a command in a folder."""
        if self.process.poll() is not None:
            self.__enter__()
        self.process.stdin.write(json.dumps([str(folder), command]) + "\n")
        self.process.stdin.flush()
        return Result(**json.loads(self.process.stdout.readline()))

    def case(self, case: Case, folder: Path) -> Result:
        """Write a case's files into a folder, run its command there, and empty the folder again."""
        folder.mkdir()
        link_golden(folder)
        for name, content in case.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():
                path.unlink()
            path.write_bytes(content)
        try:
            return self.run(folder, case.command)
        finally:
            shutil.rmtree(folder)


def _resident() -> tuple[int, int]:
    status = Path("/proc/self/status").read_text()
    return tuple(int(status.partition(f"{field}:")[2].split()[0]) << 10 for field in ("VmRSS", "VmSize"))


def _child(folder: str, command: list[str], said: int) -> None:
    from vidmem_model.cli import main

    os.chdir(folder)
    os.write(said, f"{_resident()[0]}\n".encode())  # a fork has mapped less than its parent
    nothing = os.open(os.devnull, os.O_RDWR)
    for own, other in ((0, nothing), (1, nothing), (2, said)):
        os.dup2(other, own)
    limit = _resident()[1] + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = main(command)
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    """Run what comes on stdin, a line a command; a line on stdout for each."""
    import vidmem_model
    from vidmem_model import shipped
    from vidmem_model.cli import main

    for module in pkgutil.walk_packages(vidmem_model.__path__, "vidmem_model."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)

    shipped.CHECKPOINTS = GOLDEN / "training" / "finished"
    # What only a first call imports.
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(io.StringIO()):
        for name in ("dct-int8", "learned-float16"):
            memory = GOLDEN / "memories" / f"{name}.safetensors"
            assert main(["retrieve", str(memory), "--frame", "0", "-o", f"{scratch}/x.png"]) == 0
        for suffix in ("png", "pdf", "svg"):
            result = ROOT / "docs" / "memory_vs_context.json"
            assert main(["plot", str(result), "-o", f"{scratch}/plot.{suffix}"]) == 0
    for line in sys.stdin:
        folder, command = json.loads(line)
        with tempfile.TemporaryFile() as said:
            began = time.monotonic()
            child = os.fork()
            if child == 0:
                try:
                    _child(folder, command, said.fileno())
                finally:
                    os._exit(70)
            pid = 0
            while not pid:
                pid, status, usage = os.wait4(child, os.WNOHANG)
                if not pid and time.monotonic() - began > 4 * SECONDS:
                    os.kill(child, signal.SIGKILL)
                    pid, status, usage = os.wait4(child, 0)
                time.sleep(0.002 if not pid else 0)
            said.seek(0)
            before, _, text = said.read(100_000).decode("utf-8", "replace").partition("\n")
        grown = (usage.ru_maxrss << 10) - int(before or 0)
        result = Result(os.waitstatus_to_exitcode(status), text, usage.ru_utime + usage.ru_stime, grown)
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    serve()
