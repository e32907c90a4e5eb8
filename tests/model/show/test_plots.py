"""Plots: by the suffix PNG, PDF or SVG, in the widths of a paper, the same bytes each time, whatever was measured."""

from __future__ import annotations

import copy
import itertools
import json
import random
import re

import numpy as np
import pytest
from paths import ROOT

from vidmem_model import cli
from vidmem_model.errors import UserError
from vidmem_model.measure import attention, parts
from vidmem_model.show import figure
from vidmem_model.show.cost import write_cost_plot
from vidmem_model.show.curve import write_curve_plot
from vidmem_model.show.plots import write_memory_plot
from vidmem_model.show.retrieval import methods_of, write_positions_plot, write_retrieval_plot

pytest.importorskip("matplotlib")

REASONS = (
    "takes about 210 s a call, more than 120 s",
    "ran out of memory",
    "takes about 9.0 GiB, and 1.0 GiB are free",
)


def memory_result(draw):
    """As `attention.profile` returns it, of drawn strategies at drawn lengths, some of them not reached."""
    chosen = draw.sample(attention.STRATEGIES, draw.randint(1, 4))
    lengths = sorted(draw.sample([0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 600.0], draw.randint(1, 5)))
    points = []
    for strategy in chosen:
        for seconds in lengths[: draw.randint(1, len(lengths))]:
            held = int(10 ** draw.uniform(4, 11))
            time = 10 ** draw.uniform(-5, 2)
            sizes = {"context_tokens": int(9360 * seconds), "held_bytes_computed": held, "peak_bytes": 2 * held}
            points.append({"strategy": strategy, "seconds": seconds, "call_seconds": time, **sizes})
    return {"format": "vidmem.memory_vs_context", "points": points}


def cost_result(draw):
    """As `profile_model` returns it: every point is there or left out."""
    lengths = sorted(draw.sample([1.0, 2.0, 5.0, 10.0, 20.0, 120.0], draw.randint(1, 5)))
    points, skipped = [], []
    for strategy in (parts.EVERY, *draw.sample(parts.STRATEGIES, draw.randint(1, 5))):
        for part in parts.parts_of(strategy):
            for seconds in lengths:
                place = {"part": part, "strategy": strategy, "seconds": seconds}
                if points and draw.random() < 0.2:
                    skipped.append({**place, "reason": draw.choice(REASONS)})
                else:
                    measured = {"peak_bytes": int(10 ** draw.uniform(5, 10)), "call_seconds": 10 ** draw.uniform(-3, 2)}
                    points.append(place | measured)
    name = draw.choice(["demo", "a model whose name takes more room than there is in the picture" * 3])
    return {"format": "vidmem.model_cost", "model": name, "points": points, "skipped": skipped}


def retrieval_result(draw):
    """As `evaluate_retrieval` returns it, of one model or of many, some by methods that nobody knows today."""

    def row(trained, tokens):
        spread = draw.choice([None, 0.1])
        curve = [draw.uniform(0.1, 40) for _ in range(positions)]
        measures = {name: {"mean": draw.choice(curve), "spread": spread, "curve": curve} for name in figure_measures}
        return {"trained": trained, "tokens": tokens, **measures}

    figure_measures, positions = ("psnr", "ssim", "stlpips"), draw.choice([1, 2, 24])
    rates = dict(draw.sample([("4×4×2", 72), ("2×2×2", 288), ("2×2×1", 576)], draw.randint(1, 3)))
    rows = {}
    for rate, tokens in rates.items():
        for encoder in draw.sample(["both", "only LR", "large patchifier"], draw.randint(1, 3)):
            rows[f"{encoder} {rate}"] = row(True, tokens)
        for method in draw.sample(["dct", "merge", "another", "one more"], draw.randint(0, 4)):
            rows[f"{method} {rate}"] = row(False, tokens)
    for name in draw.sample(["mean frame", "VAE alone"], draw.randint(0, 2)):
        rows[name] = row(False, 0)
    return {"format": "vidmem.retrieval", "config": {"history": 96}, "fps": 12.0, "rows": rows}


def curve_result(draw):
    count = draw.choice([1, 2, 30, 300])
    scale, sign = 10 ** draw.uniform(-6, 3), draw.choice([-0.5, 0.01])
    return [
        {"step": i + 1, "loss": scale * (sign + draw.random()), "grad_norm": draw.random() + 0.1} for i in range(count)
    ]


PLOTS = {
    write_memory_plot: memory_result,
    write_cost_plot: cost_result,
    write_retrieval_plot: retrieval_result,
    write_positions_plot: retrieval_result,
    write_curve_plot: curve_result,
}


def inches(path):
    """Width of a picture as it stands on paper, and its text where the file has it as text."""
    data = path.read_bytes()
    if path.suffix == ".png":
        return int.from_bytes(data[16:20], "big") / 200, ""
    if path.suffix == ".svg":
        text = data.decode()
        return float(re.search(r'<svg[^>]* width="([\d.]+)pt"', text)[1]) / 72, " ".join(
            re.findall(r">([^<>]+)<", text)
        )
    return float(re.search(rb"/MediaBox \[ *0 0 ([\d.]+)", data)[1]) / 72, ""


