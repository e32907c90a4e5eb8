"""Trains the VAE, the demo memory (Stage I) and its continuation (Stage II) for some minutes; see gpu_train.sh.

    python benchmarks/gpu_train.py OUT [--minutes 4]
    python benchmarks/gpu_train.py --join OUT -o FOLDER

Each call is a round: every stage trains for its share of the minutes, from its last checkpoint in the working folder. A
call that was killed is continued where it stopped, without repeating finished stages, so that the inputs of a stage do
not change. On a machine whose working folder is empty, or behind, the previous round is restored from OUT: weights and
step counts, without the moments of the optimizers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from benchmarks import without_pyav  # noqa: E402

without_pyav.stand_in()

import torch  # noqa: E402

from benchmarks import timing, train_pieces, train_stages  # noqa: E402
from benchmarks.train_held_out import HeldOut  # noqa: E402
from benchmarks.train_stages import STAGES, Plan  # noqa: E402
from vidmem_model.errors import UserError  # noqa: E402
from vidmem_model.files import make_folder, write_json  # noqa: E402
from vidmem_model.machine import describe_device, versions  # noqa: E402
from vidmem_model.show.plots import plots_missing  # noqa: E402
from vidmem_model.train.curve import read_curve  # noqa: E402
from vidmem_model.train.distributed import Interrupted  # noqa: E402
from vidmem_model.train.run import CURVE, SPEED  # noqa: E402
from vidmem_model.vae import load_vae  # noqa: E402

REPORT, CURVES, PICTURE, STATE = "train.json", "curves.png", "held_out.png", "state.json"
# Shares of a call's time, and the share of the final measuring and writing.
SHARES = {"vae": 0.25, "memory": 0.5, "continuation": 0.25}
_RESERVED = 0.08
_POINTS = 300  # of a curve in the report


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for the results; may contain earlier ones")
    parser.add_argument("--minutes", type=float, default=4.0, help="time limit of this call")
    parser.add_argument("--bundle", type=Path, default=train_stages.BUNDLE, help="made by train_bundle.py")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "gpu_train", help="folder of the runs, which stays on this machine"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--preset", choices=("demo", "tiny"), default="demo")
    parser.add_argument("--steps", type=int, help="steps of each stage, over all rounds")
    parser.add_argument("--batch", type=int, default=32, help="samples per step")
    parser.add_argument("--no-graph", action="store_true", help="launch the ops of a step one by one")
    parser.add_argument("--join", type=Path, metavar="OUT", help="join the models in OUT, in the folder of -o")
    parser.add_argument("-o", "--output", type=Path, help="with --join")
    given = parser.parse_args(arguments)
    if (given.join is None) == (given.out is None) or (given.join is None) != (given.output is None):
        parser.error("give OUT, or --join OUT -o FOLDER")
    return given


def main(arguments: list[str] | None = None) -> int:
    """Trains, or joins models; returns the exit code."""
    began = time.monotonic()
    given = parse(arguments)
    try:
        if given.join is not None:
            train_pieces.join(read_report(given.join)["pieces"], given.join, given.output)
            print(f"{given.output}: {', '.join(sorted(path.name for path in given.output.iterdir()))}")
            return 0
        return train(given, began)
    except Interrupted as stop:
        print(f"gpu_train: stopped after step {stop.step}; the same command goes on from there", file=sys.stderr)
        return 128 + stop.signal
    except UserError as error:
        print(f"gpu_train: {error}", file=sys.stderr)
        return 2


def train(given: argparse.Namespace, began: float) -> int:
    """Runs a round, or the rest of one."""
    if not given.bundle.is_file():
        raise UserError(
            f"{given.bundle}: no such file; make it by `python benchmarks/train_bundle.py -o {given.bundle}`"
        )
    make_folder(given.out)
    given.work.mkdir(parents=True, exist_ok=True)
    plan = Plan(given.preset, given.bundle, given.work, given.device, given.steps, given.batch, not given.no_graph)
    device = torch.device(given.device)
    state = resume(given, plan)
    if set(STAGES) <= set(state["done"]):
        state |= {"round": state["round"] + 1, "done": []}
    model = plan.config("memory").model
    held_out = HeldOut(plan.data, model, load_vae(model.vae), plan.config("continuation").sampling)
    gemm = gemm_rate(device) if device.type == "cuda" else None
    for stage in STAGES:
        folder = plan.folder(stage)
        if stage not in state["done"]:
            left = 60 * given.minutes * (1 - _RESERVED) - (time.monotonic() - began)
            waiting = [each for each in STAGES if each not in state["done"]]
            seconds = max(1.0, left * SHARES[stage] / sum(SHARES[each] for each in waiting))
            print(f"{stage}: {seconds:.0f} s from step {plan.steps_done(stage)}", flush=True)
            if stage in state["stages"] and plan.complete(stage):
                state["stages"][stage]["steps"] = 2 * [plan.steps_done(stage)]
            else:
                state["stages"][stage] = run_stage(plan, stage, seconds, gemm)
            state["done"].append(stage)
            state["stages"][stage]["held_out"] = measure(held_out, stage, plan, device)
            state["rounds"].append(summary(state, stage))
            write_json(given.work / STATE, state)
            write_out(given, plan, state, held_out, began)
        elif stage != STAGES[-1]:  # only for the picture
            measure(held_out, stage, plan, device)
        print(f"{stage}: {json.dumps(summary(state, stage))} in {folder.name}/", flush=True)
    return 0


def resume(given: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """Restores the state of the local rounds, or that of OUT if it is further; prepares the folders of the runs."""
    here = given.work / STATE
    state = json.loads(here.read_text()) if here.is_file() else {"round": 1, "done": [], "stages": {}, "rounds": []}
    steps = sum(plan.steps_done(stage) for stage in STAGES)
    if not (given.out / REPORT).is_file():
        return state
    report = read_report(given.out)
    if report["preset"] != plan.preset:
        raise UserError(f"{given.out}: holds a training of preset {report['preset']}, this one is of {plan.preset}")
    theirs = sum(each["steps"][1] for each in report["stages"].values())
    if theirs <= steps:
        return state
    print(f"going on from {given.out}: {theirs} steps there, {steps} here", flush=True)
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        train_pieces.join(report["pieces"], given.out, Path(scratch))
        for stage, each in report["stages"].items():
            plan.begin_with(stage, each["steps"][1], Path(scratch))
    state = {key: report[key] for key in ("round", "done", "stages", "rounds")}
    write_json(here, state)
    return state


def run_stage(plan: Plan, stage: str, seconds: float, gemm: float | None) -> dict[str, Any]:
    """Trains a stage for the given seconds; returns its entry for the report."""
    began, before = time.monotonic(), plan.steps_done(stage)
    with gpu_use(plan.device) as percent:
        plan.train(stage, seconds)
    wall = time.monotonic() - began
    speed = json.loads((plan.folder(stage) / SPEED).read_text())
    rows = read_curve(plan.folder(stage) / CURVE)
    every = -(-len(rows) // _POINTS)
    parts = [rows[i : i + every] for i in range(0, len(rows), every)]
    reached = speed["flops_per_second"]
    return {
        "steps": [before, plan.steps_done(stage)],
        "seconds": round(wall, 1),
        **{key: speed[key] for key in ("steps_per_second", "flops_per_step", "flops_per_second")},
        **{key: speed[key] for key in ("precision", "cuda_graph")},
        "share_of_gemm_rate": reached / gemm if reached and gemm else None,
        "gpu_busy_percent": round(statistics.fmean(percent), 1) if percent else None,
        "curve": [[part[-1]["step"], round(statistics.fmean(row["loss"] for row in part), 5)] for part in parts],
    }


def measure(held_out: HeldOut, stage: str, plan: Plan, device: torch.device) -> dict[str, float] | None:
    """PSNR of a stage on held-out film; None if the bundle has none of that length."""
    if not held_out.pieces:
        return None
    if stage == "vae":
        config = plan.config("vae").model.vae
        return held_out.vae(load_vae(config, plan.vae_file), device)
    return getattr(held_out, stage)(plan.folder(stage), device)


def summary(state: dict[str, Any], stage: str) -> dict[str, Any]:
    """The report line of a stage and round."""
    each = state["stages"][stage]
    psnr = each["held_out"] and round(each["held_out"]["psnr"], 2)
    per_second = each["steps_per_second"] and round(each["steps_per_second"], 2)
    return {"round": state["round"], "stage": stage, "steps": each["steps"], "per_second": per_second, "psnr": psnr}


def write_out(given: argparse.Namespace, plan: Plan, state: dict[str, Any], held_out: HeldOut, began: float) -> None:
    """Writes the report, the weights so far, the curves and the picture to OUT."""
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        pieces = train_pieces.split(plan.export(state["stages"], Path(scratch)), given.out)
    if plots_missing() is None:
        train_stages.write_curves(given.out / CURVES, {stage: each["curve"] for stage, each in state["stages"].items()})
    if held_out.pictures:
        held_out.write_picture(given.out / PICTURE)
    report = {
        "format": "vidmem.gpu_train",
        "version": 1,
        "preset": plan.preset,
        "batch": plan.batch,
        "bundle_sha256": hashlib.sha256(given.bundle.read_bytes()).hexdigest(),
        "minutes": given.minutes,
        "seconds": round(time.monotonic() - began, 1),
        **state,
        "held_out": held_out.describe(),
        "device": describe_device(given.device),
        "versions": versions(),
        "pieces": pieces,
    }
    write_json(given.out / REPORT, report)
    train_pieces.remove_others(pieces, given.out)


def read_report(out: Path) -> dict[str, Any]:
    """Reads the report in a folder.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        report = json.loads((out / REPORT).read_text())
        if report["format"] != "vidmem.gpu_train" or report["version"] != 1:
            raise ValueError("of another format")
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{out / REPORT}: cannot be read as the report of a training ({error})") from error


def gemm_rate(device: torch.device) -> float:
    """FLOP/s of a large bfloat16 matrix product, as measured by the benchmarks."""
    rates = timing.measure_rates(timing.CudaClock(device), device, {"bfloat16": torch.bfloat16})
    return rates.flops_per_second["bfloat16"]


@contextmanager
def gpu_use(device: str) -> Iterator[list[float]]:
    """Collects, twice a second, the percentage of time that the GPU was busy, if the driver reports it."""
    percent: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            try:
                percent.append(float(torch.cuda.utilization()))
            except Exception:  # no NVML, or it does not answer
                return

    thread = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        thread.start()
    try:
        yield percent
    finally:
        stop.set()
        if device == "cuda":
            thread.join()


if __name__ == "__main__":
    sys.exit(main())
