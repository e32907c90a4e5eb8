"""Files and pictures that commands write: right pixels, whole or not at all, small enough to send."""

import json
import os

import numpy as np
import pytest
import torch

from vidmem_model import files
from vidmem_model.errors import UserError
from vidmem_model.show import plots
from vidmem_model.show.sheet import SheetRow, write_contact_sheet
from vidmem_model.video.png import write_png


def read_png(path):
    """Decode with FFmpeg, which shares nothing with our writer."""
    import av

    with av.open(str(path)) as container:
        return next(container.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (48, 64)])
def test_png_holds_the_pixels(tmp_path, shape):
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    write_png(tmp_path / "x.png", image)
    np.testing.assert_array_equal(read_png(tmp_path / "x.png"), image.numpy())
    strided = image.transpose(0, 1)
    write_png(tmp_path / "x.png", strided)
    np.testing.assert_array_equal(read_png(tmp_path / "x.png"), strided.numpy())
    assert os.listdir(tmp_path) == ["x.png"]


@pytest.mark.parametrize("image", [torch.zeros(4, 4, 3), torch.zeros(4, 4, dtype=torch.uint8)])
def test_png_refuses_other_images(tmp_path, image):
    with pytest.raises(ValueError, match=r"write_png: image must be uint8 \(H, W, 3\), got"):
        write_png(tmp_path / "x.png", image)
    assert os.listdir(tmp_path) == []


def test_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing/x.json", "does not exist; create it"),
        ("file/x.json", "is not a directory"),
        ("folder", "is a directory; give the path of a file"),
    ],
)
def test_paths_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        files.write_json(tmp_path / name, {})


def test_unwritable_folder():
    with pytest.raises(UserError, match="/proc/x.json: cannot be written"):
        files.write_json(files.Path("/proc/x.json"), {})


def test_full_disk_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="No space left on device"), files.replacing(tmp_path / "x"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_output_folder_appears_only_when_all_is_done(tmp_path):
    target = tmp_path / "out"
    with files.output_folder(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    with pytest.raises(KeyboardInterrupt), files.output_folder(target) as folder:
        (folder / "a").write_text("2")
        raise KeyboardInterrupt
    assert (target / "a").read_text() == "1"
    (target / "own").touch()
    with files.output_folder(target) as folder:
        (folder / "a").write_text("3")
    assert (target / "a").read_text() == "3"
    assert sorted(os.listdir(target)) == ["a", "own"]
    assert os.listdir(tmp_path) == ["out"]


def test_output_folder_refuses_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="is a file; give the path of a folder"):
        files.output_folder(tmp_path / "out").__enter__()


def sheet_rows(count, height=120, width=208, noise=False):
    rows = []
    for i in range(count):
        source = torch.full((height, width, 3), 40, dtype=torch.uint8)
        if noise:
            source = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8)
        exact, off = source.clone(), source.clone()
        off[:, : width // 2] = (off[:, : width // 2].int() + 32).clamp(0, 255).byte()
        captions = {"dct": (exact, "equal"), "merge": (off, "18.03 dB   SSIM 0.9")}
        rows.append(SheetRow(f"frame {i}\n0.00 s", source, captions))
    return rows


def test_contact_sheet_shows_source_and_difference(tmp_path):
    pytest.importorskip("matplotlib")
    write_contact_sheet(tmp_path / "sheet.png", sheet_rows(2), "title")
    pixels = read_png(tmp_path / "sheet.png")
    grey = (pixels == 40).all(2)
    # Source and dct of both rows in full, merge by half: 2 x (1 + 1 + 0.5) thumbnails of 264 x 152.
    assert grey.sum() == pytest.approx(5 * 264 * 152, rel=0.02)
    # 32 of 255 lies in the middle of the colour scale, which ends at 64.
    from matplotlib import colormaps

    middle = np.array(colormaps["inferno"](0.5, bytes=True)[:3])
    assert (pixels == middle).all(2).sum() == pytest.approx(2 * 0.5 * 264 * 152, rel=0.05)
    assert os.listdir(tmp_path) == ["sheet.png"]


def test_contact_sheet_of_noise_stays_small(tmp_path):
    pytest.importorskip("matplotlib")
    write_contact_sheet(tmp_path / "sheet.png", sheet_rows(5, noise=True), "title")
    assert 300_000 < (tmp_path / "sheet.png").stat().st_size < 1_500_000


def test_without_matplotlib_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert plots.plots_missing() == "matplotlib is not installed: pip install 'vidmem-model[bench]'"


def test_json_is_readable(tmp_path):
    files.write_json(tmp_path / "x.json", {"name": "Größe", "values": [1, 2.5, None]})
    with open(tmp_path / "x.json", encoding="utf-8") as file:
        text = file.read()
    assert "Größe" in text and text.endswith("}\n")
    assert json.loads(text)["values"] == [1, 2.5, None]
