"""The memory file: reading returns what was written, and every damage is an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vidmem_kernels import MemoryBank
from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.evaluate.metrics import psnr
from vidmem_model.memory.compressor import compress
from vidmem_model.memory.config import CompressorConfig
from vidmem_model.memory.file import read_memory, write_memory
from vidmem_model.memory.method import encoded
from vidmem_model.video import Clip


@pytest.fixture(scope="module")
def clip():
    t, y, x = torch.arange(11).view(-1, 1, 1), torch.arange(70).view(-1, 1), torch.arange(131)
    waves = [torch.sin((y + 2 * t) / (5 + c)) + torch.cos((x - t) / (8 - c)) for c in range(3)]
    noise = torch.randn(11, 70, 131, 3, generator=torch.Generator().manual_seed(1)) * 2
    return (torch.stack(waves, -1) * 50 + 128 + noise).round().clamp(0, 255).to(torch.uint8)


def made(clip, **config):
    clip = Clip(clip, 23.976, Path("folder/holiday.mp4"), None)
    return compress(encoded(clip, dtype=torch.float32), CompressorConfig(**config))


def written(path, clip, **config):
    write_memory(path, made(clip, **config))
    return path


def quality(memory, clip):
    return sum(psnr(memory.retrieve(k), clip[k]) for k in range(len(clip))) / len(clip)


@pytest.fixture
def file(tmp_path, clip):
    return written(tmp_path / "memory.safetensors", clip)


@pytest.mark.parametrize("method", ["dct", "merge"])
def test_header_and_frames_survive(tmp_path, clip, method):
    memory = read_memory(written(tmp_path / "m.safetensors", clip, method=method, dtype="float32"))
    assert (memory.method, memory.frames, memory.height, memory.width) == (method, 11, 70, 131)
    assert memory.fps == 23.976 and memory.source == "holiday.mp4"
    assert len(memory.bank) == 2 * 1 * 2
    compressed = made(clip, method=method)
    torch.testing.assert_close(memory.bank.positions, compressed.positions)
    whole = read_memory(written(tmp_path / "n.safetensors", clip, method=method, dtype="float32"))
    for k in range(11):
        frame = memory.retrieve(k)
        assert frame.shape == (70, 131, 3) and frame.dtype == torch.uint8
        assert torch.equal(frame, whole.retrieve(k))


def test_row_types_trade_size_for_quality(tmp_path, clip):
    sizes, qualities = {}, {}
    for dtype in ("float32", "float16", "int8", "float8"):
        path = written(tmp_path / f"{dtype}.safetensors", clip, dtype=dtype)
        sizes[dtype], qualities[dtype] = path.stat().st_size, quality(read_memory(path), clip)
    rows = 4 * 3072
    assert sizes["float32"] - sizes["float16"] == pytest.approx(2 * rows, abs=256)
    assert sizes["float16"] - sizes["int8"] == pytest.approx(rows, abs=256)
    assert qualities["float16"] == pytest.approx(qualities["float32"], abs=0.02)
    assert qualities["int8"] > qualities["float32"] - 1.5
    assert qualities["float8"] > qualities["float32"] - 3


@pytest.mark.parametrize("frame", [-1, 11, 10**9])
def test_frames_that_are_not_there(file, frame):
    with pytest.raises(UserError, match=rf"no frame {frame}; give a frame from 0 to 10"):
        read_memory(file).retrieve(frame)


def one_line(error):
    assert "\n" not in str(error.value)


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(MemoryFormatError, match="vidmem compress") as error:
            read_memory(path)
        one_line(error)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_cut_file(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(MemoryFormatError) as error:
        read_memory(file)
    one_line(error)


@pytest.mark.parametrize("place", [9, 400, -5000, -1])
def test_one_changed_byte(file, place):
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    with pytest.raises(MemoryFormatError) as error:
        read_memory(file)
    one_line(error)


def test_foreign_files(tmp_path):
    text = tmp_path / "text"
    text.write_text("hello")
    weights = tmp_path / "weights.safetensors"
    save_file({"weight": torch.zeros(3, 4)}, weights)
    bare = tmp_path / "bank.safetensors"
    bank = MemoryBank(4)
    bank.append(torch.zeros(1, 4), torch.zeros(1, 3))
    bank.save(bare)
    for path in (text, weights, bare):
        with pytest.raises(MemoryFormatError) as error:
            read_memory(path)
        one_line(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "2"}, "has format version 2, this vidmem reads version 1"),
        ({"size": "[11, 70]"}, "header is damaged"),
        ({"size": "eleven"}, "header is damaged"),
        ({"fps": "fast"}, "header is damaged"),
        ({"method": "wavelet"}, "header is damaged"),
        ({"grid": None}, "header is damaged .it lacks 'grid'"),
        ({"grid": "[3, 1, 2]"}, "header is damaged"),
    ],
)
def test_other_headers(file, tmp_path, changes, message):
    bank = MemoryBank.load(file)
    header = {k: v for k, v in bank.metadata.items() if not k.startswith("vidmem.")}
    header = {k: v for k, v in {**header, **changes}.items() if v is not None}
    bank.save(tmp_path / "other.safetensors", metadata=header)
    with pytest.raises(MemoryFormatError, match=message) as error:
        read_memory(tmp_path / "other.safetensors")
    one_line(error)


def test_memory_of_another_codec(tmp_path, clip):
    bank = MemoryBank.load(written(tmp_path / "m.safetensors", clip, method="merge"))
    header = {k: v for k, v in bank.metadata.items() if not k.startswith("vidmem.")}
    bank.save(tmp_path / "other.safetensors", metadata={**header, "codec": "wan"})
    with pytest.raises(MemoryFormatError, match="codec 'wan'") as error:
        read_memory(tmp_path / "other.safetensors")
    one_line(error)


def test_unwritable_place(tmp_path, clip):
    with pytest.raises(UserError, match="cannot be written") as error:
        written(tmp_path / "none" / "m.safetensors", clip)
    one_line(error)


def test_interrupt_while_writing_keeps_the_old_file(file, clip, monkeypatch):
    before = file.read_bytes()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    monkeypatch.setattr("os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(file, clip[:4])
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]
