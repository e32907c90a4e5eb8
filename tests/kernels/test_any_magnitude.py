"""Norms, similarities and scales of rows whose squares overflow or vanish: drawn magnitudes on every backend."""

import random

import pytest
import torch
from backend_helpers import BACKENDS, backend_called, skip_without

import vidmem_kernels as vk

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Exponents of 2 of the largest and the smallest normal numbers.
EXPONENTS = {torch.float32: (-126, 127), torch.bfloat16: (-126, 127), torch.float16: (-14, 15)}
INF, NAN = float("inf"), float("nan")


@pytest.fixture(params=BACKENDS)
def backend(request):
    skip_without(request.param, "select_tokens")
    with backend_called(request.param) as name:
        yield name


def drawn_rows(draw, batch, rows, channels, dtype, subnormal):
    """Rows each of a magnitude of its own, or some of them extreme only; several nearly alike."""
    low, high = EXPONENTS.get(dtype, (-1022, 1023))
    low += -{torch.float32: 20, torch.bfloat16: 4, torch.float16: 6}.get(dtype, 40) if subnormal else 14
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    x = torch.rand(batch, rows, channels, generator=generator, dtype=torch.float64) - 0.5
    kind = draw.randrange(3)
    spread = (torch.rand(batch, rows, 1, generator=generator, dtype=torch.float64) * (high - low) + low).round()
    if kind == 1:
        spread = torch.where(torch.rand(batch, rows, 1, generator=generator) < 0.3, spread, 0)
    elif kind == 2:  # all at one place of the range
        spread = torch.full_like(spread, draw.choice([low + 1, low + 3, high - 1, high]))
    return torch.ldexp(x, spread.int()).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def log_norms(x):
    """log2 of the norms of rows, in float64; those of zeros are -inf."""
    peak = x.double().abs().amax(dim=2)
    unit = x.double() / peak.masked_fill(peak == 0, 1).unsqueeze(2)
    return torch.linalg.vector_norm(unit, dim=2).log2() + peak.log2()


@pytest.mark.sample(16)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 40, 700])
def test_the_largest_norms_are_selected(dtype, channels, backend):
    draw = random.Random(f"{dtype} {channels}")
    # Triton's interpreter widens subnormals of bfloat16 wrongly.
    subnormal = backend != "triton" or dtype in (torch.float32, torch.float64)
    for _ in range(2 if backend == "triton" else 20):
        x = drawn_rows(draw, 2, 24, channels, dtype, subnormal)
        keep = draw.randint(1, 23)
        index = vk.select_tokens(x, keep, backend=backend).index.long()
        norms, slack = log_norms(x), 1e-9 if dtype == torch.float64 else 1e-6
        taken = norms.gather(1, index)
        left = norms.scatter(1, index, -INF)
        assert torch.where(left.amax(1) == -INF, True, taken.amin(1) >= left.amax(1) - slack).all()


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinity_comes_first_and_nan_last(dtype, backend):
    top = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal * (1 if backend == "triton" else torch.finfo(dtype).eps)
    x = torch.tensor([0.0, NAN, tiny, INF, top, 1.0, -top, -INF, 2 * tiny], dtype=dtype)
    x = torch.stack([x, torch.zeros_like(x), x], dim=1).unsqueeze(0)
    x[0, 6, 1] = top  # the norm is sqrt(3) * top, beyond the dtype
    by_norm = [3, 7, 6, 4, 5, 8, 2, 0, 1]
    for keep in range(1, 10):
        assert vk.select_tokens(x, keep, backend=backend).index.tolist() == [sorted(by_norm[:keep])]


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_is_that_of_directions(dtype, backend):
    """Scaled rows match as the rows do."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip(reason="Triton's kernels compare in float32")
    draw = random.Random(str(dtype))
    low, high = EXPONENTS.get(dtype, (-1022, 1023))
    for _ in range(1 if backend == "triton" else 10):
        # Small integers keep every bit down to some binary places above the smallest number.
        x = torch.randint(-4, 5, (2, 24, 9)).double() + torch.eye(24, 9).double() * 8
        power = torch.tensor([draw.randint(low + 4, high - 5) for _ in range(48)]).view(2, 24, 1)
        scaled = torch.ldexp(x, power.int()).to(dtype)
        for match in (
            lambda m: vk.match_tokens(m, 7, backend=backend),
            lambda m: vk.match_neighbors(m, 7, grid=(2, 3, 4), backend=backend),
        ):
            expected, found = match(x.to(dtype)), match(scaled)
            assert all(map(torch.equal, expected, found))


@pytest.mark.sample(12)
@pytest.mark.parametrize("rows", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_come_back_within_the_bound(dtype, rows, backend):
    draw = random.Random(f"{dtype} {rows}")
    for _ in range(1 if backend == "triton" else 10):
        x = drawn_rows(draw, 2, 12, 17, dtype, backend != "triton")
        quantized = vk.quantize_rows(x, rows, backend=backend)
        index = torch.arange(12, dtype=torch.int32).expand(2, -1)
        back = vk.gather_tokens(quantized.rows, index, scale=quantized.scale, backend=backend)
        assert back.dtype == quantized.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert back.isfinite().all()
        x, back, scale = x.double(), back.double(), quantized.scale.double().unsqueeze(2)
        bound = scale / 2 if rows == torch.int8 else torch.maximum(x.abs() / 16, scale / 1024)
        slack = x.abs() * 2**-22 + torch.finfo(quantized.scale.dtype).tiny * 2**-22
        assert ((back - x).abs() <= bound + slack).all()


def test_scale_of_float64(backend):
    """Every way that quantised rows are read: out_dtype, -1, a shared bank, gradients, fakes, compiled."""
    x = torch.randn(1, 6, 5, dtype=torch.float64) * 1e200
    index = torch.tensor([[0, 5, -1, 3], [2, 2, 4, -1]], dtype=torch.int32)
    rows, scale = vk.quantize_rows(x, backend=backend)
    expected = (rows.double() * scale[..., None])[0, index.clamp(min=0).long()].masked_fill(index[..., None] < 0, 0)
    back = vk.gather_tokens(rows, index, scale=scale, backend=backend)
    assert back.dtype == torch.float64 and torch.equal(back, expected)
    small = vk.gather_tokens(rows, index, scale=scale * 1e-200, out_dtype=torch.bfloat16, backend=backend)
    torch.testing.assert_close(small, (expected * 1e-200).bfloat16())
    leaf = scale.clone().requires_grad_()
    vk.gather_tokens(rows, index, scale=leaf, backend=backend).sum().backward()
    count = torch.bincount(index[index >= 0].long(), minlength=6)
    torch.testing.assert_close(leaf.grad, rows.double().sum(2) * count)
    meta = vk.gather_tokens(rows.to("meta"), index.to("meta"), scale=scale.to("meta"))
    assert meta.dtype == torch.float64 and meta.shape == back.shape


def test_quantised_float64_rows_compile():
    def call(x, index):
        rows, scale = vk.quantize_rows(x)
        return vk.gather_tokens(rows, index, scale=scale)

    x, index = torch.randn(1, 4, 8, dtype=torch.float64), torch.tensor([[0, 3, -1]])
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(x, index), call(x, index))
