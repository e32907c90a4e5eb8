"""Attention straight to what a MemoryBank stores."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from vidmem_kernels import MemoryBank, cross_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]


@pytest.fixture(params=["device", "mmap"])
def storage(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_where_they_are(dtype, storage, tmp_path):
    bank = MemoryBank(12, dtype=dtype, storage=storage, path=tmp_path / "rows" if storage == "mmap" else None)
    for count in (0, 5, 70):
        bank.append(torch.randn(count, 12), torch.randn(count, 3))
        rows, scale, positions = bank.stored()
        assert rows.dtype == dtype and rows.shape == (len(bank), 12) and rows.data_ptr() == bank._rows.data_ptr()
        assert torch.equal(positions, bank.positions) and (scale is None) == (dtype.itemsize > 1)
        memory = rows.view(1, len(rows), 3, 4)
        factor = None if scale is None else scale.unsqueeze(0)
        # Two videos of a batch read one memory, two heads of theirs each of its three.
        q = torch.randn(2, 9, 6, 4).to(dtype if scale is None else torch.float32)
        out = cross_attention(q, memory, memory, k_scale=factor, v_scale=factor, out_dtype=torch.float32)
        read = bank.gather(torch.arange(len(bank)), torch.float32).view(1, -1, 3, 4).expand(2, -1, -1, -1)
        if len(bank) == 0:
            assert not out.any()
            continue
        read = read.transpose(1, 2)
        expected = scaled_dot_product_attention(q.float().transpose(1, 2), read, read, enable_gqa=True)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_stored_is_of_one_moment():
    bank = MemoryBank(4, dtype=torch.int8)
    bank.append(torch.randn(3, 4), torch.randn(3, 3))
    stored = bank.stored()
    bank.append(torch.randn(200, 4), torch.randn(200, 3))
    assert [len(part) for part in stored] == [3, 3, 3] and [len(part) for part in bank.stored()] == [203] * 3
    assert torch.equal(bank.stored().rows[:3], stored.rows)
