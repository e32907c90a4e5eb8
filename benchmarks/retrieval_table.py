#!/usr/bin/env python3
"""Trains every row of the retrieval table and evaluates all: the rows of arXiv 2512.23851, at a small size.

A row is a base recipe of `vidmem pretrain` with other memory encoders. Every run is a separate process with one thread.
An interrupt loses nothing: the same command continues, without training finished models or evaluating them again.
"""

from __future__ import annotations

import argparse
import copy
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from vidmem_model.model.config import Compression

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.page_parts import with_part  # noqa: E402

PAGE = ROOT / "docs" / "retrieval.md"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Row:
    """A row: a memory encoder, and the seeds that it is trained with."""

    branches: str
    compression: Compression
    seeds: tuple[int, ...]

    def runs(self) -> list[tuple[str, int]]:
        """Names of the folders of the runs, and their seeds."""
        return [(f"{self.branches}-{self.compression}-seed{seed}", seed) for seed in self.seeds]


ROWS = (
    Row("patchifier", Compression(2, 4, 4), (0, 1, 2)),
    Row("lr", Compression(2, 4, 4), (0, 1, 2)),
    Row("hr", Compression(2, 4, 4), (0, 1, 2)),
    Row("both", Compression(2, 4, 4), (0, 1, 2)),
    Row("both", Compression(2, 2, 2), (0,)),
    Row("both", Compression(1, 2, 2), (0,)),
)


def write_recipes(base: Path, out: Path, rows: tuple[Row, ...]) -> list[Path]:
    """Writes the recipe of every run, first seeds first, so that a first table is available soon.

    Args:
        base: recipe that all runs share.
        out: folder of the table.
        rows: rows of the table.

    Returns:
        The recipes.

    Raises:
        SystemExit: the base is not a recipe, or an existing recipe differs.
    """
    recipe = yaml.safe_load(base.read_text(encoding="utf-8"))
    if not isinstance(recipe, dict) or "model" not in recipe:
        raise SystemExit(f"{base}: is not a recipe of vidmem pretrain: it has no model")
    captions = (recipe.get("data") or {}).get("captions")
    if captions and (base.parent / captions).is_file():
        recipe["data"]["captions"] = str((base.parent / captions).resolve())
    runs = [(seed, name, row) for row in rows for name, seed in row.runs()]
    written = []
    for seed, name, row in sorted(runs, key=lambda run: run[0]):
        mine = copy.deepcopy(recipe)
        model = {"preset": mine["model"]} if isinstance(mine["model"], str) else mine["model"]
        encoder = dict((model.get("encoders") or [{}])[0], branches=row.branches, compression=asdict(row.compression))
        encoder.pop("rate", None)  # the earlier name of compression
        mine["model"] = {**model, "encoders": [encoder]}
        mine["output"] = str(out / name)
        mine["optimisation"] = {**mine.get("optimisation", {}), "seed": seed, "threads": 1}
        text = yaml.safe_dump(mine, sort_keys=False)
        path = out / f"{name}.yaml"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise SystemExit(f"{path}: differs from {base}; delete it and {out / name}, or choose another --out")
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
        written.append(path)
    return written


def train_all(recipes: list[Path], jobs: int) -> None:
    """Trains the models that do not exist yet, `jobs` at a time.

    Raises:
        SystemExit: a run failed; the others were stopped with a checkpoint.
    """
    waiting = [recipe for recipe in recipes if not (recipe.with_suffix("") / MODEL).is_file()]
    running: dict[Path, subprocess.Popen] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                recipe = waiting.pop(0)
                command = [sys.executable, "-m", "vidmem_model", "pretrain", str(recipe)]
                with recipe.with_suffix(".log").open("ab") as log:
                    running[recipe] = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
                print(f"training {recipe.stem}, {len(waiting)} more to train", flush=True)
            time.sleep(1)
            for recipe in [r for r, process in running.items() if process.poll() is not None]:
                code = running.pop(recipe).returncode
                if code:
                    raise SystemExit(f"{recipe}: training failed with code {code}; see {recipe.with_suffix('.log')}")
                print(f"trained {recipe.stem}", flush=True)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def evaluate(out: Path, options: list[str]) -> None:
    """Evaluates all models in the folder."""
    command = [sys.executable, "-m", "vidmem_model", "evaluate", "retrieval", "--table", str(out)]
    command += ["--json", str(out / "retrieval.json"), "--markdown", str(out / "retrieval.md")]
    command += ["--plot", str(out / "retrieval.png"), *options]
    subprocess.run(command, check=True)
    command = [sys.executable, "-m", "vidmem_model", "plot", str(out / "retrieval.json"), "--positions"]
    subprocess.run([*command, "-o", str(out / "retrieval_positions.png")], check=True)


def fill_page(page: Path, made: str) -> None:
    """Replaces the table between the marks of the page, atomically."""
    try:
        text = with_part(page.read_text(encoding="utf-8"), "retrieval", made)
    except ValueError as error:
        raise SystemExit(f"{page}: {error}") from error
    part = page.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, page)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Other options are passed to vidmem evaluate retrieval."
    )
    parser.add_argument("base", type=Path, help="recipe of vidmem pretrain that all rows share")
    parser.add_argument("--out", type=Path, required=True, help="folder of recipes, runs and results")
    parser.add_argument("--jobs", type=int, default=2, help="concurrent runs, of one thread each")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, help="page of the table, JSON and plot")
    given, options = parser.parse_known_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    train_all(write_recipes(given.base, given.out, ROWS), given.jobs)
    evaluate(given.out, options)
    if given.page:
        fill_page(given.page, (given.out / "retrieval.md").read_text(encoding="utf-8"))
        for name in ("retrieval.json", "retrieval.png", "retrieval_positions.png"):
            shutil.copyfile(given.out / name, given.page.parent / name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; run the same command to continue")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
