"""Workers: processes that do one job after another and can be killed with a job that hangs.

    with Pool("cuda", []) as pool:
        worker = pool.start()
        outcome = worker.do({"kind": "ours", ...}, limit=20.0)   # Outcome(status, reason, said)

A worker says what it has found as soon as it has it, so that a job which is stopped loses no more than it had not said.
Workers are forks of one process that has imported everything and touched no GPU, which takes them milliseconds; each
leads a process group of its own, so that compilers that it started end with it.
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
    """How a job ended: "ok", "hung" (over its limit), "died" or "error", why, and what the worker had said by then.

    Of what it says, "spent" means that its process is of no more use: the next job gets a new one.
    """

    status: str
    reason: str
    said: dict[str, Any]


class Worker:
    """A process that does jobs; after one that hung or killed it, the next is done by a new one."""

    def __init__(self, start: Callable[[], tuple[Any, Connection]]) -> None:
        self._start = start
        self._process: Any = None
        self._pipe: Connection | None = None

    def do(self, job: Job, limit: float) -> Outcome:
        """Has a job done within `limit` seconds, the start of a process included."""
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
            process.kill()  # it may not lead its group yet

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
        cases: Python files that register benchmarks, besides those of benchmarks/cases.
        environment: variables of the workers.
    """

    def __init__(self, device: str, cases: Sequence[Path], environment: dict[str, str] | None = None) -> None:
        os.environ.update(environment or {})
        self.device, self.cases = device, [str(path) for path in cases]
        self.workers: list[Worker] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["benchmarks.suite.row"])

    def no_forks(self) -> None:
        """Processes that import everything anew: where a fork cannot use the GPU."""
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
        """Has `count` workers do jobs, each within `limit`, until `seconds` are over; `told` hears of each."""
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
    """What a worker's process does: jobs, until the pipe is closed."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's; the pool decides
    os.dup2(2, 1)  # what libraries print is no result
    jobs: list[Job] = []
    ready = threading.Semaphore(0)
    threading.Thread(target=_listen, args=(pipe, jobs, ready), daemon=True).start()
    from .row import Session, explain, load_cases

    load_cases(cases)
    session = Session(device)
    gc.freeze()  # what was imported is never looked through again: a collection after each job then takes no time
    while ready.acquire():
        job, fault = jobs.pop(0), None
        try:
            for found in session.do(job):
                pipe.send(("said", found))
        except Exception as error:
            fault = explain(error)
        pipe.send(("done", fault))


def _listen(pipe: Connection, jobs: list[Job], ready: threading.Semaphore) -> None:
    """Takes jobs as they come; where the pool is gone, the worker and its compilers go, whatever they are at."""
    try:
        while True:
            jobs.append(pipe.recv())
            ready.release()
    except (EOFError, OSError):
        os.killpg(0, signal.SIGKILL)
