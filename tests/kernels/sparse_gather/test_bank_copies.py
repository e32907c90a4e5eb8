"""Copies of MemoryBank, pickles, and what other processes get: the same rows, and each bank its own."""

import copy
import io
import multiprocessing
import os
import pickle
import random
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, fill, ids, stored
from torch.utils.data import DataLoader, Dataset

from vidmem_kernels import MemoryBank, MemoryFileError
from vidmem_kernels.sparse_gather import memory_file

CHANNELS = 5


def by_torch(bank):
    buffer = io.BytesIO()
    torch.save(bank, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda bank: pickle.loads(pickle.dumps(bank)),
    "old pickle": lambda bank: pickle.loads(pickle.dumps(bank, protocol=2)),
    "torch": by_torch,
    "sent": lambda bank: pickle.loads(ForkingPickler.dumps(bank)),
}


def content(bank):
    """Rows as they are stored, with positions and scales, out of reach of the bank."""
    held = bank._held.trimmed()
    parts = (held.rows.view(torch.uint8), held.positions, torch.empty(0) if held.scale is None else held.scale)
    return [part.clone() for part in parts]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def make(draw, dtype, storage, folder):
    """A bank of that storage: new, with room to spare, loaded, appended to after loading, or imported."""
    count = draw.choice([0, 1, 7, 64, 70])
    name = folder / f"{draw.getrandbits(60):x}"
    how = draw.choice(["new", "loaded", "appended", "imported"])
    bank = MemoryBank(CHANNELS, dtype=dtype, storage=storage, path=f"{name}-working" if storage == "mmap" else None)
    fill(bank, count, seed=count)
    bank.metadata, bank.extras = {"k": "v"}, {"x": torch.arange(3.0), "y": torch.ones(2).to(torch.float8_e5m2)}
    if how != "new":
        bank.save(name)
        load = MemoryBank.from_safetensors if how == "imported" else MemoryBank.load
        bank = load(name, storage=storage)
        fill(bank, draw.choice([1, 9]) if how == "appended" else 0)
    return bank


@pytest.mark.parametrize("storage", ["device", "mmap"])
@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
def test_banks_and_their_copies_are_independent(dtype, storage, tmp_path):
    """Any bank, copied any way, copies copied and appended to in any order: each holds what it should."""
    for seed in range(12):
        draw = random.Random(f"{dtype} {storage} {seed}")
        banks = [make(draw, dtype, storage, tmp_path)]
        models = [content(banks[0])]
        for step in range(10):
            at = draw.randrange(len(banks))
            what = draw.choice([*COPIES, "append", "append", "append", "save"])
            if what == "append":
                tokens, positions = fill(banks[at], draw.choice([0, 1, 3, 80]), seed=step)
                one = MemoryBank(CHANNELS, dtype=dtype)
                one.append(tokens, positions)
                models[at] = [torch.cat(parts) for parts in zip(models[at], content(one), strict=True)]
            elif what == "save":
                path = tmp_path / f"saved-{draw.randrange(3)}"
                banks[at].save(path)
                banks.append(MemoryBank.load(path, storage=storage))
                models.append(models[at])
            else:
                try:
                    made = COPIES[what](banks[at])
                except MemoryFileError as error:  # a name that another bank was saved under since
                    assert storage == "mmap" and "saved-" in str(error)
                    continue
                assert made.storage == storage and made.dtype == dtype and made.channels == CHANNELS
                assert made.metadata == banks[at].metadata == {"k": "v"}
                assert made.metadata is not banks[at].metadata and made.extras is not banks[at].extras
                assert torch.equal(made.extras["x"], torch.arange(3.0))
                assert made.extras["y"].dtype == torch.float8_e5m2 and torch.equal(
                    made.extras["y"].float(), torch.ones(2)
                )
                assert made.capacity_bytes == made.nbytes == banks[at].nbytes
                banks.append(made)
                models.append(models[at])
            for bank, model in zip(banks, models, strict=True):
                assert same(content(bank), model), (seed, step, what)


def test_deepcopy_copies_extras_and_copy_does_not():
    bank = MemoryBank(3)
    bank.extras["x"] = torch.zeros(2)
    bank.note = ["mine"]
    shallow, deep, loaded = copy.copy(bank), copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))
    assert shallow.extras["x"] is bank.extras["x"] and deep.extras["x"] is not bank.extras["x"]
    assert shallow.note is bank.note and deep.note == loaded.note == ["mine"] and deep.note is not bank.note
    both = copy.deepcopy([bank, bank])
    assert both[0] is both[1]


class Named(MemoryBank):
    """A bank of somebody else's."""


@pytest.mark.parametrize("how", COPIES)
def test_subclasses_stay_what_they_are(how):
    bank = Named(3)
    fill(bank, 4)
    assert type(COPIES[how](bank)) is Named and same(content(COPIES[how](bank)), content(bank))


