"""A method is a module and an entry in METHODS: this file is the module of a fourth method, the mean frame."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("av")

from film_helpers import SMALL, make_video
from tiny_helpers import tiny_model

from vidmem_model import cli, shipped
from vidmem_model.demo import DemoConfig, run_demo
from vidmem_model.errors import MemoryFormatError
from vidmem_model.evaluate.baselines import untrained_memory
from vidmem_model.measure.attention import ProfileConfig
from vidmem_model.memory import METHODS, Method, learned, listed, takers, trained, untrained
from vidmem_model.memory.compressor import compress as compress_clip
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.file import read_memory, write_memory
from vidmem_model.memory.header import check_rows
from vidmem_model.memory.method import Rows, encoded
from vidmem_model.model.config import Compression
from vidmem_model.model.file import save_model
from vidmem_model.show.tables import print_demo
from vidmem_model.video.clip import ClipSpec

MEAN = Method("mean", takes=("compression",), needs=("shape",), room=3, module=__name__)


def compress(clip, config, progress):
    clip = encoded(clip)
    frames = torch.cat(list(clip.codec.decode_chunks(clip.latents, clip.size)), 2)
    mean = frames[0].mean(1).permute(1, 2, 0)
    if progress:
        progress(1, 1)
    return Rows(mean.flatten(1), torch.zeros(len(mean), 3), clip.codec, {}, {"shape": json.dumps(mean.shape)})


def check(bank, header):
    _, rows, columns = header.size
    if json.loads(bank.metadata["shape"]) != [rows, columns, 3] or (len(bank), bank.channels) != (rows, 3 * columns):
        raise ValueError(f"{len(bank)} rows of {bank.channels} for size {header.size}")
    check_rows(bank, header, (1, 1, 1))


def read(bank, frame):
    rows = bank.gather(torch.arange(len(bank)), out_dtype=torch.float32) * bank.extras["scale"]
    shape = json.loads(bank.metadata["shape"])
    return rows.view(shape).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


@pytest.fixture
def mean(monkeypatch):
    monkeypatch.setitem(METHODS, "mean", MEAN)


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "waves.mkv")


def test_a_fourth_method_is_compressed_stored_and_read(mean, tmp_path):
    frames = torch.randint(0, 256, (5, 20, 34, 3), dtype=torch.uint8)
    memory = compress_clip(frames, CompressorConfig("mean", dtype="float32"), fps=25)
    write_memory(tmp_path / "m", memory)
    opened = read_memory(tmp_path / "m")
    assert (opened.method, opened.frames, opened.fps) == ("mean", 5, 25.0)
    expected = frames.float().mean(0)
    assert all((opened.retrieve(i).float() - expected).abs().max() <= 0.51 for i in range(5))
    back = untrained_memory("mean", frames, Compression(2, 2, 2), 48)
    assert back.frames.shape == frames.shape and (back.tokens, back.width) == (20, 102)
    with pytest.raises(
        ValueError, match=r"requires method merge \(the compression sets the number of mean tokens\), got 3"
    ):
        CompressorConfig("mean", budget=3)


def test_files_of_a_fourth_method_are_checked(mean, tmp_path, monkeypatch):
    memory = compress_clip(torch.zeros(3, 16, 16, 3, dtype=torch.uint8), CompressorConfig("mean"), fps=25)
    for meta, message in (
        ({"shape": "[16, 15, 3]"}, "its header is damaged .16 rows of 48 for size"),
        ({"shape": None}, "its header is damaged .it lacks 'shape'"),
        ({"method": "median"}, "method must be one of dct, merge, learned, mean, got 'median'"),
    ):
        texts = {key: text for key, text in {**memory.meta, **meta}.items() if text is not None}
        write_memory(tmp_path / "m", type(memory)(**{**vars(memory), "meta": texts}))
        with pytest.raises(MemoryFormatError, match=message):
            read_memory(tmp_path / "m")
    write_memory(tmp_path / "m", memory)
    monkeypatch.delitem(METHODS, "mean")
    with pytest.raises(MemoryFormatError, match="method must be one of dct, merge, learned, got 'mean'"):
        read_memory(tmp_path / "m")


def test_a_fourth_method_in_the_commands(mean, video, tmp_path, capfd):
    path, image = tmp_path / "m.safetensors", tmp_path / "frame.png"
    assert cli.main(["compress", str(video), "-o", str(path), *SMALL, "-m", "mean"]) == 0
    assert "24 frames of 80x112 at 24 fps (the video ends before 20 s), 210 -> 80 tokens" in capfd.readouterr().out
    assert cli.main(["retrieve", str(path), "--frame", "7", "-o", str(image)]) == 0
    assert "from 80 mean tokens" in capfd.readouterr().out
    assert cli.main(["retrieve", str(path), "--frame", "7", "-o", str(image), "--steps", "2"]) == 2
    assert (
        "steps requires a memory of method learned, this one is of method mean; leave steps out"
        in capfd.readouterr().err
    )
    assert cli.main(["compress", str(video), "-o", str(path), "-m", "median"]) == 2
    assert "--method must be one of dct, merge, learned, mean, got 'median'" in capfd.readouterr().err


def test_a_fourth_method_in_the_demo(mean, video, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("vidmem_model.measure.repeat._SLOW_SECONDS", 0.02)
    monkeypatch.setattr("vidmem_model.demo.plots_missing", lambda: "not here")
    out = tmp_path / "out"
    arguments = ["demo", str(video), "-o", str(out), *SMALL, "--seconds", "1", "--lengths", "0.5", "--frames", "2"]
    assert cli.main(arguments) == 0
    report = json.loads((out / "report.json").read_text())
    assert list(report["methods"]) == ["dct", "merge", "mean"] and report["learned"] is None
    assert report["methods"]["mean"]["context_tokens_after"] == 80
    stages = [stage["stage"] for stage in report["stages"]]
    assert {"compress, mean", "store, mean", "retrieve, mean"} <= set(stages)
    assert f"{report['methods']['mean']['mean_psnr_db']:.2f}" in capfd.readouterr().out
    assert "memory-mean.safetensors" in os.listdir(out)


def test_two_models_of_one_size_in_the_demo(video, tmp_path, capfd, monkeypatch):
    """Their memories, and those that they are compared with, are files of their own."""
    monkeypatch.setattr("vidmem_model.measure.repeat._SLOW_SECONDS", 0.02)
    monkeypatch.setattr("vidmem_model.demo.plots_missing", lambda: "not here")
    monkeypatch.setattr(shipped, "CHECKPOINTS", tmp_path)
    again = replace(METHODS["learned"], name="again", module="vidmem_model.memory.learned", about="the other model")
    monkeypatch.setitem(METHODS, "again", again)
    learned.open_model.cache_clear()
    save_model(tmp_path / "demo.safetensors", tiny_model())
    try:
        clip, layer = ClipSpec(80, 112, 24.0, 0.0, 1.0), ProfileConfig(lengths=(0.5,))
        config = DemoConfig(
            video, clip, frames=2, compression=Compression(2, 2, 2), trained=("learned", "again"), profile=layer
        )
        print_demo(run_demo(config, tmp_path / "out"), tmp_path / "out")
        assert capfd.readouterr().out.count("8 frames of 32x64 at 8 fps") == 2
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        entries = {name: report[name]["methods"] for name in trained()}
        assert {name: list(each) for name, each in entries.items()} == {
            "learned": ["learned", "dct", "merge"],
            "again": ["again", "dct", "merge"],
        }
        files = [entry["file"] for each in [report["methods"], *entries.values()] for entry in each.values()]
        assert len(set(files)) == len(files) == 8 and set(files) <= set(os.listdir(tmp_path / "out"))
        opened = read_memory(tmp_path / "out" / entries["again"]["again"]["file"])
        assert opened.method == "again" and opened.retrieve(3, steps=1).shape == (32, 64, 3)
    finally:
        learned.open_model.cache_clear()


def python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_lists_a_fourth_method_without_torch(monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code = f"""
import sys
from vidmem_model.memory import METHODS, Method
METHODS["mean"] = {MEAN!r}
from vidmem_model.cli import main
main(["compress", "--help"])
main(["demo", "--help"])
assert "torch" not in sys.modules
"""
    shown = " ".join(python(code).split())
    assert "dct, merge, learned (the trained model) or mean." in shown
    assert "Used by dct, merge and mean." in shown
    assert "requires --method merge." in shown


def test_dct_imports_no_networks(video, tmp_path):
    """Not to compress, nor to read a frame back."""
    code = """
