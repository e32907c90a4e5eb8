"""Linear attention: of all tokens to all, causal by frames, causal by tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import vidmem_kernels as vk

from ..registry import Benchmark, Work, baseline, benchmark, randn


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


@benchmark("linear_attention", covers="linear_attention")
class LinearAttention(Linear):
    @baseline("matmul form", compiled=True)
    def matmul(self, x, s):
        q, k, v = (x[name].transpose(1, 2) for name in "qkv")
        q, k = F.relu(q), F.relu(k)
        total = q @ k.sum(dim=2).unsqueeze(3)
        return ((q @ (k.mT @ v)) / (total + 1e-10)).transpose(1, 2)

    @baseline("einsum form")
    def einsum(self, x, s):
        q, k, v = F.relu(x["q"]), F.relu(x["k"]), x["v"]
        out = torch.einsum("blhd,bhde->blhe", q, torch.einsum("blhd,blhe->bhde", k, v))
        return out / (torch.einsum("blhd,bhd->blh", q, k.sum(1)).unsqueeze(3) + 1e-10)


def _chunks(x, s, size):
    """q, k and v as (B, H, chunks, size, D) in float32 after the feature map, padded with zeros."""
    spare = -s["L"] % size
    for name in "qkv":
        t = x[name].transpose(1, 2).float()
        t = t if name == "v" else F.relu(t)
        yield F.pad(t, (0, 0, 0, spare)).unflatten(2, (-1, size))


@benchmark("linear_attention_frames", covers="linear_attention")
class LinearAttentionFrames(Linear):
    def options(self, s):
        return {"causal": True, "block_size": s["frame"]}

    @baseline("chunked matmul, cumsum", compiled=True)
    def chunked(self, x, s):
        q, k, v = _chunks(x, s, s["frame"])
        state = (k.mT @ v).cumsum(dim=2)
        total = q @ k.sum(dim=3).cumsum(dim=2).unsqueeze(4)
        out = (q @ state / (total + 1e-10)).flatten(2, 3)[:, :, : s["L"]]
        return out.transpose(1, 2).to(x["v"].dtype)


@benchmark("linear_attention_causal", covers="linear_attention")
class LinearAttentionCausal(Linear):
    def options(self, s):
        return {"causal": True}

    @baseline("chunked matmul, cumsum", compiled=True)
    def chunked(self, x, s):
        q, k, v = _chunks(x, s, 64)
        state, total = k.mT @ v, k.sum(dim=3)
        before, total = state.cumsum(dim=2) - state, total.cumsum(dim=2) - total
        scores = (q @ k.mT).tril()
        out = q @ before + scores @ v
        total = q @ total.unsqueeze(4) + scores.sum(dim=4, keepdim=True)
        return (out / (total + 1e-10)).flatten(2, 3)[:, :, : s["L"]].transpose(1, 2).to(x["v"].dtype)

    @baseline("fla fused_chunk_linear_attn", devices=("cuda",), needs="fla")
    def fla(self, x, s):
        from fla.ops.linear_attn import fused_chunk_linear_attn

        return fused_chunk_linear_attn(F.relu(x["q"]), F.relu(x["k"]), x["v"], scale=1.0, normalize=True)[0]
