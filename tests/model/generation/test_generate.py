"""Generation segment by segment: content of the memory, interrupt and resume, and refused settings."""

import dataclasses
import json

import pytest
import torch

from vidmem_model import cli
from vidmem_model.errors import UserError
from vidmem_model.generation.generator import GenerateConfig, SegmentGenerator, generate
from vidmem_model.generation.history import context_per_second
from vidmem_model.generation.storyboard import Shot, Storyboard
from vidmem_model.model.config import PRESETS, Compression, EncoderConfig, ModelConfig
from vidmem_model.model.encoder import History, count_tokens, low_resolution
from vidmem_model.model.file import save_model
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.vae import DCTCodec, frames_to_float, load_vae
from vidmem_model.vae.config import VAEConfig
from vidmem_model.video import probe, read_clip
from vidmem_model.video.clip import ClipSpec
from vidmem_model.video.write import video_writer

BOARD = Storyboard((Shot(0, "a fox"), Shot(4, "a lake")))
CONFIG = GenerateConfig(seconds=8.5, steps=2, seed=3)  # 68 frames: 17 latent frames, 3 segments of 6


def tiny(**changes) -> ModelConfig:
    tiny = PRESETS["tiny"]
    dit = dataclasses.replace(tiny.dit, **changes.pop("dit", {}))
    return dataclasses.replace(tiny, dit=dit, **changes)


def build(config: ModelConfig):
    """A model and a VAE whose weights are all random, also those that are initialised to zero."""
    torch.manual_seed(1)
    model, vae = MemoryModel(config).eval(), load_vae(config.vae)
    for part in (model, vae):
        for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
            parameter.requires_grad_(False)
    return model, vae


@pytest.fixture(scope="module")
def parts():
    return build(tiny())


def make(parts, path, config=CONFIG, board=BOARD, **more):
    """Generate; the report, and the latents of all segments."""
    made, kept = {}, SegmentGenerator.take_in

    def watch(self, latents):
        made[len(made)] = latents.clone()
        return kept(self, latents)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SegmentGenerator, "take_in", watch)
        report = generate(board, *parts, path, config, **more)
    return report, torch.cat(list(made.values()), 2)


def test_the_memory_grows_by_the_same_number_each_segment(parts, tmp_path):
    seen = []
    report, latents = make(parts, tmp_path / "a.mp4", progress=seen.append)
    # 6 latent frames of 2 x 4 patch tokens a segment, at 2 x 2 x 2: 3 x 1 x 2 tokens.
    assert report["memory_tokens"] == [0, 6, 12, 18]
    assert report["window_tokens"] == [0, 24, 24, 24]
    assert report["context_per_second"] == context_per_second(Compression(2, 2, 2), 32, 64, 8.0) == 2.0
    assert (report["segments"], report["frames"], latents.shape[2]) == (3, 68, 18)
    assert [(p.segment, p.step, p.context) for p in seen] == [
        (1, 1, 0), (1, 2, 0), (2, 1, 30), (2, 2, 30), (3, 1, 36), (3, 2, 36)
    ]  # fmt: skip
    assert [p.seconds for p in seen[::2]] == [0, 3, 6]
    info = probe(tmp_path / "a.mp4")
    assert (info.frames, info.width, info.height, info.fps) == (68, 64, 32, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_the_video_shows_what_was_made(parts, tmp_path):
    _, latents = make(parts, tmp_path / "a.mp4")
    _, vae = parts
    frames = vae.decode(vae.unscale(latents))[0, :, :68].clamp(-1, 1)
    shown = frames_to_float(read_clip(tmp_path / "a.mp4", ClipSpec(None, None, None, seconds=None)).frames)[0]
    assert shown.shape == frames.shape
    # yuv420p keeps brightness; the colours of random weights are as sharp as noise.
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1, 1)
    luma, shown = (frames * weights).sum(0), (shown * weights).sum(0)
    assert (luma - shown).square().mean() < 0.01 * luma.var()


