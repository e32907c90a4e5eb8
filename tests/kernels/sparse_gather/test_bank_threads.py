"""MemoryBank in threads: what is read while another thread appends is the bank at one moment."""

import copy
import pickle
import random
import sys
import threading
import time

import pytest
import torch
from bank_helpers import BANK_DTYPES, QUANTIZED, ids, stored

from vidmem_kernels import MemoryBank

ROWS = 2000
CUDA = torch.cuda.is_available()
NEEDS_CUDA = pytest.mark.skipif(not CUDA, reason="no CUDA GPU")
STORAGES = ["device", "mmap", pytest.param("pinned", marks=[pytest.mark.gpu, NEEDS_CUDA])]


@pytest.fixture(autouse=True)
def many_switches():
    """One torch thread, and threads of Python that give way all the time."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-5)
    yield
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def all_rows(dtype):
    """Tokens of which each is larger, along the query, than those before it, whatever they are stored as."""
    i = torch.arange(ROWS)
    if dtype in QUANTIZED:
        return torch.stack([i + 1.0, 0.5 * (i + 1), -(i + 1.0)], dim=1), torch.tensor([[1.0, 0, 0]])
    return torch.stack([i // 64, i % 64, i % 7], dim=1).float(), torch.tensor([[64.0, 1, 0]])


def run(*functions):
    """Runs each in a thread; the first error of any is raised here."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[function]) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("dtype", BANK_DTYPES, ids=ids)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("start", ["new", "loaded"])
def test_reads_while_another_thread_appends(dtype, storage, start, tmp_path):
    tokens, query = all_rows(dtype)
    expected = stored(tokens, dtype)
    places = torch.rand(ROWS, 3)
    device = "cuda" if storage == "pinned" else "cpu"
    path = tmp_path / "working" if storage == "mmap" else None
    bank = MemoryBank(3, dtype=dtype, device=device, storage=storage, path=path)
    bank.append(tokens[:5], places[:5])
    if start == "loaded":
        bank.save(tmp_path / "start")
        bank = MemoryBank.load(tmp_path / "start", device=device, storage=storage)
    done = threading.Event()
    reads = dict.fromkeys(["gather", "topk", "sizes", "positions", "repr", "save", "copy"], 0)

    def write():
        draw = random.Random(1)
        at = 5
        while at < ROWS:
            end = min(ROWS, at + draw.choice([0, 1, 2, 5, 20]))
            bank.append(tokens[at:end], places[at:end])
            # Not faster than the readers, each of which shall come between many appends.
            for _ in range(2000):
                if done.is_set() or min(reads.values()) >= 5 * at // ROWS:
                    break
                time.sleep(0.001)
            at = end

    def check_whole(other, least):
        count = len(other)
        assert least <= count <= ROWS
        got = other.gather(torch.arange(count, device=device), torch.float32)
        assert torch.equal(got.cpu(), expected[:count]) and torch.equal(other.positions.cpu(), places[:count])

    def read(seed):
        draw = random.Random(seed)
        while not done.is_set():
            what = draw.choice(list(reads) if draw.random() < 0.1 else list(reads)[:5])
            before = len(bank)
            if what == "gather":
                index = torch.tensor([draw.randrange(-1, before) for _ in range(4)], device=device)
                wanted = torch.where(index[:, None].cpu() < 0, 0.0, expected[index.cpu()])
                assert torch.equal(bank.gather(index, torch.float32).cpu(), wanted)
            elif what == "topk":
                found = bank.topk(query.to(device), 3)[1].flatten().tolist()
                assert found == [found[0] - i for i in range(3)] and before <= found[0] + 1 <= len(bank)
            elif what == "sizes":
                each = 3 * dtype.itemsize + 12 + 4 * (dtype in QUANTIZED)
                size = bank.nbytes
                assert size % each == 0 and before <= size // each <= len(bank)
                assert bank.capacity_bytes >= before * each
            elif what == "positions":
                seen = bank.positions
                assert before <= len(seen) <= len(bank) and torch.equal(seen.cpu(), places[: len(seen)])
            elif what == "repr":
                assert before <= int(repr(bank).split("(")[1].split(" ")[0]) <= len(bank)
            elif what == "save":
                bank.save(tmp_path / f"saved-{seed}")
                check_whole(MemoryBank.load(tmp_path / f"saved-{seed}", device=device), before)
            else:
                made = draw.choice([copy.copy, copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b))])(bank)
                check_whole(made, before)
            reads[what] += 1

    def stopping(function, *args):
        try:
            function(*args)
        finally:
            done.set()

    run(lambda: stopping(write), *[lambda seed=seed: stopping(read, seed) for seed in range(3)])
    check_whole(bank, ROWS)
    assert min(reads.values()) >= 4


@pytest.mark.parametrize("storage", ["device", "mmap"])
def test_appends_of_several_threads_stay_whole(storage, tmp_path):
    bank = MemoryBank(2, storage=storage, path=tmp_path / "working" if storage == "mmap" else None)

    def write(writer):
        for i in range(60):
            size = (writer + i) % 5
            bank.append(torch.full((size, 2), float(100 * writer + i)), torch.full((size, 3), float(writer)))

    run(*[lambda writer=writer: write(writer) for writer in range(4)])
    seen = bank.gather(torch.arange(len(bank)))[:, 0].int().tolist()
    order = list(dict.fromkeys(seen))
    for writer in range(4):
        wanted = [100 * writer + i for i in range(60) if (writer + i) % 5]
        assert [value for value in order if value // 100 == writer] == wanted
    assert seen == [value for value in order for _ in range((value // 100 + value % 100) % 5)]
    assert torch.equal(bank.positions[:, 0].int(), torch.tensor(seen, dtype=torch.int32) // 100)
