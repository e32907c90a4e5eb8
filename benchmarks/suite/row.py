"""The work of a worker: one contender of one row, reported piece by piece.

Ours is verified at the smallest of `Benchmark.verified_at` whose call takes the same path as that of the full shape
(`launches`): the same backends and libraries, the same Triton kernels with the same constants. An alternative is
verified against our results at the full shape, which needs no second compilation, and timed alternating with ours.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import cases  # noqa: F401  (registers the benchmarks)
from ..measure import Contender, alternative, backends, choices_of_backends, explain, failures, ours, speed
from ..registry import BENCHMARKS, DTYPES, Benchmark, Inputs, Sizes, prepare
from ..timing import clock_of, interleave, measure_rates, speedup
from ..verify import Expected, check_baseline, check_ours, expect
from . import breakdown
from .launches import Path as Taken
from .launches import differences, path_of, recording
from .schedule import BASELINE, DETAIL, OURS, Row

RATES, WARM = "rates", "warm"
MS = 1e3


def load_cases(paths: Sequence[str]) -> None:
    """Runs Python files that register benchmarks."""
    for path in paths:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


class Session:
    """Runs the jobs of a process; the device is not touched before the first."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device, 0) if device == "cuda" else torch.device(device)
        self._clock: Any = None

    @property
    def clock(self) -> Any:
        if self._clock is None:
            self._clock = clock_of(self.device)
        return self._clock

    def do(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Runs a job, which names its `kind` and, except for rates, its `row`; yields results as it has them."""
        kinds = {RATES: self.rates, WARM: self.warm, OURS: self.ours, BASELINE: self.baseline, DETAIL: self.detail}
        yield from kinds[job["kind"]](**{name: value for name, value in job.items() if name != "kind"})
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError:  # for example an illegal access, after which all later calls fail too
                yield {"spent": True}

    def rates(self, dtypes: Sequence[str], compiler: bool) -> Iterator[dict[str, Any]]:
        """Bandwidth and matrix product rates: the denominators of the floor; `compiler`: also imports torch's."""
        if compiler:  # takes seconds, which would otherwise count for the first compiled alternative
            importlib.import_module("torch._inductor.compile_fx")
        yield {"rates": measure_rates(self.clock, self.device, {name: DTYPES[name] for name in dtypes})}

    def warm(self, row: Row, passes: Sequence[str], contender: str | None) -> Iterator[dict[str, Any]]:
        """Calls ours, or an alternative, so that its compiled code is on disk when it is measured."""
        bench, s, dtype = self._of(row)
        x = self._make(bench, s, dtype)
        called = self._contender(bench, s, contender)
        for which in passes:
            with failures(called):
                _, path, seconds = self._call(bench, called, x, which, dtype)
                yield {which: MS * seconds}
                if path is not None:
                    self._alike(bench, s, x, which, dtype, path)
        if called.status == "error":
            raise RuntimeError(called.reason)

    def ours(self, row: Row, rates: Any, seconds: float) -> Iterator[dict[str, Any]]:
        """Verifies and times ours, alone on the device."""
        bench, s, dtype = self._of(row)
        contender = ours(bench, s)
        with failures(contender):
            x = self._make(bench, s, dtype)
            results, path, first = self._call(bench, contender, x, row.which, dtype)
            del results
            yield {"first_call_ms": MS * first, "backend": contender.backend, "path": _told(path)}
            sizes, small, results, elsewhere = self._alike(bench, s, x, row.which, dtype, path)
            check_ours(bench, results, expect(bench, small, sizes, row.which, dtype), small, sizes, row.which)
            yield {"verified_at": sizes, "other_path_at": elsewhere}
            del small, results
            call = partial(_prepared, bench, contender, x, row.which, dtype)
            times, errors = interleave(self.clock, {"ours": call}, 1, seconds)
            if errors:
                raise RuntimeError(errors["ours"])
            yield speed(bench, s, row.dtype, row.which, rates, times["ours"])
            yield {"peak_bytes": self.clock.peak_bytes(partial(call, 0))}
        yield {"status": contender.status, "reason": contender.reason}

    def _alike(
        self, bench: Benchmark, s: Sizes, x: Inputs, which: str, dtype: torch.dtype, path: Taken
    ) -> tuple[Sizes, Inputs, Any, list[dict[str, Any]]]:
        """Calls ours at the smallest sizes that take the same path as the full ones.

        Returns:
            (those sizes, inputs, results, the smaller sizes that were tried, with the differences).
        """
        elsewhere: list[dict[str, Any]] = []
        for sizes in bench.verified_at(s):
            small = x if sizes == s else self._make(bench, sizes, dtype)
            try:
                results, taken, _ = self._call(bench, ours(bench, sizes), small, which, dtype)
                differs = [] if sizes == s else differences(path, taken)
            except ValueError as error:  # such sizes are refused, e.g. fewer blocks than topk
                if sizes == s:
                    raise
                differs = [explain(error)]
            if not differs:
                break
            elsewhere.append({"sizes": sizes, "differs": differs[:5]})
        return sizes, small, results, elsewhere

    def baseline(
        self, row: Row, contender: str, rates: Any, seconds: float, ours_is_right: bool
    ) -> Iterator[dict[str, Any]]:
        """Verifies an alternative, and times it alternating with ours if ours is right."""
        bench, s, dtype = self._of(row)
        other, mine = self._contender(bench, s, contender), ours(bench, s)
        if other.status != "ok":
            yield {"status": other.status, "reason": other.reason}
            return
        with failures(other):
            sizes = s if ours_is_right else next(bench.verified_at(s))
            x = self._make(bench, sizes, dtype)
            if ours_is_right:
                results = self._call(bench, mine, x, row.which, dtype)[0]
                exact = _leaves(bench.comparable(results, x, s) if row.which == "fwd" else results)
                expected = Expected(exact, exact)
                del results
            else:
                expected = expect(bench, x, sizes, row.which, dtype)
            verified = other if sizes == s else self._contender(bench, sizes, contender)
            results, _, first = self._call(bench, verified, x, row.which, dtype)
            yield {"first_call_ms": MS * first}
            check_baseline(bench, results, expected, x, sizes, row.which, dtype)
            yield {"verified_at": sizes, "verified_by": "ours" if ours_is_right else "reference in float64"}
            del results, expected
            x = x if sizes == s else self._make(bench, s, dtype)
            timed = {"ours": mine, contender: other} if ours_is_right else {contender: other}
            calls = {name: partial(_prepared, bench, c, x, row.which, dtype) for name, c in timed.items()}
            times, errors = interleave(self.clock, calls, 1, seconds)
            if errors:
                raise RuntimeError("; ".join(f"{name}: {error}" for name, error in errors.items()))
            yield speed(bench, s, row.dtype, row.which, rates, times[contender])
            if ours_is_right:
                yield {"over_ours": speedup(times["ours"], times[contender])}
            yield {"peak_bytes": self.clock.peak_bytes(partial(calls[contender], 0))}
        yield {"status": other.status, "reason": other.reason}

    def detail(self, row: Row) -> Iterator[dict[str, Any]]:
        """Measures where the time of ours goes, and whether it works on a side stream and in a CUDA graph."""
        bench, s, dtype = self._of(row)
        x = self._make(bench, s, dtype)
        contender = ours(bench, s)
        kernels = self._call(bench, contender, x, row.which, dtype)[1].kernels()
        call = partial(_prepared, bench, contender, x, row.which, dtype, 0)
        yield {"split": breakdown.split(call, self.device, kernels)}
        # A backward pass runs on the stream of its forward pass, so another stream needs both passes.
        whole = partial(_prepared, bench, contender, x, "fwd" if row.which == "fwd" else "fwd+bwd", dtype, 0)
        yield {"side_stream": breakdown.on_side_stream(whole, self.device)}
        graph = breakdown.in_graph(whole, self.device)
        yield {"graph": graph, "spent": not graph["works"] and self.device.type == "cuda"}

    def _of(self, row: Row) -> tuple[Benchmark, Sizes, torch.dtype]:
        bench = BENCHMARKS[row.op]
        return bench, bench.shapes[row.shape].sizes, DTYPES[row.dtype]

    def _make(self, bench: Benchmark, s: Sizes, dtype: torch.dtype) -> Inputs:
        return bench.make(s, dtype, str(self.device), torch.Generator(self.device).manual_seed(0))

    def _contender(self, bench: Benchmark, s: Sizes, name: str | None) -> Contender:
        """The alternative of that name, or ours."""
        if name is None:
            return ours(bench, s)
        known = {b.name: b for b in bench.baselines(self.device.type, compiled=True)}
        if known[name].is_compiled:
            torch._dynamo.reset()  # each shape recompiles, and Dynamo stops after a few recompilations
        return alternative(bench, known[name], s)

    def _call(
        self, bench: Benchmark, contender: Contender, x: Inputs, which: str, dtype: torch.dtype
    ) -> tuple[Any, Taken | None, float]:
        """(results, path, seconds) of one call; records the backends of ours."""
        call = _prepared(bench, contender, x, which, dtype)
        is_ours = contender.kind == "ours"
        with recording() if is_ours else nullcontext() as launches, choices_of_backends() as choices:
            start = perf_counter()
            results = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds = perf_counter() - start
        if not is_ours:
            return results, None, seconds
        contender.backend = backends(choices)
        return results, path_of(choices, launches), seconds


def _prepared(
    bench: Benchmark, contender: Contender, x: Inputs, which: str, dtype: torch.dtype, copy: int = 0
) -> Callable[[], Any]:
    return prepare(contender.function, x, which, bench.differentiable, dtype)


def _leaves(results: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(results) if isinstance(t, torch.Tensor)]


def _told(path: Taken) -> dict[str, Any]:
    """A path as JSON: the choices, and the features of each Triton kernel's launches."""
    launches = [{"kernel": launch.kernel, "launches": n, **dict(launch.features)} for launch, n in path.launches]
    return {"choices": sorted(path.choices), "launches": sorted(launches, key=str)}
