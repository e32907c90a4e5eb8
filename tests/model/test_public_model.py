"""The exports of vidmem_model: lazy imports, calls as in their docstrings, clear errors."""

from __future__ import annotations

import doctest
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from film_helpers import make_video

import vidmem_model
from vidmem_model import ClipSpec, CompressorConfig, compress, read_memory, write_memory
from vidmem_model.errors import MediaError, UserError
from vidmem_model.memory import compressor
from vidmem_model.memory.method import encoded
from vidmem_model.model.config import Compression
from vidmem_model.video import Clip, read_clip


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("film") / "film.mkv", frames=30)


def frames_of(count, height=32, width=48):
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)


def test_nothing_is_imported_before_it_is_asked_for():
    code = """
import sys
import vidmem_model
assert set(vidmem_model.__all__) <= set(dir(vidmem_model))
assert not {"torch", "vidmem_kernels", "typer", "av"} & set(sys.modules)
assert [name for name in sys.modules if name.startswith("vidmem_model.")] == ["vidmem_model._requirements"]
vidmem_model.compress
assert "vidmem_model.memory.learned" not in sys.modules and "vidmem_model.model.dit" not in sys.modules
from vidmem_model import *
assert callable(generate) and callable(load_model) and isinstance(MemoryModel, type)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_export_is_what_its_module_has():
    promised = {"load_model", "MemoryModel", "compress", "read_memory", "write_memory", "generate"}
    assert promised | {"ClipSpec", "CompressorConfig"} <= set(vidmem_model.__all__)
    for name in vidmem_model.__all__:
        found = getattr(vidmem_model, name)
        assert found.__name__ == name and found.__doc__ and found.__module__.startswith("vidmem_model.")
    with pytest.raises(AttributeError, match="module 'vidmem_model' has no attribute 'compres'"):
        vidmem_model.compres  # noqa: B018
    with pytest.raises(ImportError):
        from vidmem_model import compres  # noqa: F401


def test_the_example_of_compress(film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("film.mkv").symlink_to(film)
    (example,) = (each for each in doctest.DocTestFinder().find(compressor) if each.name.endswith(".compress"))
    assert len(example.examples) >= 6
    runner = doctest.DocTestRunner()
    said = []
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_the_first_steps_of_the_tutorial(tmp_path, monkeypatch):
    text = Path(vidmem_model.__file__).parents[2].joinpath("docs/tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text.split("## 4.")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    make_video(tmp_path / "film.mp4", frames=21)
    names = {}
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and names["frame"].dtype == torch.uint8 and names["psnr"] > 25
    assert read_memory("memory.safetensors").method == "dct"


@pytest.mark.parametrize("method", ["dct", "merge"])
def test_all_forms_of_a_video_give_one_memory(film, tmp_path, method):
    spec, config = ClipSpec(48, 80, 12.0, seconds=1.0), CompressorConfig(method, Compression(1, 2, 2))
    clip = read_clip(film, spec)
    made = [
        compress(str(film), config, spec),
        compress(film, config, spec),
        compress(clip, config),
        compress(encoded(clip), config),
        compress(clip.frames, config, fps=12),
        compress(clip.frames.numpy(), config, fps=np.float64(12)),
    ]
    assert [each.source for each in made] == ["film.mkv"] * 4 + [""] * 2 and {each.fps for each in made} == {12.0}
    for each in made[1:]:
        assert torch.equal(each.tokens, made[0].tokens) and each.meta == made[0].meta
    write_memory(tmp_path / "m", made[0])
    assert read_memory(tmp_path / "m").retrieve(11).shape == (48, 80, 3)


def test_by_default_twenty_seconds_at_the_size_of_the_method(film, monkeypatch):
    asked = []

    def load_clip(video, spec, room, progress):
        asked.append((spec, room))
        raise UserError("enough")

    monkeypatch.setattr(compressor, "load_clip", load_clip)
    for config in (None, CompressorConfig("merge"), CompressorConfig("learned")):
        with pytest.raises(UserError, match="enough"):
            compress(film, config)
    assert [room for _, room in asked] == [4, 6, 12]
    assert asked[0][0] == asked[1][0] == ClipSpec()
    assert asked[2][0] == ClipSpec(128, 192, 12.0)


def test_progress_says_what_is_done(film):
    told = []
    compress(
        film,
        CompressorConfig(compression=Compression(1, 2, 2)),
        ClipSpec(32, 48, seconds=1.0),
        progress=lambda *n: told.append(n),
    )
    assert {name for name, *_ in told} == {"decode", "compress, dct"}
    assert told[-1] == ("compress, dct", 6, 6)


CLIP = Clip(torch.zeros(4, 16, 16, 3, dtype=torch.uint8), 24.0, Path("f"), None)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: compress("none.mkv"), MediaError, "none.mkv: no such file"),
        (lambda: compress(frames_of(4)), ValueError, "fps is required for frames and not allowed for others, got None"),
        (
            lambda: compress("none.mkv", fps=24),
            ValueError,
            "fps is required for frames and not allowed for others, got 24",
        ),
        (lambda: compress(CLIP, clip=ClipSpec()), ValueError, "clip is allowed for a video file only, got Clip"),
        (
            lambda: compress(frames_of(4).float(), fps=24),
            ValueError,
            r"uint8 \(T, H, W, 3\), got \(torch.float",
        ),
        (lambda: compress(frames_of(0), fps=24), ValueError, r"must be uint8 \(T, H, W, 3\), got"),
        (lambda: compress(frames_of(4)[..., :2], fps=24), ValueError, r"must be uint8 \(T, H, W, 3\), got"),
        (lambda: compress(frames_of(4)[0], fps=24), ValueError, r"must be uint8 \(T, H, W, 3\), got"),
        (lambda: compress(frames_of(4), fps=0), ValueError, "compress: fps must be positive, got 0"),
        (lambda: compress(frames_of(4), fps=float("nan")), ValueError, "compress: fps must be positive, got nan"),
        (lambda: compress(frames_of(4), fps="24"), ValueError, "compress: fps"),
        (lambda: compress([1, 2]), TypeError, "video must be a path, frames, a Clip or an EncodedClip, got list"),
        (lambda: compress(None), TypeError, "video must be a path, frames, a Clip or an EncodedClip, got NoneType"),
        (lambda: compress(CLIP, CompressorConfig("learned")), UserError, "takes frames of 128x192, got 16x16"),
        (lambda: compress(encoded(CLIP), CompressorConfig("learned")), ValueError, "method learned takes frames"),
        (
            lambda: compress(CLIP, CompressorConfig("learned", model="none")),
            UserError,
            "the trained model 'none' is not installed; use --method dct or merge",
        ),
        (lambda: CompressorConfig("dct", model="demo"), ValueError, "model requires method learned, got 'demo'"),
    ],
)
def test_what_is_not_right_is_told_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_frames_are_asked_for_by_integers(tmp_path):
    write_memory(tmp_path / "m", compress(frames_of(5), CompressorConfig(compression=Compression(1, 1, 1)), fps=24))
    opened = read_memory(tmp_path / "m")
    for third in (np.int64(3), np.uint8(3), torch.tensor(3)):
        assert torch.equal(opened.retrieve(third), opened.retrieve(3))
    for wrong in (1.5, "1", None, [1]):
        with pytest.raises(TypeError, match="retrieve: frame must be an integer, got"):
            opened.retrieve(wrong)
    for none in (-1, 5, 10**30):
        with pytest.raises(UserError, match="there is no frame .*; give a frame from 0 to 4"):
            opened.retrieve(none)
    write_memory(tmp_path / "m", compress(frames_of(4, 128, 192), CompressorConfig("learned"), fps=12))
    opened = read_memory(tmp_path / "m")
    for wrong in (0, -1, 10**9, 1.5, "1", True):
        with pytest.raises(ValueError, match="retrieve: steps.* must be .*, got"):
            opened.retrieve(1, steps=wrong)


def test_frames_are_left_as_they_are():
    frames = frames_of(9)
    before = frames.clone()
    for method in ("dct", "merge"):
        compress(frames, CompressorConfig(method, Compression(1, 1, 1)), fps=24)
    assert torch.equal(frames, before)
