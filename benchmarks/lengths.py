"""Measures time and peak memory against length, and the length from which ours is better than softmax attention.

    python benchmarks/lengths.py                                        # linear attention; about a minute
    python benchmarks/lengths.py --op linear_attention_frames --passes fwd --lengths 16384 561600
    python benchmarks/lengths.py --op cross_attention -o /tmp/lengths.json   # a memory of fixed size instead of all

Softmax attention of the same tokens is SDPA: dense, causal by tokens, or of each frame to all frames up to it. Its time
is quadratic in the length, so it is left out if a call would take longer than --limit. Exits 1 if anything failed or
did not fit into memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from math import exp, log
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from benchmarks import cases  # noqa: E402, F401  (registers the benchmarks)
from benchmarks.record import describe, result_path, write_json  # noqa: E402
from benchmarks.registry import BENCHMARKS, DTYPES, PASSES, Inputs, Sizes, choose, prepare  # noqa: E402
from benchmarks.report import summary  # noqa: E402
from benchmarks.shapes import HISTORY_60S, MEMORY_20S  # noqa: E402
from benchmarks.timing import clock_of, interleave, summarise  # noqa: E402
from benchmarks.verify import check_ours, expect  # noqa: E402

LENGTHS = (64, 256, 1024, 4096, 16_384, 65_536, 187_200, 561_600)
FRAME = HISTORY_60S[1] * HISTORY_60S[2]
OPS = ("linear_attention", "linear_attention_frames", "linear_attention_causal", "cross_attention")
# heads, channels and dtype: for the CPU, what two cores compute in a minute; for CUDA, those of Wan 1.3B.
DEFAULTS = {"cpu": (2, 64, "float32"), "cuda": (12, 128, "bfloat16")}
OURS, SOFTMAX = "ours", "softmax"

Row = dict[str, Any]


def softmax(op: str, x: Inputs, s: Sizes) -> torch.Tensor:
    """Softmax attention of all tokens, with the visibility of `op`."""
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    if op == "linear_attention_frames":
        ends = range(s["frame"], s["L"] + s["frame"], s["frame"])
        parts = [
            F.scaled_dot_product_attention(part, k[:, :, :end], v[:, :, :end])
            for part, end in zip(q.split(s["frame"], dim=2), ends, strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=op == "linear_attention_causal").transpose(1, 2)


def ours(op: str, x: Inputs, s: Sizes, backend: str = "auto") -> torch.Tensor:
    """Linear attention, or attention to the first MEMORY_20S tokens."""
    if op == "cross_attention":
        x = {"q": x["q"], "k": x["k"][:, :MEMORY_20S], "v": x["v"][:, :MEMORY_20S]}
    return BENCHMARKS[op].call(x, s, backend)


def crossing(rows: list[Row], key: str) -> Row:
    """Finds the length from which on ours is below softmax attention in `key`, interpolating the logarithms.

    Returns:
        {"length": number or None, "says": in words}.
    """
    values = {name: {r["length"]: r[key] for r in rows if r["contender"] == name} for name in (OURS, SOFTMAX)}
    both = sorted(values[OURS].keys() & values[SOFTMAX].keys())
    # Logarithm of the ratio of softmax attention to ours; a peak below the resolution counts as one byte.
    gains = [log(max(values[SOFTMAX][n], 1e-9) / max(values[OURS][n], 1e-9)) for n in both]
    if not both:
        return {"length": None, "says": "not compared"}
    if gains[-1] <= 0:
        return {"length": None, "says": f"not up to {both[-1]:,} tokens"}
    last = max((i for i, gain in enumerate(gains) if gain <= 0), default=None)
    if last is None:
        return {"length": both[0], "says": f"at all lengths, from {both[0]:,} tokens"}
    low, high = both[last], both[last + 1]
    part = -gains[last] / (gains[last + 1] - gains[last])
    length = round(exp(log(low) + part * (log(high) - log(low))))
    return {"length": length, "says": f"from {length:,} tokens"}


class Sweep:
    """Measures one op at increasing lengths."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.clock = clock_of(args.device)
        self.previous: tuple[int, float] | None = None  # length and seconds of softmax attention
        self.errors: list[str] = []

    def inputs(self, length: int) -> tuple[Inputs, Sizes]:
        args = self.args
        s = {"B": 1, "L": length, "Lq": length, "Lk": length, "H": args.heads, "D": args.channels, "frame": FRAME}
        rng = torch.Generator(args.device).manual_seed(0)
        return BENCHMARKS[args.op].make(s, DTYPES[args.dtype], str(args.device), rng), s

    def check(self) -> None:
        """Checks ours against the reference at the shortest length."""
        op, dtype = BENCHMARKS[self.args.op], DTYPES[self.args.dtype]
        x, s = self.inputs(min(self.args.lengths))
        for which in self.args.passes:
            expected = expect(op, x, s, which, dtype)
            results = prepare(lambda inputs: op.call(inputs, s, "auto"), x, which, op.differentiable, dtype)()
            check_ours(op, results, expected, x, s, which)

    def measure(self, length: int, which: str) -> list[Row]:
        x, s = self.inputs(length)
        args = self.args
        functions: dict[str, Callable[..., Any]] = {OURS: ours}
        if self.previous is None or self.previous[1] * (length / self.previous[0]) ** 2 <= args.limit:
            functions[SOFTMAX] = softmax
        calls = {
            name: lambda copy, function=function: prepare(
                lambda inputs: function(args.op, inputs, s), x, which, ("q", "k", "v"), DTYPES[args.dtype]
            )
            for name, function in functions.items()
        }
        peaks, rows = {}, []
        for name, call in list(calls.items()):
            try:
                peaks[name] = self.clock.peak_bytes(partial(call, 0))
            except torch.OutOfMemoryError:
                del calls[name]
                self.errors.append(f"{which} of {length:,} tokens, {name}: out of memory")
        seconds, errors = interleave(self.clock, calls, 1, args.seconds)
        self.errors += [f"{which} of {length:,} tokens, {name}: {message}" for name, message in errors.items()]
        for name, times in seconds.items():
            found = summarise(times)
            row = {"op": args.op, "pass": which, "length": length, "contender": name, "median_ms": found.median}
            rows.append(row | {"best_ms": found.best, "rounds": len(times), "peak_bytes": peaks[name]})
        if SOFTMAX in seconds:
            self.previous = length, 1e-3 * summarise(seconds[SOFTMAX]).median
        return rows

    def run(self, result: Row) -> None:
        self.check()
        for which in self.args.passes:
            self.previous = None
            for length in sorted(self.args.lengths):
                print(f"{self.args.op} {which} {length}", file=sys.stderr, flush=True)
                result["rows"] += self.measure(length, which)
            rows = [r for r in result["rows"] if r["pass"] == which]
            result["break_even"][which] = {key: crossing(rows, key) for key in ("median_ms", "peak_bytes")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", default=OPS[0], help=f"of {', '.join(OPS)}")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    parser.add_argument("--heads", type=int)
    parser.add_argument("--channels", type=int, help="of a head")
    parser.add_argument("--dtype")
    parser.add_argument("--passes", nargs="+", default=["fwd", "fwd+bwd"], metavar="PASS")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, default=0.5, help="of rounds for each length")
    parser.add_argument("--limit", type=float, default=3.0, help="longest call of softmax attention, in seconds")
    parser.add_argument("-o", "--output", type=Path, help=".json file or folder; default: nothing is written")
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        choose("--op", [args.op], OPS)
        choose("--passes", args.passes, PASSES)
        heads, channels, dtype = DEFAULTS[args.device.type]
        args.heads, args.channels = args.heads or heads, args.channels or channels
        args.dtype = choose("--dtype", [args.dtype or dtype], DTYPES)[0]
        if min(args.lengths) < 1:
            raise ValueError(f"--lengths: must be at least 1, got {min(args.lengths)}")
    except (ValueError, RuntimeError, KeyError) as error:
        parser.error(str(error).splitlines()[0])
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    started = perf_counter()
    result = describe(ROOT, args.device, sys.argv[1:] if argv is None else argv)
    result |= {"op": args.op, "dtype": args.dtype, "heads": args.heads, "channels": args.channels, "break_even": {}}
    sweep = Sweep(args)
    sweep.run(result)
    result |= {"complete": True, "errors": sweep.errors, "seconds": perf_counter() - started}
    print(summary(result))
    if args.output is not None:
        path = result_path(args.output, ROOT, result)
        write_json(path, result)
        print(f"\n{path}")
    for message in sweep.errors:
        print(message, file=sys.stderr)
    return 1 if sweep.errors else 0


if __name__ == "__main__":
    sys.exit(main())
