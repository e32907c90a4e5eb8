"""The files of MemoryBank: they come back as they were, damaged ones never do."""

import fcntl
import hashlib
import json
import os
import stat
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import safetensors.torch
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, fill, ids, refuses, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from vidmem_kernels import MemoryBank, MemoryFileError
from vidmem_kernels.sparse_gather import memory_file


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


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_save_load_append_save(dtype, storage, tmp_path):
    working = tmp_path / "working" if storage == "mmap" else None
    bank = MemoryBank(7, dtype=dtype, storage=storage, path=working)
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


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
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


@pytest.mark.parametrize("chunk", [1 << 22, 16])
def test_file_changed_anywhere_is_refused(small_file, chunk, monkeypatch):
    monkeypatch.setattr(memory_file, "_CHUNK", chunk)
    content = small_file.read_bytes()
    for i in range(len(content)):
        for change in (0x01, 0x20, 0xFF):
            small_file.write_bytes(content[:i] + bytes([content[i] ^ change]) + content[i + 1 :])
            refused(small_file)
    small_file.write_bytes(content)
    assert len(MemoryBank.load(small_file)) == 5


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_file_of_many_chunks_cut_or_changed_around_its_tensors_is_refused(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_file, "_CHUNK", 64)
    bank = MemoryBank(17, dtype=dtype)
    tokens, _ = fill(bank, 40)
    path = tmp_path / "bank"
    bank.save(path, extras={"wide": torch.arange(50.0, dtype=torch.float64), "narrow": torch.ones(7, dtype=torch.bool)})
    for storage in ("device", "mmap"):
        loaded = MemoryBank.load(path, storage=storage)
        assert torch.equal(loaded.gather(torch.arange(40), torch.float32), stored(tokens, dtype))
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    ends = [entry["data_offsets"][1] for name, entry in json.loads(content[8:start]).items() if name[0] != "_"]
    assert len(ends) == (5 if dtype in QUANTIZED else 4) and start + ends[-1] == len(content)
    for end in (0, *ends):
        for i in range(max(0, start + end - 3), min(len(content), start + end + 3)):
            path.write_bytes(content[:i])
            refused(path)
            path.write_bytes(content[:i] + bytes([content[i] ^ 0x80]) + content[i + 1 :])
            refused(path)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_edit_is_refused(data, tmp_path_factory):
    """Blocks lost, doubled, moved or zeroed, as by editors, bad copies and crashed disks."""
    path = tmp_path_factory.getbasetemp() / "edited"
    bank = MemoryBank(3, dtype=torch.int8)
    fill(bank, 5)
    bank.save(path, {"k": "v"})
    content = path.read_bytes()
    a, b, c = sorted(data.draw(st.integers(0, len(content))) for _ in range(3))
    parts = content[:a], content[a:b], content[b:c], content[c:]
    edits = [
        parts[0] + parts[2] + parts[3],
        parts[0] + parts[1] * 2 + parts[2] + parts[3],
        parts[0] + parts[2] + parts[1] + parts[3],
        parts[0] + bytes(b - a) + parts[2] + parts[3],
        parts[0] + data.draw(st.binary(min_size=1, max_size=9)) + content[a:],
    ]
    for edited in edits:
        if edited != content:
            path.write_bytes(edited)
            refused(path)


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
        "vidmem_kernels.MemoryBank); give a file that MemoryBank.save or vidmem compress wrote, or, if it was "
        "rewritten by another program, import it with MemoryBank.from_safetensors"
    )
    safetensors.torch.save_file({"weight": torch.zeros(2, 3)}, foreign)
    assert refused(foreign) == (
        f"MemoryBank.load: {foreign} is not a memory file (its header does not name the format "
        "vidmem_kernels.MemoryBank); give a file that MemoryBank.save or vidmem compress wrote"
    )
    foreign.write_text("A text of some length, which is no safetensors file.\n")
    assert refused(foreign) == (
        f"MemoryBank.load: {foreign} is not a memory file (it has no safetensors header, or ends inside it); "
        "give a file that MemoryBank.save or vidmem compress wrote"
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


def test_leftovers_of_killed_writers_are_removed_and_those_of_living_ones_are_not(tmp_path):
    for name in (".vidmem-dead.tmp", ".vidmem-alive.tmp", "vidmem-user.tmp"):
        (tmp_path / name).write_bytes(b"begun")
    with open(tmp_path / ".vidmem-alive.tmp", "rb") as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        MemoryBank(2).save(tmp_path / "bank")
        assert {p.name for p in tmp_path.iterdir()} == {"bank", ".vidmem-alive.tmp", "vidmem-user.tmp"}
    MemoryBank(2).save(tmp_path / "bank")
    assert {p.name for p in tmp_path.iterdir()} == {"bank", "vidmem-user.tmp"}


def test_file_systems_without_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    (tmp_path / ".vidmem-perhaps.tmp").write_bytes(b"begun")
    monkeypatch.setattr(fcntl, "flock", unsupported)
    MemoryBank(2).save(tmp_path / "bank")
    assert {p.name for p in tmp_path.iterdir()} == {"bank", ".vidmem-perhaps.tmp"}
    assert MemoryBank.load(tmp_path / "bank").channels == 2


def test_many_writers_in_one_folder(tmp_path):
    """None removes what another has begun, nor what another's lock comes too late for."""

    def save_often(channels):
        for count in range(40):
            bank = MemoryBank(channels)
            fill(bank, count)
            bank.save(tmp_path / str(channels))
            assert len(MemoryBank.load(tmp_path / str(channels))) == count
        return channels

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(save_often, (1, 2, 3, 4))) == [1, 2, 3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "3", "4"]


def test_symbolic_link_is_followed(small_file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(small_file)
    MemoryBank(9).save(link)
    assert link.is_symlink() and MemoryBank.load(small_file).channels == 9


def test_append_after_a_change_of_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = MemoryBank(3)
    tokens, _ = fill(bank, 4)
    bank.save("bank")
    loaded = MemoryBank.load("bank", storage="mmap")
    assert loaded._folder == tmp_path
    monkeypatch.chdir("/proc")  # where no file can be made
    fill(loaded, 4)
    assert torch.equal(loaded.gather(torch.arange(8)), torch.cat([tokens, tokens]))


def test_extras_that_are_lazily_negated(tmp_path):
    wave = torch.tensor([1 + 2j, 3 - 4j])
    MemoryBank(2).save(tmp_path / "bank", extras={"imag": wave.conj().imag})
    assert MemoryBank.load(tmp_path / "bank").extras["imag"].tolist() == [-2, 4]
