"""The text of the CUDA kernels, compiled by g++ and run on the CPU: checks their logic, not their memory model."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from paths import ROOT

from vidmem_kernels.sparse_gather import reference

HERE = Path(__file__).parent
nan, inf = math.nan, math.inf

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    library = tmp_path_factory.mktemp("cuda") / "kernels.so"
    source = HERE / "cuda_emulation" / "kernels.cpp"
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", f"-I{source.parent}", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(function, *args):
    """Tensors go as pointers, numbers as int64, None as null."""
    function(
        *(
            ctypes.c_void_p(arg.data_ptr() if isinstance(arg, torch.Tensor) else None)
            if arg is None or isinstance(arg, torch.Tensor)
            else ctypes.c_int64(arg)
            for arg in args
        )
    )


def select(kernels, score, keep):
    guarded = torch.full((score.shape[0] * keep + 8,), -1, dtype=torch.int32)
    function = kernels.select_double if score.dtype == torch.float64 else kernels.select_float
    call(function, score, *score.stride(), *score.shape, keep, guarded)
    assert (guarded[-8:] == -1).all(), "wrote past the end"
    return guarded[:-8].view(-1, keep)


def selected(score, keep):
    return reference.select_tokens(torch.zeros(*score.shape, 1), keep, score)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("keep", [1, 4100, 4096 + 77])
def test_select_with_ties_across_tiles(keep, dtype, kernels):
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, inf, -inf, nan, 1e30], dtype=dtype)
    score = values[torch.randint(len(values), (2, 4096 + 77))]
    assert torch.equal(select(kernels, score, keep), selected(score, keep))


def test_select_tells_neighbours_apart(kernels):
    for dtype, bits in ((torch.float32, torch.int32), (torch.float64, torch.int64)):
        score = (torch.ones((), dtype=dtype).view(bits) + torch.randperm(3000)).to(bits).view(dtype)
        score = torch.stack([score, -score], dim=1).t()  # strided
        assert torch.equal(select(kernels, score, 1234), selected(score, 1234))


@pytest.mark.parametrize("channels", [1, 40, 131])
def test_row_norms(channels, kernels):
    x = torch.randint(-4, 5, (37, channels)).float()  # sums of squares are exact
    norms = torch.full((37,), nan)
    call(kernels.row_norms, x, 37, channels, norms)
    expected = torch.linalg.vector_norm(x, dim=1)
    assert torch.equal(norms * 2.0**64, torch.where(expected == 0, -(2.0**64), expected))
    # In the order of the norms, whatever their size.
    x *= 2.0 ** torch.randint(-140, 120, (37, 1)).double()
    x[3] = 0
    call(kernels.row_norms, x, 37, channels, norms)
    assert torch.equal(norms.argsort(stable=True), torch.linalg.vector_norm(x.double(), dim=1).argsort(stable=True))


@pytest.mark.parametrize(("count", "channels"), [(1, 7), (256, 7), (257, 300), (512, 7), (1300, 7)])
def test_sums_of_long_groups(count, channels, kernels):
    """A hot row among others, two hot rows beside each other, a batch of dropped sources only."""
    index = torch.randint(-1, 6, (4, count))
    index[1, torch.rand(count) < 0.9] = 3
    index[2] = 2 + torch.arange(count) % 2
    index[3] = -1
    src = torch.randint(-8, 9, (4, count, channels)).float()  # sums are exact in any order
    keys, order = index.masked_fill(index < 0, 6).sort(dim=1, stable=True)
    out = torch.full((4, 6, channels), nan)
    call(kernels.sum_rows, src, keys, order, 4, count, 6, channels, out)
    assert torch.equal(out, reference.scatter_add_tokens(src, index, 6))


@pytest.mark.parametrize("channels", [5, 8, 1040])
@pytest.mark.parametrize("banks", [1, 2])
def test_gather(banks, channels, kernels):
    """Rows outside the bank are NaN, -1 is zeros."""
    bank, scale = torch.randn(banks, 4, channels), torch.rand(banks, 4)
    index = torch.tensor([[0, -1, 3, 3], [2, 1, -1, 0]])
    for factor in (None, scale):
        out = torch.full((2, 4, channels), 7.0)
        call(kernels.gather_rows, bank, index, factor, banks, 2, 4, 4, channels, out)
        assert torch.equal(out, reference.gather_tokens(bank, index, factor, None))
    bad = torch.tensor([[4, -2, 0, 1 << 40], [-1, 0, -(1 << 40), 3]])
    out = torch.full((2, 4, channels), 7.0)
    call(kernels.gather_rows, bank, bad, None, banks, 2, 4, 4, channels, out)
    expected = reference.gather_tokens(bank, bad.where((bad >= -1) & (bad < 4), 0), None, None)
    expected[(bad < -1) | (bad > 3)] = nan
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
