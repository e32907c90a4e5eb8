"""Evaluation of retrieval: choice of histories, comparison, means and spreads, and the command."""

import dataclasses
import importlib.util
import json
import statistics
import sys

import pytest
import torch
from paths import ROOT
from tiny_helpers import CONFIG, film, tiny_model

pytest.importorskip("av")

from film_helpers import make_video

from vidmem_model import cli, shipped
from vidmem_model.errors import UserError
from vidmem_model.evaluate import baselines, retrieval
from vidmem_model.evaluate.held_out import HeldOut, RetrievalConfig
from vidmem_model.evaluate.metrics import psnr, ssim
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.learned import TrainedModel
from vidmem_model.model.config import PRESETS, Compression, EncoderConfig
from vidmem_model.model.file import save_model
from vidmem_model.model.memory_model import MemoryModel
from vidmem_model.show import tables
from vidmem_model.train.recipe import read_pretrain
from vidmem_model.vae import load_vae
from vidmem_model.vae.config import VAEConfig
from vidmem_model.video import iter_frames, probe

# The embedded codec is a VAE without weights.


@pytest.fixture
def quick_stlpips(monkeypatch):
    """A stand-in for ST-LPIPS without weights."""
    monkeypatch.setattr(retrieval, "stlpips", lambda a, b: (a.float() - b.float()).abs().mean((1, 2, 3)) / 255)


def test_video_frames_of_latent_positions():
    assert retrieval.latent_positions(9, 1, 4) == [range(0, 1), range(1, 5), range(5, 9)]
    assert retrieval.latent_positions(10, 4, 4) == [range(0, 4), range(4, 8), range(8, 10)]
    assert retrieval.latent_positions(3, 4, 4) == [range(0, 3)]
    assert retrieval.latent_positions(8, 4, 4) == [range(0, 4), range(4, 8)]


def test_compare_takes_the_frames_of_each_position(quick_stlpips):
    truth = film(8)
    read = truth.clone()
    read[:4] = 255 - read[:4]
    read[7, 0, 0, 0] ^= 64
    found = retrieval.compare(read, truth, [range(0, 4), range(4, 8)])
    assert found["psnr"][0] == pytest.approx(statistics.fmean(psnr(read[i], truth[i]) for i in range(4)))
    assert found["ssim"][0] == pytest.approx(statistics.fmean(ssim(read[i], truth[i]) for i in range(4)))
    # Three frames are equal and count as 60 dB, the last has one wrong byte.
    assert found["psnr"][1] == pytest.approx((3 * 60 + psnr(read[7], truth[7])) / 4)
    # ST-LPIPS looks at frames 2 and 6, of which the second is equal.
    assert found["stlpips"] == [
        pytest.approx((read[2].float() - truth[2].float()).abs().mean().item() / 255, rel=1e-5),
        0.0,
    ]


def test_rows_are_means_over_histories_and_positions(quick_stlpips):
    histories = [HeldOut(film(8, seed), "film", 0.0) for seed in (1, 2)]
    positions = [range(0, 4), range(4, 8)]
    row = retrieval.measure_row(lambda h: baselines.mean_frame(h.frames), histories, positions)
    each = [retrieval.compare(baselines.mean_frame(h.frames).frames, h.frames, positions) for h in histories]
    for name in retrieval.MEASURES:
        (a, b), (c, d) = each[0][name], each[1][name]
        assert row[name]["curve"] == pytest.approx([(a + c) / 2, (b + d) / 2])
        assert row[name]["clips"] == pytest.approx([(a + b) / 2, (c + d) / 2])
        assert row[name]["mean"] == pytest.approx((a + b + c + d) / 4)


def test_mean_frame_is_the_mean():
    frames = film(6)
    back = baselines.mean_frame(frames)
    assert back.frames.shape == frames.shape and back.tokens == 0
    assert torch.equal(back.frames[5], frames.double().mean(0).round().to(torch.uint8))


@pytest.mark.parametrize("method", ["dct", "merge"])
def test_training_free_memories_have_the_tokens_asked_for(method):
    frames = film(24)
    # 24 frames of 32x64 have 6 x 2 x 4 patch tokens, which boxes of 2x2x2 make 3 x 1 x 2.
    back = baselines.untrained_memory(method, frames, Compression(2, 2, 2), 48)
    assert (back.tokens, back.width) == (6, 48) and back.frames.shape == frames.shape
    error = [psnr(a, b) for a, b in zip(back.frames, frames, strict=True)]
    wider = baselines.untrained_memory(method, frames, Compression(1, 1, 1), 192)
    assert (wider.tokens, wider.width) == (48, 192)
    better = [psnr(a, b) for a, b in zip(wider.frames, frames, strict=True)]
    assert statistics.fmean(better) > statistics.fmean(error) + 3
    assert CompressorConfig().dtype == "float16"  # as learned tokens are rounded


