"""Finds the fastest tile of every Triton kernel on this GPU and writes the table that launches read.

    python benchmarks/tune.py [--seconds 200] [--kernels NAME ...] [--ops NAME ...] [-o FILE]

Runs the benchmarks' calls at full shapes, records which tiles their kernels request, and compiles the candidates of
each kernel in parallel processes. Candidates are dropped if they spill, serialise tensor-core instructions, fail, or
give other results than the default tile; the rest are timed. Writes vidmem_kernels/tuned/<class>.json, or FILE, after
every
call: tuned entries are replaced, the others stay (a new FILE starts with the shipped table, so that it can replace it).
Exits 1 if nothing could be tuned.

A dry run without a GPU: TRITON_INTERPRET=1 python benchmarks/tune.py --device cpu --shapes smoke -o FILE
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as OutOfTime
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import cases, ptxas  # noqa: E402, F401  (cases: registers the benchmarks)
from benchmarks.compile_kernels import triton_modules  # noqa: E402
from benchmarks.record import write_json  # noqa: E402
from benchmarks.registry import BENCHMARKS, DTYPES, choose, prepare  # noqa: E402
from benchmarks.targets import BY_KEY  # noqa: E402
from benchmarks.timing import clock_of, interleave, summarise  # noqa: E402
from vidmem_kernels import _tuned  # noqa: E402
from vidmem_kernels._tuned import Tile, Tunable  # noqa: E402

COMPILING = 0.55  # share of the seconds; what is not compiled by then is left out
CLOSE = 0.02  # largest difference to the default tile's results, relative to the largest magnitude


class Call(NamedTuple):
    """A benchmark's call, run by Triton."""

    op: str
    shape: str
    dtype: str
    which: str  # pass

    def __str__(self) -> str:
        return " ".join(self)

    def prepared(self, device: str) -> Callable[[], Any]:
        """The call on new inputs; for a gradient, the forward pass is already done."""
        bench, dtype = BENCHMARKS[self.op], DTYPES[self.dtype]
        sizes = bench.shapes[self.shape].sizes
        inputs = bench.make(sizes, dtype, device, torch.Generator(device).manual_seed(0))
        function = lambda x: bench.call(x, sizes, "triton")  # noqa: E731
        return prepare(function, inputs, self.which, bench.differentiable, dtype)

    def again(self, device: str) -> Callable[[], Any]:
        """The call as a function that can be repeated; for a gradient, each call includes the forward pass."""
        return self._replace(which="fwd+bwd" if self.which == "bwd" else self.which).prepared(device)


class Task(NamedTuple):
    """One tile of one kernel in one call."""

    call: Call
    kernel: str
    key: str
    tile: Tile


def calls(device: str, ops: list[str], shapes: list[str] | None, dtypes: list[str]) -> list[Call]:
    """The benchmarks' calls at the default shapes of a device, or at the named ones; targets first."""
    found = []
    for op in ops:
        bench = BENCHMARKS[op]
        for name, shape in bench.shapes.items():
            if name in shapes if shapes else device in shape.devices:
                passes = [which for which in ("fwd", "bwd") if which in bench.passes]
                found += [Call(op, name, dtype, which) for dtype in dtypes for which in passes]
    wanted = list(BY_KEY)
    rank = {call: wanted.index(key) for call in found if (key := (call.op, call.shape, call.which)) in BY_KEY}
    return sorted(found, key=lambda call: rank.get(call, len(wanted)))


def asked(call: Call, device: str) -> list[tuple[Tunable, dict[str, Any]]]:
    """The tiles that a call requests, without duplicates."""
    run = call.prepared(device)
    with _tuned.watching() as found, torch.autograd.set_multithreading_enabled(False):
        run()
    return list({(tunable.kernel, tunable.key(**fields)): (tunable, fields) for tunable, fields in found}.values())


def compiled(task: Task, device: str) -> list[str]:
    """Runs a call once with a tile, in a worker process; returns why the tile is excluded, if it is."""
    triton_modules()  # a new worker has not imported them
    tunable = _tuned.TUNABLES[task.kernel]
    try:
        with ptxas.listening() as log, tunable.forced(task.tile), torch.autograd.set_multithreading_enabled(False):
            task.call.prepared(device)()
            if device != "cpu":
                torch.cuda.synchronize()
    except Exception as error:  # for example a tile that is too large for this GPU
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"]
    found = ptxas.read(log.getvalue()).get(task.kernel, [])
    arch = _tuned.arch_of(torch.device(device))
    return [why for report in found for why in ptxas.faults(report, 0, 0, arch, 0, False)]


