"""The shipped checkpoints work, and take at most 30 MB."""

import pytest
import torch

from vidmem_model.evaluate.metrics import psnr
from vidmem_model.generation.generator import GenerateConfig, SegmentGenerator
from vidmem_model.memory.learned import TrainedModel
from vidmem_model.model.file import load_model
from vidmem_model.shipped import CHECKPOINTS, CONTINUING_MODEL, shipped
from vidmem_model.vae import load_vae


@pytest.fixture(scope="module")
def frames():
    """A disc that moves to the right over a meadow under a sky: uint8 (32, 128, 192, 3)."""
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(192.0), indexing="ij")
    sky = torch.stack([90 + rows, 130 + rows / 2, 220 - rows / 4], -1)
    meadow = torch.stack([60 + columns / 4, 120 + rows / 4, 40 + rows / 8], -1)
    still = torch.where(rows[..., None] < 70, sky, meadow)
    shown = []
    for t in range(32):
        inside = (rows - 64).square() + (columns - 30 - 4 * t).square() < 24**2
        shown.append(torch.where(inside[..., None], torch.tensor([200.0, 190.0, 180.0]), still))
    return torch.stack(shown).to(torch.uint8)


def test_size():
    assert sum(file.stat().st_size for file in CHECKPOINTS.iterdir()) <= 30e6


def test_stage_one_gives_frames_back(frames):
    """The frame asked for, or its neighbour, and better than the mean of the history: the disc is where it was."""
    memory = TrainedModel.load(shipped())
    encoded = memory.encode(frames)
    remembered = memory.remember(encoded)
    assert remembered.tokens.shape[1] == 4 * 2 * 3  # boxes of 8 frames x 64 x 64 pixels
    made = memory.decode(memory.retrieve(remembered, list(range(8)), steps=2), tuple(frames.shape[:3]))
    mean = frames.float().mean(0).round().to(torch.uint8)
    for t in (3, 16, 29):
        assert psnr(made[t], frames[t]) > max(26.0, psnr(mean, frames[t]) + 3)
        assert abs(max(range(32), key=lambda i: psnr(made[t], frames[i])) - t) <= 1


def test_stage_two_goes_on_from_the_last_frame(frames):
    model = load_model(shipped(CONTINUING_MODEL))
    generator = SegmentGenerator(
        model, load_vae(model.config.vae, model.vae_weights), GenerateConfig(steps=2, segment=2)
    )
    generator.start_from(frames)
    tokens = generator.context[0]
    made = torch.cat(list(generator.take_in(generator.make("", 0, lambda done: None))))
    assert made.shape == (8, 128, 192, 3) and generator.context[0] == tokens + 6  # boxes of 64 x 64 x 8
    assert psnr(made[0], frames[-1]) > 22
    assert max(range(32), key=lambda i: psnr(made[0], frames[i])) >= 28  # in the last latent frame
