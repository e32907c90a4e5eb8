"""Workers: processes that run one job after another and are killed if a job hangs.

    with Pool("cuda", []) as pool:
        worker = pool.start()
        outcome = worker.do({"kind": "ours", ...}, limit=20.0)   # Outcome(status, reason, said)

A worker reports each result as soon as it has it, so that a stopped job loses only what it had not reported. Workers
are forks of one process that has imported everything and has not touched the GPU, so they start within milliseconds;
each leads its own process group, so that compilers that it started end with it.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

Job = dict[str, Any]
START_SECONDS = 60.0  # importing torch and Triton on a cold disk


class Outcome(NamedTuple):
    """How a job ended: "ok", "hung" (over its limit), "died" or "error", the reason, and what the worker had reported.

    A report "spent" means that the process cannot be used again: the next job gets a new one.
    """

    status: str
    reason: str
    said: dict[str, Any]


class Worker:
    """A process that runs jobs; after a job that hung or killed it, a new process runs the next one."""

    def __init__(self, start: Callable[[], tuple[Any, Connection]]) -> None:
        self._start = start
        self._process: Any = None
        self._pipe: Connection | None = None

    def do(self, job: Job, limit: float) -> Outcome:
        """Runs a job within `limit` seconds, including the start of a process."""
        end = monotonic() + limit
        said: dict[str, Any] = {}
        try:
            if self._process is None:
                self._process, self._pipe = self._start()
                end = max(end, monotonic() + min(limit, START_SECONDS))
            self._pipe.send(job)
            while self._pipe.poll(max(0.0, end - monotonic())):
                kind, content = self._pipe.recv()
                if kind == "said":
                    said |= content
                    continue
                if said.pop("spent", False):
                    self.stop()
                return Outcome("ok" if content is None else "error", content or "", said)
        except (EOFError, OSError):
            code = self._ended()
            self.stop()
            return Outcome("died", f"its process died ({code})", said)
        self.stop()
        return Outcome("hung", f"stopped at its limit of {limit:.0f} s", said)

    def _ended(self) -> str:
        if self._process is None:
            return "it did not start"
        self._process.join(2)
        code = self._process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def kill(self) -> None:
        """Kills the process and all that it started; a `do` on another thread then ends."""
        if (process := self._process) is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # it may not lead its process group yet

    def stop(self) -> None:
        """Kills the process and forgets it."""
        if self._process is not None:
            self.kill()
            self._process.join(10)
            self._pipe.close()
            self._process = self._pipe = None


class Pool:
    """Starts workers for a device.

    Args:
        device: "cuda" or "cpu".
        cases: Python files that register benchmarks besides those of benchmarks/cases.
        environment: environment variables of the workers.
    """

    def __init__(self, device: str, cases: Sequence[Path], environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.device, self.cases = device, [str(path) for path in cases]
        self.workers: list[Worker] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.suite.row"])

    def no_forks(self) -> None:
        """Uses processes that import everything again, if a fork cannot use the GPU."""
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *unused: object) -> None:
        for worker in self.workers:
            worker.stop()

    def start(self) -> Worker:
        """A worker, whose process starts with its first job."""
        worker = Worker(self._spawn)
        self.workers.append(worker)
        return worker

    def _spawn(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs, self.device, self.cases))
        process.start()
        theirs.close()
        return process, ours

    def all_at_once(
        self, jobs: Iterable[Job], count: int, seconds: float, limit: float, told: Callable[[Job, Outcome], None]
    ) -> None:
        """Lets `count` workers run jobs, each within `limit`, until `seconds` are over; `told` gets each outcome."""
        end = monotonic() + seconds
        waiting = iter(jobs)
        lock = threading.Lock()

        def work(worker: Worker) -> None:
            while (left := end - monotonic()) > 1:
                with lock:
                    job = next(waiting, None)
                if job is None:
                    break
                outcome = worker.do(job, min(limit, left))
                with lock:
                    told(job, outcome)
            worker.stop()

        workers = [self.start() for _ in range(count)]
        threads = [threading.Thread(target=work, args=(worker,)) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt
            end = 0.0
            for worker in workers:
                worker.kill()
            raise


def serve(pipe: Connection, device: str, cases: Sequence[str]) -> None:
    """The main function of a worker's process: runs jobs until the pipe is closed."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # sent by the terminal; the pool decides
    os.dup2(2, 1)  # so that the output of libraries is not taken for results
    jobs: list[Job] = []
    ready = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(pipe, jobs, ready), daemon=True).start()
    from .row import Session, explain, load_cases

    load_cases(cases)
    session = Session(device)
    gc.freeze()  # excludes imported objects from garbage collection, which then takes no time after each job
    while ready.acquire():
        job, fault = jobs.pop(0), None
        try:
            for found in session.do(job):
                pipe.send(("said", found))
        except Exception as error:
            fault = explain(error)
        pipe.send(("done", fault))


def _listen(pipe: Connection, jobs: list[Job], ready: threading.Semaphore) -> None:
    """Receives jobs; if the pool is gone, ends the worker and its compilers, whatever they are doing."""
    try:
        while True:
            jobs.append(pipe.recv())
            ready.release()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
