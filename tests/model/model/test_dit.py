"""The DiT: rotary positions, a block against plain torch, the history and its cache, text, memory, learning."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from vidmem_model.model.config import PRESETS, Compression, DiTConfig
from vidmem_model.model.dit import DiT, KVCache
from vidmem_model.model.flow import interpolate, sample, velocity_loss
from vidmem_model.model.rope import axis_sizes, frame_positions, norm_rotate, position_features, rotary

CHANNELS, TEXT = 4, 6
SMALL = dataclasses.replace(PRESETS["tiny"].dit, history_sees_video=False, position_features=True)


class Memory(NamedTuple):
    tokens: torch.Tensor
    positions: torch.Tensor


def made(base=SMALL, **changes):
    dit = DiT(dataclasses.replace(base, **changes), CHANNELS, TEXT)
    with torch.no_grad():  # away from the zeros of a fresh model, but for the gates of the memory
        for name, parameter in dit.named_parameters():
            if not name.endswith("memory_attention.gate"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return dit


def inputs(batch=2, memory=5, dim=48):
    frames = torch.tensor([[3.0, 4.0], [6.0, 9.0]])[:batch]
    return {
        "x": torch.randn(batch, CHANNELS, 2, 4, 6),
        "t": torch.linspace(0.9, 0.4, batch),
        "text": torch.randn(batch, 3, TEXT),
        "text_mask": torch.tensor([[True, True, True], [True, False, False]])[:batch],
        "frames": frames,
        "memory": Memory(torch.randn(batch, memory, dim), torch.rand(1, memory, 3) * 4),
        "window": torch.randn(batch, CHANNELS, 1, 4, 6),
        "window_frames": frames[:, :1] - 1,
    }


# --- positions ---


def test_frame_positions_are_ordered_as_patches():
    positions = frame_positions(torch.tensor([[1.5, 7.0]]), 2, 2)
    assert positions[0, :5].tolist() == [[1.5, 0, 0], [1.5, 0, 1], [1.5, 1, 0], [1.5, 1, 1], [7, 0, 0]]


@pytest.mark.parametrize(("head", "sizes"), [(128, (44, 42, 42)), (64, (24, 20, 20)), (6, (2, 2, 2))])
def test_channels_are_split_as_in_wan(head, sizes):
    assert axis_sizes(head) == sizes and sum(sizes) == head


def test_rotation_by_hand():
    # One pair of channels an axis: the frequency is 1, the angle is the position in radians.
    rotation = rotary(torch.tensor([[[0.5, 1.0, 2.0]]]), 6)
    # The root mean square of these channels is sqrt(1 / 2).
    rotated = norm_rotate(torch.tensor([3.0, 0.0] * 3).view(1, 1, 6), torch.full((6,), 0.5**0.5), rotation)
    expected = [f(p) for p in (0.5, 1.0, 2.0) for f in (math.cos, math.sin)]
    assert rotated.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_norm_and_rotation_are_those_of_single_ops():
    x = torch.randn(2, 5, 3, 4, 6, dtype=torch.float64)[:, :, :2].requires_grad_()
    scale = torch.rand(2, 1, 6, dtype=torch.float64).requires_grad_()
    positions = torch.rand(2, 5, 3) * 10
    rotation = rotary(positions, 6)
    angle = rotation.angle().double().view(2, 5, 1, 1, 3)
    normed = torch.nn.functional.rms_norm(x, (6,), eps=1e-6) * scale
    a, b = normed.unflatten(-1, (3, 2)).unbind(-1)
    expected = torch.stack([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1).flatten(-2)
    torch.testing.assert_close(norm_rotate(x, scale, rotation), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(norm_rotate(x, scale), normed)
    exact = rotation.to(torch.complex128)
    assert torch.autograd.gradcheck(lambda x, s: norm_rotate(x, s, exact), (x, scale))
    assert torch.autograd.gradcheck(norm_rotate, (x[:, :, 0], scale[0, 0]))


def test_scores_depend_on_the_offset_only():
    q, k, one = torch.randn(2, 7, 3, 32), torch.randn(2, 7, 3, 32), torch.ones(32)
    positions = torch.rand(2, 7, 3) * 20

    def scores(offset):
        rotation = rotary(positions + torch.tensor(offset), 32)
        return torch.einsum("blhd,bmhd->bhlm", norm_rotate(q, one, rotation), norm_rotate(k, one, rotation))

    torch.testing.assert_close(scores([37.5, -4.0, 11.25]), scores([0.0, 0.0, 0.0]), atol=1e-4, rtol=1e-4)
    moved = rotary(positions + torch.tensor([1.0, 0.0, 0.0]), 32)
    here = rotary(positions, 32)
    other = torch.einsum("blhd,bmhd->bhlm", norm_rotate(q, one, moved), norm_rotate(k, one, here))
    assert (other - scores([0.0, 0.0, 0.0])).abs().max() > 0.1


def test_features_tell_neighbours_in_a_box_apart():
    t = torch.arange(8.0)
    features = position_features(torch.stack([t, t * 0, t * 0], -1)[None])[0]
    assert torch.cdist(features, features)[~torch.eye(8, dtype=torch.bool)].min() > 1
    # The cosine of period 2 is the parity.
    parity = next(i for i in range(features.shape[1]) if features[:2, i].tolist() == [1.0, -1.0])
    assert features[:, parity].tolist() == [1.0, -1.0] * 4


# --- one block, once more in plain torch ---


def plain_norm(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def plain_block(block, x, mods, cos, sin, text):
    """A block of one head and one frame, on (N, D), written from the formulas."""
    dim = x.shape[1]
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = mods + block.table
    h = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    q, k, v = ((1 + scale) * h + shift).matmul(block.qkv.weight.T).add(block.qkv.bias).split(dim, 1)

    def turn(x):
        even, odd = x[:, ::2], x[:, 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(1)

    q, k = (turn(plain_norm(y, s)) for y, s in zip((q, k), block.qk_scale[:, 0], strict=True))
    x = x + gate * block.out((q @ k.T / dim**0.5).softmax(1) @ v)
    q = plain_norm(block.text_q(block.text_norm(x)), block.text_scale[0])
    k, v = block.text_kv(text).split(dim, 1)
    x = x + block.text_out((q @ plain_norm(k, block.text_scale[1]).T / dim**0.5).softmax(1) @ v)
    h = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    gated, value = block.up((1 + mlp_scale) * h + mlp_shift).chunk(2, 1)
    return x + mlp_gate * block.down(gated / (1 + (-gated).exp()) * value)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_against_plain_torch(prediction):
    dit = made(DiTConfig(dim=12, heads=1, depth=2, mlp=16, prediction=prediction))
    x, text, t = torch.randn(1, CHANNELS, 1, 4, 4), torch.randn(1, 2, TEXT), 0.7
    got = dit(x, torch.tensor([t]), text, torch.ones(1, 2, dtype=torch.bool), frames=torch.tensor([[5.0]]))

    # Cells of a token: channel, then row, then column.
    cells = x[0, :, 0].view(CHANNELS, 2, 2, 2, 2).permute(1, 3, 0, 2, 4).reshape(4, -1)
    tokens = dit.patch_projection(cells)
    angle = torch.tensor([[5.0, 0, 0], [5, 0, 1], [5, 1, 0], [5, 1, 1]])
    angle = torch.stack([angle[:, 0], angle[:, 0] / 100, *angle[:, 1:].repeat_interleave(2, 1).T], 1)
    angle[:, [3, 5]] /= 100  # two pairs of channels an axis: frequencies 1 and 1 / sqrt(10000)
    frequency = 10000 ** (-torch.arange(128) / 128)
    time = dit.time_embedding(torch.cat([(1000 * t * frequency).cos(), (1000 * t * frequency).sin()]))
    mods = dit.time_projection(F.silu(time)).view(6, 12)
    for block in dit.blocks:
        tokens = plain_block(block, tokens, mods, angle.cos(), angle.sin(), dit.text_projection(text[0]))
    shift, scale = dit.head_table + time
    out = dit.head(F.layer_norm(tokens, (12,)) * (1 + scale) + shift)
    out = out.view(2, 2, CHANNELS, 2, 2).permute(2, 0, 3, 1, 4).reshape(1, CHANNELS, 1, 4, 4)
    expected = out if prediction == "velocity" else (x - out) / t
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


# --- the history ---


@pytest.mark.parametrize("linear_blocks", [(), (0,), (0, 1)])
@pytest.mark.parametrize("added", [{}, {"memory_cross_attention": True}, {"unfold": 16, "prediction": "sample"}])
def test_cache_is_exact_where_the_history_sees_itself_only(linear_blocks, added):
    dit = made(linear_blocks=linear_blocks, **added)
    given, cache = inputs(), KVCache()
    for t in (1.0, 0.6, 0.2):
        given |= {"t": torch.full((2,), t), "x": torch.randn_like(given["x"])}
        torch.testing.assert_close(dit(**given, cache=cache), dit(**given), atol=1e-5, rtol=1e-5)
    assert len(cache.blocks) == 2


@pytest.mark.parametrize("linear_blocks", [(), (0, 1)])
def test_cache_is_that_of_the_first_step_where_the_history_sees_the_video(linear_blocks):
    dit = made(history_sees_video=True, linear_blocks=linear_blocks)
    given, cache = inputs(), KVCache()
    torch.testing.assert_close(dit(**given, cache=cache), dit(**given))
    torch.testing.assert_close(dit(**given, cache=cache), dit(**given), atol=1e-5, rtol=1e-5)
    later = given | {"t": torch.full((2,), 0.1), "x": torch.randn_like(given["x"])}
    assert (dit(**later, cache=cache) - dit(**later)).abs().max() > 1e-3


def test_history_is_at_time_0_and_does_not_see_the_noise():
    dit, given = made(), inputs()

    def kept(**changes):
        cache = KVCache()
        dit(**given | changes, cache=cache)
        return [tensor for block in cache.blocks for tensor in block]

    before = kept()
    assert before[0].shape == (2, 5 + 6, 2, 24)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in before)
    other = {"t": torch.tensor([0.1, 0.7]), "x": torch.randn_like(given["x"]), "frames": given["frames"] + 3}
    assert all(torch.equal(a, b) for a, b in zip(before, kept(**other), strict=True))
    assert not torch.equal(before[0], kept(window_frames=given["window_frames"] - 1)[0])

    dit = made(history_sees_video=True)
    first, again = kept(), kept(t=torch.tensor([0.1, 0.7]))
    assert torch.equal(first[0], again[0])  # keys of block 0: before any attention, at time 0
    assert not torch.allclose(first[2], again[2])  # block 1 has seen the video


def test_a_clean_frame_is_what_a_noisy_frame_at_time_0_is():
    # All see all, so a window frame differs from a noisy frame at t = 0 by the head alone.
    dit, given = made(history_sees_video=True), inputs(memory=0)
    both = {
        "x": torch.cat([given["window"], given["x"]], 2),
        "t": torch.cat([torch.zeros(2, 1), given["t"][:, None].expand(2, 2)], 1),
        "frames": torch.cat([given["window_frames"], given["frames"]], 1),
    }
    joined = dit(**{k: v for k, v in given.items() if "window" not in k and k != "memory"} | both)
    torch.testing.assert_close(dit(**given), joined[:, :, 1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("history_sees_video", [False, True])
def test_the_video_reads_the_history(history_sees_video):
    dit, given = made(history_sees_video=history_sees_video), inputs()
    out = dit(**given)
    tokens = given["memory"].tokens.clone()
    tokens[1] += torch.randn_like(tokens[1])
    changed = dit(**given | {"memory": given["memory"]._replace(tokens=tokens)}) - out
    assert changed[0].abs().max() < 1e-5 < 1e-3 < changed[1].abs().max()
    empty = Memory(tokens[:, :0], torch.zeros(1, 0, 3))
    torch.testing.assert_close(dit(**given | {"memory": empty}), dit(**given | {"memory": None}))


def test_gate_of_the_memory_starts_closed_and_opens():
    plain, crossed = made(), made(memory_cross_attention=True)
    assert crossed.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    given = inputs()
    torch.testing.assert_close(crossed(**given), plain(**given))
    crossed(**given).square().mean().backward()
    gates = [block.memory_attention.gate for block in crossed.blocks]
    assert all(gate.grad.abs().max() > 0 for gate in gates)
    with torch.no_grad():
        gates[1].fill_(1.0)
    assert (crossed(**given) - plain(**given)).abs().max() > 1e-3


# --- text ---


def test_masked_text_is_not_read():
    dit, given = made(), inputs()
    out = dit(**given)
    text = given["text"].clone()
    text[1, 1:] = 100.0
    torch.testing.assert_close(dit(**given | {"text": text}), out)
    text[1, 0] = 100.0
    assert (dit(**given | {"text": text})[1] - out[1]).abs().max() > 1e-3


def test_a_prompt_without_tokens():
    dit, given = made(), inputs()
    none = given | {"text_mask": torch.zeros(2, 3, dtype=torch.bool)}
    out = dit(**none)
    out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in dit.parameters())
    empty = given | {"text": given["text"][:, :0], "text_mask": given["text_mask"][:, :0]}
    torch.testing.assert_close(dit(**empty), out)


# --- the whole ---


@pytest.mark.parametrize("unfold", [0, 20])
def test_a_fresh_model_predicts_the_mean(unfold):
    given = inputs()
    assert DiT(SMALL, CHANNELS, TEXT)(**given).abs().max() == 0
    dit = DiT(
        dataclasses.replace(SMALL, prediction="sample", unfold=unfold), CHANNELS, TEXT, compression=Compression(2, 2, 2)
    )
    given |= {"memory": Memory(torch.randn(2, 12, 48), torch.cartesian_prod(*[torch.arange(0.5, 5, 2)] * 3)[None, :12])}
    times = torch.tensor([0.4, 0.01])
    if unfold:
        given |= {"window": None, "window_frames": None}  # else it predicts the newest clean frame, see test_unfold.py
    expected = given["x"] / torch.tensor([0.4, 0.05]).view(2, 1, 1, 1, 1)  # a time below 0.05 counts as that
    torch.testing.assert_close(dit(**given | {"t": times}), expected)


def test_a_fresh_token_reads_itself_first():
    block = DiT(SMALL, CHANNELS, TEXT).blocks[0]
    q, k, _ = block.qkv(torch.randn(20, 48)).view(20, 3, 2, 24).unbind(1)
    scores = torch.einsum("lhd,mhd->hlm", q, k)
    assert (scores.argmax(-1) == torch.arange(20)).float().mean() > 0.8


def test_frames_at_times_of_their_own():
    dit, given = made(), inputs()
    same = given["t"][:, None].expand(2, 2)
    torch.testing.assert_close(dit(**given | {"t": same}), dit(**given))
    assert not torch.allclose(dit(**given | {"t": same * torch.tensor([1.0, 0.5])}), dit(**given))


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_learns_two_samples_by_heart(prediction):
    dit = DiT(dataclasses.replace(SMALL, prediction=prediction), CHANNELS, TEXT)
    given = inputs()
    x0 = given.pop("x")
    optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        noise, given["t"] = torch.randn_like(x0), torch.rand(2) * 0.8 + 0.2
        loss = velocity_loss(dit(interpolate(x0, noise, given["t"]), **given), x0, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[:3]) / 3 > 1.5
    assert sum(losses[-10:]) / 10 < 0.6
    del given["t"]
    with torch.no_grad():
        made = sample(lambda x, t: dit(x, t, **given), torch.randn_like(x0), steps=10)
    assert (made - x0).square().mean() < 0.3 * x0.square().mean()


@pytest.mark.parametrize("linear_blocks", [(), (0, 1)])
def test_bfloat16_autocast(linear_blocks):
    dit, given = made(linear_blocks=linear_blocks, memory_cross_attention=True), inputs()
    given["text_mask"] = torch.tensor([[True, True, False], [False] * 3])
    exact = dit(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = dit(**given)
        rounded.square().mean().backward()
    assert rounded.dtype == torch.float32
    assert (rounded - exact).square().mean() < 1e-3 * exact.square().mean()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in dit.parameters())


def test_sizes_that_do_not_fit():
    dit, given = made(), inputs()
    for changes, message in [
        ({"x": given["x"][:, :2]}, r"latents must be \(B, 4, T, H, W\)"),
        ({"x": given["x"][0]}, r"x must be \(B, C, K, H, W\)"),
        ({"frames": given["frames"][:, :1]}, r"frames must be of shape \(2, 2\), got \(2, 1\)"),
        ({"t": torch.zeros(3)}, r"t must be of shape \(2,\), got \(3,\)"),
        ({"window": None}, "must be given together"),
        ({"memory": Memory(torch.zeros(1, 5, 48), torch.zeros(1, 5, 3))}, r"memory.tokens must be of shape \(2, 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            dit(**given | changes)
