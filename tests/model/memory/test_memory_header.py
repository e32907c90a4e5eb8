"""A memory file with a valid checksum but inconsistent parts is refused before memory is allocated."""

from __future__ import annotations

import math
import os

import pytest
from golden_helpers import use_golden_models
from header_helpers import one_number, tensor, text
from hostile import GOLDEN, Tensors

from vidmem_model.errors import MemoryFormatError, UserError
from vidmem_model.measure.peak import PeakMemory
from vidmem_model.memory.file import read_memory
from vidmem_model.model.file import load_model

CASES = {
    "rows without end": ("dct", text("size", [480_000_000, 32, 64])),
    "box without end": ("dct", text("box", [10**9] * 3)),
    "box of another grid": ("dct", text("box", [8, 16, 32])),
    "grid of another size": ("dct", text("grid", [4, 2, 2])),
    "frames without end": ("dct", text("size", [1 << 29, 32, 64])),
    "pixels without end": ("dct", text("size", [12, 32, 10**9])),
    "negative size": ("dct", text("size", [12, -32, 64])),
    "size in fractions": ("dct", text("size", [12.0, 32, 64])),
    "size of true": ("dct", text("size", [True, 32, 64])),
    "nested size": ("dct", text("size", "[" * 50 + "]" * 50)),
    "deep size": ("dct", text("size", "[" * 100_000)),
    "long size": ("dct", text("size", [1] * 100_000)),
    "size of long numbers": ("dct", text("size", "[" + "9" * 5000 + ", 32, 64]")),
    "fps 0": ("merge", text("fps", "0")),
    "fps nan": ("dct", text("fps", "nan")),
    "fps inf": ("dct", text("fps", "Infinity")),
    "fps negative": ("learned", text("fps", "-3")),
    "fps none": ("dct", text("fps", "null")),
    "another dtype": ("dct", text("dtype", "float32")),
    "another codec's channels": ("merge", text("codec_channels", 64)),
    "no codec's channels": ("merge", text("codec_channels", 0)),
    "no text": ("dct", text("source", "a\0b")),
    "long text": ("dct", text("source", "x" * 100_000)),
    "frames of another model": ("learned", text("size", [12, 32, 32])),
    "more frames than rows": ("learned", text("size", [480, 32, 64])),
    "row_of below 0": ("merge", tensor("extras.row_of", "I16", -32768)),
    "row_of beyond the rows": ("merge", one_number("extras.row_of", "h", 10)),
    "row_of in floats": ("merge", tensor("extras.row_of", "F32", 0.0)),
    "row_of of another shape": ("merge", tensor("extras.row_of", "I16", 0, [3, 8])),
    "row_of too short": ("merge", tensor("extras.row_of", "I16", 0, [23])),
    "table below 0": ("dct", one_number("extras.table", "i", -1)),
    "table beyond the box": ("dct", one_number("extras.table", "i", 3 * 8 * 16 * 16)),
    "table in int64": ("dct", tensor("extras.table", "I64", 0)),
    "scale in float64": ("dct", tensor("extras.scale", "F64", 1.0)),
    "scale in float16": ("merge", tensor("extras.scale", "F16", 1.0)),
    "scale of 0": ("dct", one_number("extras.scale", "f", 0.0)),
    "scale nan": ("learned", one_number("extras.scale", "f", math.nan)),
    "scale inf": ("dct", one_number("extras.scale", "f", math.inf)),
    "scale of another shape": ("dct", tensor("extras.scale", "F32", 1.0, [128, 1])),
    "rows nan": ("dct", one_number("rows", "e", math.nan)),
    "rows inf": ("merge", one_number("rows", "e", math.inf)),
    "all rows nan": ("learned", tensor("rows", "F16", math.nan)),
    "rows beyond float32": ("dct", tensor("extras.scale", "F32", 3e38)),
    "positions nan": ("dct", one_number("positions", "f", math.nan)),
    "positions after the clip": ("merge", one_number("positions", "f", 4.0)),
    "positions far away": ("learned", tensor("positions", "F32", 1e30)),
    "positions before the clip": ("dct", tensor("positions", "F32", -1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_refused(case, tmp_path, monkeypatch):
    use_golden_models(monkeypatch)
    method, change = CASES[case]
    file = Tensors.read((GOLDEN / "memories" / f"{method}-float16.safetensors").read_bytes())
    path = tmp_path / "m"
    path.write_bytes(file.write())
    assert read_memory(path).frames == 12  # put together again it is as it was
    change(file)
    path.write_bytes(file.write())
    with PeakMemory() as memory, pytest.raises(MemoryFormatError) as caught:
        read_memory(path)
    message = str(caught.value)
    assert message.startswith((f"{path}: its header is damaged (", f"{path} is not a memory file (its positions"))
    assert message.isprintable()
    assert len(message) < 400
    assert memory.grown_bytes < 64 << 20


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "is not a file"),
        (os.mkfifo, "is not a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a file"),
        (lambda path: path.symlink_to(path), "no such file"),
    ],
    ids=["nothing", "folder", "pipe", "device", "loop"],
)
def test_what_is_no_file_is_told(make, says, tmp_path):
    path = tmp_path / "it.safetensors"
    make(path)
    with pytest.raises(MemoryFormatError, match=f"it.safetensors: {says}; make one with `vidmem compress`"):
        read_memory(path)
    with pytest.raises(UserError, match=f"it.safetensors: {says}"):
        load_model(path)
