"""What the kernels of gather and scatter-add do beyond the contract: every number, bad indices, their own checks."""

import re
from pathlib import Path

import pytest
import torch
from backend_helpers import compiled

from vidmem_kernels import _dispatch, gather_tokens, scatter_add_tokens
from vidmem_kernels._op import OPS
from vidmem_kernels.testing import Make

ROW = torch.zeros(1, 1, dtype=torch.int32)


@pytest.fixture(params=["triton", "cuda", "cpu", "reference"])
def backend(request, device):
    reason = _dispatch.unavailable(OPS["gather_tokens"], request.param, device)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


def same(a, b):
    """Equal to the bit but for the bits of a NaN."""
    assert torch.equal(a.isnan(), b.isnan())
    assert torch.equal(a.nan_to_num(), b.nan_to_num())
    assert torch.equal(torch.signbit(a)[~a.isnan()], torch.signbit(b)[~b.isnan()])


def convert(values, out_dtype, **options):
    return gather_tokens(values.view(1, 1, -1), ROW, out_dtype=out_dtype, **options).flatten()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_widens_every_half(dtype, capability):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    same(convert(codes, torch.float32, backend="cpu"), codes.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cpu_narrows_and_rounds_to_even(dtype, capability):
    """Every half, the midpoints between neighbours and what lies just beside them, overflow, subnormals, NaN."""
    halves = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middle = (halves[:-1].double() + halves[1:].double()).div(2).float()
    values = torch.cat([halves, middle, *(middle.nextafter(torch.tensor(x)) for x in (0.0, float("inf")))])
    values = torch.cat([values, -values, torch.tensor([65504.0, 65519.9, 65520.0, 3.4e38, 1e-45, float("nan")])])
    # NaNs that adding half a unit of bfloat16 would turn into minus zero or infinity.
    values = torch.cat([values, torch.tensor([0x7FFFFFFF, 0x7F800001], dtype=torch.int32).view(torch.float32)])
    same(convert(values, dtype, backend="cpu"), values.to(dtype))


@pytest.mark.parametrize("flush", [False, True])
def test_cpu_reads_every_float8(flush, capability):
    """Subnormals too where the processor is told to flush its own."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.float()
    torch.set_flush_denormal(flush)
    try:
        out = convert(codes, None, scale=torch.ones(1, 1), backend="cpu")
    finally:
        torch.set_flush_denormal(False)
    same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_reads_every_float8(dtype, backend, device):
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
    out = gather_tokens(
        codes.view(1, 1, -1),
        ROW.to(device),
        scale=torch.full((1, 1), 0.5, device=device),
        out_dtype=dtype,
        backend=backend,
    )
    torch.testing.assert_close(out.flatten(), (codes.float() * 0.5).to(dtype), rtol=0, atol=0, equal_nan=True)


def test_float64_goes_to_halves(backend, device):
    bank = torch.randn(1, 5, 33, dtype=torch.float64, device=device)
    index = torch.tensor([[4, -1, 0]], device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = gather_tokens(bank, index, out_dtype=dtype, backend=backend)
        # Triton's interpreter cuts off what does not fit bfloat16; its compiled kernels round.
        cuts = backend == "triton" and device == "cpu" and dtype == torch.bfloat16
        torch.testing.assert_close(out[0, 0], bank[0, 4].to(dtype), rtol=2**-7 if cuts else 0, atol=0)
        assert (out[0, 1] == 0).all()


def test_bad_index_is_refused_or_marked(backend, device):
    """The CPU raises; a GPU kernel gives NaN rows and drops sources, and reads nothing outside."""
    bank = torch.ones(1, 3, 40, device=device)
    index = torch.tensor([[0, 3, -2, 2]], device=device)
    src = torch.ones(1, 4, 40, device=device)
    if backend in ("cpu", "reference"):
        with pytest.raises(IndexError, match=r"gather_tokens: index must be in \[-1, 2\], got"):
            gather_tokens(bank, index, backend=backend)
        with pytest.raises(IndexError, match=r"scatter_add_tokens: index must be in \[-1, 2\], got"):
            scatter_add_tokens(src, index, 3, backend=backend)
        return
    out = gather_tokens(bank, index, backend=backend)
    assert out.isnan().all(dim=2).tolist() == [[False, True, True, False]]
    assert (out[0, [0, 3]] == 1).all()
    assert scatter_add_tokens(src, index, 3, backend=backend)[0, :, 0].tolist() == [1, 0, 1]


def test_many_batches(backend, device):
    """More than the 65,535 that some axes of a GPU's grid can count; few where the interpreter runs."""
    batch = 40 if backend == "triton" and device == "cpu" else 70_000
    bank = torch.arange(batch * 2.0, device=device).view(batch, 2, 1)
    index = torch.ones(batch, 1, dtype=torch.int32, device=device)
    assert torch.equal(gather_tokens(bank, index, backend=backend), bank[:, 1:])
    assert torch.equal(scatter_add_tokens(bank[:, 1:], index, 2, backend=backend)[:, 1:], bank[:, 1:])


def test_gradient_is_summed_wide(backend, device):
    """A row read 300 times with a float32 result: its bfloat16 gradient is rounded once, not 300 times.

    300 x 1.00385 = 301.155, in bfloat16 302; but 1.00385 alone is 1 there.
    """
    bank = torch.zeros(1, 2, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    index = torch.ones(1, 300, dtype=torch.int32, device=device)
    (gather_tokens(bank, index, out_dtype=torch.float32, backend=backend) * 1.00385).sum().backward()
    assert bank.grad.tolist() == [[[0.0] * 4, [302.0] * 4]]


@pytest.mark.parametrize("rows_batch", [1, 2])
def test_gradient_of_scale(rows_batch, backend, device):
    rows = torch.randint(-127, 128, (rows_batch, 6, 21), device=device).to(torch.int8)
    scale = torch.rand(rows_batch, 6, device=device).requires_grad_()
    index = torch.randint(-1, 6, (2, 9), device=device)
    weight = torch.randn(2, 9, 21, device=device)
    (gather_tokens(rows, index, scale=scale, backend=backend) * weight).sum().backward()
    expected = torch.zeros(rows_batch, 6, dtype=torch.float64)
    for b in range(2):
        for k, row in enumerate(index[b].tolist()):
            if row >= 0:
                lane = b % rows_batch
                expected[lane, row] += (rows[lane, row].double() * weight[b, k].double()).sum().cpu()
    torch.testing.assert_close(scale.grad.double().cpu(), expected, rtol=1e-5, atol=1e-4)


def test_quantised_bank_that_wants_a_gradient_is_refused():
    bank = torch.randn(1, 3, 4).requires_grad_().to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="bank must not require a gradient, which float8_e4m3fn cannot have"):
        gather_tokens(bank, ROW, scale=torch.ones(1, 3))


WIDTHS = [1, 7, 8, 9, 31, 512, 1031]
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def ops(name):
    op = getattr(torch.ops.vidmem, name)
    return lambda *args: op(*args, "cpu"), lambda *args: op(*args, "reference")


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8, torch.float8_e4m3fn])
def test_cpu_gathers_any_strides(dtype, capability):
    """Equal to the reference to the bit: widths of no vector, transposed banks, a batch of one and none, no rows."""
    gather, reference = ops("gather_tokens")
    make = Make()
    for width in WIDTHS:
        rows = make.randn(2, 12, width, dtype=torch.float32).mul(40).to(dtype)
        if dtype == torch.float8_e4m3fn:
            rows.view(torch.uint8)[0, :, -1] = torch.arange(0, 252, 21, dtype=torch.uint8)
        transposed = rows.transpose(1, 2).contiguous().transpose(1, 2)
        scale = make.rand(2, 12) if dtype in (torch.int8, torch.float8_e4m3fn) else None
        for index in (make.randint(-1, 12, (2, 41)), make.randint(-1, 12, (2, 41)).T.contiguous().T.long()):
            for out_dtype in (None, *FLOATS):
                for bank in (rows, transposed, rows[1:]):
                    factors = None if scale is None else scale[-bank.shape[0] :]
                    args = bank, index, factors, out_dtype
                    same(gather(*args).double(), reference(*args).double())
        none = gather(rows, index[:, :0], scale, torch.float32)
        assert none.shape == (2, 0, width)
        assert (
            gather(rows[:, :0], torch.full_like(index, -1), None if scale is None else scale[:, :0], None) == 0
        ).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cpu_reads_every_float8_at_every_place(out_dtype, capability):
    """Whatever lane of a vector, or remainder of a row, a code falls into."""
    codes = torch.arange(256, dtype=torch.uint8)
    for width in (1, 3, 17, 64, 256, 1000):
        bank = codes.repeat(width).view(1, 256, width).view(torch.float8_e4m3fn)
        scale = torch.full((1, 256), 0.75)
        out = gather_tokens(bank, torch.arange(256).unsqueeze(0), scale=scale, out_dtype=out_dtype, backend="cpu")
        same(out, (bank.float() * 0.75).to(out_dtype))


