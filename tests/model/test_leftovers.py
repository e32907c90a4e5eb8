"""Full disks, killed processes and closed streams end in one line and leave no partial files."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from process_helpers import COMMANDS, results, stage
from training_helpers import curve, train

from vidmem_model import cli, files
from vidmem_model.errors import UserError
from vidmem_model.train import checkpoint
from vidmem_model.train import loop as training


def one_line(err):
    """The last line of stderr, the only one that is neither progress nor a note on a former name in the recipe."""
    lines = [line for line in err.splitlines() if not line.startswith("step ") and " blocks of " not in line]
    lines = [line for line in lines if not (line.startswith("vidmem: note: ") and " is deprecated; " in line)]
    assert len(lines) == 1 and lines[0].startswith("vidmem: error: "), err
    assert "bug" not in lines[0] and len(lines[0]) < 600
    return lines[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("share", range(4))
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full(nursery, whole, tmp_path, name, share):
    """A limit of the size of files has the same effect, at any place; then there is room again."""
    expected, _ = whole(name)
    folder = stage(tmp_path / "full")
    before = results(folder).keys()
    made = {name: content for name, content in expected.items() if name not in before}
    largest = max(len(content) for content in made.values() if isinstance(content, bytes))
    assert largest > 2000  # of stderr, a file here, goes less
    limit = (2000, largest // 2, largest - 1, random.Random(name).randrange(2000, largest))[share]
    failed = nursery.run(folder, *COMMANDS[name], limit=limit)
    assert failed.code == 2, (limit, failed.err)
    line = one_line(failed.err)
    assert "File too large" in line and "bytes are free in" in line and "make room" in line, line
    assert [path for path in folder.rglob(".*")] == []
    if name in ("compress", "demo"):
        assert results(folder).keys() == before
    again = nursery.run(folder, *COMMANDS[name])
    assert again.code == 0, again.err
    assert results(folder) == expected


def test_a_checkpoint_that_does_not_fit(tmp_path, monkeypatch):
    """The partial checkpoint is removed, the one before stays, and the run resumes from it."""
    reference = train(tmp_path / "whole", steps=8).state_dict()
    folder = tmp_path / "full"
    writer = checkpoint.dcp.save

    def full(state, **given):
        if checkpoint.newest(folder / "checkpoints"):
            raise checkpoint.CheckpointException("write", {0: (OSError(28, "No space left on device"), None)})
        writer(state, **given)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.dcp, "save", full)
        with pytest.raises(UserError) as error:
            train(folder, steps=8)
    said = str(error.value)
    assert "checkpoint of step 8" in said and "bytes are needed" in said and str(folder) in said and "\n" not in said
    assert os.listdir(folder / "checkpoints") == ["step-00000004"]
    model = train(folder, steps=8)
    assert curve(folder) == curve(tmp_path / "whole")
    assert all(torch.equal(value, reference[name]) for name, value in model.state_dict().items())


DEAD = (".vidmem-dead.tmp", ".vidmem-0123456789abcdef.tmp")


def leave(folder):
    """What killed processes left, a file and a folder, and what a living one holds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DEAD[0]).write_bytes(b"begun")
    (folder / DEAD[1] / "deep").mkdir(parents=True)
    (folder / DEAD[1] / "deep" / "file").write_bytes(b"begun")
    (folder / ".vidmem-alive.tmp").write_bytes(b"begun")
    (folder / ".vidmem-living.tmp").mkdir()
    held = [os.open(folder / name, os.O_RDONLY) for name in (".vidmem-alive.tmp", ".vidmem-living.tmp")]
    for handle in held:
        fcntl.flock(handle, fcntl.LOCK_EX)
    return held


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("name", "place"),
    [(name, ".") for name in ("compress", "generate", "demo")]
    + [("generate", "made.mp4.parts"), ("pretrain", "one"), ("finetune", "two"), ("pretrain-vae", "vae")],
)
def test_what_dead_processes_left_goes_and_what_living_ones_hold_stays(nursery, whole, tmp_path, name, place):
    folder = stage(tmp_path / "folder")
    held = leave(folder / place)
    (folder / "one" / "checkpoints" / ".step-00000007.part").mkdir(parents=True) if place == "one" else None
    assert nursery.run(folder, *COMMANDS[name]).code == 0
    for handle in held:
        os.close(handle)
    found = results(folder)
    kept = {str(Path(place) / each) for each in (".vidmem-alive.tmp", ".vidmem-living.tmp")}
    assert found.keys() - whole(name)[0].keys() - {place} == kept
    shutil.rmtree(folder / place / ".vidmem-living.tmp")