@pytest.mark.sample(9)
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".SVG"])
@pytest.mark.parametrize("write", PLOTS, ids=lambda write: write.__name__)
def test_a_plot_is_what_its_suffix_says(tmp_path, write, suffix, columns):
    result = PLOTS[write](random.Random(f"{write.__name__} {suffix} {columns}"))
    kept = copy.deepcopy(result)
    first, second = tmp_path / f"first{suffix}", tmp_path / f"second{suffix}"
    write(first, result, columns)
    assert result == kept
    data = first.read_bytes()
    magic = {".png": b"\x89PNG\r\n\x1a\n", ".pdf": b"%PDF-", ".svg": b"<?xml"}[suffix.lower()]
    assert data.startswith(magic)
    assert b"CreationDate" not in data and b"dc:date" not in data
    write(second, result, columns)
    assert second.read_bytes() == data, "the same numbers, other bytes"
    if suffix != ".SVG":
        width, text = inches(first)
        assert width == pytest.approx(figure.WIDTHS[columns], abs=0.01)
        words = {write_curve_plot: "step", write_retrieval_plot: "tokens of the memory"}.get(write, "history")
        assert suffix != ".svg" or words in text
    if suffix == ".pdf":
        assert b"/FontFile2" in data and b"/Type3" not in data, "fonts are embedded as such"


@pytest.mark.sample(7)
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("write", PLOTS, ids=lambda write: write.__name__)
def test_whatever_was_measured_is_drawn_within_the_picture(tmp_path, monkeypatch, recwarn, write, seed):
    """No text lies outside the picture or over another text of its panel."""
    from matplotlib.figure import Figure

    found = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda drawn, *given, **way: found.append(drawn) or save(drawn, *given, **way)
    )
    columns = 1 + seed % 2
    write(tmp_path / "plot.png", PLOTS[write](random.Random(seed)), columns)
    assert not recwarn.list, [str(each.message) for each in recwarn.list]
    (drawn,) = found
    for text in drawn.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= drawn.bbox.x1, text.get_text()
    for axes in drawn.axes:
        ends = [note.get_window_extent() for note in axes.texts]
        for box in (*ends, axes.xaxis.label.get_window_extent(), axes.yaxis.label.get_window_extent()):
            assert box.x0 >= -1 and box.x1 <= drawn.bbox.x1 + 1
        for one, other in itertools.combinations(ends, 2):
            assert min(one.y1, other.y1) <= max(one.y0, other.y0) + 2
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            low, high = sorted(axis.get_view_interval())
            shown = [
                label.get_text() for label, at in zip(labels, axis.get_ticklocs(), strict=False) if low <= at <= high
            ]
            assert len(shown) == len(set(shown)), "two ticks with one label"


def test_the_ends_say_how_much_less_it_is(tmp_path):
    lengths = ((1.0, 100), (20.0, 2000))
    points = [
        {"strategy": strategy, "seconds": seconds, "context_tokens": 9360, "held_bytes_computed": 1}
        | {"peak_bytes": size * 2**20, "call_seconds": 0.01 * size}
        for strategy, sizes in (("whole history", (100, 2211)), ("compressed memory", (100, 74)), ("merged", (1, 2200)))
        for (seconds, _), size in zip(lengths, sizes, strict=True)
    ]
    write_memory_plot(tmp_path / "x.svg", {"points": points})
    text = (tmp_path / "x.svg").read_text()
    assert "30× less" in text and "30× faster" in text and text.count("× less") == 1
    assert "peak memory (MiB)" in text and "time of one call (s)" in text
    for point in points:
        point["call_seconds"] /= 1e3
    write_memory_plot(tmp_path / "x.svg", {"points": points})
    assert "time of one call (ms)" in (tmp_path / "x.svg").read_text()


def test_what_was_left_out_is_said(tmp_path):
    write_cost_plot(tmp_path / "cost.svg", json.loads((ROOT / "docs" / "cost.json").read_text()))
    text = " ".join(re.findall(r">([^<>]+)<", (tmp_path / "cost.svg").read_text()))
    assert "first step and next step (whole history) at 20 s: takes about 210 s a call, more than 120 s" in text
    assert "VAE encode (every strategy) at 1 s and more: takes about 373 s a call, more than 120 s" in text


def test_lines_of_the_retrieval_plot():
    """At each number of tokens the learned line is the best of the encoders."""
    result = json.loads((ROOT / "docs" / "retrieval.json").read_text(encoding="utf-8"))
    methods = methods_of(result)
    assert list(methods) == ["learned", "dct", "merge", "mean frame", "VAE alone"]
    assert [row["tokens"] for row in methods["learned"]] == [72, 288, 576]
    assert methods["learned"][0] == result["rows"]["both 4×4×2"]
    assert methods["dct"] == [result["rows"][f"dct {rate}"] for rate in ("4×4×2", "2×2×2", "2×2×1")]
    best = {}
    for row in result["rows"].values():
        if row["trained"]:
            best[row["tokens"]] = max(best.get(row["tokens"], 0), row["psnr"]["mean"])
    assert [row["psnr"]["mean"] for row in methods["learned"]] == [best[n] for n in sorted(best)]


