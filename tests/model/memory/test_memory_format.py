"""docs/memory_file.md says enough to read a frame of a memory file without this package: its reader, in numpy, does."""

import json
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from paths import ROOT

from vidmem_model import CompressorConfig, compress, read_memory, write_memory
from vidmem_model.memory import METHODS
from vidmem_model.memory.config import ROW_DTYPES
from vidmem_model.model.config import Compression

PAGE = (ROOT / "docs/memory_file.md").read_text()
READER = PAGE.split("```python\n")[1].split("```")[0]
GOLDEN = sorted((ROOT / "tests/golden/memories").iterdir())


@pytest.fixture(scope="module")
def reader():
    names = {}
    exec(compile(READER, "memory_file.md", "exec"), names)
    return names


def assert_same_frames(reader, path, frames):
    memory = read_memory(path)
    for frame in frames:
        expected = memory.retrieve(frame).numpy()
        made = reader["read_frame"](path, frame)
        assert made.dtype == np.uint8 and made.shape == expected.shape
        assert np.abs(made.astype(int) - expected).max() <= 1


def test_it_imports_numpy_and_the_standard_library_alone():
    imported = [line.split()[1] for line in READER.splitlines() if line.startswith(("import ", "from "))]
    assert imported == ["json", "struct", "numpy"]


@pytest.mark.parametrize("path", [path for path in GOLDEN if not path.name.startswith("learned")], ids=lambda p: p.stem)
def test_it_reads_files_of_every_dtype(reader, path):
    assert_same_frames(reader, path, range(read_memory(path).frames))


@pytest.mark.parametrize(
    ("method", "size", "box"),
    [
        ("dct", (9, 50, 91), (2, 1, 1)),  # nothing divides anything
        ("dct", (5, 33, 40), (1, 2, 3)),
        ("merge", (9, 50, 91), (2, 1, 1)),
        ("merge", (6, 17, 64), (1, 1, 2)),
    ],
)
def test_it_reads_clips_of_odd_sizes(reader, method, size, box, tmp_path):
    noise = torch.nn.functional.interpolate(
        torch.rand(1, 3, 3, 4, 5, generator=torch.Generator().manual_seed(1)), size=size, mode="trilinear"
    )
    frames = (noise[0].permute(1, 2, 3, 0) * 255).to(torch.uint8)
    width = {"channels": 200} if method == "dct" else {}
    config = CompressorConfig(method, Compression(*box), **width)
    write_memory(tmp_path / "memory", compress(frames, config, fps=12))
    assert_same_frames(reader, tmp_path / "memory", range(size[0]))


def entries(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    text = {name for name in header.pop("__metadata__") if not name.startswith("vidmem.")}
    return text, {name: entry["dtype"] for name, entry in header.items()}


def test_the_page_names_every_tensor_and_entry():
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    documented = {name for line in rows for name in line.split("|")[1].replace("`", "").split(", ") if name}
    documented = {name.strip() for name in documented}
    found = Counter()
    for path in GOLDEN:
        text, tensors = entries(path)
        found.update(text | tensors.keys())
        for name, dtype in tensors.items():
            assert any(f"`{dtype}`" in line.split("|")[2] for line in rows if f"`{name}`" in line.split("|")[1]), name
    assert documented == found.keys()
    assert all(f"`{name}`" in PAGE for name in (*METHODS, *ROW_DTYPES))
