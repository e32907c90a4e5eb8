"""What the kernels of gather and scatter-add do beyond the contract: every number, bad indices, their own checks."""

import pytest
import torch

from vidmem_kernels import _dispatch, _extension, gather_tokens, scatter_add_tokens
from vidmem_kernels._registry import OPS

compiled = pytest.mark.skipif(_extension.module is None, reason="vidmem_kernels._C is not built")
CAPABILITIES = _extension.module.available_cpu_capabilities() if _extension.module else []
ROW = torch.zeros(1, 1, dtype=torch.int32)


@pytest.fixture(params=["triton", "cuda", "cpu", "reference"])
def backend(request, device):
    reason = _dispatch.unavailable(OPS["gather_tokens"], request.param, device)
    if reason is not None:
        pytest.skip(reason=reason)
    return request.param


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    before = _extension.module.cpu_capability()
    _extension.module.set_cpu_capability(request.param)
    yield request.param
    _extension.module.set_cpu_capability(before)


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
    with pytest.raises(ValueError, match="gather_tokens: a float8_e4m3fn bank has no gradient, detach it"):
        gather_tokens(bank, ROW, scale=torch.ones(1, 3))


@compiled
def test_compiled_kernels_check_for_themselves():
    """What could read outside memory is refused below api.py too."""
    gather, scatter = torch.ops.vidmem_cpp.gather_tokens, torch.ops.vidmem_cpp.scatter_add_tokens
    bank, index = torch.zeros(2, 3, 4), torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="gather_tokens: bank must have batch 1 or 3, got 2"):
        gather(bank, index[:1].expand(3, -1), None, None)
    with pytest.raises(ValueError, match="gather_tokens: scale must be float32 of the bank's first two sizes"):
        gather(bank.to(torch.int8), index, torch.ones(2, 2), None)
    with pytest.raises(ValueError, match="gather_tokens: scale must be given exactly for"):
        gather(bank.to(torch.int8), index, None, None)
    with pytest.raises(ValueError, match="index must be int32 or int64"):
        gather(bank, index.to(torch.int16), None, None)
    with pytest.raises(ValueError, match="index must have 2 dimensions, got 1"):
        gather(bank, index[0], None, None)
    with pytest.raises(ValueError, match=r"scatter_add_tokens: index must be \(2, 3\), got \(2, 5\)"):
        scatter(bank, index, 3)
    with pytest.raises(ValueError, match="num_rows must not be negative, got -1"):
        scatter(bank, index[:, :3], -1)
    assert scatter(torch.zeros(0, 1, 1), index[:0, :1], 1 << 40).shape == (0, 1 << 40, 1)