def differs(result: Any, expected: Any) -> str | None:
    """Why results differ from those of the default tile, or None."""
    pairs = zip(_tensors(result), _tensors(expected), strict=True)
    for given, wanted in pairs:
        if not wanted.is_floating_point():
            if (given != wanted).float().mean() > CLOSE:  # near ties may be decided differently
                return "makes other choices than the default tile"
            continue
        given, wanted = given.double(), wanted.double()
        finite = wanted.isfinite()
        if not torch.equal(finite, given.isfinite()):
            return "is not finite where the default tile is finite"
        error = (given - wanted)[finite].abs().max() if finite.any() else torch.zeros(())
        if error > CLOSE * wanted[finite].abs().max():
            return f"differs by {error:.3g} from the default tile's results"
    return None


def _tensors(tree: Any) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class Tuner:
    """Tunes calls within a time limit; `document` is the table so far."""

    def __init__(self, device: str, seconds: float, document: dict[str, Any], workers: int) -> None:
        self.device, self.seconds, self.document, self.workers = device, seconds, document, workers
        self.started = perf_counter()
        self.arch = _tuned.arch_of(torch.device(device))
        self.clock = clock_of(torch.device(device))
        self.measured_on = measured_on(device)
        self.entered = 0

    def left(self, share: float = 1.0) -> float:
        """Seconds left of a share of the time."""
        return share * self.seconds - (perf_counter() - self.started)

    def tune(self, todo: list[Call], kernels: list[str]) -> Iterator[str]:
        """Tunes the tiles that the calls request; yields a line for each kernel and call."""
        tasks: dict[tuple[Call, str, str], list[Task]] = {}
        tuned: set[tuple[str, str]] = set()
        for call in todo:
            if self.left(COMPILING) <= 0:
                yield f"{call}: not started, out of time"
                continue
            try:
                found = asked(call, self.device)
            except Exception as error:  # the other calls must still be tuned
                yield f"{call}: {type(error).__name__}: {str(error).strip()[:200]}"
                continue
            for tunable, fields in found:
                entry = tunable.kernel, tunable.key(**fields)
                if entry in tuned or (kernels and tunable.kernel not in kernels):
                    continue
                tuned.add(entry)
                tasks[(call, *entry)] = [Task(call, *entry, tile) for tile in self.candidates(tunable, fields)]
        faults = self.compile_all([task for group in tasks.values() for task in group])
        for (call, kernel, key), group in tasks.items():
            if self.left() <= 0:
                yield f"{kernel}[{key}]: not timed, out of time"
                continue
            yield self.time(call, kernel, key, group, faults)

    def candidates(self, tunable: Tunable, fields: dict[str, Any]) -> list[Tile]:
        """The default first, then the shipped tile and those that the kernel declares."""
        tiles = tunable.shipped(self.arch, **fields)
        return tiles + [tile for tile in tunable.candidates(self.arch, **fields) if tile not in tiles]

    def compile_all(self, tasks: list[Task]) -> list[tuple[Task, list[str]]]:
        """Every task, with the reason if it is excluded; tasks that are not compiled in time are excluded."""
        if self.workers == 0:
            return [(task, compiled(task, self.device)) for task in tasks]
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.workers, mp_context=context)
        futures: list[Future] = [pool.submit(compiled, task, self.device) for task in tasks]
        found = []
        for task, future in zip(tasks, futures, strict=True):
            try:
                found.append((task, future.result(timeout=max(0.0, self.left(COMPILING)))))
            except OutOfTime:
                found.append((task, ["not compiled in time"]))
            except Exception as error:  # the worker died
                found.append((task, [f"{type(error).__name__}: {error}"]))
        for process in pool._processes.values():  # they must not run during timing
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        return found

    def time(self, call: Call, kernel: str, key: str, group: list[Task], faults: list[tuple[Task, list[str]]]) -> str:
        """Times the tiles of one kernel in one call and stores the fastest."""
        tunable = _tuned.TUNABLES[kernel]
        out = {str(task.tile): why for task, why in faults if task in group and why}
        default = group[0].tile
        if why := out.get(str(default)):
            return f"{kernel}[{key}]: the default is out: {'; '.join(why)}"
        run = call.again(self.device)
        expected = run()
        contenders, by_name = {}, {}
        for task in group:
            name = str(task.tile)
            if name in out:
                continue
            with tunable.forced(task.tile):
                if task.tile != default and (why := differs(run(), expected)):
                    out[name] = [why]
                    continue
            by_name[name] = task.tile
            contenders[name] = lambda copy, tile=task.tile: _forcing(tunable, tile, call.prepared(self.device))
        seconds, errors = interleave(self.clock, contenders, 1, min(2.0, 0.1 * len(contenders)))
        out |= {name: [why] for name, why in errors.items()}
        if str(default) not in seconds:
            return f"{kernel}[{key}]: the default fails: {'; '.join(out[str(default)])}"
        ms = {name: summarise(times).median for name, times in seconds.items()}
        best = min(ms, key=ms.get)
        self.document.setdefault("kernels", {}).setdefault(kernel, {})[key] = {
            "tile": by_name[best],
            "ms": round(ms[best], 4),
            "default_ms": round(ms[str(default)], 4),
            "call": str(call),
            "tried": len(ms),
            "left_out": {name: "; ".join(why) for name, why in out.items()},
            "on": self.measured_on,
        }
        self.entered += 1
        gain = ms[str(default)] / ms[best]
        return f"{kernel}[{key}]: {best}, {ms[best]:.3f} ms, {gain:.2f}x the default; {len(ms)} timed, {len(out)} out"


