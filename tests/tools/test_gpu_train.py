"""Training on a GPU in rounds, tried out on the CPU: what it leaves, and how it goes on here and on another machine."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from paths import ROOT
from safetensors.torch import load_file

pytest.importorskip("av")  # films are written and bundled by it; what is tested reads none
pytest.importorskip("peft")

from film_helpers import write_video  # noqa: E402
from install_helpers import environment  # noqa: E402

sys.path.insert(0, str(ROOT))

from benchmarks import gpu_train, train_bundle, train_pieces, train_stages  # noqa: E402
from vidmem_model.errors import UserError  # noqa: E402
from vidmem_model.model.file import load_model  # noqa: E402
from vidmem_model.train import checkpoint, loop  # noqa: E402
from vidmem_model.train.curve import read_curve  # noqa: E402
from vidmem_model.weights import pack, unpack  # noqa: E402

STEPS = 11  # checkpoints come every tenth on the CPU
MOST = 16 << 20


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bundled(folder, preset, height, width, fps, scene, scenes, still=2):
    """A bundle of a film of scenes, of which the sixth is for testing; they move by a pixel every `still` frames."""

    def picture(k, h, w):
        texture = np.random.default_rng(k // scene).integers(0, 256, (h // 8, w // 4, 3)).repeat(8, 0).repeat(8, 1)
        return np.roll(texture, k // still, axis=1)[:, :w].astype(np.uint8)

    film, bundle = folder / "film.mkv", folder / "film.safetensors"
    write_video(film, scene * scenes, height, width, fps, draw=picture)
    cut = ["--preset", preset, "--block-seconds", str(1.2 * scene / fps)]
    assert train_bundle.main([str(film), "-o", str(bundle), *cut]) == 0
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return bundled(tmp_path_factory.mktemp("film"), "tiny", 32, 64, 8, 72, 7)


def options(bundle, work, steps=STEPS, **more):
    given = {"bundle": bundle, "work": work, "device": "cpu", "preset": "tiny", "steps": steps, "batch": 2, **more}
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def whole(bundle, tmp_path_factory):
    """OUT and working folder of a round that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    out, work = folder / "out", folder / "work"
    assert gpu_train.main([str(out), *options(bundle, work)]) == 0
    return out, work


def report_of(out):
    return json.loads((out / "train.json").read_text())


def curves(work):
    """Rows of every stage's curve, without the seconds."""
    return {
        stage: [line.rsplit(",", 1)[0] for line in (work / stage / "curve.csv").read_text().splitlines()]
        for stage in train_stages.STAGES
    }


def test_what_a_round_leaves(whole, tmp_path, capsys):
    out, work = whole
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) <= 8 and all(path.stat().st_size <= MOST for path in files)
    assert {"train.json", "held_out.png"} <= {path.name for path in files}
    report = report_of(out)
    assert report["round"] == 1 and report["done"] == list(train_stages.STAGES)
    assert report["held_out"]["picture_rows"] == ["history", "vae", "memory", "future", "continuation"]
    for stage, each in report["stages"].items():
        rows = read_curve(work / stage / "curve.csv")
        assert each["steps"] == [0, STEPS] and rows[-1]["step"] == STEPS == each["curve"][-1][0]
        assert each["steps_per_second"] > 0 and each["held_out"]["psnr"] > 5
    assert report["stages"]["vae"]["held_out"]["psnr"] > 15, "it begins with the principal components"
    assert gpu_train.main(["--join", str(out), "-o", str(tmp_path / "models")]) == 0
    joined = load_model(tmp_path / "models").state_dict()
    trained = load_model(work / "memory").state_dict()
    stored = unpack(pack(trained, "int8"))
    assert all(torch.equal(joined[name], stored[name]) for name in trained)
    assert (tmp_path / "models/vae.safetensors").read_bytes() == (work / "vae/vae.safetensors").read_bytes()


def weights(out, folder):
    """All numbers that a round has left, by file and name."""
    train_pieces.join(report_of(out)["pieces"], out, folder)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 3
    return {(file.name, name): tensor.tolist() for file in files for name, tensor in load_file(file).items()}


class Killed(BaseException):
    """Stands in for what nothing catches."""


