"""Cuts, blocks of whole scenes, the split, and the cache of latents."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from film_helpers import write_video

from vidmem_model.errors import UserError
from vidmem_model.model.config import PRESETS, Compression
from vidmem_model.model.encode import encode_block, filled_frames
from vidmem_model.model.encoder import low_resolution
from vidmem_model.train import latents as dataset
from vidmem_model.train.blocks import Block
from vidmem_model.train.latents import prepare
from vidmem_model.vae import frames_to_float, load_vae
from vidmem_model.vae.causal import CausalVAE
from vidmem_model.vae.config import VAEConfig
from vidmem_model.video import iter_frames, read_clip
from vidmem_model.video.clip import ClipSpec
from vidmem_model.video.films import DataConfig, read_captions
from vidmem_model.video.scenes import find_cuts, luma, stretches

# Frames of the scenes of the film below, at 8 frames a second.
SCENES = (19, 22, 9, 40, 17, 18, 21, 24, 14)
CUTS = tuple(int(n) for n in np.cumsum(SCENES)[:-1])
MODEL = dataclasses.replace(PRESETS["tiny"], vae=VAEConfig(channels=8, width=16, depth=1))
DATA = DataConfig(block_seconds=5.0, test_every=3, shortest=2)
BOX, FAST = Compression(2, 2, 2), Compression(1, 2, 2)


def scene_picture(k, height=32, width=64):
    """A textured scene that drifts by a pixel every other frame, brightens slowly, and has some noise."""
    scene = int(np.searchsorted(CUTS, k, side="right"))
    texture = np.random.default_rng(scene).integers(0, 256, (8, 16, 3)).repeat(8, 0).repeat(8, 1)
    moved = np.roll(texture[:height, : 2 * width], k // 2, axis=1)[:, :width].astype(float)
    noise = np.random.default_rng(1000 + k).normal(0, 6, (height, width, 1))
    return np.clip(0.7 * moved + 0.3 * k + noise, 0, 255).astype(np.uint8)


def film_frames():
    return np.stack([scene_picture(k) for k in range(sum(SCENES))])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """The film as a lossless video."""
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    return write_video(path, sum(SCENES), 32, 64, 8, draw=lambda k, h, w: scene_picture(k))


@pytest.fixture(scope="module")
def vae():
    """A causal VAE with random weights: its latents depend on what came before in the block."""
    torch.manual_seed(1)
    made = CausalVAE(MODEL.vae).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    made.latent_mean.fill_(0.1)
    made.latent_std.fill_(2.0)
    return made


def test_luma_is_the_mean_of_boxes():
    frames = np.random.default_rng(0).integers(0, 256, (2, 36, 96, 3), dtype=np.uint8)
    grey = frames @ np.array([0.299, 0.587, 0.114])
    expected = grey.reshape(2, 18, 2, 32, 3).mean((2, 4))
    np.testing.assert_allclose(luma(frames), expected, atol=1e-3)


def test_cuts_are_found_and_nothing_else():
    assert find_cuts(luma(film_frames())) == list(CUTS)


def test_motion_flashes_and_fades_are_no_cuts():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (18, 32)).astype(np.float32)
    moving = np.stack([np.roll(base, 2 * k, axis=1) for k in range(12)])
    assert np.abs(np.diff(moving, axis=0)).mean() > 50 and find_cuts(moving) == []
    flash = np.stack([base] * 12)
    flash[6] = 255
    assert find_cuts(flash) == []
    other = rng.integers(0, 256, (18, 32)).astype(np.float32)
    fade = np.stack([(1 - s) * base + s * other for s in np.linspace(0, 1, 12)])
    assert find_cuts(fade) == []
    assert find_cuts(np.stack([base] * 6 + [other] * 6)) == [6]
    weak = np.stack([base] * 6 + [base + 15] * 6)
    assert find_cuts(weak) == [] and find_cuts(weak, threshold=10) == [6]


@pytest.mark.parametrize("chunk", [7, 16, 200])
def test_stretches_are_whole_scenes_without_gaps(chunk):
    frames = film_frames()
    made = list(stretches((frames[i : i + chunk] for i in range(0, len(frames), chunk)), 40))
    assert np.array_equal(np.concatenate([s.frames for s in made]), frames)
    starts = [s.start for s in made]
    assert starts[0] == 0 and set(starts[1:]) <= set(CUTS)
    assert [s.start + len(s.frames) for s in made[:-1]] == starts[1:]
    assert sorted([s.start + c for s in made for c in s.cuts] + starts[1:]) == list(CUTS)
    # A stretch ends with the first scene that brings it to 30 frames.
    assert starts == [0, 41, 90, 125, 170] and not any(s.continues for s in made)


def test_an_endless_scene_is_broken_and_says_so():
    frames = np.concatenate([np.full((95, 32, 64, 3), 30, np.uint8), np.full((30, 32, 64, 3), 200, np.uint8)])
    made = list(stretches([frames[:50], frames[50:]], 20))
    assert [(s.start, len(s.frames), s.continues) for s in made] == [
        (0, 40, False),
        (40, 40, True),
        (80, 15, True),
        (95, 30, False),
    ]


def test_blocks_and_split(film, vae, tmp_path):
    made = prepare(dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path)), MODEL, vae, [BOX])
    assert [round(8 * b.start) for b in made.blocks] == [0, 41, 90, 125, 170]
    assert [b.frames for b in made.blocks] == [40, 48, 32, 44, 12]
    assert [b.scenes for b in made.blocks] == [2, 2, 2, 2, 1]
    assert [b.split for b in made.blocks] == ["train", "train", "test", "train", "train"]
    assert made.split("test").blocks == made.blocks[2:3] and len(made.split("train").blocks) == 4
    # No scene has frames on both sides.
    scenes = {
        side: {
            int(np.searchsorted(CUTS, round(8 * b.start) + k, side="right"))
            for b in made.split(side).blocks
            for k in range(b.frames)
        }
        for side in ("train", "test")
    }
    assert not scenes["train"] & scenes["test"] and scenes["test"] == {4, 5}


def test_latents_are_those_of_the_frames_at_the_place_given(film, vae, tmp_path):
    """Read a block's frames again from the film, at its start: the VAE makes the same latents of them."""
    made = prepare(dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path)), MODEL, vae, [BOX, FAST])
    each = made.blocks[2]
    spec = ClipSpec(MODEL.height, MODEL.width, MODEL.fps, each.start, each.frames / MODEL.fps)
    frames = frames_to_float(torch.from_numpy(np.concatenate(list(iter_frames(each.film, spec)))))
    assert frames.shape[2] == each.frames == 4 * each.latents.shape[1]
    for rate, latents in ((None, each.latents), *each.lows.items()):
        video = frames if rate is None else low_resolution(frames, rate)
        video = video[:, :, : video.shape[2] // 4 * 4]
        expected = vae.scale(vae.encode(video))[0]
        torch.testing.assert_close(latents.float(), expected, rtol=2e-3, atol=2e-3)
        assert latents.dtype == torch.float16
    assert each.latents.shape == (8, 8, 4, 8)
    assert each.lows[BOX].shape == (8, 4, 2, 4) and each.lows[FAST].shape == (8, 8, 2, 4)


def test_first_latent_frame_of_one_video_frame():
    """As in Wan and Hunyuan: 1 + 4 k frames are whole, and a stream in pieces equals the whole."""

    class First(torch.nn.Module):
        name, channels, stride, first_frames, device = "first", 3, (4, 8, 8), 1, torch.device("cpu")

        def encode(self, frames, cache=None):
            head = [frames[:, :, :1]] if not cache else []
            rest = frames if cache else frames[:, :, 1:]
            cache["seen"] = True
            assert rest.shape[2] % 4 == 0
            parts = [*head, *rest.split(4, 2)] if rest.shape[2] else head
            means = torch.stack([p.mean(2) for p in parts], 2)
            return torch.nn.functional.avg_pool3d(means, (1, 8, 8))

        def scale(self, latents):
            return latents

    frames = torch.randint(0, 256, (21, 32, 32, 3), dtype=torch.uint8)
    made = encode_block(frames, First())
    expected = First().encode(frames_to_float(frames), {})[0]
    torch.testing.assert_close(made, expected.half())
    assert made.shape == (3, 6, 4, 4)
    assert encode_block(frames, First(), Compression(2, 1, 1)).shape == (3, 3, 4, 4)
    assert filled_frames(23, First()) == 21 and filled_frames(0, First()) == 0 and filled_frames(1, First()) == 1


def test_the_cache_is_used_again_and_grows_by_rates(film, vae, tmp_path, monkeypatch):
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path))
    first = prepare(config, MODEL, vae, [BOX])
    calls = []
    encode = dataset.encode_block
    monkeypatch.setattr(dataset, "encode_block", lambda f, v, rate: calls.append(rate) or encode(f, v, rate))
    again = prepare(config, MODEL, vae, [BOX])
    assert calls == []
    for a, b in zip(first.blocks, again.blocks, strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.lows[BOX], b.lows[BOX])
    prepare(config, MODEL, vae, [BOX, FAST])
    assert calls == [FAST] * 5
    calls.clear()
    # Other weights, other settings: another folder.
    other = CausalVAE(MODEL.vae).eval().requires_grad_(False)
    prepare(config, MODEL, other)
    prepare(dataclasses.replace(config, test_every=2), MODEL, vae)
    assert len(calls) == 10 and len(list(tmp_path.iterdir())) == 3


