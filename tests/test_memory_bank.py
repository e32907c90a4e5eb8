"""MemoryBank: what it holds comes back, from memory, from disk and from files; damaged files never do."""

import hashlib
import os
import random
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_kernels import MemoryBank, MemoryFileError, quantize_rows
from vidmem_kernels.sparse_gather import memory_bank, memory_file

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
QUANTIZED = DTYPES[3:]


def ids(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(params=["device", "mmap"])
def make_bank(request, tmp_path):
    """Makes banks of each storage that needs no GPU."""
    made = []

    def make(channels, **kwargs):
        made.append(None)
        path = tmp_path / f"working-{len(made)}" if request.param == "mmap" else None
        return MemoryBank(channels, storage=request.param, path=path, **kwargs)

    return make


def fill(bank, count, seed=0):
    """Appends `count` random tokens with positions, and returns both."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, bank.channels, generator=generator)
    positions = torch.rand(count, 3, generator=generator) * 100
    bank.append(tokens, positions)
    return tokens, positions


def stored(tokens, dtype):
    """What a bank of `dtype` gives back for `tokens`, in float32."""
    if dtype not in QUANTIZED:
        return tokens.to(dtype).float()
    rows, scale = quantize_rows(tokens, dtype)
    return rows.float() * scale.unsqueeze(1)


def refuses(error, message, function, *args, **kwargs):
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == message


# --- append and gather ---


def test_by_hand(make_bank):
    bank = make_bank(2)
    bank.append(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))
    bank.append(torch.tensor([[5.0, 6.0]]), torch.tensor([[6.0, 7.0, 8.0]]))
    assert len(bank) == 3 and bank.channels == 2
    assert bank.positions.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert bank.gather(torch.tensor([2, -1, 0])).tolist() == [[5, 6], [0, 0], [1, 2]]
    batched = bank.gather(torch.tensor([[1], [2]], dtype=torch.int32), out_dtype=torch.bfloat16)
    assert batched.tolist() == [[[3, 4]], [[5, 6]]] and batched.dtype == torch.bfloat16
    assert bank.nbytes == 3 * (2 * 4 + 3 * 4)


def test_int8_by_hand(make_bank):
    bank = make_bank(2, dtype=torch.int8)
    bank.append(torch.tensor([[127.0, 63.4], [0.0, 0.0]]), torch.zeros(2, 3))
    assert bank.gather(torch.tensor([0, 1])).tolist() == [[127, 63], [0, 0]]
    assert bank.nbytes == 2 * (2 + 4 + 12)


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_many_appends_grow_by_doubling(dtype, make_bank, monkeypatch):
    bank = make_bank(5, dtype=dtype)
    grown = []
    grow = MemoryBank._grow
    monkeypatch.setattr(MemoryBank, "_grow", lambda self, rows: (grown.append(rows), grow(self, rows))[1])
    expected, places = [], []
    for i in range(200):
        tokens, positions = fill(bank, i % 4, seed=i)
        expected.append(stored(tokens, dtype))
        places.append(positions)
    assert len(bank) == 300
    assert grown == [64, 128, 256, 512]
    assert bank.capacity_bytes == 512 * bank.nbytes // 300
    assert torch.equal(bank.positions, torch.cat(places))
    assert torch.equal(bank.gather(torch.arange(300), out_dtype=torch.float32), torch.cat(expected))


def test_capacity_is_taken_at_once(make_bank, monkeypatch):
    bank = make_bank(3, capacity=100)
    monkeypatch.setattr(MemoryBank, "_grow", lambda *_: pytest.fail("grew"))
    fill(bank, 100)
    assert bank.capacity_bytes == bank.nbytes == 100 * (3 * 4 + 12)


def test_empty_bank(make_bank):
    bank = make_bank(3, dtype=torch.int8)
    assert len(bank) == bank.nbytes == bank.capacity_bytes == 0
    assert bank.positions.shape == (0, 3)
    bank.append(torch.zeros(0, 3), torch.zeros(0, 3))
    assert bank.gather(torch.tensor([-1])).tolist() == [[0, 0, 0]]
    assert bank.gather(torch.zeros(0, dtype=torch.int64)).shape == (0, 3)
    values, index = bank.topk(torch.zeros(2, 3), 0)
    assert values.shape == index.shape == (2, 0)


def test_gathered_rows_and_positions_survive_later_appends(make_bank):
    bank = make_bank(4)
    tokens, positions = fill(bank, 64)
    before, rows = bank.positions, bank.gather(torch.arange(64))
    fill(bank, 200, seed=1)
    assert torch.equal(before, positions) and torch.equal(rows, tokens)


def test_appends_of_any_float_dtype_and_strides(make_bank):
    bank = make_bank(3, dtype=torch.float16)
    tokens = torch.randn(3, 5)
    bank.append(tokens.T.double(), torch.zeros(3, 5).T)
    bank.append(tokens.T.bfloat16(), torch.zeros(5, 3))
    assert torch.equal(bank.gather(torch.arange(5)), tokens.T.half())
    assert torch.equal(bank.gather(torch.arange(5, 10)), tokens.T.bfloat16().half())


def test_append_refuses_and_leaves_the_bank_as_it_was(make_bank):
    bank = make_bank(3, dtype=torch.float16)
    fill(bank, 4)
    before = bank.gather(torch.arange(4))
    ok, at = torch.zeros(2, 3), torch.zeros(2, 3)
    name = "MemoryBank.append: "
    refuses(ValueError, name + "tokens must have 3 channels, got 4", bank.append, torch.zeros(2, 4), at)
    refuses(ValueError, name + "tokens must have shape (K, C), got (2, 3, 1)", bank.append, ok.unsqueeze(2), at)
    refuses(ValueError, name + "positions must have shape (2, 3), got (1, 3)", bank.append, ok, at[:1])
    refuses(ValueError, name + "positions must have shape (2, 3), got (2, 2)", bank.append, ok, at[:, :2])
    refuses(TypeError, name + "positions must be float32, got int64", bank.append, ok, at.long())
    refuses(TypeError, name + "tokens must be a tensor, got list", bank.append, [[1.0, 2.0, 3.0]], at)
    refuses(
        TypeError,
        name + "tokens must be float32, bfloat16, float16 or float64, got int8",
        bank.append,
        ok.to(torch.int8),
        at,
    )
    limit = "tokens must be finite and at most 65504 in magnitude"
    for bad in (float("nan"), float("inf"), 70000.0):
        refuses(ValueError, name + limit, bank.append, torch.full((2, 3), bad), at)
        if bad != 70000.0:
            refuses(ValueError, name + "positions must be finite", bank.append, ok, torch.full((2, 3), bad))
    gradient = "tokens and positions must not require a gradient, which the bank would not carry; detach them or use"
    with_grad = torch.zeros(2, 3, requires_grad=True)
    refuses(ValueError, f"{name}{gradient} torch.no_grad()", bank.append, with_grad, at)
    assert len(bank) == 4 and torch.equal(bank.gather(torch.arange(4)), before)
    with torch.no_grad():
        bank.append(with_grad, at)
    assert len(bank) == 6 and not bank.gather(torch.arange(6)).requires_grad


@pytest.mark.parametrize("dtype", QUANTIZED, ids=ids)
def test_quantized_append_refuses_what_is_not_finite(dtype):
    bank = MemoryBank(2, dtype=dtype)
    with pytest.raises(ValueError, match="tokens must be finite"):
        bank.append(torch.tensor([[1.0, 2.0], [float("nan"), 1.0]]), torch.zeros(2, 3))
    assert len(bank) == 0


def test_gather_refuses(make_bank):
    bank = make_bank(3)
    fill(bank, 4)
    name = "MemoryBank.gather: "
    refuses(TypeError, name + "index must be int32 or int64, got float32", bank.gather, torch.zeros(2))
    refuses(ValueError, name + "index must have shape (B, K), got ()", bank.gather, torch.tensor(1))
    refuses(IndexError, "gather_tokens: index must be in [-1, 3], got 4", bank.gather, torch.tensor([4]))


def test_constructor_refuses(tmp_path):
    name = "MemoryBank: "
    refuses(ValueError, name + "channels must be at least 1, got 0", MemoryBank, 0)
    refuses(TypeError, name + "channels must be an int, got float", MemoryBank, 2.0)
    refuses(ValueError, name + "capacity must be at least 0, got -1", MemoryBank, 2, capacity=-1)
    refuses(
        TypeError,
        name + "dtype must be float32, bfloat16, float16, int8 or float8_e4m3fn, got torch.float64",
        MemoryBank,
        2,
        dtype=torch.float64,
    )
    refuses(ValueError, name + "storage must be device, pinned or mmap, got 'disk'", MemoryBank, 2, storage="disk")
    need = name + "path must be given exactly for storage 'mmap', got "
    refuses(ValueError, need + "None for 'mmap'", MemoryBank, 2, storage="mmap")
    refuses(ValueError, need + "'x' for 'device'", MemoryBank, 2, path="x")
    taken = tmp_path / "taken"
    taken.write_text("precious")
    with pytest.raises(FileExistsError):
        MemoryBank(2, storage="mmap", path=taken)
    assert taken.read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_pinned_needs_a_gpu(tmp_path):
    text = "storage 'pinned' must have a CUDA device to pin memory for, got none"
    refuses(RuntimeError, f"MemoryBank: {text}", MemoryBank, 2, storage="pinned")
    bank = MemoryBank(2)
    bank.save(tmp_path / "bank")
    refuses(RuntimeError, f"MemoryBank.load: {text}", MemoryBank.load, tmp_path / "bank", storage="pinned")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("storage", ["device", "pinned"])
def test_on_a_gpu(dtype, storage, tmp_path):
    bank = MemoryBank(5, dtype=dtype, device="cuda", storage=storage)
    tokens, positions = fill(bank, 100)
    expected = stored(tokens, dtype)
    index = torch.tensor([[3, -1, 99]], device="cuda")
    bank.save(tmp_path / "bank")
    for held in (bank, MemoryBank.load(tmp_path / "bank", device="cuda", storage=storage)):
        assert held._rows.is_pinned() == (storage == "pinned")
        assert held.positions.is_cuda and torch.equal(held.positions.cpu(), positions)
        got = held.gather(index, out_dtype=torch.float32)
        assert got.is_cuda and torch.equal(got[0, ::2].cpu(), expected[[3, 99]]) and not got[0, 1].any()
        values, found = held.topk(expected[:4].cuda(), 1)
        assert values.is_cuda and found.flatten().tolist() == [0, 1, 2, 3]
        fill(held, 100, seed=1)
        assert len(held) == 200


# --- topk ---


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_topk_by_loops(dtype, make_bank, monkeypatch):
    bank = make_bank(4, dtype=dtype)
    tokens = torch.randint(-3, 4, (23, 4)).float()
    tokens[:, 0] = torch.tensor([448.0 * 127, 127.0])[(torch.arange(23) % 2)]  # scales that are powers or exact
    if dtype == torch.float16:
        tokens[:, 0] = 128
    bank.append(tokens, torch.zeros(23, 3))
    rows = stored(tokens, dtype)
    query = torch.randint(-2, 3, (3, 4)).float()
    expected = []
    for q in query.double():
        scores = [float((q * row).sum()) for row in rows.double()]
        order = sorted(range(23), key=lambda i: (-scores[i], i))[:9]
        expected.append((order, [scores[i] for i in order]))
    for elements in (memory_bank._SCORED_ELEMENTS, 5 * 4, 1):  # all rows at once, five, one at a time
        monkeypatch.setattr(memory_bank, "_SCORED_ELEMENTS", elements)
        values, index = bank.topk(query, 9)
        assert index.dtype == torch.int32 and values.dtype == torch.float32
        for i, (order, scores) in enumerate(expected):
            torch.testing.assert_close(values[i].double(), torch.tensor(scores, dtype=torch.float64))
            if dtype not in QUANTIZED:  # every product is exact: ties are ties
                assert index[i].tolist() == order


def test_topk_ties_and_nan(make_bank):
    bank = make_bank(1)
    bank.append(torch.tensor([[1.0], [3.0], [1.0], [3.0]]), torch.zeros(4, 3))
    values, index = bank.topk(torch.tensor([[1.0], [-1.0], [float("nan")]]), 3)
    assert index.tolist() == [[1, 3, 0], [0, 2, 1], [0, 1, 2]]
    assert values[:2].tolist() == [[3, 3, 1], [-1, -1, -3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = bank.topk(torch.tensor([[1.00390625]]), 1)
    assert exact[0].item() == 3 * 1.00390625


def test_topk_refuses(make_bank):
    bank = make_bank(3)
    fill(bank, 4)
    name = "MemoryBank.topk: "
    refuses(ValueError, name + "k must be in [0, 4], got 5", bank.topk, torch.zeros(1, 3), 5)
    refuses(ValueError, name + "query must have 3 channels, got 2", bank.topk, torch.zeros(1, 2), 1)
    refuses(ValueError, name + "query must have shape (Q, C), got (3,)", bank.topk, torch.zeros(3), 1)
    refuses(
        TypeError,
        name + "query must be float32, bfloat16 or float16, got float64",
        bank.topk,
        torch.zeros(1, 3, dtype=torch.float64),
        1,
    )


# --- files ---


def equal_banks(first, second):
    index = torch.arange(len(first))
    return (
        len(first) == len(second)
        and first.dtype == second.dtype
        and torch.equal(first.positions, second.positions)
        and torch.equal(first.gather(index, torch.float32), second.gather(index, torch.float32))
    )


EXTRAS = {
    "wide": torch.arange(6.0).view(2, 3).T,
    "int64": torch.tensor([2**40, -1]),
    "bool": torch.tensor(True),
    "none": torch.zeros(0, 4, dtype=torch.uint8),
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
    "fp8": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
}
METADATA = {"name": "a film, 片", "format": "mine", "": "empty key"}


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_save_load_append_save(dtype, storage, make_bank, tmp_path):
    bank = make_bank(7, dtype=dtype)
    fill(bank, 33)
    path = tmp_path / "bank.safetensors"
    bank.save(path, METADATA, EXTRAS)
    content = path.read_bytes()
    loaded = MemoryBank.load(path, storage=storage)
    assert equal_banks(loaded, bank) and loaded.nbytes == bank.nbytes
    assert loaded.metadata == METADATA and loaded.storage == storage
    assert loaded.extras.keys() == EXTRAS.keys()
    for name, tensor in EXTRAS.items():
        assert loaded.extras[name].dtype == tensor.dtype
        assert torch.equal(loaded.extras[name].float(), tensor.float()), name

    fill(loaded, 50, seed=1)
    assert path.read_bytes() == content  # an append does not touch the file
    fill(bank, 50, seed=1)
    assert equal_banks(loaded, bank)
    loaded.save(path)  # over the file it reads from; metadata and extras are its own
    again = MemoryBank.load(path, storage=storage)
    assert equal_banks(again, bank) and equal_banks(loaded, bank)
    assert again.metadata == METADATA and again.extras.keys() == EXTRAS.keys()
    assert again.topk(torch.ones(2, 7), 5)[1].tolist() == bank.topk(torch.ones(2, 7), 5)[1].tolist()
    assert sorted(p.name for p in tmp_path.iterdir() if "working" not in p.name) == [path.name]


def test_empty_bank_is_saved(tmp_path):
    MemoryBank(3, dtype=torch.int8).save(tmp_path / "bank")
    for storage in ("device", "mmap"):
        bank = MemoryBank.load(tmp_path / "bank", storage=storage)
        assert len(bank) == 0 and bank.channels == 3 and bank.dtype == torch.int8
        fill(bank, 2)
        assert len(bank) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_file_is_plain_safetensors(dtype, tmp_path):
    bank = MemoryBank(5, dtype=dtype)
    tokens, positions = fill(bank, 9)
    bank.save(tmp_path / "bank", METADATA, {"wide": EXTRAS["wide"]})
    tensors = safetensors.torch.load_file(tmp_path / "bank")
    assert set(tensors) == {"rows", "positions", "extras.wide"} | ({"scale"} if dtype in QUANTIZED else set())
    assert torch.equal(tensors["positions"], positions) and torch.equal(tensors["extras.wide"], EXTRAS["wide"])
    rows = tensors["rows"].float()
    assert tensors["rows"].dtype == dtype
    assert torch.equal(rows * tensors["scale"][:, None] if dtype in QUANTIZED else rows, stored(tokens, dtype))
    with safetensors.safe_open(tmp_path / "bank", "pt") as file:
        header = file.metadata()
    assert header.items() >= METADATA.items()
    content = (tmp_path / "bank").read_bytes()
    checksum = header["vidmem.checksum"].encode()
    assert hashlib.sha256(content.replace(checksum, b"0" * 64)).hexdigest().encode() == checksum


def test_saving_twice_gives_the_same_bytes(tmp_path):
    bank = MemoryBank(5)
    fill(bank, 9)
    for name in ("a", "b"):
        bank.save(tmp_path / name, METADATA, EXTRAS)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_mapped_rows_are_read_when_asked_for(tmp_path):
    """A mapped bank of 64 MiB leaves the memory of the process as it is, but for the rows that are gathered."""
    bank = MemoryBank(1024, dtype=torch.float32, capacity=16384)
    bank.append(torch.zeros(16384, 1024), torch.zeros(16384, 3))
    bank.save(tmp_path / "bank")
    script = """
        import sys, torch
        from vidmem_kernels import MemoryBank
        def resident():
            lines = open("/proc/self/status").read().splitlines()
            return sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssFile"))) / 1024
        MemoryBank(4).gather(torch.tensor([-1]))
        before = resident()
        bank = MemoryBank.load(sys.argv[1], storage="mmap")
        bank.gather(torch.tensor([0, 16383]))
        print(resident() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "bank")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 32


@pytest.fixture
def small_file(tmp_path):
    bank = MemoryBank(3, dtype=torch.int8)
    fill(bank, 5)
    path = tmp_path / "bank"
    bank.save(path, {"k": "v"}, {"x": torch.arange(3)})
    return path


def refused(path):
    """The message of the one error that loading `path` must give, with both storages."""
    messages = set()
    for storage in ("device", "mmap"):
        with pytest.raises(MemoryFileError) as caught:
            MemoryBank.load(path, storage=storage)
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith(f"MemoryBank.load: {path} is ") and "\n" not in message and ";" in message
    return message


def test_file_cut_anywhere_is_refused(small_file):
    content = small_file.read_bytes()
    for length in range(len(content)):
        small_file.write_bytes(content[:length])
        refused(small_file)
    small_file.write_bytes(content + b"\0")
    assert "holds" in refused(small_file)


@pytest.mark.parametrize("change", [0x01, 0x20, 0xFF])
def test_file_changed_anywhere_is_refused(small_file, change):
    content = small_file.read_bytes()
    for i in range(len(content)):
        small_file.write_bytes(content[:i] + bytes([content[i] ^ change]) + content[i + 1 :])
        refused(small_file)
    small_file.write_bytes(content)
    assert len(MemoryBank.load(small_file)) == 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.one_of(st.binary(max_size=64), st.text(max_size=40).map(str.encode)), framed=st.booleans())