def test_a_whole_dct_gives_the_frames_back():
    frames = film(8)
    back = baselines.untrained_memory("dct", frames, Compression(1, 1, 1), 3 * 4 * 16 * 16)
    assert (back.frames.int() - frames.int()).abs().max() <= 1


def test_vae_alone_decodes_the_true_latents():
    memory = TrainedModel(tiny_model(), load_vae(VAEConfig(kind="dct", channels=768), None))
    frames = film(10)  # two and a half latent frames: padded, then cropped again
    back = retrieval.read_vae(memory)(HeldOut(frames, "film", 0.0))
    assert (back.frames.int() - frames.int()).abs().max() <= 1


def test_learned_row_asks_for_every_latent_frame_in_order():
    """A model that answers with the frames it is asked for, numbered."""
    memory = TrainedModel(tiny_model(), load_vae(CONFIG.vae, None))
    memory.queries = 3
    asked = []

    def retrieve(tokens, frames, prompts, steps, generator):
        assert len(prompts) == len(frames) == len(tokens.tokens) == len(tokens.positions) and steps == 2
        asked.extend(map(tuple, frames.tolist()))
        return frames[:, None, :, None, None].expand(-1, 8, -1, 4, 8)

    memory.model.retrieve = retrieve
    tokens = memory.remember(memory.encode(film(28)))
    made = memory.retrieve(tokens, list(range(7)), steps=2)
    assert made.shape == (1, 8, 7, 4, 8)
    assert made[0, 0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    # As many frames at a time as asked for, and those far apart.
    assert sorted(asked) == [(0, 3, 6), (1, 4), (2, 5)]
    assert memory.retrieve(tokens, [5, 2], steps=2)[0, 0, :, 0, 0].tolist() == [5, 2]


def table_of(tmp_path, names):
    for name, (seed, encoder) in names.items():
        save_model(tmp_path / name, tiny_model(seed, **encoder))
    return [tmp_path / name for name in names]


def test_table_joins_seeds_and_is_taken_up_again(tmp_path, quick_stlpips, monkeypatch, capfd):
    models = table_of(tmp_path, {"a": (0, {}), "b": (1, {}), "c": (0, {"branches": "hr"})})
    histories = [HeldOut(film(16, 3), "film", 0.0)]
    config = RetrievalConfig(clips=1, history=16, steps=1)
    store = tmp_path / "runs"
    store.mkdir()
    result = retrieval.evaluate_retrieval(models, histories, config, store)
    assert list(result["rows"]) == [
        "without LR 2×2×2",
        "both 2×2×2",
        "dct 2×2×2",
        "merge 2×2×2",
        "mean frame",
        "VAE alone",
    ]
    both = result["rows"]["both 2×2×2"]
    runs = [run["psnr"]["mean"] for run in both["runs"]]
    assert len(set(runs)) == 2
    assert both["psnr"]["mean"] == pytest.approx(sum(runs) / 2)
    assert both["psnr"]["spread"] == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
    assert len(both["psnr"]["curve"]) == 4 and result["rows"]["mean frame"]["psnr"]["spread"] is None
    assert result["rows"]["VAE alone"]["psnr"]["mean"] > max(runs)
    assert [result["rows"][n]["tokens"] for n in ("both 2×2×2", "dct 2×2×2", "merge 2×2×2")] == [4, 4, 4]
    assert [result["rows"][n]["width"] for n in ("both 2×2×2", "dct 2×2×2", "merge 2×2×2")] == [48, 48, 48]
    json.dumps(result, allow_nan=False)
    markdown = tables.retrieval_markdown(result).splitlines()
    assert len(markdown) == 8 and markdown[3].startswith("| both 2×2×2 | 4 | 2 | ") and " ± " in markdown[3]
    monkeypatch.setenv("COLUMNS", "40")
    tables.print_retrieval(result)
    shown = capfd.readouterr().out
    assert all(cell.strip() in shown for line in markdown[2:] for cell in line.split("|")) and "…" not in shown
    monkeypatch.setattr(retrieval, "measure_row", lambda *_: pytest.fail("was measured before"))
    assert retrieval.evaluate_retrieval(models, histories, config, store) == result


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_rounded_model_has_a_row_of_its_own(tmp_path, quick_stlpips, dtype):
    models = table_of(tmp_path, {"a": (0, {}), "b": (1, {})})
    rounded = save_model(tmp_path / "c", tiny_model(0), dtype=dtype)
    histories = [HeldOut(film(16, 3), "film", 0.0)]
    config = RetrievalConfig(clips=1, history=16, steps=1)
    rows = retrieval.evaluate_retrieval([rounded, *models], histories, config)["rows"]
    assert list(rows)[:2] == ["both 2×2×2", f"both 2×2×2, {dtype}"]
    assert [len(rows[name]["runs"]) for name in list(rows)[:2]] == [2, 1]
    exact, after = (rows[name]["runs"][0]["psnr"]["mean"] for name in list(rows)[:2])
    assert exact != after and after == pytest.approx(exact, abs=0.5)


def test_models_of_other_sizes_are_not_mixed(tmp_path, quick_stlpips):
    (first,) = table_of(tmp_path, {"a": (0, {})})
    encoder = EncoderConfig(Compression(2, 2, 2), "patchifier")
    other = MemoryModel(dataclasses.replace(CONFIG, height=64, encoders=(encoder,)))
    save_model(tmp_path / "other", other)
    with pytest.raises(UserError, match="other: differs from .*a in VAE, frame size or rate"):
        retrieval.evaluate_retrieval(
            [first, tmp_path / "other"], [HeldOut(film(8), "f", 0.0)], RetrievalConfig(1, 8, 1)
        )


def test_command_without_models(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(shipped, "CHECKPOINTS", tmp_path)
    assert cli.main(["evaluate", "retrieval"]) == 2
    assert "this installation of vidmem ships no model; give --model or --table" in capfd.readouterr().err
    assert cli.main(["evaluate", "retrieval", "--table", str(tmp_path)]) == 2
    assert "has no subfolder with a model.safetensors" in capfd.readouterr().err


def test_by_default_the_shipped_model_on_what_it_was_not_trained_on(tmp_path, quick_stlpips, capfd, monkeypatch):
    """Histories come from the held-out parts of the model's training video, and no other part is decoded."""
    video = make_video(tmp_path / "film.mp4", frames=120)
    length = probe(video).duration
    test = [[0.25 * length, 0.5 * length], [0.75 * length, length]]
    data = {"videos": [str(video)], "test": test, "shortest": 2, "mirror": True, "zooms": [2.0]}
    save_model(tmp_path / "demo.safetensors", tiny_model(), {"training": {"data": data, "sampling": {"history": 2}}})
    monkeypatch.setattr(shipped, "CHECKPOINTS", tmp_path)
    decoded = []
    seen = lambda v, spec: decoded.append(spec) or iter_frames(v, spec)  # noqa: E731
    monkeypatch.setattr("vidmem_model.train.blocks.iter_frames", seen)
    found = tmp_path / "found.json"
    assert cli.main(["evaluate", "retrieval", "--steps", "1", "--clips", "20", "--json", str(found)]) == 0
    assert "both 2×2×2" in capfd.readouterr().out
    starts = [clip["start_seconds"] for clip in json.loads(found.read_text())["clips"]]
    spans = [(start, start + 8 / CONFIG.fps) for start in starts]
    assert len(spans) >= 2
    assert all(any(a <= first and last <= b + 0.2 for a, b in test) for first, last in spans)
    assert all(any(a <= spec.start < b for a, b in test) for spec in decoded)


def test_command(tmp_path, quick_stlpips, capfd):
    pytest.importorskip("matplotlib")
    video = make_video(tmp_path / "film.mp4", frames=48)
    (model,) = table_of(tmp_path, {"a": (0, {})})
    out = {name: tmp_path / f"out.{name}" for name in ("json", "png", "md")}
    arguments = ["evaluate", "retrieval", "--model", model, "--video", video, "--clips", 2, "--history", 8]
    arguments += ["--steps", 1, "--json", out["json"], "--plot", out["png"], "--markdown", out["md"]]
    assert cli.main(list(map(str, arguments))) == 0
    result = json.loads(out["json"].read_text())
    assert [clip["start_seconds"] for clip in result["clips"]] == sorted({c["start_seconds"] for c in result["clips"]})
    assert len(result["clips"]) == 2 and result["config"]["history"] == 8
    shown = capfd.readouterr().out
    for row in out["md"].read_text(encoding="utf-8").splitlines()[2:]:
        name, value = row.split(" | ")[0].strip("| "), row.split(" | ")[3]
        assert name in shown and value in shown
    assert out["png"].read_bytes()[:4] == b"\x89PNG"


def test_an_interrupt_keeps_what_was_measured(tmp_path, quick_stlpips, monkeypatch, capfd):
    video = make_video(tmp_path / "film.mp4", frames=24)
    (model,) = table_of(tmp_path, {"a": (0, {})})
    found = tmp_path / "out.json"
    arguments = ["evaluate", "retrieval", "--model", model, "--video", video, "--clips", 1, "--history", 8]
    arguments = [*map(str, arguments), "--steps", "1"]
    measure, calls, stop_at = retrieval.measure_row, [], 3

    def interrupted(*given):
        calls.append(given)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(retrieval, "measure_row", interrupted)
    assert cli.main([*arguments, "--json", str(found)]) == 130
    said = f"vidmem: interrupted; results so far are kept in {found}.parts; run the same command again to resume\n"
    assert capfd.readouterr().err.splitlines(keepends=True)[-1] == said
    parts = tmp_path / "out.json.parts"
    assert len(list(parts.iterdir())) == 2 and not found.exists()
    (parts / "mine.txt").write_text("of the user")
    stop_at = 0
    assert cli.main([*arguments, "--json", str(found)]) == 0
    assert len(calls) == 3 + 3, "of five rows two were kept"
    assert [path.name for path in parts.iterdir()] == ["mine.txt"]
    assert len(json.loads(found.read_text())["rows"]) == 5
    calls.clear()
    stop_at = 1
    assert cli.main(arguments) == 130
    assert capfd.readouterr().err.endswith("vidmem: interrupted; nothing was written\n")


@pytest.fixture(scope="module")
def table_script():
    path = ROOT / "benchmarks" / "retrieval_table.py"
    spec = importlib.util.spec_from_file_location("retrieval_table", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["retrieval_table"] = module
    spec.loader.exec_module(module)
    return module


def test_recipes_of_the_table(table_script, tmp_path):
    (tmp_path / "mine").mkdir()
    base, captions = tmp_path / "mine" / "base.yaml", tmp_path / "mine" / "said.yaml"
    captions.write_text("")
    base.write_text("model: tiny\noutput: elsewhere\ndata: {captions: said.yaml}\noptimisation: {steps: 7, lr: 3e-4}\n")
    recipes = table_script.write_recipes(base, tmp_path, table_script.ROWS)
    assert len(recipes) == 4 * 3 + 2 and [r.stem[-1] for r in recipes] == list("00000011112222")
    for recipe in recipes:
        config = read_pretrain(recipe)
        (encoder,) = config.model.encoders
        assert recipe.stem == f"{encoder.branches}-{encoder.compression}-seed{config.optimisation.seed}"
        assert encoder.channels == PRESETS["tiny"].encoders[0].channels
        assert config.output == str(tmp_path / recipe.stem) and config.data.captions == str(captions)
        assert (config.optimisation.steps, config.optimisation.lr, config.optimisation.threads) == (7, 3e-4, 1)
    assert table_script.write_recipes(base, tmp_path, table_script.ROWS) == recipes
    base.write_text("model: tiny\noutput: elsewhere\noptimisation: {steps: 8}\n")
    with pytest.raises(SystemExit, match="differs from"):
        table_script.write_recipes(base, tmp_path, table_script.ROWS)


def test_training_skips_what_is_finished_and_tells_what_failed(table_script, tmp_path, monkeypatch):
    monkeypatch.setattr(table_script.sys, "executable", "/bin/false")
    done, failing = tmp_path / "done.yaml", tmp_path / "failing.yaml"
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "model.safetensors").touch()
    table_script.train_all([done], jobs=2)
    with pytest.raises(SystemExit, match="failing.yaml: training failed with code 1; see .*failing.log"):
        table_script.train_all([done, failing], jobs=2)


def test_page_is_filled_again_and_again(table_script, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(table_script.PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    begin, end = "<!-- retrieval:begin -->\n", "<!-- retrieval:end -->\n"
    before, after = page.read_text(encoding="utf-8").split(begin)
    for table in ("| a |\n", "| b |\n"):
        table_script.fill_page(page, table)
    assert page.read_text(encoding="utf-8") == f"{before}{begin}\n| b |\n\n{end}" + after.split(end)[1]
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="page.md: the page must have the lines <!-- retrieval:begin -->"):
        table_script.fill_page(page, "")
