"""Memory encoders: cropping, values of every branch, causality, and equality of streams and single calls."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_model.model.config import BRANCHES, Compression, EncoderConfig
from vidmem_model.model.encoder import MemoryEncoder, count_tokens, low_resolution
from vidmem_model.model.encoder_layers import FrameAttention
from vidmem_model.vae import patchify
from vidmem_model.vae.config import VAEConfig

CHANNELS, DIM = 3, 12
CONFIG = EncoderConfig(compression=Compression(2, 2, 1), channels=(4, 8), heads=2, window=1)
STREAMED = ("both", "lr", "hr", "patchifier")


def encoder(seed=0, **changes):
    torch.manual_seed(seed)
    return MemoryEncoder(dataclasses.replace(CONFIG, **changes), DIM, CHANNELS)


def projection(dim=DIM):
    """A patch embedding with random weights, as of a transformer."""
    weight = torch.randn(dim, CHANNELS * 4, generator=torch.Generator().manual_seed(9))
    return lambda latents: F.linear(patchify(latents)[0].float(), weight)


def inputs(frames=6, rows=9, columns=5, compression=CONFIG.compression, batch=1):
    """Latents with rows and columns that fill no box, and those of the low-resolution video."""
    generator = torch.Generator().manual_seed(frames)
    history = torch.randn(batch, CHANNELS, frames, rows, columns, generator=generator)
    time, height, width = compression
    size = (frames // time, rows // height, columns // width)
    return history, torch.randn(batch, CHANNELS, *size, generator=generator)


# --- crop rule and positions ---


@pytest.mark.parametrize(
    ("compression", "tokens"),
    [
        (Compression(2, 4, 4), 7 * 13 * 60),
        (Compression(2, 2, 2), 15 * 26 * 60),
        (Compression(4, 2, 2), 15 * 26 * 30),
        (Compression(1, 2, 2), 15 * 26 * 120),
        (Compression(8, 2, 2), 15 * 26 * 15),
    ],
)
def test_twenty_seconds_at_the_published_rates(compression, tokens):
    config = EncoderConfig(compression=compression)
    assert count_tokens(config, VAEConfig(), 480, 480, 832) == tokens
    # The first latent frame covers one frame: 1 + 119 * 4.
    assert count_tokens(config, VAEConfig(kind="wan"), 477, 480, 832) == tokens
    assert math.prod(MemoryEncoder(dataclasses.replace(config, branches="lr"), 8, 16).grid(120, 60, 104)) == tokens


def test_tokens_of_frames_that_the_vae_pads():
    # 481 frames are 121 latent frames of the causal VAE, the last box is not full; 488 rows are 62 latent rows.
    assert count_tokens(EncoderConfig(), VAEConfig(), 481, 488, 832) == 7 * 13 * 60
    assert count_tokens(EncoderConfig(compression=Compression(1, 1, 1)), VAEConfig(), 9, 16, 24) == 3 * 1 * 2
    assert count_tokens(EncoderConfig(compression=Compression(1, 1, 1)), VAEConfig(kind="hunyuan"), 9, 16, 16) == 3
    assert count_tokens(EncoderConfig(compression=Compression(1, 1, 1)), VAEConfig(), 0, 16, 16) == 0


@pytest.mark.parametrize("branches", BRANCHES)
def test_the_grid_is_the_crop(branches):
    model, embed = encoder(branches=branches), projection()
    history, low = inputs(frames=5)  # low: 2 frames of 4 x 5; boxes: 2 x 2 x 2
    assert model.grid(5, 9, 5) == (2, 2, 2)
    whole = model(history, low, embed)
    assert whole.tokens.shape == (1, 8, DIM)
    outside = history.clone()
    outside[:, :, 4:], outside[..., 8:, :], outside[..., 4:] = 5.0, 5.0, 5.0
    beyond = torch.cat([low, torch.full_like(low, 5.0)], 2)
    beyond[..., 4:] = 5.0
    assert torch.equal(model(outside, beyond, embed).tokens, whole.tokens)
    inside, within = history.clone(), low.clone()
    inside[:, :, 3, 7, 3] += 9.0
    within[:, :, 1, 3, 3] += 9.0
    # The last cell of the last box, in the branches that read it.
    assert not torch.equal(model(inside, within, embed).tokens, whole.tokens)


@pytest.mark.parametrize("branches", STREAMED)
def test_positions_are_midpoints_in_patch_tokens(branches):
    history, low = inputs(frames=4, rows=8, columns=4)
    expected = [(t, h, w) for t in (0.5, 2.5) for h in (0.5, 2.5) for w in (0.0, 1.0)]
    positions = encoder(branches=branches)(history, low, projection()).positions
    assert positions.dtype == torch.float32
    assert positions[0].tolist() == [list(p) for p in expected]


# --- values of the branches ---


@pytest.mark.parametrize(
    "compression",
    [
        Compression(2, 4, 4),
        Compression(2, 2, 2),
        Compression(4, 2, 2),
        Compression(1, 2, 2),
        Compression(8, 2, 2),
        Compression(1, 1, 4),
    ],
)
def test_both_is_the_sum_of_its_branches(compression):
    time, height, width = compression
    history, low = inputs(2 * time, 4 * height + 1, 2 * width, compression, batch=2)
    embed = projection()
    both, high = encoder(compression=compression), encoder(compression=compression, branches="hr")
    high.load_state_dict(both.state_dict())
    of_low = encoder(compression=compression, branches="lr")(history, low, embed).tokens
    of_high = high(history, None, embed).tokens
    torch.testing.assert_close(both(history, low, embed).tokens, of_low + of_high)
    assert of_high.shape == (2, 2 * 2 * 1, DIM)
    # Tokens of one position differ between the batch's histories, and are neither vanishing nor large.
    assert (of_high[0] - of_high[1]).abs().amax(1).min() > 1e-3
    assert 0.1 < of_high.std() < 0.5
    torch.testing.assert_close(of_low, embed(low[..., :4, :2]))


def test_without_history_the_low_resolution_video_says_how_many():
    history, low = inputs(6)
    model = encoder(branches="lr")
    assert torch.equal(model(None, low, projection()).tokens, model(history, low, projection()).tokens)
    # With a history there are no more tokens than it has boxes, so that ablations have the same ones.
    assert model(history[:, :, :5], low, projection()).tokens.shape[1] == 2 * 2 * 2


def test_patchifier_is_a_convolution_of_boxes():
    model = encoder(branches="patchifier")
    history, _ = inputs(frames=4, rows=8, columns=6, batch=2)
    kernel = model.patchifier.weight.unflatten(1, (CHANNELS, 2, 4, 2))
    expected = F.conv3d(history, kernel, model.patchifier.bias, stride=(2, 4, 2)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model(history, None, projection()).tokens, expected)


def test_shortcut_is_added_to_the_convolutions():
    model = encoder(branches="hr", shortcut=20)
    history, _ = inputs(frames=8)
    plain, patchifier = encoder(branches="hr"), encoder(branches="patchifier")
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("shortcut")})
    first, second = model.shortcut
    with torch.no_grad():
        patchifier.patchifier.weight.copy_(second.weight @ first.weight)
        patchifier.patchifier.bias.copy_(second.weight @ first.bias)
    made = model(history, None, projection())
    expected = plain(history, None, projection()).tokens + patchifier(history, None, projection()).tokens
    torch.testing.assert_close(made.tokens, expected)
    first, state = model.append(history[:, :, :3], None, projection(), None)
    rest, _ = model.append(history[:, :, 3:], None, projection(), state)
    torch.testing.assert_close(torch.cat([first.tokens, rest.tokens], 1), made.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("compression", "cell"), [(Compression(2, 2, 2), 2), (Compression(1, 4, 2), 2), (Compression(4, 4, 4), 4)]
)
def test_merging_equal_tokens_gives_them_and_their_midpoints(compression, cell):
    # Cells of 2 x 2 x 2 tokens go in one round, of 4 x 4 x 4 in two; values are far apart between cells.
    values = 10 * torch.randn(1, CHANNELS, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    doubled = values.repeat_interleave(2, 3).repeat_interleave(2, 4)
    history = doubled.repeat_interleave(cell, 2).repeat_interleave(cell, 3).repeat_interleave(cell, 4)
    model, embed = encoder(compression=compression, branches="merge"), projection()
    made = model(history, None, embed)
    torch.testing.assert_close(made.tokens, embed(doubled), rtol=1e-4, atol=1e-3)
    middles = torch.tensor([cell / 2 - 0.5, cell * 1.5 - 0.5])
    torch.testing.assert_close(made.positions[0], torch.cartesian_prod(middles, middles, middles))


def test_merge_by_hand():
    # Tokens a b / c d over two frames; c and d are like a, the first of the cell; two are to remain.
    history = torch.zeros(1, CHANNELS, 2, 2, 4)
    a, b, c, d = (torch.tensor(x) for x in ((1.0, 0, 0), (-8.0, 4, 0), (1.5, 0, 0), (1.0, 0.4, 0)))
    for token, frame, column in ((a, 0, 0), (b, 0, 2), (c, 1, 0), (d, 1, 2)):
        history[0, :, frame, :, column : column + 2] = token.view(-1, 1, 1)
    history.requires_grad_()
    model, embed = encoder(compression=Compression(2, 1, 1), branches="merge"), projection()
    made = model(history, None, embed)
    mean = ((a + c + d) / 3)[None, :, None, None, None].expand(1, -1, 1, 2, 2)
    torch.testing.assert_close(made.tokens[:, :1], embed(mean))
    torch.testing.assert_close(made.tokens[:, 1:], embed(b[None, :, None, None, None].expand(1, -1, 1, 2, 2)))
    torch.testing.assert_close(made.positions, torch.tensor([[[2 / 3, 0, 1 / 3], [0, 0, 1]]]))
    # A third of a row's gradient goes to each of its tokens, all of it to the one that stays alone.
    made.tokens.sum().backward()
    rows = history.grad[0].sum(2).unflatten(2, (2, 2)).sum(3)
    torch.testing.assert_close(3 * rows[:, 0, 0], rows[:, 0, 1])
    torch.testing.assert_close(rows[:, 1, 0], rows[:, 0, 0])


def test_sparse_keeps_the_strongest_tokens_and_their_positions():
    history = torch.full((2, CHANNELS, 2, 4, 4), 0.01)
    history[0, :, 1, 2:, :2] = 2.0  # frame 1, row 1, column 0
    history[0, :, 0, :2, 2:] = -1.0  # frame 0, row 0, column 1
    history[1, :, 1] = 1.0
    model, embed = encoder(compression=Compression(2, 2, 1), branches="sparse"), projection()
    made = model(history, None, embed)
    assert made.positions.tolist() == [[[0, 0, 1], [1, 1, 0]], [[1, 0, 0], [1, 0, 1]]]
    torch.testing.assert_close(made.tokens[0], embed(history)[0, [1, 6]])


def test_low_resolution_averages_areas_of_every_other_frame():
    frames = torch.arange(5 * 5 * 7.0).view(1, 1, 5, 5, 7).expand(2, 3, -1, -1, -1)
    made = low_resolution(frames, Compression(2, 2, 3))
    expected = frames[:, :, ::2, :4, :6].unflatten(4, (2, 3)).unflatten(3, (2, 2)).mean((4, 6))
    torch.testing.assert_close(made, expected)
    pieces = [low_resolution(piece, Compression(2, 2, 3)) for piece in frames.split(2, 2)]
    assert torch.equal(torch.cat(pieces, 2), made)
    with pytest.raises(ValueError, match="at least 8 x 3 pixels"):
        low_resolution(frames, Compression(2, 8, 3))


# --- time ---


@pytest.mark.parametrize("attention", ["causal", "window", "none"])
def test_no_token_sees_a_later_frame(attention):
    model = encoder(attention=attention)
    history, low = inputs(frames=12)
    before = model(history, low, projection()).tokens.unflatten(1, (6, -1))
    changed = history.clone()
    changed[:, :, 7] += 1.0  # in box 3
    after = model(changed, low, projection()).tokens.unflatten(1, (6, -1))
    torch.testing.assert_close(after[:, :3], before[:, :3], rtol=0, atol=0)
    assert all((after - before)[:, i].abs().max() > 1e-4 for i in (3, 4))


@pytest.mark.parametrize("window", [0, 2, math.inf])
def test_attention_is_softmax_over_the_frames_of_its_window(window):
    torch.manual_seed(0)
    layer = FrameAttention(12, 2, window)
    x = torch.randn(2, 12, 4, 2, 3)
    got, kept = layer(x, 0, None)
    frame = torch.arange(4).repeat_interleave(6)
    changed = x.clone()
    changed[:, :, 1] += torch.randn(12, 1, 1)
    reached = (layer(changed, 0, None)[0] - got).abs().amax((0, 1, 3, 4)) > 1e-6
    assert reached.tolist() == [False, True, window >= 1, window >= 2]
    assert kept.frame.tolist() == [f for f in range(4) if f >= 4 - window for _ in range(6)]
    # Only differences of positions count: a stream that is long already attends as a young one.
    torch.testing.assert_close(layer(x, 1000, None)[0], got, rtol=1e-3, atol=1e-4)
    # Queries and keys of zero: the mean of the visible values.
    with torch.no_grad():
        layer.qk_scale.zero_()
        layer.qkv.bias.normal_()
        value = layer.qkv(layer.norm(x).flatten(2).transpose(1, 2))[..., 24:]
        apart = frame[:, None] - frame
        visible = ((apart >= 0) & (apart <= window)).float()
        mean = visible @ value / visible.sum(1, keepdim=True)
        expected = x + layer.out(mean).transpose(1, 2).unflatten(2, (4, 2, 3))
        torch.testing.assert_close(layer(x, 0, None)[0], expected)


segments = st.lists(st.integers(0, 5), max_size=6)


@pytest.mark.parametrize(
    ("branches", "attention"),
    [("both", "causal"), ("both", "window"), ("hr", "window"), ("hr", "none"), ("lr", "none"), ("patchifier", "none")],
)
@settings(max_examples=12, deadline=None)
@given(cuts=segments, low_cuts=segments, time=st.sampled_from([1, 2, 4]))
def test_segments_give_the_tokens_of_the_whole(branches, attention, cuts, low_cuts, time):
    compression = Compression(time, 1, 1)
    model, embed = encoder(compression=compression, branches=branches, attention=attention), projection()
    history, low = inputs(11, 4, 3, compression)
    with torch.no_grad():
        whole = model(history, low, embed)
        pieces = list(zip(*(_cut(x, n) for x, n in ((history, cuts), (low, low_cuts))), strict=True))
        state, made = None, []
        for piece in pieces:
            part, state = model.append(*piece, embed, state)
            made.append(part)
    assert state.boxes == 11 // time
    torch.testing.assert_close(torch.cat([part.tokens for part in made], 1), whole.tokens, rtol=1e-4, atol=1e-5)
    assert torch.equal(torch.cat([part.positions for part in made], 1), whole.positions)


def _cut(x, lengths):
    """x in 7 segments, of the lengths given as far as it has frames, the last with all that is left."""
    lengths = (lengths + [0] * 6)[:6]
    ends = torch.tensor([0, *lengths]).cumsum(0).clamp(max=x.shape[2]).tolist()
    return [x[:, :, a:b] for a, b in zip(ends, [*ends[1:], x.shape[2]], strict=True)]


@pytest.mark.parametrize("branches", ["merge", "sparse"])
def test_reductions_reduce_each_segment_on_its_own(branches):
    model, embed = encoder(branches=branches), projection()
    history, _ = inputs(8)
    first, state = model.append(history[:, :, :5], None, embed, None)
    second, state = model.append(history[:, :, 5:], None, embed, state)
    for part, start in ((first, 0), (second, 4)):
        alone = model(history[:, :, start : start + 4], None, embed)
        assert torch.equal(part.tokens, alone.tokens)
        assert torch.equal(part.positions - alone.positions, torch.tensor([start, 0, 0]).expand_as(part.positions))
    assert state.history.shape[2] == 0


def test_a_state_can_be_used_again_and_holds_no_more_than_later_segments_need():
    model, embed = encoder(), projection()
    history, low = inputs(40)
    _, state = model.append(history[:, :, :33], low[:, :, :16], embed, None)
    once, _ = model.append(history[:, :, 33:], low[:, :, 16:], embed, state)
    again, _ = model.append(history[:, :, 33:], low[:, :, 16:], embed, state)
    assert torch.equal(once.tokens, again.tokens)
    held = [state.history, state.low, *state.high.inputs, *state.high.tokens]
    assert all(x.untyped_storage().nbytes() == x.numel() * x.element_size() for x in held)
    assert [x.shape[2] for x in (state.history, state.low, *state.high.inputs)][:3] == [1, 0, 2]
    assert state.high.tokens.frame.unique().tolist() == [15]


@pytest.mark.parametrize("branches", BRANCHES)
def test_empty_segments(branches):
    model, embed = encoder(branches=branches), projection()
    history, low = inputs(4)
    nothing = history[:, :, :0], low[:, :, :0]
    empty, state = model.append(*nothing, embed, None)
    assert empty.tokens.shape == (1, 0, DIM)
    assert empty.positions.shape == (1, 0, 3)
    made, state = model.append(history, low, embed, state)
    assert torch.equal(made.tokens, model(history, low, embed).tokens)
    assert made.tokens.isfinite().all()
    assert model.append(*nothing, embed, state)[0].tokens.shape == (1, 0, DIM)


# --- training ---


@pytest.mark.parametrize("branches", ["both", "hr", "patchifier"])
def test_gradients_reach_every_parameter(branches):
    model = encoder(branches=branches)
    made = model(*inputs(6), projection()).tokens
    (made * torch.randn(made.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    assert list(model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-8, name


@pytest.mark.parametrize("branches", BRANCHES)
def test_autocast(branches):
    model, embed = encoder(branches=branches), projection()
    history, low = inputs(8)
    exact = model(history, low, embed)
    with torch.autocast("cpu", torch.bfloat16):
        made, state = model.append(history[:, :, :4], low[:, :, :2], embed, None)
        rest, _ = model.append(history[:, :, 4:], low[:, :, 2:], embed, state)
    assert made.positions.dtype == torch.float32
    if branches in STREAMED:
        tokens = torch.cat([made.tokens, rest.tokens], 1).float()
        assert (tokens - exact.tokens).norm() < 0.02 * exact.tokens.norm()
    else:
        assert made.tokens.isfinite().all()


# --- what does not fit ---


@pytest.mark.parametrize(
    ("branches", "history", "low", "message"),
    [
        ("both", (1, 3, 2, 8, 4), None, "low must be given for branches 'both'"),
        ("hr", None, None, "history must be given for branches 'hr'"),
        ("hr", (1, 4, 2, 8, 4), None, r"history must be of shape \(B, 3, T, H, W\)"),
        ("hr", (1, 3, 2, 3, 4), None, "history must have at least 4 x 2 cells"),
        ("both", (1, 3, 2, 8, 4), (1, 3, 1, 2, 4), "low must have at least 4 x 4 cells"),
    ],
)
def test_inputs_that_do_not_fit(branches, history, low, message):
    history, low = (torch.zeros(size) if size else None for size in (history, low))
    with pytest.raises(ValueError, match=message):
        encoder(branches=branches)(history, low, projection())


def test_segments_that_do_not_fit():
    model, embed = encoder(branches="lr"), projection()
    history, low = inputs(4)
    _, state = model.append(None, low, embed, None)
    with pytest.raises(ValueError, match="history must be given in every segment or in none"):
        model.append(history, low, embed, state)
    with pytest.raises(ValueError, match="low must have the batch and the size of the segments before"):
        model.append(None, low[..., :2, :], embed, state)