@pytest.mark.parametrize("seed", range(50))
def test_labels_are_moved_apart_as_little_as_possible(seed):
    draw = random.Random(seed)
    count = draw.randint(1, 8)
    places = [draw.choice([draw.uniform(0, 100), 50.0]) for _ in range(count)]
    heights = [draw.choice([9.6, 19.2]) for _ in range(count)]
    moved = figure.spread(places, heights)
    order = sorted(range(count), key=lambda i: (moved[i], places[i]))
    assert [places[i] for i in order] == sorted(places)
    for below, above in itertools.pairwise(order):
        assert moved[above] - moved[below] >= (heights[above] + heights[below]) / 2 - 1e-9
    # No other places without overlap have a smaller sum of squares: small moves, made valid, do not lower it.
    cost = sum((m - p) ** 2 for m, p in zip(moved, places, strict=True))
    generator = np.random.default_rng(seed)
    for _ in range(50):
        other = np.array(moved) + generator.normal(0, 3, count)
        for below, above in itertools.pairwise(order):
            other[above] = max(other[above], other[below] + (heights[above] + heights[below]) / 2)
        assert sum((m - p) ** 2 for m, p in zip(other, places, strict=True)) >= cost - 1e-6


@pytest.mark.parametrize("name", ["x.jpg", "x", "x.png.gz", ".png"])
def test_another_suffix_is_refused_before_any_work(tmp_path, capfd, name):
    path = tmp_path / name
    says = r"a plot must be a \.png, \.pdf or \.svg file, got .*; choose another name"
    for write, result in PLOTS.items():
        with pytest.raises(UserError, match=says):
            write(path, result(random.Random(0)))
    result = ROOT / "docs" / "retrieval.json"
    assert cli.main(["plot", str(result), "-o", str(path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and re.search(says, err)
    assert not path.exists()


@pytest.mark.parametrize(
    ("file", "options"),
    [
        ("docs/cost.json", []),
        ("docs/retrieval.json", ["--columns", "1"]),
        ("docs/retrieval.json", ["--positions"]),
        ("python/vidmem_model/pretrained/demo.curve.csv", []),
    ],
)
def test_the_files_of_the_docs_can_be_drawn(tmp_path, capfd, file, options):
    path = tmp_path / "plot.svg"
    assert cli.main(["plot", str(ROOT / file), "-o", str(path), *options]) == 0
    assert capfd.readouterr().out == f"{path}\n" and path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("x.json", "{", [], "is not a result file (it is not JSON"),
        ("x.json", "[]", [], "must be curve.csv or JSON of one of the formats"),
        ("x.json", '{"format": "vidmem.demo"}', [], "got 'vidmem.demo'"),
        ("x.json", '{"format": ["a"]}', [], "must be curve.csv or JSON"),
        ("x.json", '{"format": "vidmem.retrieval", "rows": {}}', [], "has no measurements to draw"),
        ("x.json", '{"format": "vidmem.model_cost", "points": []}', [], "has no measurements to draw"),
        (
            "x.json",
            '{"format": "vidmem.model_cost", "points": [{}]}',
            [],
            "cannot be drawn, it is incomplete or damaged (KeyError",
        ),
        ("x.json", '{"format": "vidmem.memory_vs_context", "points": [1]}', ["--positions"], "--positions requires"),
        ("x.csv", "step,loss\n1,2\n", [], "cannot be read as a training curve"),
        ("x.csv", "step,loss,grad_norm,lr,seconds\n", [], "has no measurements to draw"),
        ("missing.json", None, [], "cannot be read"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, capfd, name, content, options, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert cli.main(["plot", str(tmp_path / name), "-o", str(tmp_path / "plot.png"), *options]) == 2
    out, err = capfd.readouterr()
    assert message in err and out == "" and err.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


def test_other_settings_of_matplotlib_change_nothing(tmp_path):
    import matplotlib

    result = curve_result(random.Random(0))
    write_curve_plot(tmp_path / "a.svg", result)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "savefig.dpi": 30}):
        write_curve_plot(tmp_path / "b.svg", result)
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_columns_are_one_or_two(tmp_path):
    with pytest.raises(ValueError, match="plot: columns must be 1 or 2, got 3"):
        write_curve_plot(tmp_path / "x.png", curve_result(random.Random(0)), 3)
    assert cli.main(["plot", str(ROOT / "docs" / "cost.json"), "-o", str(tmp_path / "x.png"), "--columns", "3"]) == 2
    assert not list(tmp_path.iterdir())
