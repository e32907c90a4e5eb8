"""Tiles of Triton launches: from the table of a class of GPUs, else a kernel's default."""

import ast
import importlib
import json
import random

import pytest
import torch
from paths import ROOT

from vidmem_kernels import _tuned
from vidmem_kernels._tuned import Tunable

ARCHS = (80, 86, 89, 90, 100, 103, 120)
GPU = torch.device("cuda", 0)


@pytest.fixture
def tables(tmp_path, monkeypatch):
    """A folder of tables, the architecture of the GPU, and a kernel that is no real one."""
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuned, "TUNABLES", {})
    _tuned.document.cache_clear()
    arch = [90]
    monkeypatch.setattr(_tuned, "arch_of", lambda device: arch[0])
    yield tmp_path, arch
    _tuned.document.cache_clear()


def tunable():
    return Tunable(
        "_kernel",
        ("dtype", "size", "features"),
        default=lambda arch, dtype, size, features: {"BLOCK_N": arch + size, "num_warps": 4},
        candidates=lambda arch, dtype, size, features: [{"BLOCK_N": n, "num_warps": 8} for n in (32, 64)],
    )


def write(folder, name, entries):
    kernels = {
        "_kernel": {key: {"tile": tile, "ms": 1.0, "default_ms": 2.0, "on": "x"} for key, tile in entries.items()}
    }
    (folder / f"{name}.json").write_text(json.dumps({"kernels": kernels}))


@pytest.mark.parametrize("seed", range(5))
def test_table_then_default(tables, seed):
    folder, arch = tables
    rng = random.Random(seed)
    fields = {
        "dtype": rng.choice(["bf16", "fp32"]),
        "size": rng.choice([64, 128]),
        "features": rng.choice(["", "bias"]),
    }
    key = " ".join(str(value) for value in fields.values() if value != "")
    tuned = {"BLOCK_N": rng.choice([16, 32]), "num_warps": 2}
    write(folder, "sm90", {key: tuned, f"{key} more": {"BLOCK_N": 8, "num_warps": 1}})
    kernel = tunable()
    for arch[0] in ARCHS:
        chosen = kernel.chosen(GPU, **fields)
        default = {"BLOCK_N": arch[0] + fields["size"], "num_warps": 4}
        assert (chosen.tile, chosen.source) == ((tuned, "sm90") if arch[0] == 90 else (default, "default"))
        assert kernel.tile(GPU, **fields) == chosen.tile
        assert kernel.shipped(arch[0], **fields) == ([default, tuned] if arch[0] == 90 else [default])
        assert str(chosen) == (
            f"_kernel[{key}]: BLOCK_N={chosen.tile['BLOCK_N']} num_warps={chosen.tile['num_warps']} ({chosen.source})"
        )


def test_a_tile_of_other_constants_is_refused(tables):
    folder, _ = tables
    write(folder, "sm90", {"bf16 64": {"BLOCK_M": 16, "num_warps": 2}})
    with pytest.raises(
        ValueError, match=r"sm90.json: _kernel\[bf16 64\] must have BLOCK_N, .*, got BLOCK_M, num_warps"
    ):
        tunable().tile(GPU, dtype="bf16", size=64, features="")


def test_wrong_fields_and_names(tables):
    kernel = tunable()
    with pytest.raises(TypeError, match="fields must be dtype, size, features, got dtype"):
        kernel.tile(GPU, dtype="bf16")
    with pytest.raises(ValueError, match="must have one Tunable, got another"):
        tunable()


def test_forced_and_watched(tables):
    kernel, fields = tunable(), {"dtype": "bf16", "size": 64, "features": "bias"}
    forced = {"BLOCK_N": 1, "num_warps": 1}
    with _tuned.watching() as asked, kernel.forced(forced):
        assert kernel.tile(GPU, **fields) == forced
        assert kernel.chosen(GPU, **fields).source == "default"
    assert asked == [(kernel, fields)]
    assert kernel.tile(GPU, **fields) != forced
    assert len(asked) == 1


# --- what is shipped ---


def modules():
    return sorted((ROOT / "vidmem_kernels").rglob("*triton_*.py"))


def choices():
    """(Tunable, fields) of every entry of an AOT table that has a tile to choose."""
    pytest.importorskip("triton")
    found = {}
    for path in modules():
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for variants in getattr(module, "AOT", {}).values():
            for _, _, how, *_ in variants:
                if not isinstance(how, int):
                    found[how[0].kernel, how[0].key(**how[1])] = how
    return found


def test_candidates_are_tiles_of_the_kernel():
    """Same constants as the default, each once, powers of two, on every architecture."""
    found = choices()
    assert found
    for tunable, fields in found.values():
        for arch in ARCHS:
            default = tunable.default(arch, **fields)
            tiles = list(tunable.candidates(arch, **fields))
            assert all(tile.keys() == default.keys() for tile in tiles), tunable.kernel
            assert all(tiles.count(tile) == 1 for tile in tiles), (tunable.kernel, arch, fields)
            assert "num_warps" in default, tunable.kernel
            for tile in (default, *tiles):
                blocks = [value for name, value in tile.items() if name.startswith("BLOCK_") or name == "num_warps"]
                assert all(value & (value - 1) == 0 for value in blocks), (tunable.kernel, tile)


def test_every_kernel_with_a_choice_is_compiled_ahead():
    """Importing all modules registers every Tunable; each is named by an entry of an AOT table."""
    named = {kernel for kernel, _ in choices()}
    assert named == _tuned.TUNABLES.keys()


def test_tables_hold_what_kernels_take():
    found = choices()
    for path in _tuned.FOLDER.glob("*.json"):
        assert path.stem in {_tuned.class_of(arch) for arch in ARCHS}
        for kernel, entries in _tuned.table(path.stem).items():
            tunable = _tuned.TUNABLES[kernel]
            for key, entry in entries.items():
                assert entry.keys() >= {"tile", "ms", "default_ms", "call", "on"}, (path.name, kernel, key)
                assert entry["ms"] <= entry["default_ms"] * 1.0001
                if (kernel, key) not in found:
                    continue  # a case that the AOT table has no example of
                fields = found[kernel, key][1]
                for arch in ARCHS:
                    if _tuned.class_of(arch) == path.stem:
                        default = tunable.default(arch, **fields)
                        assert entry["tile"] in [default, *tunable.candidates(arch, **fields)], (kernel, key)


def test_every_launch_reads_its_tile_by_one_function():
    """No launch says num_warps or num_stages itself."""
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                own = {word.arg for word in node.keywords} & {"num_warps", "num_stages"}
                assert not own, f"{path.relative_to(ROOT)}:{node.lineno} sets {', '.join(own)}"