def test_names_of_two_containers_never_meet(tmp_path, monkeypatch):
    """Both processes have one number, as the first of each container has."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "x"
    with files.replacing(target) as one, files.replacing(target) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert target.read_text() == "one" and os.listdir(tmp_path) == ["x"]
    with files.output_folder(tmp_path / "a") as one, files.output_folder(tmp_path / "b") as other:
        assert one != other
        assert len(os.listdir(tmp_path)) == 1 + 2 + 2


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("number", "ignored"),
    [(signal.SIGHUP, False), (signal.SIGHUP, True), (signal.SIGTERM, False), (signal.SIGINT, False)],
)
def test_a_signal_ends_a_training_unless_nohup(nursery, tmp_path, monkeypatch, number, ignored):
    forward, calls = training.FlowMatching.forward, []

    def interrupting(self, batch):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return forward(self, batch)

    monkeypatch.setattr(training.FlowMatching, "forward", interrupting)
    monkeypatch.chdir(stage(tmp_path / "folder"))
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)  # of pytest: nohup's, perhaps
    try:
        assert cli.main(COMMANDS["pretrain"]) == (0 if ignored else 128 + number)
    finally:
        signal.signal(number, before)
    assert len(calls) == (6 if ignored else 2)
    assert not list(Path().rglob(".lock")) and not list(Path().rglob("*.part"))


@pytest.mark.sample(1)
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_leaves_nothing_of_a_command(nursery, tmp_path, number):
    folder = stage(tmp_path / "folder")
    before = results(folder)
    child = nursery.start(folder, *COMMANDS["demo"])
    while not list(folder.glob(".vidmem-*")):
        pass
    child.kill(number)
    assert child.end().code == 128 + number and child.err == ""
    assert results(folder) == before


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["compress", "generate"])
@pytest.mark.parametrize("stream", [1, 2])
def test_streams_that_are_full(nursery, whole, tmp_path, name, stream):
    folder = stage(tmp_path / "folder")
    done = nursery.run(folder, *COMMANDS[name], streams={stream: "/dev/full"})
    if stream == 1:
        assert done.code == 2 and "results cannot be printed to stdout (No space left" in one_line(done.err)
    else:
        assert done.code == 0
    assert results(folder) == whole(name)[0]


def test_a_training_goes_on_without_stderr(nursery, whole, tmp_path):
    folder = stage(tmp_path / "folder")
    assert nursery.run(folder, *COMMANDS["pretrain"], streams={2: "/dev/full"}).code == 0
    assert results(folder) == whole("pretrain")[0]


@pytest.mark.sample(2)
@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full"])
def test_streams_of_a_shell(tmp_path, redirection):
    command = f"'{sys.executable}' -m vidmem_model --help {redirection}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    if ">&-" in redirection.replace("2>&-", "") or "> /dev/full" in redirection.replace("2> /dev/full", ""):
        assert done.returncode == 2 and done.stdout == ""
        if "2" not in redirection:
            assert done.stderr.count("\n") == 1 and "results cannot be printed to stdout" in done.stderr
    else:
        assert done.returncode == 0 and "Usage: vidmem" in done.stdout


def test_a_signal_that_is_swallowed_comes_again(monkeypatch, capfd):
    """Destructors, and libraries in C, cannot pass on what a signal raises."""

    class Swallows:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)

    def collect():
        Swallows()
        for _ in range(500):
            time.sleep(0.01)
        raise AssertionError("nothing ended the command")

    monkeypatch.setattr("vidmem_kernels.info.collect", collect)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        before = signal.getsignal(signal.SIGINT), sys.unraisablehook
        assert cli.main(["info"]) == 130
        assert capfd.readouterr().err == "vidmem: interrupted; nothing was written\n"
        assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    finally:
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize("variable", ["VIDMEM_CACHE", "XDG_CACHE_HOME"])
def test_a_cache_of_a_user_who_is_not(tmp_path, monkeypatch, capfd, variable):
    monkeypatch.delenv("VIDMEM_CACHE", raising=False)
    monkeypatch.setenv(variable, "~nosuchuser/x")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 2
    said = one_line(capfd.readouterr().err)
    assert "~nosuchuser/x" in said and "no such home folder" in said
    assert os.listdir(tmp_path) == []


def test_the_profile_keeps_what_it_has_measured(tmp_path, monkeypatch, capfd):
    from vidmem_model.measure import attention as profile

    measure, calls = profile.measure_point, []

    def interrupting(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(profile, "measure_point", interrupting)
    arguments = ["profile", "-o", str(tmp_path / "out"), "--lengths", "0.1,0.2", "--heads", "1", "--head-dim", "8"]
    assert cli.main(arguments) == 130
    out, err = capfd.readouterr()
    assert err == "vidmem: interrupted; the measurements so far are written, 6 are missing\n"
    found = json.loads((tmp_path / "out" / "memory_vs_context.json").read_text())
    assert len(found["points"]) == 2 and len(found["missing"]) == 6
    assert found["missing"][0] == {"strategy": "sliding window", "seconds": 0.1}
    assert "whole" in out and os.listdir(tmp_path) == ["out"]
    calls[:] = [None, None]
    assert cli.main(arguments) == 130
    assert capfd.readouterr().err == "vidmem: interrupted; nothing was written\n"