@pytest.mark.parametrize(
    "encoders",
    [
        PRESETS["tiny"].encoders,
        # At 2 x 2 x 8 a segment fills no box, and its low-resolution video no latent frame.
        (
            EncoderConfig(Compression(8, 2, 2), channels=(8, 16), heads=2),
            EncoderConfig(Compression(2, 1, 1), branches="lr"),
        ),
        (EncoderConfig(Compression(2, 2, 2), branches="patchifier"),),
    ],
    ids=["both", "two", "patchifier"],
)
def test_appended_memory_is_that_of_the_whole_history(encoders):
    model, vae = build(tiny(encoders=encoders))
    generator = SegmentGenerator(model, vae, CONFIG)
    parts = [generator.make("a fox", 0, lambda _: None)]
    frames = list(generator.take_in(parts[0]))
    for number in (1, 2):
        parts.append(generator.make("a fox", number, lambda _: None))
        frames += generator.take_in(parts[-1])
    clip = frames_to_float(torch.cat(frames))
    assert clip.shape == (1, 3, 72, 32, 64)
    lows = []
    for config in encoders:
        small = low_resolution(clip, config.compression)
        small = small[:, :, : small.shape[2] // 4 * 4]
        small = torch.nn.functional.pad(small, (0, -small.shape[4] % 16, 0, -small.shape[3] % 16, 0, 0), "replicate")
        lows.append(vae.scale(vae.encode(small)))
    whole = model.remember(History(torch.cat(parts, 2), lows))
    appended = generator.memory.tokens
    torch.testing.assert_close(appended.positions, whole.positions, rtol=0, atol=0)
    torch.testing.assert_close(appended.tokens, whole.tokens, rtol=1e-4, atol=1e-5)
    expected = sum(count_tokens(e, model.config.vae, 72, 32, 64) for e in encoders)
    assert appended.tokens.shape[1] == expected == generator.context[0]


def test_a_stopped_run_goes_on_to_the_same_video(parts, tmp_path):
    _, latents = make(parts, tmp_path / "whole.mp4")
    path, folder = tmp_path / "a.mp4", tmp_path / "a.mp4.parts"

    def stop(progress):
        if progress.segment == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(parts, path, progress=stop)
    assert not path.exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "segment-00000.safetensors", "segment-00001.safetensors", "settings.json"
    ]  # fmt: skip
    for change, message in [
        ({"steps": 3}, r"another steps \(2, this run has 3\)"),
        ({"guidance": 2.0}, r"another guidance \(1.0, this run has 2.0\)"),
        ({"seconds": 9.0}, r"another frames \(68, this run has 72\)"),
    ]:
        with pytest.raises(UserError, match=message):
            make(parts, path, dataclasses.replace(CONFIG, **change))
    with pytest.raises(UserError, match="another storyboard; give the same settings to resume, or --restart"):
        make(parts, path, board=Storyboard((Shot(0, "a dog"),)))
    with pytest.raises(UserError, match="another model;"):
        make((build(tiny(dit={"depth": 1}))[0], parts[1]), path)

    seen = []
    report, again = make(parts, path, progress=seen.append)
    assert torch.equal(again, latents)
    assert report["segments_found"] == 2 and {p.segment for p in seen} == {3}
    assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    assert not folder.exists()


def test_restart_forgets_what_was_made(parts, tmp_path):
    path = tmp_path / "a.mp4"

    def stop(progress):
        if progress.segment == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(parts, path, progress=stop)
    report, _ = make(parts, path, dataclasses.replace(CONFIG, steps=1), restart=True)
    assert report["segments_found"] == 0


def test_what_latents_depend_on(parts, tmp_path):
    path = tmp_path / "a.mp4"
    _, first = make(parts, path)
    assert torch.equal(make(parts, path)[1], first)

    def differ(config=CONFIG, board=BOARD):
        other = make(parts, path, config, board)[1]
        return [not torch.equal(a, b) for a, b in zip(other.split(6, 2), first.split(6, 2), strict=True)]

    assert differ(dataclasses.replace(CONFIG, seed=4)) == [True, True, True]
    assert differ(dataclasses.replace(CONFIG, guidance=3.0)) == [True, True, True]
    # Without clean frames the first segment is the same; the others have only the memory.
    assert differ(dataclasses.replace(CONFIG, window=0)) == [False, True, True]
    # The middles of the segments are at 1.5, 4.5 and 7.5 s: the shot nearest to each holds.
    assert differ(board=Storyboard((Shot(0, "a fox"), Shot(3.5, "a lake")))) == [False, False, False]
    assert differ(board=Storyboard((Shot(0, "a fox"), Shot(3.5, "a lake"), Shot(6, "snow")))) == [False, False, True]
    # The segments' noises are not each other's.
    assert not torch.allclose(first[:, :, :6], first[:, :, 6:12], atol=0.1)


