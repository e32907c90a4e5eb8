"""Downloading the sample film to the cache: atomic, and one line if it fails."""

from __future__ import annotations

import io
import subprocess
import tarfile
import zipfile

import pytest

from vidmem_model import video as data
from vidmem_model.errors import MediaError
from vidmem_model.video import sample


def one_line(error):
    message = str(error.value)
    assert "\n" not in message and message
    return message


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDMEM_CACHE", str(tmp_path / "own"))
    assert data.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("VIDMEM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir() == tmp_path / "xdg" / "vidmem"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / ".cache" / "vidmem"


class FakePip:
    """Stands for the pip process: writes a release whose film is `film`, or fails."""

    film = b"film" * 1000
    fails = None
    live = 0

    def __init__(self, command, stdout, stderr, env):
        type(self).live += 1
        self.returncode = None
        release = command[command.index("-d") + 1]
        if isinstance(self.fails, str):
            stdout.write(self.fails.encode())
            return
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(sample.SAMPLE_MEMBER, self.film)
        sample.Path(release).mkdir()
        with tarfile.open(f"{release}/moviepy-2.2.1.tar.gz", "w:gz") as outer:
            entry = tarfile.TarInfo(f"moviepy-2.2.1/{sample.SAMPLE_ARCHIVE}")
            entry.size = len(inner.getvalue())
            outer.addfile(entry, io.BytesIO(inner.getvalue()))

    def poll(self):
        if isinstance(self.fails, type):
            interrupt, self.fails = self.fails, "running"
            raise interrupt
        if self.fails != "running":
            self.returncode = 1 if self.fails else 0
        return self.returncode

    def kill(self):
        self.fails = "killed"

    def wait(self):
        assert self.poll() is not None, "waits for a process that nobody ended"
        type(self).live -= 1


@pytest.fixture
def fake_pip(monkeypatch, tmp_path):
    film = FakePip.film
    monkeypatch.setenv("VIDMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sample, "SAMPLE_BYTES", len(film))
    monkeypatch.setattr(sample, "SAMPLE_SHA256", sample.hashlib.sha256(film).hexdigest())
    pip = type("Pip", (FakePip,), {"live": 0})
    monkeypatch.setattr(subprocess, "Popen", pip)
    return pip


def left_in_cache(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").iterdir())


def test_fetch_unpacks_checks_and_caches(fake_pip, tmp_path):
    path = data.fetch_sample_clip(progress=False)
    assert path.read_bytes() == fake_pip.film
    assert left_in_cache(tmp_path) == ["bbb.mp4"] and fake_pip.live == 0
    fake_pip.fails = "must not be asked again"
    assert data.fetch_sample_clip(progress=False) == path
    path.write_bytes(b"spoilt")
    fake_pip.fails = None
    assert data.fetch_sample_clip(progress=False).read_bytes() == fake_pip.film


def test_fetch_failure_is_one_line_and_leaves_nothing(fake_pip, tmp_path):
    fake_pip.fails = "Looking\nERROR: no route to the index\n"
    with pytest.raises(MediaError, match="no route to the index.*give a VIDEO argument") as error:
        data.fetch_sample_clip(progress=False)
    one_line(error)
    assert left_in_cache(tmp_path) == []


def test_fetch_refuses_another_film(fake_pip, tmp_path):
    fake_pip.film = b"other" * 800
    with pytest.raises(MediaError, match="not the expected file"):
        data.fetch_sample_clip(progress=False)
    assert left_in_cache(tmp_path) == []


def test_interrupt_stops_pip_and_leaves_nothing(fake_pip, tmp_path):
    fake_pip.fails = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        data.fetch_sample_clip(progress=False)
    assert left_in_cache(tmp_path) == [] and fake_pip.live == 0


def test_interrupt_while_unpacking_leaves_nothing(fake_pip, tmp_path, monkeypatch):
    def interrupted(release, part, bar):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(sample, "_extract_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.fetch_sample_clip(progress=False)
    assert left_in_cache(tmp_path) == [] and fake_pip.live == 0


def test_unwritable_cache(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("VIDMEM_CACHE", str(blocked / "cache"))
    with pytest.raises(MediaError, match="give a VIDEO argument"):
        data.fetch_sample_clip(progress=False)
