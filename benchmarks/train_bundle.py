"""Makes the bundle that `gpu_train.sh` trains from: a film's frames at the demo model's size, in at most 8 MiB.

    python benchmarks/train_bundle.py [FILM ...] [-o runs/train_bundle.safetensors]

The default film is the sample film, cut and split as in the recipes of the shipped models. Making the bundle needs
PyAV; reading it does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

from vidmem_model.errors import UserError  # noqa: E402
from vidmem_model.files import outputs  # noqa: E402
from vidmem_model.model.config import PRESETS  # noqa: E402
from vidmem_model.train.blocks import cut_films  # noqa: E402
from vidmem_model.train.bundle import write_bundle  # noqa: E402
from vidmem_model.train.recipe import read_pretrain_vae  # noqa: E402
from vidmem_model.vae.causal import CausalVAE  # noqa: E402
from vidmem_model.video.films import DataConfig, film_paths  # noqa: E402

BUNDLE = ROOT / "runs" / "train_bundle.safetensors"


def main(arguments: list[str] | None = None) -> int:
    """Makes the bundle; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("films", nargs="*", help="videos; by default the sample film")
    parser.add_argument("-o", "--output", type=Path, default=BUNDLE, help="file *.safetensors to write")
    parser.add_argument(
        "--preset", default="demo", choices=sorted(PRESETS), help="model that sets the frame size and rate"
    )
    parser.add_argument(
        "--seconds", type=float, help="seconds of each film; fewer seconds are stored at higher quality"
    )
    parser.add_argument("--block-seconds", type=float, help="approximate length of a block of scenes")
    parser.add_argument("--mib", type=float, default=8.0, help="maximum size of the file in MiB")
    given = parser.parse_args(arguments)
    data = DataConfig(videos=tuple(given.films)) if given.films else read_pretrain_vae(Path("vae")).data
    if given.seconds is not None:
        data = dataclasses.replace(data, seconds=given.seconds, test=())
    if given.block_seconds is not None:
        data = dataclasses.replace(data, block_seconds=given.block_seconds)
    model = PRESETS[given.preset]
    try:
        if given.output == BUNDLE:
            BUNDLE.parent.mkdir(exist_ok=True)
        outputs([Path(film) for film in given.films], [given.output])
        blocks = cut_films(data, film_paths(data), model, CausalVAE(model.vae))
        made = write_bundle(given.output, blocks, model, int(given.mib * 2**20))
    except UserError as error:
        print(f"train_bundle: {error}", file=sys.stderr)
        return 2
    size = given.output.stat().st_size / 2**20
    print(f"{given.output}: {made['frames']} frames, {size:.2f} MiB, {made['psnr']:.1f} dB against the film")
    return 0


if __name__ == "__main__":
    sys.exit(main())
