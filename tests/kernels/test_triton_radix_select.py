"""The radix select that Triton's kernels share, on keys themselves: extremes, few values, tiles beyond one step."""

import pytest
import torch

from vidmem_kernels import _dispatch
from vidmem_kernels._op import OPS

pytest.importorskip("triton")

from vidmem_kernels import _triton_radix_select as radix
from vidmem_kernels.sparse_gather.triton_select import _positions_kernel


@pytest.fixture(autouse=True)
def triton_runs(device):
    reason = _dispatch.unavailable(OPS["select_tokens"], "triton", device)
    if reason is not None:
        pytest.skip(reason=reason)


def positions(key, want):
    index = torch.full((key.shape[0], want), -1, dtype=torch.int32, device=key.device)
    cut, counts = radix.find_cut(key, want)
    _positions_kernel[radix.programs(key)](key, cut, counts, index, key.shape[1], want, BLOCK=radix.TILE, num_warps=4)
    return index.cpu()


def expected(key, want):
    """A stable sort, whose first `want` are put in order of position."""
    return key.cpu().sort(dim=1, descending=True, stable=True).indices[:, :want].sort(dim=1).values.int()


def keys(dtype, count):
    """Rows of: any bits, neighbours of the extremes and of 0, one value only, the lowest digit only."""
    limits = torch.iinfo(dtype)
    ends = torch.tensor([limits.min, limits.min + 1, -256, -1, 0, 1, 255, 256, limits.max - 1, limits.max], dtype=dtype)
    wide = torch.randint(limits.min, limits.max, (count,), dtype=dtype)
    few = ends[torch.randint(len(ends), (count,))]
    return torch.stack([wide, few, torch.full_like(wide, limits.min), few & 0xFF, wide | ~0xFF])


@pytest.fixture(params=[torch.int32, "digits", torch.int64], ids=str)
def dtype(request, monkeypatch):
    """int32 keys of short rows are bisected; the digits of others are counted."""
    if request.param == "digits":
        monkeypatch.setattr(radix, "_HELD", 0)
        return torch.int32
    return request.param


@pytest.mark.parametrize("count", [1, 7, 1024, pytest.param(2100, marks=pytest.mark.long)])
def test_positions_of_the_largest(count, dtype, device):
    key = keys(dtype, count).to(device)
    for want in sorted({1, count // 3 + 1, count}):
        assert torch.equal(positions(key, want), expected(key, want))


def test_more_tiles_than_are_counted_in_one_step(device, monkeypatch):
    monkeypatch.setattr(radix, "TILE", 128)
    key = keys(torch.int32, 128 * 130 + 5)[1:2].to(device)
    assert torch.equal(positions(key, 9000), expected(key, 9000))


def test_more_keys_than_a_small_program_holds(device):
    key = keys(torch.int32, 5000).to(device)
    for want in (1, 2500, 5000):
        assert torch.equal(positions(key, want), expected(key, want))


def test_keys_that_differ_in_their_last_bits(dtype, device):
    """Around a multiple of 2**24, so that the wanted number decides about every digit, down to the last bit."""
    key = (2**24 - 150 + torch.randperm(300)).to(dtype).view(1, -1).to(device)
    for want in (1, 149, 150, 151, 300):
        assert torch.equal(positions(key, want), expected(key, want))