def test_a_killed_round_is_taken_up(bundle, whole, tmp_path, monkeypatch):
    """Stages that were finished stay, the one that was killed goes on from its checkpoint, as if nothing had been."""
    out, work = tmp_path / "out", tmp_path / "work"
    rate, calls = loop.schedule, iter(range(1000))

    def dies(*arguments):
        if next(calls) == 2 * STEPS - 1:  # the last step of the second stage
            raise Killed
        return rate(*arguments)

    monkeypatch.setattr(loop, "schedule", dies)
    with pytest.raises(Killed):
        gpu_train.main([str(out), *options(bundle, work)])
    assert checkpoint.step_of(checkpoint.newest(work / "memory" / "checkpoints")) == 10
    assert report_of(out)["done"] == ["vae"]
    vae = (work / "vae" / "vae.safetensors").stat().st_mtime_ns
    assert gpu_train.main([str(out), *options(bundle, work)]) == 0
    assert (work / "vae" / "vae.safetensors").stat().st_mtime_ns == vae
    assert curves(work) == curves(whole[1])
    ours, theirs = report_of(out), report_of(whole[0])
    assert weights(out, tmp_path / "ours") == weights(whole[0], tmp_path / "theirs")
    assert [each["held_out"] for each in ours["stages"].values()] == [
        each["held_out"] for each in theirs["stages"].values()
    ]