def test_any_bytes_are_refused(content, framed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(len(content).to_bytes(8, "little") + content if framed else content)
    refused(path)


def test_damage_in_place_is_told_from_a_foreign_file(small_file, tmp_path):
    content = small_file.read_bytes()
    small_file.write_bytes(content[:-1] + b"\x55")
    assert refused(small_file) == (
        f"MemoryBank.load: {small_file} is damaged (its checksum does not match its content); "
        "restore it from a copy or save the bank again"
    )
    small_file.write_bytes(content[:-1])
    size = len(content) - 8 - int.from_bytes(content[:8], "little")
    assert refused(small_file) == (
        f"MemoryBank.load: {small_file} is damaged (it should hold {size} bytes of tensors, holds {size - 1}); "
        "restore it from a copy or save the bank again"
    )
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file({"rows": torch.zeros(2, 3), "positions": torch.zeros(2, 3)}, foreign)
    assert refused(foreign) == (
        f"MemoryBank.load: {foreign} is not a memory file (its header does not name the format "
        "vidmem_kernels.MemoryBank); give a file that MemoryBank.save wrote"
    )
    foreign.write_text("A text of some length, which is no safetensors file.\n")
    assert refused(foreign) == (
        f"MemoryBank.load: {foreign} is not a memory file (no safetensors header, or cut inside it); "
        "give a file that MemoryBank.save wrote"
    )


def test_newer_version_is_refused(small_file, monkeypatch):
    monkeypatch.setattr(memory_file, "VERSION", 2)
    MemoryBank(3).save(small_file)
    monkeypatch.undo()
    assert refused(small_file) == (
        f"MemoryBank.load: {small_file} is of version '2', this vidmem_kernels reads version '1'; "
        "install the vidmem_kernels that wrote it"
    )


def test_well_formed_file_without_a_bank_is_refused(tmp_path):
    path = tmp_path / "odd"
    ok = {"rows": torch.zeros(2, 3), "positions": torch.zeros(2, 3)}
    for change in (
        {"rows": torch.zeros(6)},
        {"rows": torch.zeros(2, 3, dtype=torch.float64)},
        {"positions": torch.zeros(2, 2)},
        {"scale": torch.zeros(2)},
        {"rows": torch.zeros(2, 3, dtype=torch.int8)},
    ):
        memory_file.write(path, ok | change, {})
        refused(path)
    memory_file.write(path, ok, {})
    assert len(MemoryBank.load(path)) == 2


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        MemoryBank.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError) as caught:
        MemoryBank(2).save(tmp_path / "none" / "bank")
    assert str(tmp_path / "none") in str(caught.value)
    with pytest.raises(IsADirectoryError):
        MemoryBank.load(tmp_path)
    with pytest.raises(IsADirectoryError):
        MemoryBank(2).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_save_refuses(tmp_path):
    bank, path = MemoryBank(2), tmp_path / "bank"
    name = "MemoryBank.save: "
    refuses(TypeError, name + "metadata must be a dict of str to str, got 'a': 1", bank.save, path, {"a": 1})
    refuses(TypeError, name + "metadata must be a dict of str, got list", bank.save, path, ["a"])
    refuses(
        ValueError,
        name + "metadata must not have keys that start with 'vidmem.', got 'vidmem.version'",
        bank.save,
        path,
        {"vidmem.version": "9"},
    )
    refuses(
        TypeError, name + "extras must be a dict of str to tensor, got 'a': list", bank.save, path, extras={"a": [1]}
    )
    with pytest.raises(TypeError, match="extras must be dense and .* got complex64"):
        bank.save(path, extras={"a": torch.zeros(2, dtype=torch.complex64)})
    assert not path.exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_interrupted_save_leaves_the_old_file_and_no_other(small_file, monkeypatch, error, at):
    before = small_file.read_bytes()
    bank = MemoryBank(3)
    fill(bank, 9)

    def fail(*args):
        raise error

    monkeypatch.setattr(os, at, fail)
    with pytest.raises((KeyboardInterrupt, OSError)):
        bank.save(small_file)
    monkeypatch.undo()
    assert small_file.read_bytes() == before
    assert [p.name for p in small_file.parent.iterdir()] == [small_file.name]


