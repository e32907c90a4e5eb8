"""The part bench: measures every row of `targets`, then all others, within a time limit, even if contenders hang.

    python -m benchmarks.suite.bench -o bench.json --seconds 170
    python -m benchmarks.suite.bench -o bench.json --seconds 30 --device cpu --shape smoke --ops gather_tokens

First everything that compiles is called once in parallel processes, so that its code is on disk; then the steps of
`schedule` run one at a time. The JSON, with rows as in run.py, is written after every step. Exits 1 if one of our rows
is wrong, fails or hangs, 2 for an invalid command line, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from .. import cases  # noqa: F401  (registers the benchmarks)
from ..record import describe, write_json
from ..registry import BENCHMARKS, DTYPES, choose
from ..report import summary
from .pool import Outcome, Pool, Worker
from .row import RATES, WARM, load_cases
from .schedule import BASELINE, DETAIL, OURS, Row, Step, plan, rows, steps

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_DTYPE = {"cpu": "float32", "cuda": "bfloat16"}
WARM_SECONDS, WARM_SHARE, WARM_MOST = 60.0, 0.25, 40.0  # of the phase, its part of all seconds, of one contender
RATES_SECONDS = 30.0
NO_TIME = "no time was left"


class Bench:
    """Runs the steps and keeps the result, which is written to disk after each."""

    def __init__(self, result: dict[str, Any], path: Path, pool: Pool, round_seconds: float) -> None:
        self.result, self.path, self.pool, self.round_seconds = result, path, pool, round_seconds
        self.rows: dict[tuple[Row, str], dict[str, Any]] = {}
        self.rates: Any = None
        self.cold: dict[tuple[Row, str], float] = {}  # milliseconds of first calls, including compilation
        self.hung: dict[tuple[str, str], Row] = {}  # op and contender -> where
        self.timer, self.profiler = (
            pool.start(),
            pool.start(),
        )  # a separate process, because profiling leaves hooks behind

    def write(self) -> None:
        write_json(self.path, self.result)

    def warm(self, todo: Sequence[Step], device: str, processes: int, seconds: float) -> None:
        """Calls what compiles, first ours and then the alternatives, in parallel processes."""
        passes: dict[tuple[str, str, str, str | None], list[str]] = {}
        for step in todo:
            if step.kind == OURS or (step.kind == BASELINE and _compiles(step, device)):
                name = step.contender if step.kind == BASELINE else None
                passes.setdefault((*step.row[:3], name), []).append(step.row.which)
        jobs = [
            {"kind": WARM, "row": Row(op, shape, dtype, ""), "passes": which, "contender": name}
            for (op, shape, dtype, name), which in passes.items()
        ]
        faults: list[str] = []
        done = 0

        def told(job: dict[str, Any], outcome: Outcome) -> None:
            nonlocal done
            done += 1
            name = job["contender"] or "vidmem (auto)"
            self.cold |= {(job["row"]._replace(which=which), name): ms for which, ms in outcome.said.items()}
            if outcome.status != "ok":
                faults.append(f"{' '.join(job['row'][:3])} {name}: {outcome.reason}")

        start = monotonic()
        self.pool.all_at_once(jobs, processes, seconds, WARM_MOST, told)
        self.result["warm"] = {
            "processes": processes,
            "seconds": monotonic() - start,
            "called": done,
            "not_called": len(jobs) - done,
            "faults": faults,
        }
        self.write()

    def measure_rates(self, dtypes: Sequence[str], compiler: bool, limit: float) -> None:
        """Measures the denominators of the floor; as the first use of the GPU, it shows whether forks can use it."""
        job = {"kind": RATES, "dtypes": dtypes, "compiler": compiler}
        outcome = self.timer.do(job, limit)
        if outcome.status != "ok":
            print(f"a forked process cannot use the device ({outcome.reason}): new ones instead", file=sys.stderr)
            self.timer.stop()
            self.pool.no_forks()
            outcome = self.timer.do(job, limit)
        if outcome.status != "ok":
            raise RuntimeError(f"rates: {outcome.reason}")
        self.rates = outcome.said["rates"]
        self.result["rates"] = {
            "copy_gb_s": self.rates.bytes_per_second / 1e9,
            "gemm_tflop_s": {name: rate / 1e12 for name, rate in self.rates.flops_per_second.items()},
        }
        if self.rates.host_bytes_per_second != float("inf"):
            self.result["rates"]["host_gb_s"] = self.rates.host_bytes_per_second / 1e9

    def take(self, step: Step, limit: float) -> None:
        """Runs a step within its limit, or records why not."""
        reason = self._why_not(step, limit)
        if reason is not None:
            self.result["left_out"].append({**_where(step.row), **_who(step), "reason": reason})
        else:
            {OURS: self._ours, BASELINE: self._baseline, DETAIL: self._detail}[step.kind](step, limit)
        self.write()

    def _why_not(self, step: Step, limit: float) -> str | None:
        if limit <= 0:
            return NO_TIME
        if step.kind == DETAIL and not self._is_right(step.row):
            return "ours was not measured"
        where = self.hung.get((step.row.op, step.contender))
        return f"hung at {where}" if where and step.kind == BASELINE else None

    def _is_right(self, row: Row) -> bool:
        return self.rows.get((row, "vidmem (auto)"), {}).get("status") == "ok"

    def _do(self, worker: Worker, step: Step, limit: float, **more: Any) -> Outcome:
        outcome = worker.do({"kind": step.kind, "row": step.row, **more}, limit)
        if outcome.status == "hung":
            self.hung[step.row.op, step.contender] = step.row
        return outcome

    def _add(self, step: Step, outcome: Outcome) -> None:
        bench = BENCHMARKS[step.row.op]
        row = {**_where(step.row), "covers": bench.covers, "sizes": bench.shapes[step.row.shape].sizes, **_who(step)}
        row |= {"backend": None, "peak_bytes": None, "status": outcome.status, "reason": outcome.reason or None}
        row |= outcome.said
        if outcome.status != "ok":
            # Rounds timed before it was stopped count, with the reason.
            row["status"] = "ok" if "median_ms" in row else "error" if outcome.status == "died" else outcome.status
        if (cold := self.cold.get((step.row, step.contender))) is not None:
            row["cold_call_ms"] = cold
        self.rows[step.row, step.contender] = row
        self.result["rows"].append(row)

    def _ours(self, step: Step, limit: float) -> None:
        self._add(step, self._do(self.timer, step, limit, rates=self.rates, seconds=self.round_seconds))

    def _baseline(self, step: Step, limit: float) -> None:
        right = self._is_right(step.row)
        more = {"contender": step.contender, "rates": self.rates, "seconds": self.round_seconds}
        self._add(step, self._do(self.timer, step, limit, **more, ours_is_right=right))
        if right:
            mine = self.rows[step.row, "vidmem (auto)"]
            others = [
                r for (row, _), r in self.rows.items() if row == step.row and "over_ours" in r and r["status"] == "ok"
            ]
            if best := min(others, key=lambda r: r["over_ours"], default=None):
                mine |= {"best_baseline": best["contender"], "speedup": best["over_ours"]}

    def _detail(self, step: Step, limit: float) -> None:
        outcome = self._do(self.profiler, step, limit)
        mine = self.rows[step.row, "vidmem (auto)"]
        mine |= outcome.said
        if outcome.status != "ok":
            missing = [name for name in ("split", "side_stream", "graph") if name not in outcome.said]
            mine |= {name: {"works": None, "reason": f"not measured: {outcome.reason}"} for name in missing}


def _compiles(step: Step, device: str) -> bool:
    """Whether the first call of an alternative that can run takes long."""
    known = {b.name: b for b in BENCHMARKS[step.row.op].baselines(device, compiled=True)}
    b = known[step.contender]
    return b.missing() is None and (b.is_compiled or b.needs is not None or device in b.on_request)


def _where(row: Row) -> dict[str, str]:
    return {"op": row.op, "shape": row.shape, "dtype": row.dtype, "pass": row.which}


def _who(step: Step) -> dict[str, str]:
    return {"contender": step.contender, "kind": "baseline" if step.kind == BASELINE else "ours"}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.suite.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=170.0, help="for everything; default: %(default)s")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="default: all")
    parser.add_argument("--shape", help="one shape for all; default: those of the device")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: on cuda")
    parser.add_argument("--warm", type=int, metavar="N", help="processes that compile first; default on cuda: 12")
    parser.add_argument("--round-seconds", type=float, default=0.3, help="of timing, for each contender of a row")
    parser.add_argument("--cases", nargs="+", type=Path, default=[], metavar="FILE.py", help="that add benchmarks")
    parser.add_argument("-o", "--output", type=Path, required=True, help=".json file")
    args = parser.parse_args(argv)
    try:
        load_cases(args.cases)
        choose("--device", [args.device], ["cpu", "cuda"])
        args.ops = choose("--ops", args.ops, BENCHMARKS) if args.ops else None
        args.dtypes = choose("--dtypes", args.dtypes or [DEFAULT_DTYPE[args.device]], DTYPES)
        if args.shape:
            choose("--shape", [args.shape], {name for bench in BENCHMARKS.values() for name in bench.shapes})
        if not 0 < args.seconds < float("inf"):
            raise ValueError(f"--seconds: must be above 0, got {args.seconds:g}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    on_gpu = args.device == "cuda"
    if args.compile is None:
        args.compile = on_gpu
    if args.warm is None:
        args.warm = min(12, os.cpu_count() or 1) if on_gpu else 0
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    end = monotonic() + args.seconds
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result = describe(ROOT, torch.device(args.device), sys.argv[1:] if argv is None else argv)
    result |= {"note": "", "left_out": []}
    todo = steps(rows(args.device, args.dtypes, args.ops, args.shape), args.device, args.compile)
    code = 0
    with Pool(args.device, args.cases) as pool:
        bench = Bench(result, args.output, pool, args.round_seconds)
        bench.write()
        try:
            bench.measure_rates(args.dtypes, args.compile, RATES_SECONDS)
            if args.warm > 0:
                bench.warm(todo, args.device, args.warm, min(WARM_SECONDS, WARM_SHARE * args.seconds))
            for step, limit in plan(todo, end - monotonic(), monotonic):
                print(f"{end - monotonic():6.1f} s left  {step.kind:8} {step.row} {step.contender}", file=sys.stderr)
                bench.take(step, limit)
            result["complete"] = not any(left["reason"] == NO_TIME for left in result["left_out"])
        except KeyboardInterrupt:
            print("interrupted: what was measured is kept", file=sys.stderr)
            code = 130
        except RuntimeError as error:
            print(error, file=sys.stderr)
            code = 1
        result["seconds"] = args.seconds - (end - monotonic())
        bench.write()
    print(summary(result))
    return code or int(any(row["kind"] == "ours" and row["status"] != "ok" for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