def test_a_pickle_is_as_large_as_the_rows_or_names_their_file(tmp_path):
    bank = MemoryBank(1000, capacity=5000)
    fill(bank, 100)
    assert 401_000 < len(pickle.dumps(bank)) < 404_000
    bank.save(tmp_path / "bank")
    mapped = MemoryBank.load(tmp_path / "bank", storage="mmap")
    assert len(pickle.dumps(mapped)) < 4000
    fill(mapped, 100)
    assert len(pickle.dumps(mapped)) > 800_000  # no file has its rows,
    mapped.save(tmp_path / "more")
    assert len(pickle.dumps(mapped)) < 4000  # until it is saved
    working = MemoryBank(1000, storage="mmap", path=tmp_path / "working")
    fill(working, 100)
    data = pickle.dumps(working)
    assert len(data) < 6000
    before = content(working)
    fill(working, 3000)  # behind the rows of the pickle
    assert same(content(pickle.loads(data)), before)


def test_a_pickle_follows_its_rows_into_another_folder_of_work(tmp_path, monkeypatch):
    bank = MemoryBank(3)
    fill(bank, 4)
    monkeypatch.chdir(tmp_path)
    bank.save("bank")
    data = pickle.dumps(MemoryBank.load("bank", storage="mmap"))
    monkeypatch.chdir("/")
    assert same(content(pickle.loads(data)), content(bank))


def rewrite_in_place(path, content):
    """Other bytes under the same inode, size and time of change."""
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("saved", [True, False], ids=["saved", "working"])
@pytest.mark.parametrize("change", ["deleted", "replaced", "one byte", "cut", "emptied", "foreign"])
def test_a_file_that_is_not_what_it_was(change, saved, tmp_path):
    path = tmp_path / "file"
    if saved:
        bank = MemoryBank(4, dtype=torch.int8)
        fill(bank, 30)
        bank.save(path)
        bank = MemoryBank.load(path, storage="mmap")
    else:
        bank = MemoryBank(4, dtype=torch.int8, storage="mmap", path=path)
        fill(bank, 30)
    data, before = pickle.dumps(bank), content(bank)
    whole = path.read_bytes()
    os.rename(path, tmp_path / "aside")  # which the bank still maps: cut or changed in place it would lose rows
    if change == "replaced":
        other = MemoryBank(4, dtype=torch.int8)
        fill(other, 30, seed=1)
        other.save(path)
    elif change != "deleted":
        path.write_bytes(whole)
        at = len(whole) - 1 if saved else 7
        changed = {
            "one byte": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :],
            "cut": whole[:50],
            "emptied": b"",
            "foreign": b"x" * len(whole),
        }[change]
        path.write_bytes(changed)
    with pytest.raises(MemoryFileError) as caught:
        pickle.loads(data)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError) == (change == "deleted")
    if change == "deleted":
        assert str(caught.value) == (
            f"MemoryBank: {path} must still be the file with the rows of the pickled bank, got no file; restore it, or "
            "save the bank and pickle it again"
        )
    if change != "one byte" or not saved:  # of which only the whole file's checksum tells
        with pytest.raises(MemoryFileError, match="file"):
            pickle.dumps(bank)
    # The bank itself has its rows, and what does not name the file gets them.
    for how in ("copy", "deepcopy", "sent"):
        assert same(content(COPIES[how](bank)), before)
    bank.save(tmp_path / "again")
    assert same(content(pickle.loads(pickle.dumps(bank))), before)


def test_a_byte_changed_in_place_is_noticed_whatever_the_clock_says(tmp_path):
    bank = MemoryBank(4)
    fill(bank, 30)
    bank.save(tmp_path / "bank")
    data = pickle.dumps(MemoryBank.load(tmp_path / "bank", storage="mmap"))
    content = bytearray((tmp_path / "bank").read_bytes())
    content[-1] ^= 1
    rewrite_in_place(tmp_path / "bank", bytes(content))
    with pytest.raises(MemoryFileError, match="damaged"):
        pickle.loads(data)


def test_an_untouched_file_is_not_read_again(tmp_path, monkeypatch):
    bank = MemoryBank(1000)
    fill(bank, 1000)
    bank.save(tmp_path / "bank")
    monkeypatch.setattr(memory_file, "_SETTLED", -1.0)  # as if the file were old
    data = pickle.dumps(MemoryBank.load(tmp_path / "bank", storage="mmap"))
    read = []
    read_into = memory_file.read_into
    monkeypatch.setattr(memory_file, "read_into", lambda f, view, u: (read.append(len(view)), read_into(f, view, u)))
    loaded = pickle.loads(data)
    assert sum(read) == 12_000  # the positions
    monkeypatch.undo()
    assert same(content(loaded), content(bank))