import sys
from vidmem_model.cli import main
video, memory, image = sys.argv[1:]
assert main(["compress", video, "-o", memory, "--size", "source", "--fps", "source"]) == 0
assert main(["retrieve", memory, "--frame", "3", "-o", image]) == 0
print(*sorted(name for name in sys.modules if name.startswith("vidmem_model.")), sep="\\n")
"""
    imported = python(code, video, tmp_path / "memory.safetensors", tmp_path / "image.png").splitlines()
    assert "vidmem_model.memory.dct" in imported
    rooms = {name.split(".")[1] for name in imported if name != "vidmem_model.model.config"}
    assert not rooms & {"train", "generation", "evaluate", "measure", "show"}
    assert {name for name in imported if name.startswith("vidmem_model.model.")} <= {"vidmem_model.model.config"}
    assert not {"vidmem_model.memory.merge", "vidmem_model.memory.learned"} & set(imported)


def test_what_is_known_of_the_methods():
    assert list(METHODS) == [*untrained(), *trained()] == ["dct", "merge", "learned"]
    assert takers("steps") == ["learned"] and takers("compression") == ["dct", "merge"] and takers("none") == []
    for name, method in METHODS.items():
        module = method.load()
        assert name == method.name and all(callable(getattr(module, f)) for f in ("compress", "check", "read"))
        assert hasattr(module, "open_model") == (method.model is not None) == bool(method.about)
    assert listed(["a"], "or") == "a" and listed("ab", "or") == "a or b" and listed("abc", "or") == "a, b or c"
