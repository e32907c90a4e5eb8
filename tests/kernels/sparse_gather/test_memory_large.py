"""A bank of more than 2**31 elements: no offset is 32 bits wide. Rows nobody touches cost no memory."""

import shutil

import pytest
import torch

from vidmem_kernels import MemoryBank, gather_tokens

CHANNELS = 4096
ROWS = 2**31 // CHANNELS + 3  # the last three lie beyond element 2**31
GIB = 1 << 30


def available_memory():
    with open("/proc/meminfo") as file:
        return 1024 * int(next(line for line in file if line.startswith("MemAvailable")).split()[1])


needs_memory = pytest.mark.skipif(
    not torch.cuda.is_available() and available_memory() < 6 * GIB, reason="less than 6 GiB of memory available"
)


def large_bank(**options):
    """Appends at both ends; what lies between is as allocated, with scales of 0: zeros after dequantising."""
    bank = MemoryBank(CHANNELS, dtype=torch.int8, capacity=ROWS, **options)
    first = torch.randint(-127, 128, (2, CHANNELS)).float()
    last = torch.randint(-127, 128, (4, CHANNELS)).float()
    first[:, 0] = last[:, 0] = 127  # a scale of 1, so that rows come back as they were
    bank.append(first, torch.zeros(2, 3))
    bank._scale[2 : ROWS - 4] = 0
    bank._positions[2 : ROWS - 4] = 0
    bank._count = ROWS - 4
    bank.append(last, torch.ones(4, 3))
    assert len(bank) == ROWS and ROWS * CHANNELS > 2**31
    return bank, torch.cat([first, last])


INDEX = [0, 1, ROWS - 4, ROWS - 3, ROWS - 2, ROWS - 1]


def check_gather(bank, expected, backend):
    for dtype in (torch.int32, torch.int64):
        index = torch.tensor([INDEX + [-1, ROWS // 2]], dtype=dtype)
        got = gather_tokens(bank._rows[None], index, scale=bank._scale[None], backend=backend)
        assert torch.equal(got[0, :6], expected) and not got[0, 6:].any()


@needs_memory
def test_device_storage():
    bank, expected = large_bank()
    assert bank.nbytes == ROWS * (CHANNELS + 4 + 12)
    assert torch.equal(bank.gather(torch.tensor(INDEX)), expected)
    for backend in ("auto", "reference"):
        check_gather(bank, expected, backend)
    values, index = bank.topk(expected[[5, 0]], 1)
    assert index.tolist() == [[ROWS - 1], [0]]
    torch.testing.assert_close(values[:, 0], expected[[5, 0]].square().sum(1))


@needs_memory
def test_mapped_storage(tmp_path):
    if shutil.disk_usage(tmp_path).free < 4 * GIB:
        pytest.skip(reason="less than 4 GiB of disk free")
    path = tmp_path / "working"
    bank, expected = large_bank(storage="mmap", path=path)
    try:
        assert path.stat().st_size == ROWS * CHANNELS
        assert torch.equal(bank.gather(torch.tensor(INDEX)), expected)
        for backend in ("auto", "reference"):
            check_gather(bank, expected, backend)
    finally:
        path.unlink()  # pytest keeps the folders of its last runs