def resident():
    """MiB that this process alone, or with shared memory, takes beside files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(x.split()[1]) for x in lines if x.startswith(("RssAnon", "RssShmem"))) / 1024


def worker(first, inbox, outbox):
    """Takes banks from arguments and a queue, tells what it sees, appends to each and tells again."""
    torch.set_num_threads(1)
    MemoryBank(4).gather(torch.tensor([-1]))
    for bank in [first, None, None, None]:
        before = resident()
        bank = inbox.get() if bank is None else bank
        grown = resident() - before
        count = len(bank)
        seen = bank.gather(torch.tensor([0, count - 1]), torch.float32).clone()
        shared = bank._rows.is_shared()
        fill(bank, 2, seed=9)
        outbox.put((count, len(bank), seen.tolist(), shared, grown))


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_other_processes_map_the_rows_and_append_to_their_own(method, tmp_path):
    """Rows of 32 MiB: saved, in a working file, in a nameless one, and in memory."""
    wide, count = 2048, 4096
    tokens = torch.arange(count)[:, None].expand(count, wide).float()
    memory = MemoryBank(wide)
    memory.append(tokens, torch.zeros(count, 3))
    memory.save(tmp_path / "bank")
    saved = MemoryBank.load(tmp_path / "bank", storage="mmap")
    working = MemoryBank(wide, storage="mmap", path=tmp_path / "working", capacity=count + 50)
    working.append(tokens, torch.zeros(count, 3))
    appended = MemoryBank.load(tmp_path / "bank", storage="mmap")
    fill(appended, 3)
    banks = [saved, working, appended, memory]
    sizes = [len(bank) for bank in banks]
    last = [bank.gather(torch.tensor([len(bank) - 1])).clone() for bank in banks]

    context = multiprocessing.get_context(method)
    inbox, outbox = context.Queue(), context.Queue()
    process = context.Process(target=worker, args=(saved, inbox, outbox))
    process.start()
    for bank in banks[1:]:
        inbox.put(bank)
    for i, bank in enumerate(banks):
        seen, after, rows, shared, grown = outbox.get(timeout=120)
        assert seen == sizes[i] and after == sizes[i] + 2
        assert torch.equal(torch.tensor(rows), torch.stack([tokens[0], last[i][0]]))
        assert shared == (bank is memory) and grown < 8
        assert bank._rows.is_shared() == (bank is memory)
    process.join(60)
    assert process.exitcode == 0
    for bank, size, row in zip(banks, sizes, last, strict=True):
        assert len(bank) == size and torch.equal(bank.gather(torch.tensor([size - 1])), row)
        fill(bank, 1)
        assert len(bank) == size + 1 and torch.equal(bank.gather(torch.tensor([size - 1])), row)


def test_a_bank_that_is_sent_twice_is_shared_once():
    bank = MemoryBank(64, dtype=torch.int8)
    fill(bank, 100)
    first, second = (COPIES["sent"](bank) for _ in range(2))
    inode = os.fstat(bank._rows.untyped_storage()._share_fd_cpu_()[0]).st_ino
    for other in (first, second):
        assert os.fstat(other._rows.untyped_storage()._share_fd_cpu_()[0]).st_ino == inode
    fill(first, 1)
    fill(bank, 2, seed=3)
    assert (len(first), len(second), len(bank)) == (101, 100, 102)


@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_a_forked_process_writes_to_no_file_of_its_parent(storage, tmp_path):
    bank = MemoryBank(2, storage=storage, path=tmp_path / "working" if storage == "mmap" else None)
    tokens, _ = fill(bank, 5)
    with bank._writing:  # as if another thread were appending
        child = os.fork()
        if child == 0:
            try:
                fill(bank, 3, seed=1)
                os._exit(0 if len(bank) == 8 and torch.equal(bank.gather(torch.arange(5)), tokens) else 1)
            except BaseException:
                os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not bank._rows[5:8].any() or storage == "device"
    more, _ = fill(bank, 3, seed=2)
    assert torch.equal(bank.gather(torch.arange(8)), torch.cat([tokens, more]))


class Rows(Dataset):
    def __init__(self, bank):
        self.bank = bank

    def __len__(self):
        return len(self.bank)

    def __getitem__(self, i):
        return self.bank.gather(torch.tensor([i]), torch.float32)[0], self.bank.positions[i]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers(method, tmp_path):
    bank = MemoryBank(6, dtype=torch.int8)
    tokens, positions = fill(bank, 40)
    bank.save(tmp_path / "bank")
    mapped = MemoryBank.load(tmp_path / "bank", storage="mmap")
    loader = DataLoader(Rows(mapped), 8, num_workers=2 if method == "fork" else 1, multiprocessing_context=method)
    rows, places = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert torch.equal(rows, stored(tokens, torch.int8)) and torch.equal(places, positions)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float16, *QUANTIZED], ids=ids)
@pytest.mark.parametrize("storage", ["device", "pinned", "mmap"])
def test_copies_on_a_gpu(dtype, storage, tmp_path):
    bank = MemoryBank(
        CHANNELS, dtype=dtype, device="cuda", storage=storage, path=tmp_path / "w" if storage == "mmap" else None
    )
    fill(bank, 9)
    for how, function in COPIES.items():
        if how == "sent" and storage == "device":  # CUDA's memory is shared with other processes only
            continue
        made = function(bank)
        assert made.positions.is_cuda and made._rows.is_pinned() == (storage == "pinned")
        assert same(content(made), content(bank))
        fill(made, 3)
        assert len(bank) == 9
    buffer = io.BytesIO()
    torch.save(bank, buffer)
    buffer.seek(0)
    assert not torch.load(buffer, weights_only=False, map_location="cpu").positions.is_cuda