def test_guidance_moves_away_from_no_prompt(parts):
    model, vae = parts

    def sample(guidance, prompt):
        config = dataclasses.replace(CONFIG, guidance=guidance, steps=1)
        return SegmentGenerator(model, vae, config).make(prompt, 0, lambda _: None)

    with_prompt, without = sample(1.0, "a fox"), sample(1.0, "")
    torch.testing.assert_close(sample(0.0, "a fox"), without)
    torch.testing.assert_close(sample(2.5, "a fox"), without + 2.5 * (with_prompt - without), rtol=1e-4, atol=1e-5)


def test_kept_keys_and_values_change_nothing_where_the_history_does_not_see_the_video(parts, tmp_path):
    kept = make(parts, tmp_path / "a.mp4")[1]
    anew = make(parts, tmp_path / "a.mp4", dataclasses.replace(CONFIG, kv_cache=False))[1]
    torch.testing.assert_close(kept, anew, rtol=1e-4, atol=1e-5)


def test_cross_attention_is_a_switch(parts, tmp_path):
    with pytest.raises(UserError, match="no cross-attention to the memory"):
        make(parts, tmp_path / "a.mp4", dataclasses.replace(CONFIG, cross_attention=True))
    model, vae = build(tiny(dit={"memory_cross_attention": True}))
    on = make((model, vae), tmp_path / "a.mp4")[1]
    off = make((model, vae), tmp_path / "a.mp4", dataclasses.replace(CONFIG, cross_attention=False))[1]
    assert model.dit.config.memory_cross_attention
    assert torch.equal(on[:, :, :6], off[:, :, :6])  # there is no memory yet
    assert not torch.equal(on[:, :, 6:], off[:, :, 6:])
    for block in model.dit.blocks:
        block.memory_attention.gate.zero_()
    torch.testing.assert_close(make((model, vae), tmp_path / "a.mp4")[1], off)


def test_a_filmed_history_is_continued(tmp_path):
    config = tiny(vae=VAEConfig("dct", channels=8))
    model, vae = build(config)
    assert isinstance(vae, DCTCodec)
    film = (torch.rand(27, 32, 64, 3) * 255).to(torch.uint8)
    with video_writer(tmp_path / "film.mp4", 8) as write:
        write(film)
    seen = read_clip(tmp_path / "film.mp4", ClipSpec(32, 64, 8, seconds=None)).frames

    generator = SegmentGenerator(model, vae, CONFIG)
    generator.start_from(seen)
    # 27 frames are 6 latent frames; the first three fill none.
    latents = vae.scale(vae.encode(frames_to_float(seen[3:])))
    assert generator.frames == 6
    torch.testing.assert_close(generator.window, latents[:, :, 3:])
    low = vae.scale(vae.encode(low_resolution(frames_to_float(seen[3:]), Compression(2, 2, 2))))
    torch.testing.assert_close(generator.memory.tokens.tokens, model.remember(History(latents, [low])).tokens)

    start = dataclasses.replace(CONFIG, start=tmp_path / "film.mp4", seconds=3.0)
    report, made = make((model, vae), tmp_path / "a.mp4", start)
    assert report["memory_tokens"] == [6, 12] and report["window_tokens"] == [24, 24]
    assert (report["frames"], report["history_latent_frames"]) == (24, 6)
    torch.testing.assert_close(made, generator.make("a fox", 0, lambda _: None))
    with pytest.raises(UserError, match="--start must be a video of at least 4 frames, got 3"):
        SegmentGenerator(model, vae, CONFIG).start_from(seen[:3])


