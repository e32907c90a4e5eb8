"""The methods dct and merge: known values, sizes, budgets, positions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vidmem_kernels import MemoryBank
from vidmem_model.errors import UserError
from vidmem_model.evaluate.metrics import psnr
from vidmem_model.memory import METHODS
from vidmem_model.memory.compressor import compress
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.file import Memory
from vidmem_model.memory.method import EncodedClip, box_grid, encoded
from vidmem_model.model.config import Compression
from vidmem_model.vae import DCTCodec
from vidmem_model.video import Clip

UNTRAINED = ["dct", "merge"]


def smooth_clip(frames, height, width):
    """Slow waves that move: low frequencies in every box."""
    t, y, x = (
        torch.arange(n).view(s) for n, s in zip((frames, height, width), ((-1, 1, 1), (-1, 1), (-1,)), strict=True)
    )
    waves = [torch.sin(y / 40 + t / 30 + c) + torch.cos(x / 50 - t / 25 + 2 * c) for c in range(3)]
    return (torch.stack(waves, -1) * 60 + 128).round().clamp(0, 255).to(torch.uint8)


def noise_clip(frames, height, width):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, generator=generator)


def run(clip, progress=None, dtype=torch.float32, **config):
    config = CompressorConfig(**{"dtype": "float32", **config})
    latents = DCTCodec().encode_chunks(clip.split(5), dtype)
    clip = EncodedClip(latents, DCTCodec(), tuple(clip.shape[:3]), 24.0, Path())
    return compress(clip, config, progress=progress)


def bank_of(memory):
    bank = MemoryBank(memory.tokens.shape[1])
    bank.append(memory.tokens, memory.positions)
    bank.metadata, bank.extras = memory.meta, memory.extras
    return bank


def reconstruct(bank, frame):
    return METHODS[bank.metadata["method"]].load().read(bank, frame)


def mean_psnr(clip, memory):
    bank = bank_of(memory)
    pairs = [(clip[k], reconstruct(bank, k)) for k in range(len(clip))]
    assert all(read.dtype == torch.uint8 and read.shape == clip.shape[1:] for _, read in pairs)
    error = [((a.double() - b.double()) ** 2).mean().item() for a, b in pairs]
    return math.inf if not sum(error) else 10 * math.log10(255**2 / (sum(error) / len(error)))


# dct


def test_boxes_of_twenty_seconds():
    grid, box = box_grid((480, 480, 832), (4, 8, 8), Compression(2, 4, 4))
    assert grid == (60, 7, 13) and math.prod(grid) == 5460 and box == (8, 64, 64)
    assert box_grid((9, 20, 130), (4, 8, 8), Compression(2, 4, 4))[0] == (2, 1, 2)
    assert box_grid((480, 480, 832), (4, 8, 8), Compression(1, 2, 2)) == ((120, 15, 26), (4, 32, 32))


def test_dct_row_is_the_transform_of_its_box():
    scipy_fft = pytest.importorskip("scipy.fft")
    clip = noise_clip(16, 64, 128)
    memory = run(clip, channels=500)
    assert memory.tokens.shape == (4, 500)
    rows = (memory.tokens * memory.extras["scale"]).double()
    table = memory.extras["table"].long()
    assert table.unique().numel() == 500
    for row, (t, x) in zip(rows, itertools.product(range(2), range(2)), strict=True):
        box = clip[8 * t : 8 * t + 8, :, 64 * x : 64 * x + 64].permute(3, 0, 1, 2)
        spectrum = scipy_fft.dctn((box.double() / 127.5 - 1).numpy(), norm="ortho").reshape(-1)
        torch.testing.assert_close(row, torch.from_numpy(spectrum)[table], atol=1e-4, rtol=1e-4)


def test_dct_keeps_the_strongest_of_the_low_frequencies():
    scipy_fft = pytest.importorskip("scipy.fft")
    clip = smooth_clip(8, 64, 64)
    memory = run(clip, channels=200)
    box = (clip.double() / 127.5 - 1).permute(3, 0, 1, 2).numpy()
    energy = torch.from_numpy(scipy_fft.dctn(box, norm="ortho")).flatten().square()
    kept = energy[memory.extras["table"].long()]
    assert (kept.diff() <= 1e-6 * kept[0]).all()
    # The 800 lowest frequencies are looked at; of slow waves they miss next to nothing.
    best = energy.sort(descending=True).values[:200].sum()
    assert kept.sum() > (1 - 1e-4) * best


def test_dct_of_slow_waves_is_near_exact():
    clip = smooth_clip(16, 64, 128)
    assert mean_psnr(clip, run(clip)) > 48


def test_dct_with_every_coefficient_is_exact():
    clip = noise_clip(8, 64, 64)
    assert mean_psnr(clip, run(clip, compression=Compression(1, 2, 2), channels=3 * 4 * 32 * 32)) == math.inf


@pytest.mark.parametrize("size", [(13, 150, 203), (1, 64, 64), (3, 21, 35), (9, 37, 200), (8, 480 // 4, 64)])
def test_dct_of_odd_sizes(size):
    clip = smooth_clip(*size)
    memory = run(clip)
    (grid, _) = box_grid(size, (4, 8, 8), Compression(2, 4, 4))
    assert memory.tokens.shape == (math.prod(grid), 3072)
    assert mean_psnr(clip, memory) > 40


def test_dct_resampling_loses_only_the_finest_rows():
    """96 rows become one box of 64: a wave of 20 periods survives, one of 40 cannot."""
    y = torch.arange(96).view(1, -1, 1, 1)
    for periods, survives in ((20, True), (40, False)):
        wave = 128 + 60 * torch.cos(math.pi * (y + 0.5) * 2 * periods / 96)
        clip = wave.round().to(torch.uint8).expand(8, 96, 64, 3)
        quality = mean_psnr(clip, run(clip))
        assert quality > 45 if survives else quality < 20


def test_dct_positions_are_the_midpoints_of_the_boxes():
    memory = run(smooth_clip(20, 128, 192))
    assert memory.positions.shape == (3 * 2 * 3, 3)
    # 8 x 12 patch tokens in boxes of 4 x 4 x 2: the first covers indices 0 to 3 and moments 0 and 1.
    assert memory.positions[0].tolist() == [0.5, 1.5, 1.5]
    assert memory.positions[-1].tolist() == [4.5, 5.5, 9.5]
    # 30 rows of tokens in 7 boxes: a box spans 30/7 of them.
    tall = run(smooth_clip(1, 480, 64))
    torch.testing.assert_close(tall.positions[:, 1], (torch.arange(7) + 0.5) * 30 / 7 - 0.5)


def test_dct_refuses_more_channels_than_a_box_has():
    with pytest.raises(UserError, match=r"channels must be in \[1, 3072\]") as error:
        run(smooth_clip(4, 16, 16), compression=Compression(1, 1, 1), channels=3073)
    assert "\n" not in str(error.value)


# merge


def test_merge_without_merging_is_exact():
    clip = noise_clip(6, 32, 48)
    memory = run(clip, method="merge", budget=2 * 2 * 3)
    assert memory.extras["row_of"].tolist() == list(range(12))
    assert mean_psnr(clip, memory) == math.inf
    expected = torch.cartesian_prod(torch.arange(2.0), torch.arange(2.0), torch.arange(3.0))
    assert torch.equal(memory.positions, expected)


@pytest.mark.parametrize("budget", [1, 2, 5, 9, 31, 96])
def test_merge_meets_its_budget_and_rows_are_means(budget):
    clip = noise_clip(16, 64, 96)
    memory = run(clip, method="merge", budget=budget)
    assert memory.tokens.shape == (budget, 3072)
    whole = run(clip, method="merge", budget=96)
    tokens = whole.tokens * whole.extras["scale"]
    rows = memory.tokens * memory.extras["scale"]
    row_of = memory.extras["row_of"].long()
    assert row_of.shape == (96,) and row_of.min() >= 0 and row_of.max() < budget
    for row in row_of.unique():
        members = row_of == row
        torch.testing.assert_close(rows[row], tokens[members].mean(0), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(memory.positions[row], whole.positions[members].mean(0))


def test_merge_gives_every_token_to_the_nearest_row():
    clip = smooth_clip(16, 64, 96)
    memory, whole = (run(clip, method="merge", budget=b) for b in (6, 96))
    tokens = (whole.tokens * whole.extras["scale"])[:, :64]
    row_of = memory.extras["row_of"].long()
    assert row_of.unique().numel() == 6
    # Means moved a little after the assignment: still most tokens are nearest to their own.
    rows = (memory.tokens * memory.extras["scale"])[:, :64]
    assert (torch.cdist(tokens, rows).argmin(1) == row_of).float().mean() > 0.8


def test_equal_tokens_merge_without_loss():
    """Four flat colours, one a quarter: four rows are enough."""
    clip = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    clip[:, :32, :32] = torch.tensor([200, 30, 60], dtype=torch.uint8)
    clip[:, 32:, :32] = torch.tensor([20, 130, 60], dtype=torch.uint8)
    clip[:, 32:, 32:] = torch.tensor([20, 30, 250], dtype=torch.uint8)
    assert mean_psnr(clip, run(clip, method="merge", budget=4)) == math.inf


def test_dark_and_bright_do_not_merge():
    """Cosine similarity alone takes grey levels of one sign for equal; distance tells them apart."""
    clip = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    levels = torch.tensor([140, 170, 200, 250], dtype=torch.uint8)
    clip[:] = levels.repeat_interleave(16).view(1, 1, 64, 1)
    # 12 of the 32 tokens have an equal among the destinations.
    assert mean_psnr(clip, run(clip, method="merge", budget=20)) == math.inf


def test_more_rows_read_back_better():
    clip = torch.cat([smooth_clip(8, 64, 96), smooth_clip(8, 64, 96).flip(2)])
    quality = [mean_psnr(clip, run(clip, method="merge", budget=b)) for b in (3, 12, 48, 96)]
    assert quality == sorted(quality) and quality[-1] == math.inf


@pytest.mark.parametrize("size", [(13, 50, 203), (1, 16, 16), (3, 21, 35)])
def test_merge_of_odd_sizes(size):
    clip = smooth_clip(*size)
    memory = run(clip, method="merge", compression=Compression(1, 1, 1))
    assert mean_psnr(clip, memory) > 20
    tokens = -(-size[0] // 4) * -(-size[1] // 16) * -(-size[2] // 16)
    assert mean_psnr(clip, run(clip, method="merge", budget=tokens)) == math.inf


def test_impossible_budget_says_what_is_possible():
    with pytest.raises(UserError, match=r"budget asks for 97; give a budget from 1 to 96") as error:
        run(noise_clip(16, 64, 96), method="merge", budget=97)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", UNTRAINED)
def test_missing_latents_are_noticed(method):
    config = CompressorConfig(method=method, compression=Compression(1, 2, 2))
    clip = encoded(Clip(noise_clip(8, 32, 32), 24.0, Path(), None))
    whole, got = {"dct": ("3 boxes in time", 2), "merge": ("12 tokens", 8)}[method]
    with pytest.raises(ValueError, match=rf"latents must hold {whole} for \(12, 32, 32\), got {got}"):
        compress(replace(clip, size=(12, 32, 32)), config)
    with pytest.raises(ValueError, match=rf"latents must hold {whole} for \(12, 32, 32\), got 0"):
        compress(replace(clip, size=(12, 32, 32)), config)  # a stream that has been read


# both


@pytest.mark.parametrize("method", UNTRAINED)
def test_channels_have_unit_mean_square(method):
    memory = run(noise_clip(16, 64, 128), method=method)
    mean_square = memory.tokens.square().mean(0)
    torch.testing.assert_close(mean_square, torch.ones_like(mean_square), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", UNTRAINED)
def test_silent_channels_stay_zero(method):
    black = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    memory = run(black, method=method)
    assert memory.tokens.isfinite().all()
    assert mean_psnr(black, memory) == math.inf


@pytest.mark.parametrize("method", UNTRAINED)
def test_half_precision_latents_cost_little(method):
    clip = smooth_clip(16, 64, 128)
    exact = mean_psnr(clip, run(clip, method=method))
    assert mean_psnr(clip, run(clip, method=method, dtype=torch.float16)) == pytest.approx(exact, abs=1.0)


def test_at_equal_rows_dct_reads_back_better_than_merge():
    clip = (smooth_clip(16, 128, 128).int() + noise_clip(16, 128, 128) // 16).clamp(0, 255).to(torch.uint8)
    dct, merge = run(clip), run(clip, method="merge")
    assert dct.tokens.shape == merge.tokens.shape == (8, 3072)
    assert mean_psnr(clip, dct) > mean_psnr(clip, merge) + 3


@pytest.mark.parametrize("method", UNTRAINED)
def test_progress_counts_up_to_the_total(method):
    calls = []
    run(noise_clip(13, 64, 64), method=method, progress=lambda *c: calls.append(c))
    names, done, totals = zip(*calls, strict=True)
    assert set(names) == {f"compress, {method}"}
    assert list(done) == sorted(done) and done[-1] == totals[0] and set(totals) == {totals[0]}


@pytest.mark.parametrize("method", UNTRAINED)
def test_frames_that_are_not_there_are_refused(method):
    memory = Memory(bank_of(run(noise_clip(5, 16, 16), method=method)), method, 5, 16, 16, 24.0, "")
    for frame in (-1, 5):
        with pytest.raises(UserError, match="give a frame from 0 to 4"):
            memory.retrieve(frame)


class CountingBank:
    """A bank that notes which rows are read."""

    def __init__(self, bank):
        self.metadata, self.extras, self.bank, self.read = bank.metadata, bank.extras, bank, []

    def gather(self, index, out_dtype=None):
        self.read += index.tolist()
        return self.bank.gather(index, out_dtype)


def test_a_frame_reads_only_its_rows():
    clip = noise_clip(32, 128, 64)
    bank = CountingBank(bank_of(run(clip)))
    reconstruct(bank, 17)
    assert bank.read == [4, 5]
    merged = run(clip, method="merge", budget=40)
    bank = CountingBank(bank_of(merged))
    reconstruct(bank, 17)
    assert bank.read == merged.extras["row_of"][4 * 32 : 5 * 32].long().unique().tolist()


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": "wavelet"},
        {"compression": (2, 4, 4)},
        {"compression": 4},
        {"channels": 0},
        {"budget": 100},
        {"method": "merge", "budget": 0},
        {"dtype": "float64"},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match="CompressorConfig: .*, got "):
        CompressorConfig(**wrong)


def test_psnr_of_the_module_agrees_with_the_test():
    clip = smooth_clip(1, 64, 64)
    memory = run(clip, channels=40)
    assert mean_psnr(clip, memory) == pytest.approx(psnr(clip[0], reconstruct(bank_of(memory), 0)))