def sum_in_order(src, index, num_rows):
    """Each row added in float32 (float64 for float64) in order of K, by a plain loop."""
    wide = torch.float64 if src.dtype == torch.float64 else torch.float32
    out = torch.zeros(src.shape[0], num_rows, src.shape[2], dtype=wide)
    for b in range(src.shape[0]):
        for k, row in enumerate(index[b].tolist()):
            if row >= 0:
                out[b, row] += src[b, k].to(wide)
    return out.to(src.dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_cpu_sums_in_order_on_any_number_of_threads(dtype, capability):
    """Random rows, all into one (its channels are shared out then), a few, sorted, and dropped ones."""
    make = Make(dtype)
    count, before = 400, torch.get_num_threads()
    for width in (1, 40, 521):
        src = make.randn(2, count, width)
        index = make.randint(-1, 37, (2, count))
        kinds = [index, index.sort(dim=1).values, torch.full_like(index, 36), index % 3, torch.full_like(index, -1)]
        for where in (*kinds, make.strided(index.long())):
            expected = sum_in_order(src, where, 37)
            try:
                for threads in (1, 2, 3, 7):
                    torch.set_num_threads(threads)
                    for rows in (src, make.strided(src)):
                        assert torch.equal(torch.ops.vidmem_cpp.scatter_add_tokens(rows, where, 37), expected)
            finally:
                torch.set_num_threads(before)


def test_cpu_sums_many_rows(capability):
    """Enough for many tasks of more than one thread; few sources for each of many rows, and the reverse."""
    scatter, reference = ops("scatter_add_tokens")
    for count, num_rows, width in ((30_000, 1_000, 24), (9_000, 20_000, 10), (3_000, 7, 300), (2_000, 1, 64)):
        src = torch.randn(1, count, width)
        index = torch.randint(-1, num_rows, (1, count), dtype=torch.int32)
        assert torch.equal(scatter(src, index, num_rows), reference(src, index, num_rows))


def test_cpu_sums_nan_and_infinity(capability):
    src = (
        torch.tensor([1.0, float("inf"), float("nan"), float("inf"), -float("inf"), 2.0]).view(1, 6, 1).repeat(1, 1, 19)
    )
    out = torch.ops.vidmem_cpp.scatter_add_tokens(src, torch.tensor([[0, 1, 2, 3, 3, 0]]), 5)
    same(out, torch.tensor([3.0, float("inf"), float("nan"), float("nan"), 0.0]).view(1, 5, 1).expand_as(out))


def available_memory():
    """Bytes that may be used without swapping; 0 where the system does not say."""
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else 0


needs_memory = pytest.mark.skipif(available_memory() < 2**32, reason="less than 4 GiB of memory available")
FAR = 2**31 + 7  # elements


@compiled
@needs_memory
def test_cpu_gathers_beyond_two_to_the_31_elements():
    """Rows, batches and single elements of an int8 bank; only the pages that are written are ever allocated."""
    storage = torch.empty(FAR + 4096, dtype=torch.int8)
    storage[:4096] = 1
    end = storage[-4096:]
    end.copy_(torch.arange(4096) % 127)
    gather = torch.ops.vidmem_cpp.gather_tokens
    one = torch.ones(1, 1)
    bank = storage[: storage.numel() // 1024 * 1024].view(1, -1, 1024)
    last = bank.shape[1] - 1
    out = gather(bank, torch.tensor([[last, 0, -1, last - 1]]), one.expand(1, last + 1), None)
    assert torch.equal(out[0], torch.stack([bank[0, last], bank[0, 0], bank[0, 0] * 0, bank[0, last - 1]]).float())
    batches = storage.as_strided((2, 5, 64), (FAR, 64, 1))
    out = gather(batches, torch.tensor([[0, 4], [4, 0]], dtype=torch.int32), one.expand(2, 5), torch.bfloat16)
    assert torch.equal(out, torch.stack([batches[0, [0, 4]], batches[1, [4, 0]]]).bfloat16())
    channels = storage.as_strided((1, 5, 2), (0, 64, FAR))
    assert torch.equal(gather(channels, torch.tensor([[3]]), one.expand(1, 5), None), channels[:, 3:4].float())
    elements = storage.view(1, -1, 1)
    where = torch.tensor([[FAR + 4095, 5, FAR + 100]])
    assert torch.equal(gather(elements, where, one.expand(1, FAR + 4096), None), elements[:, where[0]].float())


@compiled
@needs_memory
def test_cpu_sources_beyond_two_to_the_31_elements():
    """scatter_add_tokens, select_tokens and quantize_rows of batches that far apart."""
    storage = torch.empty(FAR + 1024, dtype=torch.float16)
    src = storage.as_strided((2, 4, 64), (FAR, 64, 1))
    src.copy_(torch.randn(2, 4, 64))
    close = src.contiguous()
    index = torch.tensor([[0, 1, 1, 0], [1, 1, -1, 0]])
    op = torch.ops.vidmem_cpp
    assert torch.equal(op.scatter_add_tokens(src, index, 2), op.scatter_add_tokens(close, index, 2))
    for far, near in (
        (op.select_tokens(src, 2, None), op.select_tokens(close, 2, None)),
        (op.quantize_rows(src, torch.int8), op.quantize_rows(close, torch.int8)),
    ):
        assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


@compiled
def test_compiled_kernels_check_for_themselves():
    """What could read outside memory is refused below api.py too."""
    gather, scatter = torch.ops.vidmem_cpp.gather_tokens, torch.ops.vidmem_cpp.scatter_add_tokens
    bank, index = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="gather_tokens: bank must have batch 1 or 3, got 2"):
        gather(bank, index[:1].expand(3, -1), None, None)
    with pytest.raises(ValueError, match=r"gather_tokens: scale must have shape \(2, 3\), got \(2, 2\)"):
        gather(bank.to(torch.int8), index, torch.ones(2, 2), None)
    with pytest.raises(ValueError, match="gather_tokens: scale is required for"):
        gather(bank.to(torch.int8), index, None, None)
    with pytest.raises(ValueError, match="index must be int32 or int64"):
        gather(bank, index.to(torch.int16), None, None)
    with pytest.raises(ValueError, match="index must have 2 dimensions, got 1"):
        gather(bank, index[0], None, None)
    with pytest.raises(ValueError, match=r"scatter_add_tokens: index must have shape \(2, 3\), got \(2, 5\)"):
        scatter(bank, index, 3)
    with pytest.raises(ValueError, match="num_rows must not be negative, got -1"):
        scatter(bank, index[:, :3], -1)
    assert scatter(torch.zeros(0, 1, 1), index[:0, :1], 1 << 40).shape == (0, 1 << 40, 1)
