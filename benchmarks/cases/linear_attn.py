"""Linear attention: all tokens to all, causal by frames, causal by tokens.

The alternatives that hold most or all chunks at once suit a GPU. On a CPU, a Python loop over chunks that stay in the
cache is 1.5 to 5 times as fast, so ours is compared with that loop, at several chunk sizes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidmem_kernels as vk

from ..registry import Benchmark, Unsupported, Work, baseline, benchmark, randn

EPS = 1e-10
QUADRATIC_TOKENS = 4096  # beyond it, all scores at once take gigabytes and seconds


class Linear(Benchmark):
    differentiable = ("q", "k", "v")

    def make(self, s, dtype, device, rng):
        shape = (s["B"], s["L"], s["H"], s["D"])
        return {name: randn(rng, dtype, *shape) for name in "qkv"}

    def options(self, s):
        return {}

    def call(self, x, s, backend):
        return vk.linear_attention(x["q"], x["k"], x["v"], **self.options(s), backend=backend)

    def work(self, s, itemsize):
        tokens = s["B"] * s["L"] * s["H"]
        return Work(4 * tokens * s["D"] * itemsize, 4 * tokens * s["D"] ** 2)

    def work_backward(self, s, itemsize):
        tokens = s["B"] * s["L"] * s["H"]
        return Work(7 * tokens * s["D"] * itemsize, 10 * tokens * s["D"] ** 2)


def _heads(x):
    """q, k and v as (H, L, D), views; all shapes have B = 1."""
    return (x[name].squeeze(0).transpose(0, 1) for name in "qkv")


def _phi(x):
    return F.relu(x.float())


class _Loop:
    """A loop over chunks with a running state, which is updated in place if no gradient is needed.

    Chunks come from `split`, whose gradient is one concatenation; that of every slice would be as long as the sequence.
    """

    def __init__(self, x):
        q, _, v = self.qkv = tuple(_heads(x))
        self.in_place = not torch.is_grad_enabled()
        self.state = q.new_zeros(q.shape[0], q.shape[2], v.shape[2], dtype=torch.float32)
        self.total = torch.zeros_like(self.state[..., :1])
        self.out = torch.empty_like(x["v"])
        self.parts = []

    def split(self, size):
        """Chunks of q, k, v and of the result."""
        return zip(*(t.split(size, dim=1) for t in (*self.qkv, self.out.squeeze(0).transpose(0, 1))), strict=True)

    def add(self, keys, values):
        add = torch.Tensor.baddbmm_ if self.in_place else torch.baddbmm
        self.state = add(self.state, keys.mT, values)
        self.total = self.total + keys.sum(1).unsqueeze(2)

    def write(self, chunk, numerator, denominator):
        if self.in_place:
            torch.div(numerator, denominator.add_(EPS), out=chunk)
        else:
            self.parts.append(numerator / (denominator + EPS))

    def result(self):
        if self.in_place:
            return self.out
        return torch.cat(self.parts, dim=1).transpose(0, 1).unsqueeze(0).to(self.out.dtype)


def _frame_loop(x, frame, size):
    """Adds each frame to the state, then reads it, `size` tokens at a time."""
    loop = _Loop(x)
    for chunk in loop.split(frame):
        q, k, v, out = (t.split(size, dim=1) for t in chunk)
        for keys, values in zip(k, v, strict=True):
            loop.add(_phi(keys), values.float())
        for queries, part in zip(map(_phi, q), out, strict=True):
            loop.write(part, torch.bmm(queries, loop.state), torch.bmm(queries, loop.total))
    return loop.result()


def _token_loop(x, size):
    """Each chunk reads the state of those before it, and itself by masked scores."""
    loop = _Loop(x)
    for queries, keys, values, part in loop.split(size):
        queries, keys, values = _phi(queries), _phi(keys), values.float()
        scores = torch.bmm(queries, keys.mT).tril_()
        numerator = torch.bmm(scores, values).baddbmm_(queries, loop.state)
        loop.write(part, numerator, torch.baddbmm(scores.sum(2, keepdim=True), queries, loop.total))
        loop.add(keys, values)
    return loop.result()


def _quadratic(x, s, block):
    """All scores at once, masked as in softmax attention."""
    if s["L"] > QUADRATIC_TOKENS:
        raise Unsupported(f"holds all scores, {s['L']} x {s['L']}")
    q, k, v = _heads(x)
    block = torch.arange(s["L"], device=q.device) // block
    scores = F.relu(q.float()) @ F.relu(k.float()).mT * (block.unsqueeze(1) >= block)
    out = scores @ v.float() / (scores.sum(2, keepdim=True) + EPS)
    return out.transpose(0, 1).unsqueeze(0).to(x["v"].dtype)


def _chunks(x, s, size):
    """q, k and v as (B, H, chunks, size, D) in float32 after the feature map, padded with zeros."""
    spare = -s["L"] % size
    for name in "qkv":
        t = x[name].transpose(1, 2).float()
        t = t if name == "v" else F.relu(t)
        yield F.pad(t, (0, 0, 0, spare)).unflatten(2, (-1, size))


@benchmark("linear_attention")
class LinearAttention(Linear):
    @baseline("matmul form", compiled=True)
    def matmul(self, x, s):
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        q, k = F.relu(q), F.relu(k)
        total = q @ k.sum(dim=2).unsqueeze(3)
        return ((q @ (k.mT @ v)) / (total + EPS)).transpose(1, 2)

    @baseline("einsum form", compiled=True)
    def einsum(self, x, s):
        q, k, v = F.relu(x["q"]), F.relu(x["k"]), x["v"]
        out = torch.einsum("blhd,bhde->blhe", q, torch.einsum("blhd,blhe->bhde", k, v))
        return out / (torch.einsum("blhd,bhd->blh", q, k.sum(1)).unsqueeze(3) + EPS)

    @baseline("loop over 256 tokens", devices=("cpu",), on_request=("cpu",))
    def loop256(self, x, s):
        return _frame_loop(x, s["L"], 256)

    @baseline("loop over 512 tokens", devices=("cpu",))
    def loop512(self, x, s):
        return _frame_loop(x, s["L"], 512)


@benchmark("linear_attention_frames", covers="linear_attention")
class LinearAttentionFrames(Linear):
    by_frame = True

    def options(self, s):
        return {"causal": True, "block_size": s["frame"]}

    @baseline("chunked matmul, cumsum", compiled=True, on_request=("cpu",))
    def chunked(self, x, s):
        q, k, v = _chunks(x, s, s["frame"])
        state = (k.mT @ v).cumsum(dim=2)
        total = q @ k.sum(dim=3).cumsum(dim=2).unsqueeze(4)
        out = (q @ state / (total + EPS)).flatten(2, 3)[:, :, : s["L"]]
        return out.transpose(1, 2).to(x["v"].dtype)

    @baseline("loop over 256 tokens", devices=("cpu",), on_request=("cpu",))
    def loop256(self, x, s):
        return _frame_loop(x, s["frame"], 256)

    @baseline("loop over 512 tokens", devices=("cpu",))
    def loop512(self, x, s):
        return _frame_loop(x, s["frame"], 512)

    @baseline("loop over frames", on_request=("cpu",))
    def loop(self, x, s):
        return _frame_loop(x, s["frame"], s["frame"])


@benchmark("linear_attention_causal", covers="linear_attention")
class LinearAttentionCausal(Linear):
    def options(self, s):
        return {"causal": True}

    def _cumsum(self, x, s, size):
        q, k, v = _chunks(x, s, size)
        state, total = k.mT @ v, k.sum(dim=3)
        before, total = state.cumsum(dim=2) - state, total.cumsum(dim=2) - total
        scores = (q @ k.mT).tril()
        out = q @ before + scores @ v
        total = q @ total.unsqueeze(4) + scores.sum(dim=4, keepdim=True)
        return (out / (total + EPS)).flatten(2, 3)[:, :, : s["L"]].transpose(1, 2).to(x["v"].dtype)

    @baseline("chunks of 64, cumsum", compiled=True, on_request=("cpu",))
    def cumsum64(self, x, s):
        return self._cumsum(x, s, 64)

    @baseline("chunks of 128, cumsum", on_request=("cpu",))
    def cumsum128(self, x, s):
        return self._cumsum(x, s, 128)

    @baseline("loop over 64 tokens", devices=("cpu",))
    def loop64(self, x, s):
        return _token_loop(x, 64)

    @baseline("loop over 128 tokens", devices=("cpu",))
    def loop128(self, x, s):
        return _token_loop(x, 128)

    @baseline("loop over 256 tokens", on_request=("cpu",))
    def loop256(self, x, s):
        return _token_loop(x, 256)

    @baseline("all scores at once")
    def quadratic(self, x, s):
        return _quadratic(x, s, 1)

    @baseline("fla chunk_linear_attn", devices=("cuda",), needs="fla")
    def fla_chunk(self, x, s):
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(F.relu(x["q"]), F.relu(x["k"]), x["v"], scale=1.0, normalize=True)[0]

    @baseline("fla fused_chunk_linear_attn", devices=("cuda",), needs="fla")
    def fla_fused(self, x, s):
        from fla.ops.linear_attn import fused_chunk_linear_attn

        return fused_chunk_linear_attn(F.relu(x["q"]), F.relu(x["k"]), x["v"], scale=1.0, normalize=True)[0]
