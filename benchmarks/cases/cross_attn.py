"""Softmax attention of a clip or a frame to a memory: dense, with a bias a key, to chosen blocks."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vidmem_kernels as vk

from ..registry import Benchmark, Work, baseline, benchmark, randn


def _heads_first(x):
    return (x[name].transpose(1, 2) for name in "qkv")


@cache
def _flex():
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: where Dynamo gives up it must not fall back to the eager form, which holds all scores.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


class Cross(Benchmark):
    differentiable = ("q", "k", "v")

    def make(self, s, dtype, device, rng):
        lengths = {"q": s["Lq"], "k": s["Lk"], "v": s["Lk"]}
        return {name: randn(rng, dtype, s["B"], length, s["H"], s["D"]) for name, length in lengths.items()}

    def share(self, s):
        """Part of the keys that a query sees."""
        return 1.0

    def call(self, x, s, backend):
        return vk.cross_attention(x["q"], x["k"], x["v"], backend=backend)

    def work(self, s, itemsize):
        rows = s["B"] * s["H"] * s["D"]
        return Work(2 * (s["Lq"] + s["Lk"]) * rows * itemsize, 4 * s["Lq"] * s["Lk"] * rows * self.share(s))

    def work_backward(self, s, itemsize):
        # Reads q, k, v, out and its gradient, writes three gradients; five products where forward has two.
        rows = s["B"] * s["H"] * s["D"]
        return Work(4 * (s["Lq"] + s["Lk"]) * rows * itemsize, 10 * s["Lq"] * s["Lk"] * rows * self.share(s))


@benchmark("cross_attention", covers="cross_attention")
class CrossAttention(Cross):
    @baseline("SDPA")
    def sdpa(self, x, s):
        return F.scaled_dot_product_attention(*_heads_first(x)).transpose(1, 2)

    @baseline("SDPA, cuDNN", devices=("cuda",))
    def cudnn(self, x, s):
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return self.sdpa(x, s)

    @baseline("SDPA, flash", devices=("cuda",))
    def flash(self, x, s):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.sdpa(x, s)


@benchmark("cross_attention_bias", covers="cross_attention")
class CrossAttentionBias(Cross):
    differentiable = ("q", "k", "v", "key_bias")

    def make(self, s, dtype, device, rng):
        size = torch.randint(1, 33, (s["B"], s["Lk"]), generator=rng, device=device)
        return {**super().make(s, dtype, device, rng), "key_bias": size.float().log().to(dtype)}

    def call(self, x, s, backend):
        return vk.cross_attention(x["q"], x["k"], x["v"], key_bias=x["key_bias"], backend=backend)

    @baseline("SDPA, expanded mask")
    def sdpa(self, x, s):
        mask = x["key_bias"][:, None, None].expand(s["B"], s["H"], s["Lq"], s["Lk"])
        return F.scaled_dot_product_attention(*_heads_first(x), attn_mask=mask).transpose(1, 2)

    @baseline("SDPA, bias as 8 more channels")
    def channels(self, x, s):
        """The bias becomes one channel of the keys that meets a one in the queries; 8, since flash wants multiples."""
        q, k, v = _heads_first(x)
        bias = (x["key_bias"] * s["D"] ** 0.5)[:, None, :, None].expand(-1, s["H"], -1, -1)
        q = F.pad(F.pad(q, (0, 1), value=1.0), (0, 7))
        k = torch.cat([k, F.pad(bias, (0, 7))], dim=3)
        out = F.scaled_dot_product_attention(q, k, F.pad(v, (0, 8)), scale=s["D"] ** -0.5)
        return out[..., : s["D"]].transpose(1, 2)

    @baseline("FlexAttention", devices=("cuda",))
    def flex(self, x, s):
        bias = x["key_bias"]

        def score_mod(score, b, h, i, j):
            return score + bias[b, j]

        return _flex()(*_heads_first(x), score_mod=score_mod).transpose(1, 2)


@benchmark("cross_attention_blocks", covers="cross_attention")
class CrossAttentionBlocks(Cross):
    def make(self, s, dtype, device, rng):
        blocks = [-(-s[n] // b) for n, b in zip(("Lq", "Lk"), s["block"], strict=True)]
        order = torch.rand(s["B"], 1, *blocks, generator=rng, device=device).argsort(dim=3)
        index = order[..., : s["topk"]].int()
        table = torch.zeros(s["B"], 1, *blocks, dtype=torch.bool, device=device).scatter_(3, index.long(), True)
        mask = table.repeat_interleave(s["block"][0], 2)[:, :, : s["Lq"]]
        mask = mask.repeat_interleave(s["block"][1], 3)[..., : s["Lk"]]
        x = {**super().make(s, dtype, device, rng), "index": index, "mask": mask}
        if torch.device(device).type == "cuda":
            x["block_mask"] = _block_mask(table, s)
        return x

    def share(self, s):
        return s["topk"] / -(-s["Lk"] // s["block"][1])

    def call(self, x, s, backend):
        return vk.cross_attention(
            x["q"], x["k"], x["v"], block_index=x["index"], block_size=s["block"], backend=backend
        )

    @baseline("SDPA, boolean mask")
    def sdpa(self, x, s):
        return F.scaled_dot_product_attention(*_heads_first(x), attn_mask=x["mask"]).transpose(1, 2)

    @baseline("FlexAttention, BlockMask", devices=("cuda",))
    def flex(self, x, s):
        return _flex()(*_heads_first(x), block_mask=x["block_mask"]).transpose(1, 2)


def _block_mask(table, s):
    from torch.nn.attention.flex_attention import BlockMask

    block_q, block_k = s["block"]

    def visible(b, h, i, j):
        return table[b, 0, i // block_q, j // block_k]

    # All blocks are full ones, to which the kernel does not apply `visible`.
    count = table.sum(dim=3, dtype=torch.int32)
    order = table.int().argsort(dim=3, descending=True, stable=True).int()
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        order,
        count,
        order,
        BLOCK_SIZE=s["block"],
        mask_mod=visible,
        seq_lengths=(s["Lq"], s["Lk"]),
    )