def test_an_interrupted_run_goes_on_and_leaves_no_halves(film, vae, tmp_path, monkeypatch):
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path))
    encode, calls = dataset.encode_block, []

    def interrupted(frames, codec, rate):
        calls.append(rate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(frames, codec, rate)

    monkeypatch.setattr(dataset, "encode_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, MODEL, vae, [BOX])
    (folder,) = tmp_path.iterdir()
    names = ["00-000000.low-2x2x2.safetensors", "00-000000.safetensors", "00-000041.safetensors"]
    assert sorted(f.name for f in folder.iterdir()) == names
    # A write that fails leaves neither a half nor a temporary file.
    save = dataset.save_file

    def failing(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset, "save_file", failing)
    with pytest.raises(UserError, match="cannot write the latent cache .No space left on device"):
        prepare(config, MODEL, vae, [BOX])
    assert sorted(f.name for f in folder.iterdir()) == names
    monkeypatch.setattr(dataset, "save_file", save)
    calls.clear()
    calls.extend([None] * 10)
    made = prepare(config, MODEL, vae, [BOX])
    assert len(calls) == 10 + 7 and len(made.blocks) == 5
    assert len(json.loads((folder / "index.json").read_text())) == 5
    (folder / names[1]).unlink()  # the latents read before are mapped from it
    (folder / names[1]).write_bytes(b"junk")
    with pytest.raises(UserError, match=r"00-000000.safetensors: is damaged; delete it and run again"):
        prepare(config, MODEL, vae, [BOX])
    (folder / names[1]).unlink()
    again = prepare(config, MODEL, vae, [BOX])
    assert torch.equal(again.blocks[0].latents, made.blocks[0].latents)


def test_the_codec_without_weights(film, tmp_path):
    codec = load_vae(VAEConfig(kind="dct", channels=16), None)
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path), seconds=4.0)
    made = prepare(config, MODEL, codec, [BOX])
    assert [b.latents.shape for b in made.blocks] == [(16, 8, 4, 8)]
    frames = torch.from_numpy(film_frames()[:32])
    torch.testing.assert_close(
        made.blocks[0].latents.float(), codec.scale(codec.encode(frames_to_float(frames)))[0], rtol=1e-3, atol=1e-2
    )