def test_saved_file_has_the_usual_permissions(small_file, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(small_file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_failed_growth_leaves_the_bank_as_it_was(tmp_path, monkeypatch):
    bank = MemoryBank(4, storage="mmap", path=tmp_path / "working")
    tokens, _ = fill(bank, 64)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        fill(bank, 1)
    with pytest.raises(OSError, match="No space left"):
        MemoryBank(4, storage="mmap", path=tmp_path / "other", capacity=9)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["working"]
    assert len(bank) == 64 and torch.equal(bank.gather(torch.arange(64)), tokens)
    fill(bank, 1)
    assert len(bank) == 65


WRITER = """
    import sys, torch
    from vidmem_kernels import MemoryBank
    bank = MemoryBank(512)
    print("ready", flush=True)
    while True:
        bank.append(torch.full((64, 512), float(len(bank))), torch.zeros(64, 3))
        bank.save(sys.argv[1])
        print(len(bank), flush=True)
"""


def test_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "bank"
    draw = random.Random(0)
    for _ in range(5):
        command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "ready\n"
            assert writer.stdout.readline() == "64\n"
            time.sleep(draw.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            told = [int(line) for line in writer.stdout if line.endswith("\n")]
        bank = MemoryBank.load(path)
        assert len(bank) >= max(told, default=64) and len(bank) % 64 == 0
        expected = torch.arange(0.0, len(bank), 64).repeat_interleave(64)
        assert torch.equal(bank.gather(torch.arange(len(bank)))[:, 0], expected)
        assert len(list(tmp_path.iterdir())) <= 6  # what a killed writer had begun is left under its own name
