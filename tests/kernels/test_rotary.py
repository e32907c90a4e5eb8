"""Rotary embedding against a rotation written out, and against what diffusers' Wan and HunyuanVideo do."""

import math
import random

import pytest
import torch
from bank_helpers import ids, refuses
from torch._dynamo.testing import CompileCounterWithBackend

from vidmem_kernels import Rotary, apply_rotary, rotary

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def by_loops(x, positions, axes, theta):
    """Every pair turned by its angle, in Python's floats; x (B, L, H, D), positions (B, L, A)."""
    out = torch.empty_like(x, dtype=torch.float64)
    for b, row in enumerate(positions.tolist()):
        for n, place in enumerate(row):
            angles = [p * theta ** (-i / d) for p, d in zip(place, axes, strict=True) for i in range(0, d, 2)]
            for i, angle in enumerate(angles):
                even, odd = x[b, n, :, 2 * i].double(), x[b, n, :, 2 * i + 1].double()
                out[b, n, :, 2 * i] = even * math.cos(angle) - odd * math.sin(angle)
                out[b, n, :, 2 * i + 1] = even * math.sin(angle) + odd * math.cos(angle)
    return out


def drawn(seed, dtype=torch.float32):
    """(x, positions (B, L, A), axes, theta): negative, fractional and far positions."""
    draw = random.Random(seed)
    axes = (2 * draw.randint(1, 4), *(2 * draw.randint(0, 4) for _ in range(draw.randint(0, 3))))
    batch, length, heads = draw.randint(1, 3), draw.randint(1, 9), draw.randint(1, 3)
    positions = (torch.randn(batch, length, len(axes), dtype=torch.float64) * draw.choice([1, 30, 5000])).float()
    if draw.random() < 0.5:
        positions = positions.round()
    x = torch.randn(batch, length, heads, sum(axes)).to(dtype)
    return x, positions, axes, draw.choice([10000.0, 256, 7.5])


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_turns_every_pair(dtype, device):
    for seed in range(12):
        x, positions, axes, theta = drawn(seed, dtype)
        wanted = by_loops(x, positions, axes, theta)
        got = apply_rotary(x.to(device), rotary(positions.to(device), axes, theta))
        assert got.dtype == dtype and got.shape == x.shape and got.is_contiguous()
        # Cosines and sines are float32; of half precision the result is rounded once more.
        unit = 4 * torch.finfo(torch.float32).eps + (torch.finfo(dtype).eps if dtype in DTYPES[1:3] else 0)
        bound = unit * torch.linalg.vector_norm(x.double(), ord=torch.inf, dim=-1, keepdim=True)
        assert ((got.cpu().double() - wanted).abs() <= bound).all()


def test_batches_and_dtypes_of_positions(device):
    x, positions, axes, theta = torch.randn(3, 5, 2, 8, device=device), torch.arange(15, device=device), (6, 2), 100
    positions = torch.stack([positions, positions.flip(0)], -1).view(3, 5, 2)
    whole = apply_rotary(x, rotary(positions, axes, theta))
    for b in range(3):
        one = positions[b]
        for kind in (torch.int32, torch.int16, torch.uint8, torch.float64, torch.float16):
            alone = apply_rotary(x[b : b + 1], rotary(one.to(kind), axes, theta))
            assert torch.equal(alone[0], whole[b])
        shared = apply_rotary(x, rotary(one.unsqueeze(0), axes, theta))  # batch of 1
        assert torch.equal(shared, apply_rotary(x, rotary(one, axes, theta)))  # none
        assert torch.equal(shared[b], whole[b])
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(apply_rotary(strided, rotary(positions, axes, theta)), whole)


def test_empty(device):
    for batch, length, heads, axes in ((0, 3, 2, (4,)), (2, 0, 2, (4, 2)), (2, 3, 0, (2,)), (2, 3, 2, (0, 0))):
        x = torch.randn(batch, length, heads, sum(axes), device=device, requires_grad=True)
        out = apply_rotary(x, rotary(torch.randn(length, len(axes), device=device), axes))
        assert out.shape == x.shape
        out.sum().backward()
        assert x.grad.shape == x.shape


