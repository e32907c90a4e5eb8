"""A process that saves banks is killed at random moments: the file is always one that it finished."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from vidmem_kernels import MemoryBank

ROUNDS = 50
ROWS, CHANNELS = 1500, 512  # 3 MB: most of a writer's time goes into the file

# Its own process imports torch once and stays single-threaded, so that each writer is a cheap fork of it.
NURSERY = """
    import os, sys, torch
    from vidmem_kernels import MemoryBank
    sys.path.insert(0, sys.argv[1])
    from test_memory_kill import version_of
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in iter(sys.stdin.readline, ""):
        writer = os.fork()
        if writer == 0:
            number = int(line)
            while True:
                version_of(number).save(sys.argv[2])
                os.write(1, b"saved %d\\n" % number)
                number += 1
        os.write(1, b"writer %d\\n" % writer)
        os.waitpid(writer, 0)
        os.write(1, b"dead\\n")
"""


def content(number):
    """Rows and positions of version `number`; versions differ in their length too."""
    rows = ROWS + number % 5
    tokens = (torch.arange(rows) + 7.0 * number).unsqueeze(1).expand(rows, CHANNELS)
    return tokens, torch.full((rows, 3), float(number))


def version_of(number):
    bank = MemoryBank(CHANNELS)
    bank.append(*content(number))
    bank.metadata = {"number": str(number)}
    return bank


def told(nursery):
    line = nursery.stdout.readline()
    assert line.endswith("\n"), "the nursery died"
    return line.split()


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_killed_writer_leaves_a_whole_file(tmp_path, one_thread):
    path = tmp_path / "bank"
    paces = []
    for _ in range(5):
        start = time.perf_counter()
        version_of(0).save(path)
        paces.append(time.perf_counter() - start)
    pace = sorted(paces)[2]
    draw = random.Random(0)
    last = interrupted = progressed = 0
    left = set()
    command = [sys.executable, "-c", textwrap.dedent(NURSERY), os.path.dirname(__file__), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as nursery:
        assert told(nursery) == ["ready"]
        for attempt in range(ROUNDS):
            print(last + 1, file=nursery.stdin, flush=True)
            saved = last
            finish = draw.randrange(3)  # saves to wait for, so that a slow machine gets on too
            writer = None
            while writer is None or saved < last + finish:
                what, value = told(nursery)
                if what == "writer":
                    writer = int(value)
                else:
                    saved = int(value)
            time.sleep(draw.uniform(0, 2 * pace))
            os.kill(writer, signal.SIGKILL)
            while (said := told(nursery)) != ["dead"]:
                saved = int(said[1])

            bank = MemoryBank.load(path, storage=("device", "mmap")[attempt % 2])
            number = int(bank.metadata["number"])
            # What was reported as saved is there, or the one that was renamed but not reported any more.
            assert number in (saved, saved + 1)
            tokens, positions = content(number)
            assert torch.equal(bank.gather(torch.arange(len(bank))), tokens) and torch.equal(bank.positions, positions)
            before, left = left, {p.name for p in tmp_path.iterdir() if p != path}
            assert len(left) <= 1, "a writer removes what the one before it left"
            interrupted += left > set() and left != before
            progressed += number > last
            last = number
        nursery.stdin.close()
    assert nursery.returncode == 0
    assert interrupted > ROUNDS // 10, "the kills hit no writing process"
    assert progressed >= ROUNDS // 2, "the writers finished no save"
    version_of(last).save(path)
    assert list(tmp_path.iterdir()) == [path]