def test_named_stretches_are_for_testing(film, vae, tmp_path):
    test = ((41 / 8, 90 / 8), (125 / 8, 170 / 8))
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path), test=test, seconds=175 / 8)
    made = prepare(config, MODEL, vae)
    places = [(round(8 * b.start), b.frames, b.split) for b in made.blocks]
    assert places == [(0, 40, "train"), (41, 48, "test"), (90, 32, "train"), (125, 44, "test")]
    frames = torch.from_numpy(film_frames())[125:169]
    assert torch.equal(made.blocks[3].latents, encode_block(frames, vae))
    with pytest.raises(ValueError, match="test must be parts .from, to. in ascending order"):
        DataConfig(test=((3.0, 5.0), (4.0, 6.0)))


def test_mirror_images_are_trained_on(film, vae, tmp_path):
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path), mirror=True)
    made = prepare(config, MODEL, vae, [BOX])
    assert [b.mirrored for b in made.blocks] == [False, True, False, True, False, False, True, False, True]
    assert [b.split for b in made.blocks if b.mirrored] == ["train"] * 4
    frames = torch.from_numpy(film_frames())[41:89].flip(2)
    assert torch.equal(made.blocks[3].latents, encode_block(frames, vae))
    assert torch.equal(made.blocks[3].lows[BOX], encode_block(frames, vae, BOX))
    assert not torch.equal(made.blocks[3].latents, made.blocks[2].latents)


