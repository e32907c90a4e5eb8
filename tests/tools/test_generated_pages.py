"""Every generated part of a page is what its command makes of the committed files, and follows a change of them."""

from __future__ import annotations

import copy
import json
import random
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

for package in ("rich", "safetensors"):  # of vidmem_model, which kernel-only machines lack
    pytest.importorskip(package)
sys.path.insert(0, str(ROOT))

from benchmarks import benchmark_page, pages, record  # noqa: E402
from benchmarks.page_parts import marks, with_part  # noqa: E402
from vidmem_model.measure.parts import CostConfig  # noqa: E402
from vidmem_model.model.config import PRESETS  # noqa: E402

IDS = [f"{part.page}:{part.name}" for part in pages.PARTS]
DRAWS = 6


@pytest.mark.parametrize("part", pages.PARTS, ids=IDS)
def test_pages_are_up_to_date(part):
    page, made = pages.written(ROOT, part)
    assert page == made, f"{part.page}: {part.name} is out of date; run python benchmarks/pages.py"


def test_no_page_has_a_part_that_nothing_writes():
    found = set()
    for path in (ROOT / "README.md", ROOT / "benchmarks/README.md", *(ROOT / "docs").rglob("*.md")):
        text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        names = re.findall(r"^<!-- (\w+):begin -->$", text, re.MULTILINE)
        found |= {(path.relative_to(ROOT).as_posix(), name) for name in names}
    assert found == {(part.page, part.name) for part in pages.PARTS}


# --- a number that changes in a file changes the page ---


@pytest.fixture
def tree(tmp_path):
    """What parts are made of, to be changed."""
    shutil.copytree(ROOT / "benchmarks/results", tmp_path / "benchmarks/results")
    (tmp_path / "docs").mkdir()
    for path in (ROOT / "docs").glob("*.json"):
        shutil.copy(path, tmp_path / "docs")
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    return tmp_path


def shown(name: str, root: Path) -> Iterator[tuple[str, tuple[Any, ...], str]]:
    """File, place in it and key of the numbers that a part shows."""
    if name == "results":
        for row in benchmark_page.measured(root)[0]:
            rows = row.result["rows"]
            keys = {"median_ms", "speedup", "peak_bytes"} & row.ours.keys()
            yield from ((row.path, ("rows", rows.index(row.ours)), key) for key in keys)
            if row.other:
                yield from ((row.path, ("rows", rows.index(row.other)), key) for key in ("median_ms", "peak_bytes"))
    elif name in ("lengths", "merging"):
        files = sorted((root / "benchmarks/results").rglob("*lengths*" if name == "lengths" else "integrations/*"))
        path = files[-1].relative_to(root).as_posix()
        for i, row in enumerate(json.loads(files[-1].read_text())["rows"]):
            keys = {"attention_error", "prediction_error", "attention_ms", "speedup", "median_ms", "peak_bytes"}
            keys -= {"median_ms", "attention_ms"} if row.get("kv_ratio") else {"speedup"}
            yield from ((path, ("rows", i), key) for key in keys & row.keys())
    elif name in ("retrieval", "model"):
        rows = json.loads((root / "docs/retrieval.json").read_text())["rows"]
        for row in rows if name == "retrieval" else pages.model_page.SHIPPED:
            yield from (("docs/retrieval.json", ("rows", row, key), "mean") for key in ("psnr", "ssim", "stlpips"))
    else:
        for i, point in enumerate(json.loads((root / "docs/cost.json").read_text())["points"]):
            if point["part"] != "memory encode":
                yield from (("docs/cost.json", ("points", i), key) for key in ("call_seconds", "peak_bytes"))


FROM_FILES = [part for part in pages.PARTS if part.name not in ("ops", "kept", "files")]


@pytest.mark.parametrize("part", FROM_FILES, ids=lambda part: f"{part.page}:{part.name}")
def test_a_changed_number_shows(part, tree):
    before = part.make(tree)
    places = sorted(shown(part.name, tree), key=str)
    assert len(places) >= 10
    for name, place, key in random.Random(0).sample(places, DRAWS):
        path = tree / name
        kept = path.read_text(encoding="utf-8")
        result = json.loads(kept)
        where = result
        for step in place:
            where = where[step]
        where[key] = where[key] * 2 + (64 << 20 if key == "peak_bytes" else 1)
        path.write_text(json.dumps(result), encoding="utf-8")
        assert part.make(tree) != before, (name, place, key)
        path.write_text(kept, encoding="utf-8")
    assert part.make(tree) == before


# --- benchmarks ---


def some_result(tree: Path) -> tuple[Path, dict[str, Any], benchmark_page.Measured]:
    row = random.Random(1).choice(benchmark_page.measured(tree)[0])
    return tree / row.path, copy.deepcopy(row.result), row


def test_the_newest_file_that_has_a_row_counts(tree):
    path, result, row = some_result(tree)
    result["rows"] = [r for r in result["rows"] if r["op"] == row.ours["op"]]
    for year, counts in (("2001", False), ("2999", True)):
        result["date"] = f"{year}{row.result['date'][4:]}"
        (path.parent / "another.json").write_text(json.dumps(result))
        found = {(r.ours["op"], r.path.endswith("/another.json")) for r in benchmark_page.measured(tree)[0]}
        assert ((row.ours["op"], True) in found) == counts
    assert "another.json" in benchmark_page.tables(tree)