def _forcing(tunable: Tunable, tile: Tile, run: Callable[[], Any]) -> Callable[[], Any]:
    def forced() -> Any:
        with tunable.forced(tile), torch.autograd.set_multithreading_enabled(False):
            return run()

    return forced


def measured_on(device: str) -> str:
    """GPU, date and Triton version of a measurement."""
    import triton

    name = torch.cuda.get_device_name() if device != "cpu" else "interpreter"
    return f"{name}, {datetime.date.today()}, triton {triton.__version__}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200, help="time limit (default: %(default)s)")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="benchmarks whose calls to run (default: all)")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="default: those of this device's benchmarks")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], metavar="DTYPE")
    parser.add_argument("--kernels", nargs="+", default=[], metavar="NAME", help="only these (default: all)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: the interpreter, a dry run")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="0: compile in this process"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        args.ops = choose("--ops", args.ops or BENCHMARKS, BENCHMARKS)
        args.dtypes = choose("--dtypes", args.dtypes, DTYPES)
        triton_modules()
        args.kernels = choose("--kernels", args.kernels, _tuned.TUNABLES)
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device: there is no CUDA GPU here; cpu makes a dry run")
        if args.device == "cpu" and (os.environ.get("TRITON_INTERPRET") != "1" or args.output is None):
            raise ValueError("--device cpu: needs TRITON_INTERPRET=1 and -o FILE")
        if args.seconds <= 0:
            raise ValueError(f"--seconds: must be positive, got {args.seconds:g}")
        if args.output is None:
            name = _tuned.class_of(_tuned.arch_of(torch.device("cuda")))
            if name is None:
                raise ValueError("-o: this GPU belongs to no class with a table; name a file")
            args.output = _tuned.FOLDER / f"{name}.json"
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    shipped = _tuned.FOLDER / f"{_tuned.class_of(_tuned.arch_of(torch.device(args.device)))}.json"
    begun = next((path for path in (args.output, shipped) if path.is_file()), None)
    document = json.loads(begun.read_text()) if begun else {}
    tuner = Tuner(args.device, args.seconds, document, args.workers)
    for line in tuner.tune(calls(args.device, args.ops, args.shapes, args.dtypes), args.kernels):
        print(f"{perf_counter() - tuner.started:6.1f} s  {line}", flush=True)
        if tuner.entered:
            write_json(args.output, document)
    print(f"{tuner.entered} entries in {args.output}" if tuner.entered else "nothing was tuned")
    return 0 if tuner.entered else 1


if __name__ == "__main__":
    sys.exit(main())
