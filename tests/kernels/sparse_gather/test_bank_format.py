"""docs/bank_file.md says enough to read and to write a bank's file without this package."""

import hashlib
import json
import re
import struct

import numpy as np
import pytest
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, fill, ids, stored
from paths import ROOT

from vidmem_kernels import MemoryBank
from vidmem_kernels.sparse_gather import memory_file

PAGE = (ROOT / "docs" / "bank_file.md").read_text()
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def written_by_hand(tensors, metadata):
    """The page's sections, one line each; tensors are {name: (dtype, shape, bytes)}."""
    order = sorted(tensors, key=lambda name: (-WIDTHS.get(tensors[name][0], 1), name))
    own = {
        "vidmem.checksum": "0" * 64,
        "vidmem.format": "vidmem_kernels.MemoryBank",
        "vidmem.version": "1",
    }
    header, end = {"__metadata__": own | metadata}, 0
    for name in order:
        dtype, shape, data = tensors[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    content = struct.pack("<Q", len(text)) + text + b"".join(tensors[name][2] for name in order)
    return content.replace(b"0" * 64, hashlib.sha256(content).hexdigest().encode(), 1)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_file_written_by_the_page_is_the_one_that_save_writes(count, tmp_path):
    rng = np.random.default_rng(count)
    rows = rng.integers(-127, 128, (count, 5), dtype=np.int8)
    positions, scale = rng.random((count, 3), dtype=np.float32), rng.random(count, dtype=np.float32)
    wide = rng.integers(0, 9, (2, 3))
    content = written_by_hand(
        {
            "rows": ("I8", [count, 5], rows.tobytes()),
            "positions": ("F32", [count, 3], positions.tobytes()),
            "scale": ("F32", [count], scale.tobytes()),
            "extras.wide": ("I64", [2, 3], wide.tobytes()),
        },
        {"film": "片"},
    )
    (tmp_path / "hand").write_bytes(content)
    bank = MemoryBank.load(tmp_path / "hand")
    assert bank.metadata == {"film": "片"} and torch.equal(bank.extras["wide"], torch.from_numpy(wide))
    assert np.array_equal(bank.gather(torch.arange(count)).numpy(), rows * scale[:, None])
    bank.save(tmp_path / "bank")
    assert (tmp_path / "bank").read_bytes() == content


@pytest.fixture(scope="module")
def read_bank():
    """The reader of the page."""
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def read_bank" in block)
    assert re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE) == ["hashlib", "json", "struct", "numpy"]
    names = {}
    exec(compile(code, "bank_file.md", "exec"), names)
    assert set(names["KINDS"]) == set(memory_file._DTYPES)
    return names["read_bank"]


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_the_reader_of_the_page_reads_every_bank(dtype, read_bank, tmp_path):
    bank = MemoryBank(5, dtype=dtype)
    tokens, positions = fill(bank, 9)
    bank.save(tmp_path / "memory", metadata={"film": "片"})
    read, places, text, tensors = read_bank(tmp_path / "memory")
    assert torch.equal(torch.from_numpy(read), stored(tokens, dtype))
    assert np.array_equal(places, positions) and text["film"] == "片"
    assert ("scale" in tensors) == (dtype in QUANTIZED)


def test_the_reader_of_the_page_sees_damage(read_bank, tmp_path):
    bank = MemoryBank(5)
    fill(bank, 9)
    bank.save(tmp_path / "memory")
    content = bytearray((tmp_path / "memory").read_bytes())
    content[-1] ^= 1
    (tmp_path / "memory").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read_bank(tmp_path / "memory")


def test_the_page_names_every_dtype():
    row = next(line for line in PAGE.splitlines() if line.startswith("| `extras.NAME`"))
    assert all(f"`{name}`" in row for name in memory_file._DTYPES)