def test_rows_that_failed_and_shapes_that_are_gone_are_left_out(tree):
    path, result, row = some_result(tree)
    gone = benchmark_page.measured(tree)[1]
    for name, value, here in (("shape", "no such shape", 1), ("status", "error", 0)):
        changed = copy.deepcopy(result)
        own = next(r for r in changed["rows"] if r == row.ours)
        own[name] = value
        path.write_text(json.dumps(changed))
        now, left = benchmark_page.measured(tree)
        assert (row.place, row.device, row.path) not in {(r.place, r.device, r.path) for r in now}
        assert left == gone + here
    assert (f"Left out: {gone} rows" in benchmark_page.tables(ROOT)) == bool(gone)


def test_where_ours_is_slower_it_says_so():
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    slower = [row for row in benchmark_page.measured(ROOT)[0] if row.other and row.ours["speedup"] < 1]
    assert slower and page.count(", slower**") == len(slower)
    assert {"cpu", "cuda"} <= {row.result["device"]["type"] for row in slower}
    links = re.findall(r"\]\(\.\./(benchmarks/results/\S+\.json)\)", page)
    assert set(links) == {row.path for row in benchmark_page.measured(ROOT)[0]} | {
        path for path, result in benchmark_page.results(ROOT) if "break_even" in result
    }


def test_whether_a_kernel_changed_since():
    now = record.kernels(ROOT)
    assert {backend: bool(ops) for backend, ops in now.items()} == {"cpu": True, "cuda": True, "triton": True}
    draw = random.Random(2)
    for _ in range(20):
        backend = draw.choice(["cpu", "triton"])
        which = draw.choice(["fwd", "bwd"])
        op = draw.choice([op for op in now[backend] if f"{op}_backward" in now[backend]])
        ours = {"backend": backend, "covers": op, "pass": which}
        result = {"dirty": False, "kernels": copy.deepcopy(now)}
        row = benchmark_page.Measured("", result, ours, None)
        assert benchmark_page.changed(row, now) == "no"
        result["kernels"][backend][f"{op}_backward"] = "another"
        assert benchmark_page.changed(row, now) == ("no" if which == "fwd" else "yes")
        result["kernels"][backend][op] = "another"
        assert benchmark_page.changed(row, now) == "yes"
        for unknown in ({"dirty": True}, {"kernels": {}}, {"kernels": {backend: {}}}):
            assert benchmark_page.changed(row._replace(result=result | unknown), now) == "not known"
        assert benchmark_page.changed(row._replace(ours=ours | {"backend": "library"}), now) == "no kernel of ours"


# --- what a history takes ---


def test_bytes_of_keys_and_values_are_what_was_measured():
    result = json.loads((ROOT / "docs/cost.json").read_text(encoding="utf-8"))
    config = CostConfig(model=PRESETS[result["model"]], depth=result["depth"], dtype=result["config"]["dtype"])
    steps = [p for p in result["points"] if p["part"].endswith("step") and p["strategy"] != "linear attention"]
    assert len({p["strategy"] for p in steps}) == 4
    for point in steps:
        assert point["held_bytes"] == config.kv_bytes(point["context_tokens"])
        assert point["context_tokens"] == config.context_tokens(point["strategy"], point["latent_frames"])


def test_20_s_are_as_many_tokens_on_every_page():
    """At the 24 frames a second of the film; the page on costs has the 16 of Wan beside them."""
    at = {fps: CostConfig(model=replace(PRESETS["wan-1.3b"], fps=fps)) for fps in (16.0, 24.0)}
    tokens = {fps: at[fps].latent_frames(20) * at[fps].frame_tokens for fps in at}
    memory = at[24.0].memory_tokens(at[24.0].latent_frames(20))
    cost = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    first = " ".join(cost.split("##")[0].split())
    assert all(f"{tokens[fps]:,} " in first and f"{fps:g} frames a second" in first.replace("*", "") for fps in at)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{tokens[24.0]:,} tokens" in readme and f"{memory:,}" in readme and f"{tokens[16.0]:,}" not in readme


# --- marks ---


def test_parts_of_a_page():
    begin, end = marks("a")
    page = f"one\n{begin}\nold\n{end}\ntwo\n{marks('b')[0]}\nkept\n{marks('b')[1]}\n"
    made = with_part(page, "a", "\nnew\n")
    assert made == page.replace("old", "\nnew\n") and with_part(made, "a", "new") == made
    for wrong in ("", f"{begin}\n", f"{end}\n{begin}\n", page + page, page.replace(f"{end}\n", end)):
        with pytest.raises(ValueError, match="the page must have the lines <!-- a:begin --> and <!-- a:end -->"):
            with_part(wrong, "a", "new")


def test_the_command(tmp_path, monkeypatch, capsys):
    made = {"a": "first", "b": "second"}
    parts = tuple(pages.Part("page.md", name, lambda root, name=name: made[name]) for name in made)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "PARTS", parts)
    page = tmp_path / "page.md"
    page.write_text("".join(f"{mark}\n" for name in made for mark in marks(name)))
    before = page.read_text()
    assert pages.main(["--check"]) == 1 and page.read_text() == before
    assert capsys.readouterr().out == "page.md: a differs\npage.md: b differs\n"
    assert pages.main([]) == 0 and all(text in page.read_text() for text in made.values())
    assert capsys.readouterr().out == "page.md: a written\npage.md: b written\n"
    assert pages.main(["--check"]) == pages.main([]) == 0 and not capsys.readouterr().out
    page.write_text("nothing")
    with pytest.raises(ValueError, match="page.md: the page must have the lines"):
        pages.main([])
