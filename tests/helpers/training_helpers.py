"""A tiny training run on synthetic latents, also as a program: FOLDER STEPS KILL_AT EVERY [linear]."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import torch

from vidmem_model.model.config import PRESETS
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.train.blocks import Block
from vidmem_model.train.config import TrainConfig
from vidmem_model.train.distributed import processes
from vidmem_model.train.latents import Latents
from vidmem_model.train.linear_start import start_linearly
from vidmem_model.train.loop import fit
from vidmem_model.train.retrieval import FrameQueries, QueryConfig
from vidmem_model.train.run import run_settings
from vidmem_model.video.films import Caption

MODEL = PRESETS["tiny"]
# The same with all that the linear start sets.
LINEAR = dataclasses.replace(
    MODEL,
    encoders=(dataclasses.replace(MODEL.encoders[0], shortcut=48),),
    dit=dataclasses.replace(MODEL.dit, unfold=32, prediction="sample"),
)
BOX = MODEL.encoders[0].compression
QUERIES = QueryConfig(history=8, queries=2)
TRAIN = TrainConfig(
    steps=12,
    batch=4,
    lr=3e-3,
    muon_lr=3e-3,
    warmup_steps=3,
    checkpoint_every=4,
    log_every=5,
    ema_decay=0.9,
    threads=1,
    device="cpu",
)


def block(length, seed, split="train", start=0.0):
    """Latents in which every frame is another, and low-resolution latents for MODEL's compression."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(8, length, 4, 8, generator=generator)
    low = torch.randn(8, length // BOX.time, 2, 4, generator=generator)
    return Block(Path("film"), start, 4 * length, 1, split, False, 1.0, latents.half(), {BOX: low.half()})


def latents():
    """Three blocks of half a second a latent frame, with captions for the first and the last."""
    captions = (Caption(0, 8, "a rabbit"), Caption(17, 30, "a squirrel"))
    return Latents((block(16, 0), block(11, 1, start=8.0), block(20, 2, start=16.0)), 0.5, captions)


def train(folder, steps=12, kill_at=None, restart=False, linear=False, **changes):
    """Train, with the learning rates of 12 steps; SIGKILL comes in the middle of step `kill_at`, if given."""
    config = dataclasses.replace(TRAIN, **changes)
    queries = FrameQueries(latents(), MODEL.encoders, QUERIES)

    def fresh():
        model = MemoryModel(LINEAR if linear else MODEL)
        if linear:
            start_linearly(model, lambda: queries.clean(8))
        return model

    def batches(step, samples):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return queries(step, samples)

    config = dataclasses.replace(config, steps=steps)
    with processes(config) as device:
        return fit(fresh, batches, config, folder, run_settings(config), device, restart)


def curve(folder):
    """Rows of the curve, without the seconds."""
    return [line.rsplit(",", 1)[0] for line in (folder / "curve.csv").read_text().splitlines()]


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[2:5]]
    train(Path(sys.argv[1]), *numbers[:2], linear=sys.argv[5:] == ["linear"], checkpoint_every=numbers[2])