def test_frames_may_stand_anywhere():
    """Scores depend on differences of positions alone: a memory is moved by turning its keys once more."""
    axes = (8, 4, 4)
    q, k = torch.randn(1, 6, 2, 16, dtype=torch.float64), torch.randn(1, 6, 2, 16, dtype=torch.float64)
    place = torch.rand(6, 3, dtype=torch.float64) * 40
    for shift in (-1000.0, 0.25, 1e5):
        moved = place + torch.tensor([shift, 0, 0])
        one, two = (
            torch.einsum("blhd,bmhd->bhlm", apply_rotary(q, rotary(p, axes)), apply_rotary(k, rotary(p, axes)))
            for p in (place, moved)
        )
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
    again = apply_rotary(apply_rotary(k, rotary(place, axes)), rotary(torch.tensor([[-3.0, 0, 0]]).expand(6, 3), axes))
    back = apply_rotary(k, rotary(place - torch.tensor([3.0, 0, 0]), axes))
    torch.testing.assert_close(again, back, rtol=0, atol=1e-6)


def test_gradients():
    for seed in range(3):
        x, positions, axes, theta = drawn(seed, torch.float64)
        x.requires_grad_()
        table = rotary(positions, axes, theta)
        assert torch.autograd.gradcheck(lambda x, t=table: apply_rotary(x, t), x)
        assert torch.autograd.gradgradcheck(lambda x, t=table: apply_rotary(x, t), x)
        out = apply_rotary(x, table)
        weight = torch.randn_like(out)
        (grad,) = torch.autograd.grad(out, x, weight)
        back = apply_rotary(weight, Rotary(table.cos, -table.sin))  # the gradient is turned back
        torch.testing.assert_close(grad, back, rtol=0, atol=1e-15)
        wide = [t.double().requires_grad_() for t in table]
        assert torch.autograd.gradcheck(lambda c, s, x=x: apply_rotary(x.detach(), Rotary(c, s)), wide)
    positions = torch.randn(2, 3, 2, requires_grad=True)
    cos, sin = rotary(positions, (4, 2))
    (grad,) = torch.autograd.grad((cos + 2 * sin).sum(), positions)
    assert grad.shape == positions.shape and grad.abs().sum() > 0


