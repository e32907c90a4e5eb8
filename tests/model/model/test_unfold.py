"""Unfolding of memory tokens, and the linear start of a training."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from gradient_helpers import same_gradients
from training_helpers import LINEAR, QUERIES, latents

from vidmem_model.model.config import Compression, ModelConfig
from vidmem_model.model.dit import DiT
from vidmem_model.model.encoder import History, MemoryTokens
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.model.rope import frame_positions
from vidmem_model.model.unfold import Unfold
from vidmem_model.train.linear_start import start_linearly
from vidmem_model.train.retrieval import FrameQueries
from vidmem_model.vae import patchify


def middles(grid, box, start=0):
    """Positions of the memory tokens of a grid (t, h, w) of boxes."""
    axes = [torch.arange(n, dtype=torch.float32) for n in grid]
    axes[0] += start
    return torch.cartesian_prod(*[(axis + 0.5) * n - 0.5 for axis, n in zip(axes, box, strict=True)])[None]


@pytest.mark.parametrize("box", [Compression(2, 4, 4), Compression(1, 2, 4), Compression(1, 1, 1)], ids=str)
def test_unfold_is_a_transposed_convolution(box):
    time, height, width = box
    unfold = Unfold(6, 5, box)
    tokens = torch.randn(2, 3 * 2 * 3, 6, requires_grad=True)
    places = frame_positions(torch.arange(3.0 * time).expand(2, -1), 2 * height, 3 * width)
    got = unfold(MemoryTokens(tokens, middles((3, 2, 3), box)), places)

    # Linear rows are ordered (t, h, w, channel); a transposed convolution's kernel is (D, channels, t, h, w).
    kernel = unfold.projection.weight.view(time, height, width, 5, 6).permute(4, 3, 0, 1, 2)
    grid = tokens.transpose(1, 2).unflatten(2, (3, 2, 3))
    expected = torch.nn.functional.conv_transpose3d(grid, kernel, stride=(time, height, width))
    bias = unfold.projection.bias.view(time, height, width, 5).permute(3, 0, 1, 2).repeat(1, 3, 2, 3)
    expected = (expected + bias).flatten(2).transpose(1, 2)
    same_gradients(unfold, got, expected, tokens)


def test_unfold_finds_boxes_by_position_and_reads_nothing_elsewhere():
    """Tokens in any order, of a memory that begins late, among those of another encoder; frames in any order."""
    box = Compression(2, 2, 2)
    unfold = Unfold(6, 4, box)
    tokens = torch.randn(1, 8, 6)
    memory = MemoryTokens(tokens, middles((2, 2, 2), box, start=3))  # frames 6 to 9
    frames = torch.tensor([[9.0, 5.0, 6.0, 10.0, -1.0]])
    places = frame_positions(frames, 6, 4)  # two rows of patch tokens are beyond the boxes
    got = unfold(memory, places).view(5, 6, 4, 4)
    assert got[0, :4].abs().min() > 0 and got[2, :4].abs().min() > 0
    assert got[[1, 4]].abs().max() == 0 and got[:, 4:].abs().max() == 0
    assert torch.equal(got[3], got[0])  # the frame after the last reads what the last does
    alone = unfold(memory, frame_positions(frames[:, :1], 4, 4)).view(4, 4, 4)
    assert torch.equal(alone, got[0, :4])

    other = MemoryTokens(torch.randn(1, 2, 6), middles((2, 1, 1), (2, 4, 4), start=3))
    order = torch.randperm(10)
    both = [torch.cat(pair, 1)[:, order] for pair in zip(memory, other, strict=True)]
    torch.testing.assert_close(unfold(MemoryTokens(*both), places).view(5, 6, 4, 4), got)
    nothing = MemoryTokens(tokens[:, :0], torch.zeros(1, 0, 3))
    assert torch.equal(unfold(nothing, places), torch.zeros(1, 120, 4))


def linear(branches="hr", dim=48, shortcut=48, **changes):
    """The tiny model with a linear memory of boxes."""
    encoder = dataclasses.replace(LINEAR.encoders[0], branches=branches, shortcut=shortcut)
    dit = dataclasses.replace(LINEAR.dit, dim=dim)
    return MemoryModel(dataclasses.replace(LINEAR, encoders=(encoder,), dit=dit, **changes))


def histories(model, count=60):
    """Histories whose boxes vary in a few dimensions most."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(8, 8, generator=generator) * torch.tensor([3.0, 2, 1, 0.5, 0.3, 0.2, 0.1, 0.1])[:, None]
    for _ in range(count):
        x = torch.randn(1, 4, 4, 8, 8, generator=generator) @ mixing + 0.5
        low = x.movedim(4, 1)[:, :, ::2, ::2, ::2]
        yield History(x.movedim(4, 1), [low if model.encoders[0].config.reads_low else None])


def answer(model, history, t=1.0):
    """The model's output for all frames of a history, from pure noise."""
    noise = torch.randn_like(history.latents)
    frames = torch.arange(float(history.latents.shape[2]))[None]
    with torch.no_grad():
        memory = model.remember(history)
        velocity = model.predict(noise, torch.full((1,), t), [""], memory=memory, frames=frames)
    return noise - t * velocity