def test_enlarged_blocks_are_trained_on(film, vae, tmp_path):
    """A window of the enlarged frames, mirrored too; what is tested comes as it is."""
    config = dataclasses.replace(DATA, videos=(str(film),), cache=str(tmp_path), mirror=True, zooms=(1.5, 2.0))
    made = prepare(config, MODEL, vae, [BOX])
    train = [b for b in made.blocks if b.split == "train"]
    assert [(b.zoom, b.mirrored) for b in train[:6]] == [(z, m) for z in (1.0, 1.5, 2.0) for m in (False, True)]
    assert all(b.zoom == 1.0 and not b.mirrored for b in made.blocks if b.split == "test")
    block = train[2]
    seconds = block.frames / MODEL.fps
    whole = read_clip(film, ClipSpec(round(1.5 * 32), round(1.5 * 64), MODEL.fps, block.start, seconds)).frames
    windows = [whole[:, y : y + 32, x : x + 64] for y in range(17) for x in range(33)]
    row = {"name": "00-000000-x1.5", "zoom": 1.5, "film": str(film), "start": block.start, "frames": block.frames}
    taken = dataset.enlarged(row, MODEL)
    assert any(torch.equal(taken, window) for window in windows)
    assert torch.equal(block.latents, encode_block(taken, vae))
    assert torch.equal(train[3].lows[BOX], encode_block(taken.flip(2), vae, BOX))
    with pytest.raises(ValueError, match="zooms must be greater than 1"):
        DataConfig(zooms=(0.5,))


def test_captions(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("- {start: 0, end: 2, prompt: a rabbit}\n- {start: 2.5, end: 9, prompt: a squirrel}\n")
    captions = read_captions(file)
    each = Block(tmp_path, 1.0, 32, 1, "train", False, 1.0, torch.zeros(1, 8, 1, 1), {})
    latents = dataset.Latents((each,), 0.5, captions)
    # Latent frame k is on screen from 1 + k / 2 seconds on; its middle decides.
    prompts = [latents.prompt(each, k) for k in range(4)]
    assert prompts == ["a rabbit", "a rabbit", "", "a squirrel"]
    for text, says in (
        ("start: 3", "must be a list"),
        ("- {start: 0, end: 1}", r"caption 1: needs \['prompt'\]"),
        ("- {start: 0, end: soon, prompt: x}", "caption 1.end: must be of type float, got 'soon'"),
        ("[", "cannot be read as captions"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=says) as error:
            read_captions(file)
        assert "\n" not in str(error.value) and str(file) in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"videos": ()},
        {"start": -1.0},
        {"block_seconds": 0.0},
        {"test_every": 1},
        {"videos": ("a", "b"), "captions": "c"},
    ],
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match="^DataConfig: .*, got "):
        DataConfig(**wrong)


def test_named_test_stretches_and_mirror_images(film, vae, tmp_path):
    """The test stretch is taken as it is named; training blocks come mirrored too, test blocks do not."""
    first, last = CUTS[3] / 8, CUTS[5] / 8
    config = dataclasses.replace(
        DATA, videos=(str(film),), cache=str(tmp_path), test=((first, last),), mirror=True, block_seconds=30.0
    )
    made = prepare(config, MODEL, vae, [BOX])
    assert [(b.split, round(8 * b.start), b.mirrored) for b in made.blocks] == [
        ("train", 0, False),
        ("train", 0, True),
        ("test", CUTS[3], False),
        ("train", CUTS[5], False),
        ("train", CUTS[5], True),
    ]
    frames = torch.from_numpy(film_frames()[: CUTS[3]]).flip(2)
    expected = encode_block(frames[: made.blocks[1].frames], vae)
    torch.testing.assert_close(made.blocks[1].latents, expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(made.blocks[0].latents, made.blocks[1].latents)


@pytest.mark.parametrize("test", [((5.0, 3.0),), ((1.0, 4.0), (3.0, 6.0))])
def test_test_stretches_must_ascend(test):
    with pytest.raises(ValueError, match="^DataConfig: test must be parts .from, to. in ascending order"):
        DataConfig(test=test)
