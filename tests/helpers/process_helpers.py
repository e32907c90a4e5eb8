"""Runs commands of `vidmem` as separate processes without import time: forks of one that has imported everything."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import paths

GOLDEN = paths.GOLDEN / "training"

# It stays single-threaded and computes nothing, so that its forks are as good as new processes.
_NURSERY = """
    import contextlib, json, os, resource, signal, sys
    import torch
    from vidmem_model import cli, demo
    from vidmem_model.generation import generator
    from vidmem_model.measure import repeat
    from vidmem_model.memory import learned
    from vidmem_model.train import recipe
    with contextlib.suppress(ImportError):
        import matplotlib.backends.backend_agg, matplotlib.figure
    with contextlib.suppress(ImportError):
        import peft
    torch.set_num_threads(1)
    repeat._SLOW_SECONDS = 0.0  # calls are measured once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # outside of commands
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        asked = json.loads(line)
        if "ended" in asked:
            _, status = os.waitpid(asked["ended"], 0)
            os.write(1, b"%d\\n" % os.waitstatus_to_exitcode(status))
            continue
        child = os.fork()
        if child == 0:
            try:
                os.chdir(asked["cwd"])
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                for number in (1, 2):
                    log = asked["streams"].get(str(number)) or asked["log"] + f".{number}"
                    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), number)
                if asked["ignore"]:
                    signal.signal(asked["ignore"], signal.SIG_IGN)
                if asked["limit"]:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (asked["limit"], asked["limit"]))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = cli.main(asked["arguments"])
                signal.signal(signal.SIGINT, signal.SIG_DFL)
            except SystemExit as stop:
                code = stop.code
            sys.stdout.flush()
            os._exit(code)
        os.write(1, b"%d\\n" % child)
"""


def heed_signals() -> None:
    """What a shell starts in the background ignores SIGINT, what nohup starts SIGHUP, and their children would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Nursery:
    """Starts commands; the results of each are `code`, `out` and `err` of what `end` or `run` gives."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_NURSERY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            preexec_fn=heed_signals,
        )
        assert self._told() == "ready"

    def _told(self) -> str:
        line = self.process.stdout.readline()
        assert line.endswith("\n"), "the nursery died"
        return line.strip()

    def ask(self, **asked: object) -> int:
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        return int(self._told())

    def start(
        self, cwd: Path, *arguments: object, limit: int = 0, streams: dict[int, str] | None = None, ignore: int = 0
    ) -> Child:
        """Start a command.

        It can write at most `limit` bytes to a file, its stdout (1) and stderr (2) go to the files of `streams`, and it
        ignores the signal `ignore`, if these are given.
        """
        self.count += 1
        log = self.logs / str(self.count)
        asked = {"cwd": str(cwd), "arguments": list(map(str, arguments)), "log": str(log), "limit": limit}
        return Child(self, self.ask(**asked, streams=streams or {}, ignore=ignore), log)

    def run(self, cwd: Path, *arguments: object, **options: Any) -> Child:
        """Run a command to its end."""
        return self.start(cwd, *arguments, **options).end()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Child:
    """A command that runs or has ended."""

    def __init__(self, nursery: Nursery, pid: int, log: Path) -> None:
        self.nursery, self.pid, self.log = nursery, pid, log
        self.code: int | None = None

    def kill(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self) -> Child:
        self.code = self.nursery.ask(ended=self.pid)
        return self

    @property
    def out(self) -> str:
        return self._said(1)

    @property
    def err(self) -> str:
        return self._said(2)

    def _said(self, stream: int) -> str:
        log = Path(f"{self.log}.{stream}")  # missing where it was killed before it could say anything
        return log.read_text(encoding="utf-8") if log.exists() else ""


def stage(folder: Path) -> Path:
    """Make a folder with a film, models and recipes of seconds."""
    folder.mkdir()
    # The cache of latents is named by the film's path: it is one for all folders.
    (folder / "film.mkv").symlink_to(GOLDEN / "film.mkv")
    for name in ("captions.yaml", "one.yaml", "two.yaml", "vae.yaml"):
        shutil.copyfile(GOLDEN / name, folder / name)
    shutil.copytree(GOLDEN / "finished", folder / "finished")
    (folder / "board.yaml").write_text("shots:\n  - {at: 0, prompt: a red disc}\n  - {at: 2, prompt: a blue disc}\n")
    return folder


_SMALL = ["--size", "source", "--fps", "source", "--seconds", "2"]
COMMANDS = {
    "pretrain-vae": ["pretrain-vae", "vae.yaml"],
    "pretrain": ["pretrain", "one.yaml"],
    "finetune": ["finetune", "two.yaml"],
    "compress": ["compress", "film.mkv", "-o", "memory.safetensors", "-m", "merge", *_SMALL],
    "generate": ["generate", "board.yaml", "-o", "made.mp4", "--report", "made.json", "--seconds", "4"]
    + ["--model", "finished/one.safetensors", "--steps", "2", "--segment", "4"],
    "demo": ["demo", "film.mkv", "-o", "shown", *_SMALL, "--frames", "2", "--rate", "2x2x2", "--lengths", "0.1"],
}
# What differs between two runs: times, and how many segments were found.
_MEASURED = {"wall_seconds", "segments_found", "stages", "retrieve_seconds", "peak_rss_bytes"}


def results(folder: Path) -> dict[str, object]:
    """Everything in a folder but what is measured."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if re.search(r"/checkpoints/step-\d{8}\b", name):
            continue  # the last two: one of the step at which a run was stopped may be among them
        if path.is_dir() or path.is_symlink():
            found[name] = None
        elif path.name == "curve.csv":
            found[name] = [line.rsplit(",", 1)[0] for line in path.read_text().splitlines()]
        elif path.name == "speed.json" or path.name.startswith("memory_vs_context"):
            found[name] = None
        elif path.suffix == ".json":
            found[name] = _kept(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def _kept(value: object) -> object:
    if isinstance(value, dict):
        return {key: _kept(inner) for key, inner in value.items() if key not in _MEASURED}
    return [_kept(inner) for inner in value] if isinstance(value, list) else value
