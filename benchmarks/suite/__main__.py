"""The command of gpu_suite.sh: runs parts one after another, and prints a table at the end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from . import outbox, wheels
from .parts import DEFAULT, LEFT_OUT, PARTS, WHEELS_SECONDS, Context
from .process import OUT_OF_TIME

LOG_BYTES = 1_000_000
INTERRUPTED = 130
RESULTS_OF_A_PART = 3  # files that a part adds at most: its log and its results


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with 2 and one line if it is invalid."""
    seconds = ", ".join(f"{name} {part.seconds:g}" for name, part in PARTS.items())
    parser = argparse.ArgumentParser(prog="gpu_suite.sh", usage="%(prog)s OUT [PARTS...] [--seconds N] [--device D]")
    parser.add_argument("out", nargs="?", metavar="OUT", help="folder for what is found")
    parser.add_argument(
        "parts", nargs="*", metavar="PARTS", help=f"of {', '.join(PARTS)}; default: {' '.join(DEFAULT)}"
    )
    parser.add_argument("--seconds", type=float, help=f"of each part; default: {seconds}")
    parser.add_argument("--device", default="cuda", help="cuda; cpu: a dry run of tiny shapes")
    args = parser.parse_intermixed_args(argv)
    if args.out is None:
        parser.error("OUT is missing: the folder for what is found")
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"PARTS: must be of {', '.join(PARTS)}, got {part}")
    if args.device not in ("cuda", "cpu"):
        parser.error(f"--device: must be cuda or cpu, got {args.device}")
    if args.seconds is not None and not 1 <= args.seconds < float("inf"):
        parser.error(f"--seconds: must be at least 1, got {args.seconds:g}")
    args.parts = list(dict.fromkeys(args.parts or DEFAULT))
    args.out = called_from(args.out)
    return args


def called_from(path: str) -> Path:
    """Resolves a path relative to the folder in which gpu_suite.sh was called."""
    return Path(os.environ.get("SUITE_CALLED_FROM", "."), path).resolve()


def cannot(device: str) -> str | None:
    """Why nothing can be measured here, or None."""
    if importlib.util.find_spec("torch") is None:
        return f"{sys.executable} cannot import torch"
    import torch

    return "no CUDA GPU" if device == "cuda" and not torch.cuda.is_available() else None


class Suite:
    """Runs parts and reports after each one the results so far."""

    def __init__(self, out: Path, device: str, seconds: float | None) -> None:
        self.out, self.device, self.seconds = out, device, seconds
        self.started = monotonic()
        self.told: list[dict[str, Any]] = []
        self.more: dict[str, Any] = {}

    def run(self, name: str, scratch: Path) -> None:
        """Runs a part; what it cannot finish is in the table."""
        part = PARTS[name]
        log = self.out / (part.log or f"{name}.log")
        for old in (log, *(self.out / result for result in part.results if not part.goes_on)):
            old.unlink(missing_ok=True)
        here = Context(self.out, scratch, self.device, self.seconds or part.seconds, log)
        print(f"{name}: at most {here.seconds:g} s", flush=True)
        code = INTERRUPTED
        try:
            code = part.run(here)
        finally:  # an interrupted part is told of, too
            self._tell(name, code, here)

    def _tell(self, name: str, code: int, here: Context) -> None:
        """Records how a part ended, and shows the end of its log if it failed."""
        part, log = PARTS[name], here.log
        words = {0: "passed", LEFT_OUT: "left out", OUT_OF_TIME: "out of time", INTERRUPTED: "interrupted"}
        self.told.append(
            {
                "part": name,
                "status": words.get(code, "failed"),
                "exit_code": code,
                "seconds": round(monotonic() - here.started),
                "results": [result for result in part.results if (self.out / result).is_file()],
                "note": here.note,
            }
        )
        if log.is_file():
            text = log.read_bytes()
            log.write_bytes(text[-LOG_BYTES:])
            if code not in (0, LEFT_OUT, INTERRUPTED):
                print(
                    f"--- last lines of {log.name}", *text.decode(errors="replace").splitlines()[-15:], "---", sep="\n"
                )

    @property
    def passed(self) -> bool:
        return all(part["status"] in ("passed", "left out") for part in self.told)

    def write(self) -> None:
        """Writes summary.json: the parts that have run so far."""
        whole = {"device": self.device, "seconds": round(monotonic() - self.started), "passed": self.passed}
        text = json.dumps({**whole, **self.more, "parts": self.told}, indent=1)
        (self.out / "summary.json").write_text(text + "\n")

    def pack(self, spare: int = 0) -> None:
        """Keeps only a few files, and names those for which there was no room."""
        self.write()
        if lost := outbox.pack(self.out, spare):
            self.more["no_room_for"] = self.more.get("no_room_for", []) + lost
            self.write()

    def table(self) -> str:
        """A line for every part, and one for the wheels."""
        lines = [f"{'part':8}  {'status':11}  {'exit':>4}  {'time':>6}  results"]
        for part in self.told:
            results = ", ".join(filter(None, [*part["results"], part["note"]])) or "-"
            code = "" if part["status"] == "left out" else part["exit_code"]
            lines.append(f"{part['part']:8}  {part['status']:11}  {code:>4}  {part['seconds']:>4} s  {results}")
        if wheels := self.more.get("wheels"):
            lines.append(f"wheels installed: {', '.join(wheels['installed']) or 'none'}")
            lines += [f"wheel {name}: {why}" for name, why in wheels["failed"].items()]
            lines += [f"not in the folder: {', '.join(wheels['missing'])}"] if wheels["missing"] else []
        lines += [f"no room for {name}" for name in self.more.get("no_room_for", [])]
        return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if reason := cannot(args.device):
        print(f"{reason}: nothing measured", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outbox.unpack(args.out)
    suite = Suite(args.out, args.device, args.seconds)
    interrupted = False
    with tempfile.TemporaryDirectory() as scratch:
        try:
            if folder := os.environ.get("GPU_SUITE_WHEELS"):
                suite.more["wheels"] = wheels.install(called_from(folder), WHEELS_SECONDS)
            for name in args.parts:
                suite.run(name, Path(scratch))
                suite.pack(RESULTS_OF_A_PART)
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted: what was found is kept", file=sys.stderr)
    report = args.out / "bench.json"
    if "bench" in args.parts and report.is_file():
        from ..report import summary

        print(f"\n{summary(json.loads(report.read_text()))}")
    suite.pack()
    print(f"\n{suite.table()}\ntotal {monotonic() - suite.started:.0f} s; everything is in {args.out}")
    return INTERRUPTED if interrupted else 0 if suite.passed else 1


if __name__ == "__main__":
    sys.exit(main())