def test_a_first_latent_frame_of_one_frame():
    """With VAEs whose first latent frame covers a single frame, streams stay aligned with the low-resolution video."""
    model, vae = build(tiny(encoders=(EncoderConfig(Compression(4, 2, 2), channels=(8, 16), heads=2),)))

    class First(type(vae)):
        def encode(self, frames, cache=None):
            begun = cache is not None and cache.setdefault("begun", False)
            lead = 0 if begun else 3
            cache is not None and cache.update(begun=True)
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, lead, -1, -1), frames], 2)
            return super().encode(frames, cache)

        def decode(self, latents, cache=None):
            begun = cache is not None and cache.setdefault("begun", False)
            cache is not None and cache.update(begun=True)
            return super().decode(latents, cache)[:, :, 0 if begun else 3 :]

    vae.__class__, vae.first_frames, made = First, 1, []
    generator = SegmentGenerator(model, vae, CONFIG)
    frames = []
    for number in range(3):
        made.append(generator.make("", number, lambda _: None))
        frames += generator.take_in(made[-1])
    clip = frames_to_float(torch.cat(frames))
    assert clip.shape[2] == vae.video_frames(18) == 69
    low = low_resolution(clip, Compression(4, 2, 2))
    low = vae.scale(vae.encode(low[:, :, : 1 + (low.shape[2] - 1) // 4 * 4]))
    whole = model.remember(History(torch.cat(made, 2), [low]))
    assert whole.tokens.shape[1] == 4 * 2
    torch.testing.assert_close(generator.memory.tokens.tokens, whole.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("compression", "by_area", "whole_boxes"),
    [
        (Compression(2, 4, 4), 195, 182),
        (Compression(2, 2, 2), 780, 780),
        (Compression(4, 2, 2), 390, 390),
        (Compression(1, 2, 2), 1560, 1560),
        (Compression(8, 2, 2), 195, 195),
        (Compression(1, 1, 1), 6240, 6240),
    ],
)
def test_context_per_second_at_the_true_size(compression, by_area, whole_boxes):
    assert context_per_second(compression, 480, 832, 16) == by_area
    assert context_per_second(compression, 480, 832, 16, whole_boxes=True) == whole_boxes
    assert count_tokens(EncoderConfig(compression), VAEConfig(), 16 * 8, 480, 832) == 8 * whole_boxes
    assert context_per_second(Compression(2, 4, 4), 480, 832, 16, (4, 16, 16)) == 195 / 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"segment": 0}, "segment must be positive"),
        ({"seed": -1}, "seed must not be negative"),
        ({"window": -1}, "window must not be negative"),
        ({"seconds": 0.0}, "seconds must be positive"),
        ({"shift": float("nan")}, "shift must be positive"),
        ({"guidance": float("inf")}, "guidance must not be negative"),
    ],
)
def test_configurations_out_of_range(values, message):
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**values)


def test_the_command(parts, tmp_path, capsys):
    model, vae = parts
    save_model(tmp_path, model)
    from safetensors.torch import save_file

    save_file(vae.state_dict(), tmp_path / "vae.safetensors")
    board = tmp_path / "board.yaml"
    board.write_text("shots:\n  - {at: 0, prompt: a fox}\n  - {at: 4, prompt: a lake}\n")
    out, report = tmp_path / "a.mp4", tmp_path / "a.json"
    common = ["generate", str(board), "-o", str(out), "--model", str(tmp_path), "--steps", "2", "--device", "cpu"]
    assert cli.main(common) == 2
    assert "the length of the video is missing; give --seconds" in capsys.readouterr().err
    assert cli.main([*common, "--seconds", "0"]) == 2
    assert "seconds must be positive, got 0" in capsys.readouterr().err
    assert cli.main([*common, "--seconds", "8.5", "--seed", "3", "--report", str(report)]) == 0
    assert "in 3 segments" in (said := capsys.readouterr().out) and "memory 0 -> 18 tokens, 2 tokens/s" in said
    assert json.loads(report.read_text())["memory_tokens"] == [0, 6, 12, 18]
    make(parts, tmp_path / "b.mp4")
    assert out.read_bytes() == (tmp_path / "b.mp4").read_bytes()
    board.write_text("shots:\n  - {at: 0, prompt: }\n")
    assert cli.main(common) == 2
    assert capsys.readouterr().err == f"vidmem: error: {board}:2:20: prompt must not be empty\n"
