"""Two processes of torchrun use the samples of a single process, and get the same losses and weights."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import torch
from paths import HELPERS
from training_helpers import train

from vidmem_model.train.loop import read_curve

PROGRAM = HELPERS / "training_helpers.py"


@pytest.mark.sample(1)
@pytest.mark.parametrize("start", ["random", "linear"])
def test_two_processes_give_the_losses_of_one(start, tmp_path):
    """The second half of the run: two processes resume from the checkpoint of one."""
    single = tmp_path / "single"
    linear = start == "linear"
    train(single, steps=6, linear=linear, checkpoint_every=3)
    both = tmp_path / "both"
    shutil.copytree(single / "checkpoints" / "step-00000003", both / "checkpoints" / "step-00000003")
    shutil.copyfile(single / "curve.csv", both / "curve.csv")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ran = subprocess.run([*command, PROGRAM, both, "6", "-1", "3", start], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    ours, theirs = read_curve(both / "curve.csv"), read_curve(single / "curve.csv")
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5, 6]
    for row, other in zip(ours, theirs, strict=True):
        # The sums over a batch of 4 are taken as two sums of 2: a few roundings of float32.
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-6), row["step"]
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-5), row["step"]
    # One process goes on with what two have written: nothing is left to do, it reads their weights.
    mine, one = (train(folder, steps=6, linear=linear).state_dict() for folder in (both, single))
    for name, weight in one.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=2e-5, msg=name)