def test_one_graph_for_all_sizes():
    counter, first = CompileCounterWithBackend("aot_eager"), 0
    torch._dynamo.reset()

    def call(x, positions):
        return apply_rotary(x, rotary(positions, (4, 2, 2), 256.0))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for batch, length, heads in ((2, 6, 5), (3, 5, 2), (4, 9, 7)):  # none of them the number of axes
        found = [torch.randn(batch, length, heads, 8).requires_grad_() for _ in range(2)]
        found[1].data.copy_(found[0].data)
        positions = torch.randn(batch, length, 3) * 50
        outs = compiled(found[0], positions), call(found[1], positions)
        torch.testing.assert_close(*outs, rtol=0, atol=0)
        grads = [torch.autograd.grad(out.square().sum() + out.sum(), x)[0] for out, x in zip(outs, found, strict=True)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
        first = first or counter.frame_count
    assert counter.frame_count == first


def test_transforms():
    x, table = torch.randn(4, 2, 5, 3, 6), rotary(torch.randn(5, 1), (6,))
    mapped = torch.vmap(lambda x: apply_rotary(x, table))(x)
    assert torch.equal(mapped, torch.stack([apply_rotary(each, table) for each in x]))
    out, tangent = torch.func.jvp(lambda x: apply_rotary(x, table), (x[0],), (x[1],))
    assert torch.equal(tangent, apply_rotary(x[1], table)) and torch.equal(out, apply_rotary(x[0], table))


def test_refuses():
    at, x = torch.zeros(5, 2), torch.zeros(2, 5, 3, 8)
    refuses(TypeError, "rotary: positions must be a tensor, got list", rotary, [0], (4, 4))
    refuses(ValueError, "rotary: positions must have shape (N, A), got (5,)", rotary, at[:, 0], (4, 4))
    refuses(TypeError, "rotary: axes must be a non-empty sequence of channel counts, got 8", rotary, at, 8)
    refuses(TypeError, "rotary: axes must be a non-empty sequence of channel counts, got ()", rotary, at, ())
    refuses(TypeError, "rotary: axes[1] must be an int, got float", rotary, at, (4, 4.0))
    refuses(ValueError, "rotary: axes[0] must be at least 0, got -2", rotary, at, (-2, 4))
    refuses(ValueError, "rotary: axes must be even, got (4, 3)", rotary, at, (4, 3))
    message = "rotary: positions must have a column for each of the axes, got 2 and 3"
    refuses(ValueError, message, rotary, at, (4, 2, 2))
    refuses(TypeError, "rotary: theta must be a number, got str", rotary, at, (4, 4), "1")
    refuses(ValueError, "rotary: theta must be positive, got 0", rotary, at, (4, 4), 0)
    refuses(ValueError, "rotary: theta must be finite, got inf", rotary, at, (4, 4), math.inf)
    table = rotary(at, (4, 4))
    refuses(TypeError, "apply_rotary: rotary must be a Rotary (cos, sin), got Tensor", apply_rotary, x, table.cos)
    refuses(ValueError, "apply_rotary: x must have shape (B, L, H, D), got (5, 3, 8)", apply_rotary, x[0], table)
    refuses(ValueError, "apply_rotary: x must have an even D, got 7", apply_rotary, x[..., :7], table)
    message = "apply_rotary: x and rotary.cos must have the same L and D / 2, got (5, 3) and (5, 4)"
    refuses(ValueError, message, apply_rotary, x[..., :6], table)
    message = "apply_rotary: x and rotary.cos must have the same L and D / 2, got (4, 4) and (5, 4)"
    refuses(ValueError, message, apply_rotary, x[:, :4], table)
    three = Rotary(*(t.expand(3, 5, 4) for t in table))
    refuses(ValueError, "apply_rotary: x and rotary.cos must have the same B, got 2 and 3", apply_rotary, x, three)
    half = Rotary(table.cos, table.sin.half())
    refuses(TypeError, "apply_rotary: rotary.sin must be float32 or float64, got float16", apply_rotary, x, half)
    refuses(
        TypeError,
        "apply_rotary: x must be float32, bfloat16, float16 or float64, got int64",
        apply_rotary,
        x.long(),
        table,
    )


# --- diffusers ---


def grid_positions(frames, height, width):
    axes = [torch.arange(n) for n in (frames, height, width)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)


def grids(seed, count=4):
    draw = random.Random(seed)
    return [tuple(draw.randint(1, 7) for _ in range(3)) for _ in range(count)]


@pytest.mark.parametrize("head", [128, 40, 12])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=ids)
def test_as_wan_in_diffusers(head, dtype):
    wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    attention = wan.WanAttention(dim=2 * head, heads=2, dim_head=head, processor=wan.WanAttnProcessor())
    seen = {}

    def spy(q, k, v, **options):
        seen.update(q=q)
        return q

    side = 2 * (head // 6)
    axes = (head - 2 * side, side, side)
    embed = wan.WanRotaryPosEmbed(head, (1, 2, 2), 1024)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(wan, "dispatch_attention_fn", spy)
        attention = attention.to(dtype)
        for grid in grids(head):
            t, h, w = grid
            tables = embed(torch.empty(1, 1, t, 2 * h, 2 * w))
            ours = rotary(grid_positions(*grid), axes)
            for mine, theirs in zip(ours, tables, strict=True):
                assert torch.equal(mine.repeat_interleave(2, -1), theirs[0, :, 0])
            x = torch.randn(2, t * h * w, 2 * head).to(dtype)
            attention(x, rotary_emb=tables)
            q = attention.norm_q(attention.to_q(x)).unflatten(2, (2, -1))
            assert torch.equal(apply_rotary(q, ours), seen["q"])


@pytest.mark.parametrize("axes", [(16, 56, 56), (4, 6, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=ids)
def test_as_hunyuan_in_diffusers(axes, dtype):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    hunyuan = pytest.importorskip("diffusers.models.transformers.transformer_hunyuan_video")
    embed = hunyuan.HunyuanVideoRotaryPosEmbed(2, 1, list(axes), 256.0)
    for grid in grids(sum(axes)):
        t, h, w = grid
        tables = embed(torch.empty(1, 1, t, 2 * h, 2 * w))
        ours = rotary(grid_positions(*grid), axes, 256.0)
        for mine, theirs in zip(ours, tables, strict=True):
            # Theirs computes angles of up to 7 in float32.
            torch.testing.assert_close(mine.repeat_interleave(2, -1), theirs, rtol=0, atol=2e-6)
        x = torch.randn(2, t * h * w, 3, sum(axes)).to(dtype)
        exact = embeddings.apply_rotary_emb(x, tuple(m.repeat_interleave(2, -1) for m in ours), sequence_dim=1)
        assert torch.equal(apply_rotary(x, ours), exact)
        torch.testing.assert_close(apply_rotary(x, ours), embeddings.apply_rotary_emb(x, tables, sequence_dim=1))
