"""The command `vidmem`: results on stdout, mistakes in one line, no partial files."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from film_helpers import SMALL, make_video, waves

import vidmem_model
from vidmem_kernels import _extension
from vidmem_model import cli
from vidmem_model.evaluate.metrics import psnr
from vidmem_model.machine import available_bytes
from vidmem_model.memory.file import read_memory
from vidmem_model.video import sample

FPS = 24
# What every process says first where the compiled kernels are missing.
FALLBACK = "every op runs its PyTorch reference, which is correct but slower"
NOTICE = f"{_extension.reason}; {FALLBACK}\n" if _extension.reason else ""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return make_video(tmp_path_factory.mktemp("video") / "waves.mkv")


@pytest.fixture(scope="module")
def memory(video, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "memory.safetensors"
    assert cli.main(["compress", str(video), "-o", str(path), *SMALL]) == 0
    return path


def refused(capfd, arguments, *words):
    """The command fails with code 2 and one line on stderr that contains all the words."""
    code = cli.main([str(a) for a in arguments])
    out, err = capfd.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith("vidmem: error: ") and err.endswith("\n") and err.count("\n") == 1 and len(err) < 600, err
    for word in words:
        assert word in err
    return err


def run(arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "vidmem_model", *map(str, arguments)], capture_output=True, text=True, **options
    )


# --- mistakes ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compres"], ["compres", "vidmem --help"]),
        (["compress", "a.mp4", "-o", "b", "--methd", "dct"], ["--methd", "vidmem compress --help"]),
        (["compress", "a.mp4"], ["--output"]),
        (["retrieve", "a", "-o", "b.png", "--frame", "x"], ["--frame"]),
        (["--backend", "tritn", "info"], ["VIDMEM_BACKEND", "got 'tritn'", "did you mean 'triton'?"]),
        (["compress", "a.mp4", "-o", "b", "--size", "480"], ["--size must look like 480x832", "'480'"]),
        (["compress", "a.mp4", "-o", "b", "--rate", "4x4"], ["--rate must look like 4x4x2", "'4x4'"]),
        (["compress", "a.mp4", "-o", "b", "--fps", "fast"], ["--fps must be a number", "'fast'"]),
        (["compress", "a.mp4", "-o", "b", "--seconds", "0"], ["seconds must be positive, got 0.0"]),
        (["compress", "a.mp4", "-o", "b", "--start", "-1"], ["start must not be negative, got -1.0"]),
        (["compress", "a.mp4", "-o", "b", "--method", "pca"], ["method must be one of", "'pca'"]),
        (["compress", "a.mp4", "-o", "b", "--budget", "9"], ["budget requires method merge"]),
        (["compress", "a.mp4", "-o", "b", "--dtype", "int4"], ["dtype must be one of", "'int4'"]),
        (["demo", "a.mp4", "--frames", "0"], ["frames must be positive, got 0"]),
        (["profile", "--lengths", "1;2"], ["--lengths must look like 1,2,5,10,20", "'1;2'"]),
        (["profile", "--lengths", "0"], ["lengths must be at least 0.001 seconds, got [0.0]"]),
        (["profile", "--dtype", "int8"], ["dtype must be one of", "'int8'"]),
        (["profile", "--device", "gpu"], ["--device must be auto, cpu, cuda or cuda:N, got 'gpu'"]),
        (["profile", "--lengths", "1e6"], ["GiB are free", "give shorter --lengths"]),
        (
            ["compress", "a.mp4", "-o", "b", "--method", "learnt"],
            ["--method must be one of dct, merge, learned, got 'learnt'; see `vidmem compress --help`"],
        ),
        (["compress", "a.mp4", "-o", "b", "--seconds", "1e308"], ["seconds must be at most 10,000,000, got 1e+308"]),
        (["compress", "a.mp4", "-o", "b", "--fps", "nan"], ["fps must be positive, got nan"]),
        (["compress", "a.mp4", "-o", "b", "--size", "1x1000000000"], ["width must be at most 16,384, got 1000000000"]),
        (["compress", "a.mp4", "-o", "b", "--size", "9" * 5000 + "x1"], ["--size must look like 480x832, got '999"]),
        (["compress", "a.mp4", "-o", "b", "--rate", "0x0x0"], ["--rate must be positive, got (0, 0, 0)"]),
        (["demo", "a.mp4", "--frames", "9" * 20], ["frames must be at most 10,000, got 99999999999999999999"]),
        (["demo", "a.mp4", "--seed", "-1"], ["seed must not be negative, got -1; see `vidmem demo --help`"]),
        (["retrieve", "a", "-o", "b.png", "--frame", "0", "--steps", "1000000000"], ["--steps must be at most 10,000"]),
        (["storyboard", "x", "--lm", "a", "-o", "b", "--seconds", "nan"], ["--seconds must be positive, got nan"]),
        (["profile", "--lengths", ",".join("1" * 101)], ["lengths must have at most 100 entries"]),
        (["profile", "--device", "cuda:" + "9" * 5000], ["--device cuda:999"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_wrong_arguments(capfd, monkeypatch, tmp_path, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(capfd, arguments, *words)
    assert os.listdir(tmp_path) == []


def test_home_of_nobody(capfd, monkeypatch, tmp_path):
    for name in ("VIDMEM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "~nosuchuser/x")
        refused(capfd, ["demo", "-o", tmp_path / "out"], f"{name}='~nosuchuser/x': there is no such home folder")
        monkeypatch.delenv(name)


def test_backend_of_the_environment_is_checked_first(capfd, monkeypatch):
    monkeypatch.setenv("VIDMEM_BACKEND", "refrence")
    refused(capfd, ["info"], "VIDMEM_BACKEND", "'refrence'", "did you mean 'reference'?")


def test_backend_that_cannot_run_here(capfd, memory, tmp_path):
    out = tmp_path / "x.png"
    refused(
        capfd,
        ["--backend", "cuda", "retrieve", memory, "--frame", 0, "-o", out],
        "backend 'cuda' cannot run this call",
        "choose another --backend",
    )
    assert os.listdir(tmp_path) == []


@pytest.fixture(params=["missing", "empty", "folder", "text", "sound", "truncated", "no frames"])
def bad_video(request, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "bad.mkv"
    if request.param == "empty":
        path.touch()
    elif request.param == "folder":
        path.mkdir()
    elif request.param == "text":
        path.write_text("not a video\n" * 100)
    elif request.param == "sound":
        path = make_video(folder / "bad.wav", frames=0, sound=True)
    elif request.param == "truncated":
        whole = make_video(folder / "whole.mkv", frames=48).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif request.param == "no frames":
        with av.open(str(path), "w") as container:
            container.add_stream("ffv1", rate=FPS)
            container.start_encoding()
    return path


@pytest.mark.parametrize("command", ["compress", "demo"])
def test_bad_video(capfd, bad_video, tmp_path, command):
    out = tmp_path / "out"
    out.mkdir()
    target = out / "result"
    refused(capfd, [command, bad_video, "-o", target, *SMALL], bad_video.name)
    assert os.listdir(out) == []


def test_start_behind_the_end(capfd, video, tmp_path):
    refused(capfd, ["compress", video, "-o", tmp_path / "m", "--start", "9"], "no picture at 9 s")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["compress", "demo"])
def test_output_in_a_missing_folder_is_told_before_the_work(capfd, tmp_path, command):
    target = tmp_path / "no" / "result"
    # The video is missing too: the output is looked at first.
    refused(capfd, [command, tmp_path / "none.mp4", "-o", target], "does not exist; create it")
    assert os.listdir(tmp_path) == []


def test_output_that_cannot_be_written(capfd, video, memory, tmp_path):
    refused(capfd, ["compress", video, "-o", "/proc/m.safetensors"], "cannot be written")
    refused(capfd, ["retrieve", memory, "--frame", 0, "-o", "/proc/f.png"], "cannot be written")
    refused(capfd, ["demo", video, "-o", "/proc/out"], "cannot be written")
    refused(capfd, ["profile", "-o", "/proc/out"], "cannot be written")
    folder = tmp_path / "folder.png"
    folder.mkdir()
    refused(capfd, ["retrieve", memory, "--frame", 0, "-o", folder], "is a directory")
    refused(capfd, ["compress", video, "-o", folder], "is a directory")
    refused(capfd, ["demo", video, "-o", video], "is a file; give the path of a folder")


def test_budget_that_no_clip_can_fill(capfd, video, tmp_path):
    arguments = ["compress", video, "-o", tmp_path / "m", *SMALL, "--method", "merge", "--budget"]
    refused(capfd, [*arguments, 1000], "the clip has 210 tokens, budget asks for 1000")
    refused(capfd, [*arguments, 0], "--budget")
    assert os.listdir(tmp_path) == []


def test_more_frames_than_the_clip_has(capfd, video, tmp_path):
    arguments = ["demo", video, "-o", tmp_path / "out", *SMALL, "--frames", 25]
    refused(capfd, arguments, "the clip has 24 frames", "give --frames in [1, 24]")
    assert os.listdir(tmp_path) == []


def test_clip_beyond_free_memory(capfd, monkeypatch, video, tmp_path):
    monkeypatch.setattr("vidmem_model.video.load.available_bytes", lambda: 10_000)
    refused(capfd, ["compress", video, "-o", tmp_path / "m"], "are free; take fewer --seconds")
    assert available_bytes() > 10_000
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("frame", [-1, 24, 10**9])
def test_frame_out_of_range(capfd, memory, tmp_path, frame):
    arguments = ["retrieve", memory, "--frame", frame, "-o", tmp_path / "x.png"]
    refused(capfd, arguments, f"no frame {frame}", "give a frame from 0 to 23")
    assert os.listdir(tmp_path) == []


def test_frame_of_another_format(capfd, memory, tmp_path):
    refused(capfd, ["retrieve", memory, "--frame", 0, "-o", tmp_path / "x.jpg"], "ends in .png")


def test_memory_that_is_missing_foreign_or_damaged(capfd, memory, video, tmp_path):
    from safetensors.torch import save_file

    whole = memory.read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    (tmp_path / "empty").touch()
    save_file({"x": torch.zeros(3)}, tmp_path / "foreign")
    for name in ("missing", "cut", "flipped", "empty", "foreign", video, tmp_path):
        arguments = ["retrieve", tmp_path / name, "--frame", 0, "-o", tmp_path / "x.png"]
        refused(capfd, arguments, str(tmp_path / name))
    assert not (tmp_path / "x.png").exists()


def test_sample_film_that_cannot_be_fetched(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("VIDMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample, "SAMPLE_RELEASE", "/nowhere/moviepy.tar.gz")
    refused(capfd, ["demo", "-o", tmp_path / "out"], "cannot fetch the sample clip", "give a VIDEO")
    assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path / "cache") == []


def test_bug_is_called_one(capfd, monkeypatch, memory, tmp_path):
    def broken(*_):
        raise RuntimeError("boom\nsecond line")

    monkeypatch.setattr("vidmem_model.memory.dct.read", broken)
    arguments = ["retrieve", str(memory), "--frame", "0", "-o", str(tmp_path / "x.png")]
    assert cli.main(arguments) == 1
    err = capfd.readouterr().err
    assert err.startswith("vidmem: error: this is a bug: RuntimeError: boom second line") and err.count("\n") == 1
    monkeypatch.setenv("VIDMEM_DEBUG", "1")
    assert cli.main(arguments) == 1
    assert "Traceback (most recent call last)" in capfd.readouterr().err


# --- work ---


def test_compress_and_retrieve_an_odd_sized_video(capfd, tmp_path):
    video = make_video(tmp_path / "odd.mkv", frames=37, height=75, width=109)
    memory, image = tmp_path / "m.safetensors", tmp_path / "frame.png"
    assert cli.main(["compress", str(video), "-o", str(memory), *SMALL, "--rate", "1x1x2"]) == 0
    assert "37 frames of 75x109 at 24 fps" in capfd.readouterr().out
    video.unlink()
    for frame in (0, 23, 36):
        assert cli.main(["retrieve", str(memory), "--frame", str(frame), "-o", str(image)]) == 0
        with av.open(str(image)) as png:
            pixels = torch.from_numpy(next(png.decode(video=0)).to_ndarray(format="rgb24"))
        assert pixels.shape == (75, 109, 3)
        quality = [psnr(pixels, torch.from_numpy(waves(i, 75, 109))) for i in range(37)]
        assert int(np.argmax(quality)) == frame
        assert quality[frame] > 35
    assert f"frame 36 of 37 ({36 / 24:.2f} s)" in capfd.readouterr().out


def test_merge_and_its_budget(video, tmp_path):
    path = tmp_path / "m.safetensors"
    arguments = ["compress", str(video), "-o", str(path), *SMALL, "--method", "merge"]
    assert cli.main([*arguments, "--budget", "60"]) == 0
    opened = read_memory(path)
    assert (opened.method, len(opened.bank)) == ("merge", 60)
    assert psnr(opened.retrieve(5), torch.from_numpy(waves(5, 80, 112))) > 15


def test_short_clip_is_said_to_be_short(capfd, video, tmp_path):
    assert cli.main(["compress", str(video), "-o", str(tmp_path / "m"), *SMALL]) == 0
    assert "(the video ends before 20 s)" in capfd.readouterr().out


def test_demo(capfd, monkeypatch, video, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("vidmem_model.measure.repeat._SLOW_SECONDS", 0.02)
    out = tmp_path / "out"
    arguments = ["demo", str(video), "-o", str(out), *SMALL, "--frames", "3", "--rate", "2x2x2"]
    arguments += ["--seconds", "1", "--lengths", "0.5"]
    assert cli.main([*arguments, "--seed", "7"]) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    names = ["contact_sheet.png", "memory-dct.safetensors", "memory-merge.safetensors"]
    names += ["memory_vs_context.json", "memory_vs_context.png", "report.json"]
    assert sorted(os.listdir(out)) == names
    assert os.listdir(tmp_path) == ["out"]
    result = json.loads((out / "report.json").read_text())
    assert result["context_tokens_before"] == 6 * 5 * 7
    chosen = [r["frame"] for r in result["methods"]["dct"]["retrieved"]]
    assert len(set(chosen)) == 3
    for method, entry in result["methods"].items():
        memory = read_memory(out / entry["file"])
        assert entry["context_tokens_after"] == len(memory.bank) == 3 * 2 * 3
        assert entry["bytes_on_disk"] == (out / entry["file"]).stat().st_size
        assert [r["frame"] for r in entry["retrieved"]] == chosen
        for row in entry["retrieved"]:
            image = memory.retrieve(row["frame"])
            source = torch.from_numpy(waves(row["frame"], 80, 112))
            assert row["psnr_db"] == pytest.approx(psnr(image, source), abs=1e-6)
            assert 0 < row["ssim"] <= 1
        assert f"{entry['mean_psnr_db']:.2f}" in stdout, method
    for op in ("match_tokens", "merge_tokens", "gather_tokens", "cross_attention"):
        assert result["kernels"][op]["cpu"], op
    stages = {stage["stage"]: stage for stage in result["stages"]}
    assert {"decode", "encode", "compress, dct", "retrieve, merge", "memory profile"} <= stages.keys()
    assert all(stage["seconds"] > 0 and stage["peak_rss_bytes"] > 50e6 for stage in stages.values())
    curve = json.loads((out / "memory_vs_context.json").read_text())
    assert len(curve["points"]) == 4
    for name in ("contact_sheet.png", "memory_vs_context.png"):
        with av.open(str(out / name)) as png:
            pixels = next(png.decode(video=0)).to_ndarray(format="rgb24")
        assert pixels.shape[1] > 900 and pixels.std() > 20
        assert str(out / name) in stdout


def test_profile_without_matplotlib_writes_json(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr("vidmem_model.measure.repeat._SLOW_SECONDS", 0.02)
    monkeypatch.setattr("vidmem_model.show.plots.plots_missing", lambda: "matplotlib is not installed")
    out = tmp_path / "out"
    arguments = ["profile", "-o", str(out), "--lengths", "0.5", "--heads", "1", "--head-dim", "16"]
    assert cli.main(arguments) == 0
    assert "no pictures: matplotlib is not installed" in capfd.readouterr().out
    assert os.listdir(out) == ["memory_vs_context.json"]


def test_info(capfd):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["vidmem_kernels"] == found["versions"]["vidmem_model"] == vidmem_model.__version__
    assert "gather_tokens" in found["ops"]
    assert cli.main(["info"]) == 0
    assert "gather_tokens" in capfd.readouterr().out


@pytest.mark.parametrize("columns", [60, 72, 80, 100])
def test_info_fits_the_terminal(capfd, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.main(["info"]) == 0
    shown = capfd.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    assert "merge_attention_states_backward" in shown and "this op has no such kernel" in shown


def test_help_and_version(capfd):
    for arguments in ([], ["--help"], ["demo", "--help"], ["retrieve", "-h"]):
        assert cli.main(arguments) == 0
        assert "Usage: vidmem" in capfd.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capfd.readouterr().out.startswith("vidmem ")


# --- as a process ---


def test_process_reports_a_mistake(tmp_path):
    done = run(["compress", tmp_path / "none.mp4", "-o", tmp_path / "m"])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == NOTICE + f"vidmem: error: {tmp_path}/none.mp4: no such file; give the path of a video\n"


def test_help_does_not_import_torch():
    code = "import sys; from vidmem_model.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize(("signum", "code", "line"), [(signal.SIGINT, 130, True), (signal.SIGTERM, 143, False)])
def test_interrupt_leaves_nothing(tmp_path, signum, code, line):
    folder = tmp_path / "in"
    folder.mkdir()
    video = make_video(folder / "long.mkv", frames=240, height=128, width=192)
    out = tmp_path / "out"
    out.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "vidmem_model", "demo", video, "-o", out / "result", "--size", "480x832"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores SIGINT, and its children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not os.listdir(out) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    assert os.listdir(out), "the demo should be in the middle of its work"
    process.send_signal(signum)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr == NOTICE + ("vidmem: interrupted; nothing was written\n" if line else "")
    assert stdout == ""
    assert os.listdir(out) == []


def test_closed_pipe_is_no_error():
    process = subprocess.Popen(
        [sys.executable, "-m", "vidmem_model", "info"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read().decode() == NOTICE
    process.stderr.close()
    assert process.wait(timeout=60) == 0


def test_installed_command():
    command = Path(sys.executable).with_name("vidmem")
    if not command.exists():
        pytest.skip(reason="the package is not installed in this environment")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("vidmem ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "a.mp4", "-o", "b", "--fps", "fast"],
        ["compress", "a.mp4", "-o", "b", "--rate", "4x4"],
        ["compress", "a.mp4", "-o", "b", "--rate", "0x1x1"],
        ["demo", "--fps", "fast"],
        ["demo", "--lengths", "x"],
        ["demo", "--rate", "4"],
        ["profile", "--lengths", "x"],
    ],
    ids=" ".join,
)
def test_a_mistake_in_an_option_is_told_before_torch_is_imported(arguments):
    code = f"import sys; from vidmem_model.cli import main; print(main({arguments}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
