"""The cost of a model's parts: exact token and byte counts, the order of peaks, skipped points."""

import dataclasses
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from vidmem_model.cli import main
from vidmem_model.errors import UserError
from vidmem_model.measure import model as cost
from vidmem_model.measure import repeat
from vidmem_model.measure.model import CostPoint, profile_model
from vidmem_model.measure.parts import ENCODED, EVERY, PARTS, STRATEGIES, CostConfig, StrategyBench, tensor_bytes
from vidmem_model.model.config import PRESETS
from vidmem_model.show import plots as report
from vidmem_model.show.cost import write_cost_plot

TINY = PRESETS["tiny"]
MIB = 2**20
SHORT, LONG = 4.0, 400.0


def measure():
    repeat._SLOW_SECONDS = 0.01
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine hide what a call costs
    seen = []
    # 100 times the length is not to be judged by the noise of a call of milliseconds.
    config = CostConfig(TINY, (LONG, SHORT), max_seconds=1e6)
    result = profile_model(config, "tiny", progress=lambda *call: seen.append(call))
    return result, seen


@pytest.fixture(scope="module")
def measured():
    """The tiny model at 4 and 400 seconds: 8 and 800 latent frames of 8 patch tokens.

    In a process of its own, as the command has one: the heap that other tests leave in pieces adds to the
    peak of many small allocations (VAE encode at 400 s: 2 MiB in a fresh process, 9 to 14 in a used one).
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure).result()


def of(result, part, strategy, seconds=LONG):
    (point,) = (p for p in result["points"] if (p["part"], p["strategy"], p["seconds"]) == (part, strategy, seconds))
    return point


def test_counts_of_the_paper():
    """20 s at 24 fps and 480x832: 187,200 tokens, 5,460 at the rate 4x4x2; a quarter of them at 2x2x8."""
    wan = dataclasses.replace(PRESETS["wan-1.3b"], fps=24.0)
    config = CostConfig(wan, window_frames=8)
    frames = config.latent_frames(20)
    assert frames == 120 and config.frame_tokens == 1560
    assert (
        config.context_tokens("whole history", frames) == config.context_tokens("linear attention", frames) == 187_200
    )
    assert config.context_tokens("sliding window", frames) == 8 * 1560
    assert config.memory_tokens(frames) == 5_460
    assert config.context_tokens("compressed memory", frames) == 5_460 + 3 * 1560
    assert config.context_tokens("merged", 2) == 91 + 2 * 1560


def test_every_part_of_every_strategy_is_measured(measured):
    result, seen = measured
    expected = [("VAE encode", EVERY, s) for s in (SHORT, LONG)]
    for strategy in STRATEGIES:
        parts = PARTS[1:] if strategy in ENCODED else PARTS[3:]
        expected += [(part, strategy, s) for part in parts for s in (SHORT, LONG)]
    assert [(p["part"], p["strategy"], p["seconds"]) for p in result["points"]] == expected
    assert result["skipped"] == []
    assert seen[-1][1:] == (2 * len(expected), 2 * len(expected))
    assert [call[1] for call in seen] == list(range(2 * len(expected) + 1))
    names = {field.name for field in dataclasses.fields(CostPoint)}
    assert all(set(p) == names and p["call_seconds"] > 0 and p["repeats"] >= 1 for p in result["points"])
    assert result["format"] == "vidmem.model_cost" and result["model"] == "tiny"
    assert result["depth"] == result["depth_of_model"] == 2 and result["next_step_is_exact"]
    assert result["config"]["model"]["dit"]["dim"] == 48 and result["config"]["dtype"] == "float32"
    assert json.loads(json.dumps(result, allow_nan=False))["device"]["type"] == "cpu"


def test_tokens_and_kept_bytes_are_exact(measured):
    result, _ = measured
    tokens = {s: of(result, "first step", s)["context_tokens"] for s in STRATEGIES}
    # 800 frames of 2x4 patch tokens; boxes of 2x2x2 of them; beside memory 3 clean frames.
    memory = 400 * 1 * 2
    assert tokens == {
        "whole history": 6400,
        "sliding window": 64,
        "merged": memory + 24,
        "linear attention": 6400,
        "compressed memory": memory + 24,
    }
    assert of(result, "memory encode", "merged")["context_tokens"] == memory
    assert of(result, "append", "compressed memory")["context_tokens"] == 2 * 1 * 2
    dim, heads, depth = TINY.dit.dim, TINY.dit.heads, TINY.dit.depth
    for strategy in set(STRATEGIES) - {"linear attention"}:
        for part in ("first step", "next step"):
            assert of(result, part, strategy)["held_bytes"] == 2 * depth * dim * 4 * tokens[strategy]
    head = dim // heads
    assert of(result, "next step", "linear attention")["held_bytes"] == depth * heads * head * (head + 1) * 4
    # The VAE's latents of 800 frames of 4x8 cells.
    assert of(result, "VAE encode", EVERY)["held_bytes"] == 800 * 4 * 8 * TINY.vae.channels * 4


def test_what_the_encoders_make_has_the_computed_size():
    for strategy in ENCODED:
        bench = StrategyBench(CostConfig(TINY, dtype="float32"), strategy, torch.device("cpu"))
        parts = {name: (inputs, call) for name, inputs, call in bench.parts()}
        inputs, call = parts["memory encode"]
        (made,) = call(inputs(21))
        assert made.tokens.shape == (1, bench.config.memory_tokens(21), TINY.dit.dim)
        assert tensor_bytes(made) == made.tokens.numel() * 4 + made.positions.numel() * 4


def test_peaks_are_ordered_as_the_contexts_are(measured):
    result, _ = measured
    first = {s: of(result, "first step", s)["peak_bytes"] for s in STRATEGIES}
    following = {s: of(result, "next step", s)["peak_bytes"] for s in STRATEGIES}
    assert first["sliding window"] < first["compressed memory"] < first["whole history"]
    assert min(first["whole history"], first["linear attention"]) > 2 * max(first[s] for s in ENCODED)
    assert following["whole history"] > following["compressed memory"] > following["linear attention"]
    # Keys and values of the whole history, 4.7 MiB, are held; the linear state is not 0.1.
    assert following["whole history"] > 4.6 * MIB > 4 * following["linear attention"]
    short = of(result, "first step", "sliding window", SHORT)["peak_bytes"]
    assert first["sliding window"] < short + MIB
    # Video arrives chunk by chunk: a hundred times the film adds its latents, 0.8 MiB, and little more.
    assert (
        of(result, "VAE encode", EVERY)["peak_bytes"] < of(result, "VAE encode", EVERY, SHORT)["peak_bytes"] + 6 * MIB
    )


def test_compressed_memory_is_faster_and_appends_at_a_constant_cost(measured):
    result, _ = measured
    assert (
        of(result, "first step", "whole history")["call_seconds"]
        > of(result, "first step", "compressed memory")["call_seconds"]
    )
    append = of(result, "append", "compressed memory"), of(result, "append", "compressed memory", SHORT)
    # What is kept for the next segment does not grow with the history: the attention has a window.
    assert append[0]["held_bytes"] == append[1]["held_bytes"]


def test_what_would_not_fit_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(cost, "free_bytes", lambda device: 4 * MIB)
    result = profile_model(CostConfig(TINY, (SHORT, LONG)), strategies=["whole history", "sliding window"])
    left_out = {(s["part"], s["strategy"], s["seconds"]): s["reason"] for s in result["skipped"]}
    assert left_out.keys() >= {("first step", "whole history", LONG), ("next step", "whole history", LONG)}
    assert left_out["first step", "whole history", LONG].startswith(
        "takes about 0.0 GiB, with a margin of 30% 0.0 GiB, and 0.0 GiB are free"
    )
    assert of(result, "next step", "sliding window")["context_tokens"] == 64
    assert of(result, "first step", "whole history", SHORT)["context_tokens"] == 64


def test_a_model_of_which_all_is_left_out(monkeypatch, tmp_path, capfd):
    """The line says by which rule: what is free may be more than what it takes, but not with the margin."""
    from vidmem_model import cli

    need = 2 * MIB
    monkeypatch.setattr(cost, "_check_weights", lambda *_: None)
    monkeypatch.setattr(cost, "_too_much", lambda *_: "takes too much")
    out = tmp_path / "out"
    assert cli.main(["profile", "--model", "tiny", "-o", str(out), "--lengths", "1,2"]) == 0
    shown, err = capfd.readouterr()
    assert "nothing was measured: every part at every length was left out" in shown and err == ""
    assert "Time of one call" not in shown and "model_cost.png" not in shown
    assert [path.name for path in out.iterdir()] == ["model_cost.json"]
    monkeypatch.undo()
    monkeypatch.setattr(cost, "free_bytes", lambda device: int(1.2 * need))
    point = CostPoint("first step", "sliding window", SHORT, 4, 64, 64, 0, need, 0.1, 0.1, 0.1, 1)
    said = cost._too_much(CostConfig(TINY, (SHORT,)), "first step", "sliding window", point, SHORT, torch.device("cpu"))
    assert "GiB, with a margin of 30% " in said and said.endswith(" GiB are free")


@pytest.mark.sample(1)
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [1, 3, 9, 12, 17])
def test_an_interrupt_keeps_what_was_measured(monkeypatch, stop, at):
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.0)
    told = []

    def tell(what, done, total):
        told.append(what)
        if len(told) == at + 1:
            raise stop

    config, strategies = CostConfig(TINY, (SHORT, LONG)), ["sliding window", "compressed memory"]
    with pytest.raises(stop):
        profile_model(config, strategies=strategies, progress=tell)
    told.clear()
    stops = []
    result = profile_model(config, strategies=strategies, progress=tell, interrupts=stops)
    assert [type(each) for each in stops] == [stop]
    missing = {(each["what"], each["part"], each["strategy"], each["seconds"]) for each in result["missing"]}
    total = 2 * 2 * (1 + 2 + 4)  # memory and time of two lengths
    assert len(missing) == len(result["missing"]) == total - at
    for point in result["points"]:
        assert ("memory", point["part"], point["strategy"], point["seconds"]) not in missing


def test_slow_calls_are_left_out_and_out_of_memory_is_told(monkeypatch):
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.0)
    config = CostConfig(TINY, (SHORT, LONG), max_seconds=1e-6)
    result = profile_model(config, strategies=["linear attention"])
    for part in ("VAE encode", "first step", "next step"):
        shortest, longer = (s["reason"] for s in result["skipped"] if s["part"] == part)
        assert "s per call, more than the limit of 1e-06 s" in shortest and (
            part == "next step" or "a shorter history" in longer
        )
    assert result["points"] == []

    # A call of the shortest history is timed, and tells that the longest would take too long.
    monkeypatch.setattr(cost, "timed", lambda work, device: 1.0 + 0 * bool(work()))
    config = CostConfig(TINY, (SHORT, LONG), max_seconds=5.0)
    result = profile_model(config, strategies=["linear attention"])
    assert [s["reason"] for s in result["skipped"] if s["part"] == "first step"] == [
        "takes about 67 s per call, more than the limit of 5 s"
    ]
    monkeypatch.undo()
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.0)

    def fails(self, *given):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate ...")

    monkeypatch.setattr(StrategyBench, "_step", fails)
    result = profile_model(CostConfig(TINY, (SHORT,)), strategies=["sliding window"])
    assert {s["reason"] for s in result["skipped"]} == {"ran out of memory"}
    monkeypatch.setattr(cost, "free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="the weights of 1 blocks take .* give a smaller --depth"):
        profile_model(CostConfig(TINY, (SHORT,), depth=1))


def test_plot_is_written(measured, tmp_path):
    pytest.importorskip("matplotlib")
    write_cost_plot(tmp_path / "cost.png", measured[0])
    assert (tmp_path / "cost.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_key_of_the_plot_names_what_is_drawn(measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    keys, panels = [], []
    monkeypatch.setattr(Figure, "legend", lambda _, handles, **__: keys.append([h.get_label() for h in handles]))
    title = Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axes, part, **way: panels.append(part) or title(axes, part, **way))
    result = measured[0]
    write_cost_plot(tmp_path / "cost.png", result)
    known = [p for p in result["points"] if p["part"] != "VAE encode" and p["strategy"] != "merged"]
    lost = [{"part": "append", "strategy": "compressed memory", "seconds": LONG, "reason": "it does not fit"}]
    write_cost_plot(tmp_path / "cost.png", {**result, "points": known, "skipped": lost})
    strategies = ["whole history", "sliding window", "merged", "linear attention", "compressed memory"]
    assert keys == [[*strategies, "every strategy"], [s for s in strategies if s != "merged"] + ["left out"]]
    assert panels == [*PARTS, *PARTS[1:]]


def test_command(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(repeat, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(report, "plots_missing", lambda: "no matplotlib here")
    out = tmp_path / "out"
    assert main(["profile", "--model", "tiny", "--lengths", "1", "--depth", "1", "-o", str(out)]) == 0
    said = capfd.readouterr().out
    assert "model tiny, measured with 1 of its 2 blocks" in said and "no matplotlib here" in said
    assert "next step, compressed memory" in said
    assert json.loads((out / "model_cost.json").read_text())["depth"] == 1
    for arguments, message in (
        (["--model", "huge"], "no such file or preset; presets are tiny, demo"),
        (["--model", "tiny", "--heads", "2"], "--heads is not allowed with --model"),
        (["--depth", "2"], "--depth requires --model"),
        (["--model", "tiny", "--depth", "3"], "depth must be in [1, 2], got 3"),
        (["--model", "tiny", "--lengths", "0"], "lengths must be at least 0.001 seconds"),
    ):
        assert main(["profile", *arguments, "-o", str(out)]) == 2
        assert message in capfd.readouterr().err


def test_unknown_strategy():
    with pytest.raises(ValueError, match="strategies must be among .* got 'all'"):
        profile_model(CostConfig(TINY), strategies=["all"])
