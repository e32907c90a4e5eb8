"""Measures one op at one shape and dtype: verifies every contender, times the correct ones, makes the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from vidmem_kernels import _dispatch

from .registry import DTYPES, Baseline, Benchmark, Inputs, Sizes, Unsupported, prepare
from .timing import CpuClock, CudaClock, Rates, interleave, speedup, summarise
from .verify import Expected, check_baseline, check_ours, expect

Row = dict[str, Any]


@dataclass
class Contender:
    """Ours on one backend, the reference, or a baseline.

    Attributes:
        kind: "ours", "reference" or "baseline".
        function: inputs -> results.
        status: "ok", "error" (wrong or raised) or "skipped"; only "ok" is timed.
    """

    name: str
    kind: str
    function: Callable[[Inputs], Any]
    status: str = "ok"
    reason: str | None = None
    backend: str | None = None
    peak_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def out(self, status: str, reason: str) -> None:
        """Excludes the contender, with a status and a reason."""
        self.status, self.reason = status, reason


def explain(error: BaseException) -> str:
    """Class and first lines of an error, short enough for a table."""
    return f"{type(error).__name__}: {error}".strip()[:500]


def ours(bench: Benchmark, s: Sizes, backend: str = "auto") -> Contender:
    """Our public function on a backend; "reference" has its own kind if it is measured next to another backend."""
    return Contender(f"vidmem ({backend})", "ours", partial(_call_ours, bench, s, backend))


def alternative(bench: Benchmark, b: Baseline, s: Sizes) -> Contender:
    """A baseline, compiled if requested; skipped if a package is missing."""
    function = partial(b.function, bench, s=s)
    if b.is_compiled:
        function = torch.compile(function, dynamic=False, fullgraph=True)
    contender = Contender(b.name, "baseline", function)
    missing = b.missing()
    if missing:
        contender.out("skipped", missing)
    return contender


@contextmanager
def failures(contender: Contender) -> Iterator[None]:
    """Excludes a contender if an error is raised inside: wrong results and crashes give a row without a speed."""
    try:
        yield
    except (Unsupported, _dispatch.BackendError) as error:
        contender.out("skipped", str(error))
    except torch.OutOfMemoryError:
        contender.out("error" if contender.kind == "ours" else "skipped", "out of memory")
        torch.cuda.empty_cache()
    except Exception as error:
        contender.out("error", explain(error))


@contextmanager
def choices_of_backends() -> Iterator[list[_dispatch.Choice]]:
    """Records the backend choices of ops called inside; backward runs on this thread, as recording is per thread."""
    with _dispatch.recording() as choices, torch.autograd.set_multithreading_enabled(False):
        yield choices


def speed(bench: Benchmark, s: Sizes, dtype: str, which: str, rates: Rates, seconds: list[float]) -> Row:
    """The speed entries of a row: times of all rounds, rates of the required work, the floor."""
    work = bench.work_of(which, s, DTYPES[dtype].itemsize)
    floor = rates.floor(work, dtype)
    times = summarise(seconds)
    return {
        "rounds": len(seconds),
        "median_ms": times.median,
        "p20_ms": times.p20,
        "p80_ms": times.p80,
        "best_ms": times.best,
        "bytes": work.bytes,
        "flops": work.flops,
        "gb_s": work.bytes / times.median / 1e6,
        "tflop_s": work.flops / times.median / 1e9,
        "floor_ms": 1e3 * floor,
        "floor_fraction": 1e3 * floor / times.median,
    }


class Runner:
    """Measures benchmarks on one device."""

    def __init__(
        self,
        clock: CpuClock | CudaClock,
        device: torch.device,
        rates: Rates,
        backends: list[str],
        seconds: float,
        compiled: bool = False,
        reference: bool = True,
    ):
        self.clock, self.device, self.rates = clock, device, rates
        self.backends, self.seconds, self.compiled = backends, seconds, compiled
        self.reference = reference and backends != ["reference"]

    def measure(self, bench: Benchmark, shape: str, dtype_name: str, passes: list[str]) -> Iterator[Row]:
        """A row for every contender and pass; a failure becomes an error row."""
        s, dtype = bench.shapes[shape].sizes, DTYPES[dtype_name]
        row = {"op": bench.name, "covers": bench.covers, "shape": shape, "sizes": s, "dtype": dtype_name}
        try:
            inputs = [self._make(bench, s, dtype, seed=0)]
            inputs += [self._make(bench, s, dtype, seed) for seed in range(1, self.clock.copies(inputs[0]))]
        except Exception as error:  # the other ops must still run
            yield row | {"pass": None, "contender": None, "kind": None, "status": "error", "reason": explain(error)}
            return
        for which in passes:
            yield from self._measure_pass(bench, inputs, s, dtype_name, which, row | {"pass": which})

    def _make(self, bench: Benchmark, s: Sizes, dtype: torch.dtype, seed: int) -> Inputs:
        rng = torch.Generator(self.device).manual_seed(seed)
        return bench.make(s, dtype, str(self.device), rng)

    def _contenders(self, bench: Benchmark, s: Sizes) -> list[Contender]:
        if self.compiled:
            torch._dynamo.reset()  # each shape recompiles, and Dynamo stops after a few recompilations
        contenders = [ours(bench, s, backend) for backend in self.backends]
        if self.reference:
            contenders.append(Contender("reference", "reference", partial(_call_ours, bench, s, "reference")))
        return contenders + [alternative(bench, b, s) for b in bench.baselines(self.device.type, self.compiled)]

    def _measure_pass(
        self, bench: Benchmark, inputs: list[Inputs], s: Sizes, dtype_name: str, which: str, row: Row
    ) -> Iterator[Row]:
        dtype = DTYPES[dtype_name]
        contenders = self._contenders(bench, s)
        try:
            expected = expect(bench, inputs[0], s, which, dtype)
        except Exception as error:  # without expected results nothing can be verified or timed
            yield row | {"contender": None, "kind": None, "status": "error", "reason": f"reference: {explain(error)}"}
            return

        def prepared(contender: Contender, copy: int) -> Callable[[], Any]:
            return prepare(contender.function, inputs[copy], which, bench.differentiable, dtype)

        for contender in contenders:
            if contender.status == "ok":
                self._verify(bench, contender, prepared, expected, inputs[0], s, which, dtype)
        del expected
        if any(c.kind == "ours" and c.backend == "reference" for c in contenders):
            # Timing the same code twice is pointless.
            contenders = [c for c in contenders if c.kind != "reference"]
        valid = {c.name: c for c in contenders if c.status == "ok"}
        calls = {name: partial(prepared, c) for name, c in valid.items()}
        seconds, errors = interleave(self.clock, calls, len(inputs), self.seconds) if calls else ({}, {})
        for name, contender in valid.items():
            if name in errors:
                contender.out("error", errors[name])
            else:
                contender.seconds = seconds[name]
        yield from self._rows(bench, contenders, s, dtype_name, which, row)

    def _verify(
        self,
        bench: Benchmark,
        contender: Contender,
        prepared: Callable[[Contender, int], Callable[[], Any]],
        expected: Expected,
        x: Inputs,
        s: Sizes,
        which: str,
        dtype: torch.dtype,
    ) -> None:
        """Runs a contender once, checks it, and records its peak memory and, for ours, the backends that it used."""
        with failures(contender):
            with choices_of_backends() as choices:
                call = prepared(contender, 0)
                if which == "bwd":
                    choices.clear()
                results = call()
            if contender.kind == "baseline":
                check_baseline(bench, results, expected, x, s, which, dtype)
            else:
                check_ours(bench, results, expected, x, s, which)
                contender.backend = backends(choices)
            del results, call
            contender.peak_bytes = self.clock.peak_bytes(lambda: prepared(contender, 0))

    def _rows(
        self, bench: Benchmark, contenders: list[Contender], s: Sizes, dtype_name: str, which: str, row: Row
    ) -> Iterator[Row]:
        others = [c for c in contenders if c.kind != "ours" and c.status == "ok"]
        first = next((c for c in contenders if c.kind == "ours" and c.status == "ok"), None)
        best = min(others, key=lambda c: summarise(c.seconds).median, default=None)
        for c in contenders:
            made = row | {"contender": c.name, "kind": c.kind, "backend": c.backend, "status": c.status}
            if c.status != "ok":
                yield made | {"reason": c.reason}
                continue
            made |= speed(bench, s, dtype_name, which, self.rates, c.seconds) | {"peak_bytes": c.peak_bytes}
            if c.kind == "ours" and best is not None:
                made |= {"best_baseline": best.name, "speedup": speedup(c.seconds, best.seconds)}
            if c.kind != "ours" and first is not None:
                made["over_ours"] = speedup(first.seconds, c.seconds)
            yield made


def _call_ours(bench: Benchmark, s: Sizes, backend: str, x: Inputs) -> Any:
    return bench.call(x, s, backend)


def backends(choices: list[_dispatch.Choice]) -> str:
    """ "cpu" if all ops took it, else "gather_tokens: cpu, scatter_add_tokens: reference"."""
    taken = {c.op: c.backend for c in choices}
    names = set(taken.values())
    return names.pop() if len(names) == 1 else ", ".join(f"{op}: {name}" for op, name in taken.items())