@pytest.mark.long
def test_another_machine_goes_on_without_pyav(bundle, whole, tmp_path):
    """From OUT alone, by the script: a second round takes the counts of steps and the curves further."""
    out = shutil.copytree(whole[0], tmp_path / "out")
    more = STEPS + 2
    command = [ROOT / "benchmarks" / "gpu_train.sh", out, *options(bundle, tmp_path / "work", more)]
    missing = environment(tmp_path / "site", missing=["av"])
    env = {**os.environ, **missing, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {out}: {3 * STEPS} steps there, 0 here" in done.stdout
    assert (out / "train.log").read_text() == done.stdout
    report = report_of(out)
    assert report["round"] == 2 and len(report["rounds"]) == 6
    for stage, each in report["stages"].items():
        assert each["steps"] == [STEPS, more]
        rows = read_curve(tmp_path / "work" / stage / "curve.csv")
        assert [row["step"] for row in rows] == list(range(1, more + 1))
        assert checkpoint.first_step(tmp_path / "work" / stage / "checkpoints") == STEPS
    names = {piece["name"] for piece in report["pieces"]}
    assert {path.name for path in out.glob("weights-*")} == names, "pieces of the round before are gone"
    assert len(list(out.iterdir())) <= 8


@pytest.mark.long
def test_stages_that_have_all_their_steps_are_left_alone(bundle, whole, tmp_path, monkeypatch):
    """Here, and on another machine, to which the last one comes as adapters alone."""
    monkeypatch.setattr(train_stages, "_TRAIN", {"continuation": train_stages.finetune})
    for work in (shutil.copytree(whole[1], tmp_path / "here"), tmp_path / "there"):
        out = shutil.copytree(whole[0], tmp_path / f"out-{work.name}")
        assert gpu_train.main([str(out), *options(bundle, work)]) == 0
        report = report_of(out)
        assert report["round"] == 2 and [each["steps"] for each in report["stages"].values()] == [[STEPS, STEPS]] * 3
        if work.name == "here":
            assert report["pieces"] == report_of(whole[0])["pieces"]


def test_what_is_here_and_further_goes_first(bundle, whole, tmp_path):
    out, work = shutil.copytree(whole[0], tmp_path / "out"), shutil.copytree(whole[1], tmp_path / "work")
    given = gpu_train.parse([str(out), *options(bundle, work)])
    plan = train_stages.Plan("tiny", bundle, work, "cpu", STEPS, 2, False)
    state = gpu_train.resume(given, plan)
    assert state["round"] == 1 and checkpoint.newest(work / "memory" / "checkpoints") is not None
    report = report_of(out)
    (out / "train.json").write_text(json.dumps({**report, "preset": "demo"}))
    with pytest.raises(UserError, match="holds a training of preset demo, this one is of tiny"):
        gpu_train.resume(given, plan)


# --- pieces ---


@pytest.mark.parametrize("seed", range(4))
def test_pieces(tmp_path, seed):
    draw = random.Random(seed)
    files = {}
    for name in ("a.bin", "b.csv", "c"):
        files[name] = tmp_path / f"there-{name}"
        files[name].write_bytes(draw.randbytes(draw.randrange(40_000)))
    size = draw.randrange(5_000, 60_000)
    out = tmp_path / "out"
    out.mkdir()
    pieces = train_pieces.split(files, out, size)
    assert pieces == train_pieces.split(files, out, size) and all(piece["bytes"] <= size for piece in pieces)
    train_pieces.join(pieces, out, tmp_path / "joined")
    assert {name: (tmp_path / "joined" / name).read_bytes() for name in files} == {
        name: path.read_bytes() for name, path in files.items()
    }
    (out / "weights-00000000.0").write_bytes(b"of before")
    train_pieces.remove_others(pieces, out)
    assert {path.name for path in out.iterdir()} == {piece["name"] for piece in pieces}
    chosen = out / draw.choice(pieces)["name"]
    content = bytearray(chosen.read_bytes())
    content[draw.randrange(len(content))] ^= 1
    chosen.write_bytes(content)
    with pytest.raises(UserError, match=f"{chosen.name}: is not the piece that was written"):
        train_pieces.join(pieces, out, tmp_path / "again")
    chosen.unlink()
    with pytest.raises(UserError, match=f"{chosen.name}: a piece of the weights cannot be read"):
        train_pieces.join(pieces, out, tmp_path / "again")


# --- what cannot begin ---


def script(*arguments):
    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([ROOT / "benchmarks" / "gpu_train.sh", *arguments], env=env, capture_output=True, text=True)


def test_without_a_gpu_or_a_folder(tmp_path):
    done = script(tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "") and "no CUDA GPU" in done.stderr
    done = script()
    assert done.returncode == 2 and done.stderr.startswith("usage: ")


def test_what_cannot_be_read_is_one_line(bundle, tmp_path, capsys):
    given = [str(tmp_path / "out"), *options(tmp_path / "none.safetensors", tmp_path / "work")]
    assert gpu_train.main(given) == 2
    assert "train_bundle.py -o" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    for text in ("", "[]", '{"format": "other"}', '{"format": "vidmem.gpu_train", "version": 2}'):
        (tmp_path / "out" / "train.json").write_text(text)
        assert gpu_train.main([str(tmp_path / "out"), *options(bundle, tmp_path / "work")]) == 2
        assert "cannot be read as the report of a training" in capsys.readouterr().err


# --- long ---


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment(bundle, whole, tmp_path, seed):
    out, work = tmp_path / "out", tmp_path / "work"
    command = [sys.executable, ROOT / "benchmarks" / "gpu_train.py", out, *options(bundle, work)]
    began = time.monotonic()
    draw = random.Random(seed)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stage, step = draw.choice(train_stages.STAGES), draw.randint(1, STEPS)
    curve = work / stage / "curve.csv"
    while child.poll() is None and time.monotonic() < began + 300:
        if curve.is_file() and curve.read_text().count("\n") > step:
            break
        time.sleep(0.05)
    time.sleep(draw.random())
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert curves(work) == curves(whole[1])
    assert weights(out, tmp_path / "ours") == weights(whole[0], tmp_path / "theirs")


@pytest.mark.long
def test_fifty_steps_of_the_demo(tmp_path):
    """The models and the frame size that a GPU trains, on a film of some seconds."""
    # Faster motion of such a texture is a cut to a VAE of 50 steps: the recipe's max_change would allow no span.
    bundle = bundled(tmp_path, "demo", 128, 192, 12, 120, 7, still=24)
    given = options(bundle, tmp_path / "work", 50, preset="demo", batch=1, minutes=60)
    assert gpu_train.main([str(tmp_path / "out"), *given]) == 0
    files = list((tmp_path / "out").iterdir())
    assert len(files) <= 8 and all(path.stat().st_size <= MOST for path in files)
    report = report_of(tmp_path / "out")
    for stage, each in report["stages"].items():
        assert each["steps"] == [0, 50], stage
        losses = [row["loss"] for row in read_curve(tmp_path / "work" / stage / "curve.csv")]
        assert all(map(np.isfinite, losses)), stage
    levels = {stage: each["held_out"]["psnr"] for stage, each in report["stages"].items()}
    assert levels["vae"] > levels["memory"] > 10, levels
