"""Draws calls of every public function and holds each backend, values and gradients, to float64.

    python tests/fuzz.py --seconds 60                         all cores for a minute; exit code 1 on a fault
    python tests/fuzz.py --seed S --case N                    one case again, as a fault's message says
    python tests/fuzz.py --op cross_attention --backend cpu   only these, e.g. cpu/avx2, reference, triton, gpu/triton

A case is named by its seed and number, and tries one call on every backend: see tests/fuzzing. What ends a worker, or
takes longer than half a minute, is a fault of the case that ran, and the others go on.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

HANGS = 30.0  # seconds after which a case hangs
STARTS = 120.0  # and a worker that has not begun


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, help="default: the time, told at the start")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--op", nargs="+", default=[], help="public functions; default all")
    parser.add_argument("--backend", nargs="+", default=[], help="default all that run here")
    parser.add_argument("--faults", type=int, default=20, help="ends after so many kinds of them")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--from-case", type=int, help=argparse.SUPPRESS)  # a worker: the first of its cases
    return parser.parse_args(argv)


def set_environment() -> None:
    """Before torch is imported."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def check_names(options: argparse.Namespace) -> set[str]:
    from fuzzing import run

    unknown = set(options.op) - set(run.all_ops())
    if unknown:
        raise SystemExit(f"--op: no {', '.join(sorted(unknown))}; there are {', '.join(run.all_ops())}")
    known = {part for name in run.backends() for part in (name, name.split("/")[0])}
    if set(options.backend) - known:
        raise SystemExit(f"--backend: must be of {', '.join(sorted(known))}, got {', '.join(options.backend)}")
    return set(options.op or run.all_ops())


def work(options: argparse.Namespace) -> None:
    """A worker: says which case it begins, then what is wrong with it, a line of JSON each."""
    from fuzzing import run

    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's in Triton's interpreter, of lanes that are masked
    ops = check_names(options)
    number = options.from_case
    while True:
        if run.draw_case(options.seed, number)[0] in ops:
            print(json.dumps({"begin": number}), flush=True)
            begin = lambda backend: print(json.dumps({"on": backend}), flush=True)  # noqa: E731
            for fault in run.run_case(options.seed, number, ops, set(options.backend), begin):
                print(json.dumps({"fault": asdict(fault)}), flush=True)
        number += options.workers


class Worker:
    """A process that runs every `workers`-th case, and begins anew behind one that ends it."""

    def __init__(self, options: argparse.Namespace, first: int):
        self.options, self.next = options, first
        self.process: subprocess.Popen | None = None
        self.case: int | None = None
        self.backend: str | None = None
        self.ran = 0  # cases that some backend took
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, "--seed", str(self.options.seed), "--from-case", str(self.next)]
        command += ["--workers", str(self.options.workers)]
        for flag in ("op", "backend"):
            values = getattr(self.options, flag)
            command += [f"--{flag}", *values] if values else []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.rest = b""
        self.case = None
        self.since = time.monotonic()

    def lines(self) -> list[dict] | None:
        """What it said since; None if it has ended."""
        read = os.read(self.process.stdout.fileno(), 1 << 16)
        *whole, self.rest = (self.rest + read).split(b"\n")
        return [json.loads(line) for line in whole] if read else None

    def take(self, line: dict) -> dict | None:
        """Notes a line; a fault's is returned."""
        if "fault" in line:
            return line["fault"]
        if "on" in line:
            self.ran += self.backend is None
            self.backend = line["on"]
            return None
        self.case, self.backend, self.since = line["begin"], None, time.monotonic()
        self.next = self.case + self.options.workers
        return None

    def hangs(self) -> bool:
        return time.monotonic() - self.since > (HANGS if self.case is not None else STARTS)

    def stop(self) -> int:
        self.process.kill()
        self.process.stdout.close()
        return self.process.wait()


def hunt(options: argparse.Namespace) -> int:
    """Runs workers until the time is over; the number of kinds of faults."""
    from fuzzing.run import Fault, lost

    check_names(options)
    selector = selectors.DefaultSelector()
    workers = [Worker(options, i) for i in range(options.workers)]
    for worker in workers:
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
    told: set[tuple] = set()

    def tell(fault: Fault) -> None:
        if fault.kind not in told:
            told.add(fault.kind)
            print(f"FAULT {fault}", flush=True)

    def again(worker: Worker, how: str | None) -> None:
        selector.unregister(worker.process.stdout)
        code = worker.stop()
        if worker.case is None:
            raise SystemExit(f"a worker did not start: exit code {code}, see above")
        if how is None:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            how = f"ended the process with {name}"
        tell(lost(options.seed, worker.case, worker.backend or "no backend yet", how))
        worker.start()
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    end = time.monotonic() + options.seconds
    try:
        while time.monotonic() < end and len(told) < options.faults:
            for key, _ in selector.select(timeout=0.5):
                worker = key.data
                lines = worker.lines()
                if lines is None:
                    again(worker, None)
                    continue
                for line in lines:
                    fault = worker.take(line)
                    if fault is not None:
                        tell(Fault(**fault))
            for worker in workers:
                if worker.hangs():
                    again(worker, f"takes more than {HANGS:.0f} s")
    finally:
        for worker in workers:
            worker.stop()
    cases = sum(worker.ran for worker in workers)
    print(f"{cases} cases, seed {options.seed}: {len(told) or 'no'} fault{'s' if len(told) != 1 else ''}")
    return len(told)


def main() -> int:
    options = arguments()
    set_environment()
    if options.seed is None:
        options.seed = int(time.time())
    if options.from_case is not None:
        work(options)
    if options.case is not None:
        from fuzzing import run

        faulthandler.enable()
        faults = run.run_case(options.seed, options.case, check_names(options), set(options.backend))
        print(
            *[f"FAULT {f}" for f in faults],
            f"case {options.case} of seed {options.seed}: {len(faults)} faults",
            sep="\n",
        )
        return bool(faults)
    print(f"seed {options.seed}", flush=True)
    return bool(hunt(options))


if __name__ == "__main__":
    sys.exit(main())