def test_linear_start_answers_with_the_principal_components():
    """A box has 8 x 2 x 4 x 4 = 256 numbers and a token 48: the answer is the projection to 48 components."""
    model = linear()
    start_linearly(model, lambda: histories(model))
    encoder = model.encoders[0]
    boxes = torch.cat([encoder.boxes(history)[0] for history, _ in histories(model)]).double()
    centred = boxes - boxes.mean(0)
    *_, v = torch.linalg.svd(centred, full_matrices=False)
    missing = (centred - centred @ v[:48].T @ v[:48]).square().mean()
    assert 0.01 * centred.var() < missing < 0.9 * centred.var()
    errors = [(answer(model, each) - each.latents).square().mean() for each in histories(model)]
    assert torch.stack(errors).mean().item() == pytest.approx(missing.item(), rel=2e-3)
    tokens = torch.cat([model.remember(each).tokens for each in histories(model)])
    assert tokens.square().mean().item() == pytest.approx(1.0, rel=0.05)
    assert tokens.mean((0, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("shortcut", [16, 10, 30])
def test_linear_start_beside_low_resolution_tells_what_that_does_not(shortcut):
    """A low-resolution token takes 32 of the 48 directions of a token; components have the 16 others to themselves.

    The error is then that of the best linear memory there is: regression of the boxes on the 32 numbers,
    and principal components of what that leaves. With more than 16 the directions overlap, to no harm.
    """
    model = linear("both", shortcut=shortcut)
    start_linearly(model, lambda: histories(model))
    pairs = list(histories(model))
    boxes = torch.cat([model.encoders[0].boxes(history)[0] for history, _ in pairs]).double()
    low = torch.cat([patchify(low, 2)[0][0] for _, (low,) in pairs]).double()
    boxes, low = boxes - boxes.mean(0), low - low.mean(0)
    left = boxes - low @ torch.linalg.lstsq(low, boxes).solution
    *_, v = torch.linalg.svd(left, full_matrices=False)
    errors = torch.stack([(answer(model, each) - each.latents).square().mean() for each in pairs]).mean().item()
    missing = [(left - left @ v[:k].T @ v[:k]).square().mean().item() for k in (shortcut, min(shortcut, 16))]
    assert missing[1] < 0.8 * left.square().mean().item() < 0.8 * boxes.square().mean().item()
    if shortcut <= 16:
        assert errors == pytest.approx(missing[0], rel=5e-3)
    else:
        assert missing[0] < errors < 1.01 * missing[1]


@pytest.mark.parametrize("branches", ["patchifier", "both", "lr"])
def test_linear_start_of_other_encoders_is_the_best_reading_of_their_tokens(branches):
    """No linear map of the tokens answers better; as the error of least squares, it is uncorrelated with them."""
    model = linear(branches)
    start_linearly(model, lambda: histories(model))
    tokens, errors = [], []
    for history in histories(model):
        error = answer(model, history) - history.latents
        tokens.append(model.remember(history).tokens[0].detach())
        errors.append(model.encoders[0].boxes(error)[0])
    tokens, errors = torch.cat(tokens), torch.cat(errors)
    assert errors.mean(0).abs().max() < 1e-3
    products = (tokens - tokens.mean(0)).T @ errors / len(tokens)
    assert products.abs().max() < 2e-3 * errors.square().mean().sqrt() * tokens.square().mean().sqrt()


def test_linear_start_with_more_width_than_numbers_is_exact():
    model = linear("patchifier", dim=288)
    start_linearly(model, lambda: histories(model))
    history = next(histories(model))
    torch.testing.assert_close(answer(model, history), history.latents, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("remembers", [True, False])
def test_after_the_window_the_first_answer_is_its_newest_frame(remembers):
    """The head is zero at first. Frames 4 and 3 follow the clean frames 1 and 2, in either order; frame 0 does not."""
    model = linear()
    for parameter in model.dit.unfold.parameters():
        torch.nn.init.normal_(parameter)
    history, window = torch.randn(2, 8, 2, 8, 8), torch.randn(2, 8, 2, 8, 8)
    given = {
        "frames": torch.tensor([[4.0, 0.0, 3.0]] * 2),
        "memory": model.remember(History(history, [None])) if remembers else None,
    }
    noise = torch.randn(2, 8, 3, 8, 8)

    def made(**more):
        return noise - model.predict(noise, torch.ones(2), ["", ""], **given, **more)

    alone = made() if remembers else torch.zeros_like(noise)
    with_window = made(window=window, window_frames=torch.tensor([[1.0, 2.0], [2.0, 1.0]]))
    newest = torch.stack([window[0, :, 1], window[1, :, 0]])
    torch.testing.assert_close(with_window, torch.stack([newest, alone[:, :, 1], newest], 2), atol=1e-5, rtol=1e-5)


def test_clean_histories_are_those_of_the_film_and_the_same_again():
    queries = FrameQueries(latents(), LINEAR.encoders, dataclasses.replace(QUERIES, mask_probability=1.0))
    first, again = list(queries.clean(5)), list(queries.clean(5))
    stretches = [
        each.latents[:, start : start + 8].float()
        for each in latents().blocks
        for start in range(0, each.latents.shape[1] - 7, 2)
    ]
    for (history, lows), (same, _) in zip(first, again, strict=True):
        assert torch.equal(history, same) and history.shape == (1, 8, 8, 4, 8) and lows[0].shape == (1, 8, 4, 2, 4)
        assert any(torch.equal(history[0], stretch) for stretch in stretches)


def test_what_cannot_be():
    with pytest.raises(ValueError, match="there must be histories, got none"):
        start_linearly(linear(), lambda: iter(()))
    with pytest.raises(ValueError, match="unfold must be at least the 32 numbers of a patch token, got 8"):
        DiT(dataclasses.replace(LINEAR.dit, unfold=8), 8, 16)
    with pytest.raises(ValueError, match="requires a first encoder.*'merge'"):
        ModelConfig(
            encoders=(dataclasses.replace(LINEAR.encoders[0], branches="merge"),),
            dit=dataclasses.replace(LINEAR.dit, unfold=32),
        )
