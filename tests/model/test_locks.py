"""Locks: a second process that writes the same run, video, demo or cache ends in one line."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from process_helpers import COMMANDS, results, stage

from vidmem_model import files
from vidmem_model.errors import UserError

WRITES = {"pretrain-vae": "vae", "pretrain": "one", "finetune": "two", "generate": "made.mp4", "demo": "shown"}
LOCKS = {
    name: f".{output}.lock" if name in ("generate", "demo") else f"{output}/.lock" for name, output in WRITES.items()
}


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", WRITES)
def test_a_second_process_is_refused(nursery, whole, tmp_path, name):
    expected, _ = whole(name)
    both = stage(tmp_path / "both")
    (tmp_path / "linked").symlink_to(both)
    running = nursery.start(both, *COMMANDS[name])
    wait_for(lambda: (both / LOCKS[name]).exists() and (both / LOCKS[name]).read_text())
    running.kill(signal.SIGSTOP)
    for folder in (both, tmp_path / "linked"):
        refused = nursery.run(folder, *COMMANDS[name])
        owner = f"another process is writing here (pid {running.pid}, host {socket.gethostname()})"
        assert refused.code == 2 and refused.out == ""
        # The golden recipes have a former name, which gives a note.
        said = [line for line in refused.err.splitlines() if ": note: " not in line]
        assert len(said) == 1 and owner in said[0] and WRITES[name] in said[0]
    running.kill(signal.SIGCONT)
    running.end()
    assert running.code == 0, running.err
    assert results(both) == expected


def test_two_runs_share_a_cache(nursery, tmp_path):
    """The second process waits for the latents that the first one encodes."""
    folder = stage(tmp_path / "both")
    (folder / "other.yaml").write_text((folder / "one.yaml").read_text().replace("output: one", "output: other"))
    running = nursery.start(folder, "pretrain", "one.yaml")
    wait_for(lambda: list(folder.glob("latents/*/.lock")) or (folder / "one" / "curve.csv").exists())
    waiting = nursery.run(folder, "pretrain", "other.yaml")
    running.end()
    assert (running.code, waiting.code) == (0, 0), running.err + waiting.err
    made = results(folder)
    assert made["one/model.safetensors"] == made["other/model.safetensors"]
    assert not list(folder.rglob("*.lock"))


def test_the_lock_goes_with_its_process(nursery, tmp_path):
    folder = stage(tmp_path / "folder")
    for name in ("generate", "pretrain"):
        running = nursery.start(folder, *COMMANDS[name])
        wait_for((folder / LOCKS[name]).exists)
        running.kill(signal.SIGKILL)
        running.end()
        assert (folder / LOCKS[name]).exists()
        assert nursery.run(folder, *COMMANDS[name]).code == 0
        assert not (folder / LOCKS[name]).exists()


def test_a_lock_lies_beside_what_is_behind_a_link(tmp_path):
    (tmp_path / "link").symlink_to("folder/file")
    assert files.beside(tmp_path / "link") == tmp_path / "folder" / ".file.lock"
    assert files.beside(Path("/")) == Path("/..lock")


def test_a_lock_in_one_process(tmp_path):
    lock = tmp_path / ".lock"
    with files.locked(lock, tmp_path):
        with pytest.raises(UserError, match=rf"another process is writing here \(pid {os.getpid()}, host "):
            files.locked(lock, tmp_path).__enter__()
        assert os.listdir(tmp_path) == [".lock"]
    assert os.listdir(tmp_path) == []
    lock.write_text("pid 1, host elsewhere\n")  # of one that died
    with files.locked(lock, tmp_path):
        assert f"pid {os.getpid()}," in lock.read_text()
    assert os.listdir(tmp_path) == []


def test_file_systems_without_locks(tmp_path, monkeypatch):
    import fcntl

    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with files.locked(tmp_path / ".lock", tmp_path):
        files.write_json(tmp_path / "x.json", {})
    with files.output_folder(tmp_path / "out") as folder:
        files.write_json(folder / "x.json", {})
    assert sorted(os.listdir(tmp_path)) == ["out", "x.json"]


def count_up(folder, seed):
    draw = random.Random(seed)
    for _ in range(40):
        with files.locked(folder / ".lock", folder, waiting=True):
            count = int((folder / "count").read_text())
            time.sleep(draw.uniform(0, 0.002))
            (folder / "count").write_text(str(count + 1))


def test_never_two_at_once(tmp_path, monkeypatch):
    """The lock file is removed after each use, and never do two processes hold the lock."""
    monkeypatch.setattr(files, "_POLL_SECONDS", 0.001)
    (tmp_path / "count").write_text("0")
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=count_up, args=(tmp_path, seed)) for seed in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert (tmp_path / "count").read_text() == "160" and os.listdir(tmp_path) == ["count"]
