"""Runs the benchmarks: every op against the strongest alternatives, verified before it is timed.

    python benchmarks/run.py                                     # default shapes and dtypes of this machine's device
    python benchmarks/run.py --ops merge_tokens --passes fwd bwd --dtypes float32 bfloat16
    python benchmarks/run.py --shapes smoke --quick -o /tmp/smoke.json

Writes one JSON file (rewritten after every shape, so that an interrupt loses nothing) and prints a table. Exits 1 if
any row failed, 2 if the command line names something that does not exist, 130 if interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import cases  # noqa: E402, F401  (registers the benchmarks)
from benchmarks.measure import Runner  # noqa: E402
from benchmarks.record import describe, result_path, write_json  # noqa: E402
from benchmarks.registry import BENCHMARKS, DTYPES, PASSES, choose  # noqa: E402
from benchmarks.report import summary  # noqa: E402
from benchmarks.timing import clock_of, measure_rates  # noqa: E402
from vidmem_kernels._dispatch import BACKENDS  # noqa: E402

DEFAULT_DTYPES = {"cpu": ["float32"], "cuda": ["bfloat16"]}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line and checks every name in it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", metavar="OP", help="default: all")
    parser.add_argument("--shapes", nargs="+", metavar="SHAPE", help="names in shapes.py; default: those of the device")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="default: float32 on cpu, bfloat16 on cuda")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--passes", nargs="+", metavar="PASS", help=f"of {', '.join(PASSES)}; default: fwd bwd")
    parser.add_argument("--backend", nargs="+", default=["auto"], help="ours: auto (default), or one or more backends")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="also compositions under torch.compile, and rarely fastest ones; default: on cuda (C++ compiles slowly)",
    )
    parser.add_argument(
        "--no-reference", action="store_true", help="use our reference only to check results, do not time it"
    )
    parser.add_argument("--quick", action="store_true", help="the first shape of each op, and a quarter of the rounds")
    parser.add_argument("--seconds", type=float, default=1.2, help="seconds of rounds per op, shape, dtype and pass")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's. Use 1 on a shared machine")
    parser.add_argument("--time-limit", type=float, default=float("inf"), help="in seconds; no row starts after it")
    parser.add_argument("--contenders", action="store_true", help="print a line for every contender, too")
    parser.add_argument("--note", default="", help="text stored in the result, e.g. what else ran on the machine")
    parser.add_argument("-o", "--output", type=Path, help=".json file or folder; default: benchmarks/results/DEVICE")
    args = parser.parse_args(argv)
    try:
        if args.threads is not None and args.threads < 1:
            raise ValueError(f"--threads: must be at least 1, got {args.threads}")
        args.device = torch.device(args.device)
        kind = args.device.type
        choose("--device", [kind], ["cpu", "cuda"])
        if args.compile is None:
            args.compile = kind == "cuda"
        if kind == "cuda":
            args.device = torch.device("cuda", args.device.index or 0)
            if args.device.index >= torch.cuda.device_count():
                raise ValueError(f"--device {args.device}: this machine has {torch.cuda.device_count()} CUDA GPUs")
        args.ops = choose("--ops", args.ops or BENCHMARKS, BENCHMARKS)
        known = dict.fromkeys(name for op in args.ops for name in BENCHMARKS[op].shapes)
        args.shapes = choose("--shapes", args.shapes, known) if args.shapes else None
        args.dtypes = choose("--dtypes", args.dtypes or DEFAULT_DTYPES[kind], DTYPES)
        args.passes = choose("--passes", args.passes or ["fwd", "bwd"], PASSES)
        args.backend = choose("--backend", args.backend, ["auto", *BACKENDS])
    except (ValueError, RuntimeError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def plan(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(op, shape, dtype) to measure, in order."""
    todo = []
    for op in args.ops:
        shapes = BENCHMARKS[op].shapes
        chosen = [
            name
            for name, shape in shapes.items()
            if (name in args.shapes if args.shapes else args.device.type in shape.devices)
        ]
        todo += [(op, shape, dtype) for shape in chosen[: 1 if args.quick else None] for dtype in args.dtypes]
    return todo


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = perf_counter()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # handles SIGTERM, which `timeout` sends, like an interrupt
    result = describe(ROOT, args.device, sys.argv[1:] if argv is None else argv)
    result["note"] = args.note
    path = result_path(args.output, ROOT, result)
    write_json(path, result)
    clock = clock_of(args.device)
    interrupted = False
    try:
        rates = measure_rates(clock, args.device, {name: DTYPES[name] for name in args.dtypes})
        result["rates"] = {
            "copy_gb_s": rates.bytes_per_second / 1e9,
            "gemm_tflop_s": {name: rate / 1e12 for name, rate in rates.flops_per_second.items()},
        }
        seconds = args.seconds / (4 if args.quick else 1)
        runner = Runner(clock, args.device, rates, args.backend, seconds, args.compile, not args.no_reference)
        for op, shape, dtype in plan(args):
            if perf_counter() - started > args.time_limit:
                result["not_begun"].append(f"{op} {shape} {dtype}")
                continue
            print(f"{perf_counter() - started:6.1f} s  {op} {shape} {dtype}", file=sys.stderr, flush=True)
            passes = [p for p in args.passes if p in BENCHMARKS[op].passes]
            for row in runner.measure(BENCHMARKS[op], shape, dtype, passes):
                result["rows"].append(row)
            result["seconds"] = perf_counter() - started
            write_json(path, result)
        result["complete"] = not result["not_begun"]
    except KeyboardInterrupt:
        interrupted = True
    result["seconds"] = perf_counter() - started
    result["load_average_after"] = os.getloadavg()[0]
    write_json(path, result)
    print(summary(result, args.contenders))
    print(f"\n{path}")
    if interrupted:
        print("interrupted: the rows measured so far are kept", file=sys.stderr)
        return 130
    return 1 if any(row["status"] == "error" for row in result["rows"]) else 0


if __name__ == "__main__":
    sys.exit(main())
