"""Softmax attention to a memory: dense, with a bias per key, in a time window, to chosen blocks; merging of states."""

from __future__ import annotations

import importlib
from functools import cache

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import vidmem_kernels as vk

from ..registry import Benchmark, Unsupported, Work, baseline, benchmark, randn

CHUNK = 256  # queries whose scores the chunked form holds


def _heads_first(x):
    return tuple(x[name].transpose(1, 2) for name in "qkv")


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    # fullgraph: Dynamo must not fall back to the eager form, which holds all scores.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(x, **options):
    if x["q"].device.type == "cpu" and torch.is_grad_enabled():
        raise Unsupported("FlexAttention has no gradient on the CPU")
    return _compiled_flex()(*_heads_first(x), **options).transpose(1, 2)


def _chunked(x, bias=None):
    """Computes scores of CHUNK queries at a time; `bias`, broadcast over queries, is added to them."""
    q, k, v = _heads_first(x)
    parts = []
    for queries in (q * q.shape[3] ** -0.5).split(CHUNK, dim=2):
        scores = queries @ k.mT
        parts.append(torch.softmax(scores if bias is None else scores + bias, dim=3) @ v)
    return torch.cat(parts, dim=2).transpose(1, 2)


def _flash(module, q, k, v, **options):
    """flash_attn_func of a package, for (B, L, H, D) tensors."""
    if q.dtype == torch.float32:
        raise Unsupported("does not support float32")
    if module == "fa3_fwd_interface" and torch.is_grad_enabled():
        raise Unsupported("has no backward")
    out = importlib.import_module(module).flash_attn_func(q, k, v, **options)
    return out[0] if isinstance(out, tuple) else out


def _with_bias(x, s):
    """q and k as (B, L, H, D + 8): the bias is a key channel that is multiplied by a one in the queries.

    There are 8 channels because flash needs multiples of 8.
    """
    bias = (x["key_bias"] * s["D"] ** 0.5)[:, :, None, None].expand(-1, -1, s["H"], -1)
    q = F.pad(F.pad(x["q"], (0, 1), value=1.0), (0, 7))
    return q, torch.cat([x["k"], F.pad(bias, (0, 7))], dim=3)


class Cross(Benchmark):
    differentiable = ("q", "k", "v")

    def make(self, s, dtype, device, rng):
        lengths = {"q": s["Lq"], "k": s["Lk"], "v": s["Lk"]}
        return {name: randn(rng, dtype, s["B"], length, s["H"], s["D"]) for name, length in lengths.items()}

    def share(self, s):
        """Share of the keys that a query sees."""
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


@benchmark("cross_attention")
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

    @baseline("flash-attn", devices=("cuda",), needs="flash_attn.flash_attn_interface")
    def flash_attn(self, x, s):
        return _flash("flash_attn", x["q"], x["k"], x["v"])

    @baseline("FlashAttention-3", devices=("cuda",), needs="flash_attn_interface")
    def flash_attn_3(self, x, s):
        return _flash("flash_attn_interface", x["q"], x["k"], x["v"])

    @baseline("fa3-fwd", devices=("cuda",), needs="fa3_fwd_interface")
    def fa3_fwd(self, x, s):
        return _flash("fa3_fwd_interface", x["q"], x["k"], x["v"])

    @baseline("FlashAttention-4", devices=("cuda",), needs="flash_attn.cute")
    def flash_attn_4(self, x, s):
        return _flash("flash_attn.cute", x["q"], x["k"], x["v"])

    @baseline("chunked", devices=("cpu",), on_request=("cpu",))
    def chunked(self, x, s):
        return _chunked(x)


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
        q, k = (t.transpose(1, 2) for t in _with_bias(x, s))
        v = F.pad(x["v"].transpose(1, 2), (0, 8))
        return F.scaled_dot_product_attention(q, k, v, scale=s["D"] ** -0.5)[..., : s["D"]].transpose(1, 2)

    @baseline("fa3-fwd, bias as 8 more channels", devices=("cuda",), needs="fa3_fwd_interface")
    def fa3_channels(self, x, s):
        return _flash("fa3_fwd_interface", *_with_bias(x, s), x["v"], softmax_scale=s["D"] ** -0.5)

    @baseline("FlashAttention-4, bias as 8 more channels", devices=("cuda",), needs="flash_attn.cute")
    def fa4_channels(self, x, s):
        return _flash("flash_attn.cute", *_with_bias(x, s), x["v"], softmax_scale=s["D"] ** -0.5)

    @baseline("chunked", devices=("cpu",))
    def chunked(self, x, s):
        return _chunked(x, x["key_bias"][:, None, None])

    @baseline("FlexAttention", on_request=("cpu", "cuda"))
    def flex(self, x, s):
        bias = x["key_bias"]

        def score_mod(score, b, h, i, j):
            return score + bias[b, j]

        return _flex(x, score_mod=score_mod)


@benchmark("cross_attention_window", covers="cross_attention")
class CrossAttentionWindow(Cross):
    """Each frame of queries sees as many frames of keys: its own, which is the last, and those before."""

    def make(self, s, dtype, device, rng):
        # The first frame of queries is the first with a whole window before it.
        k_time = torch.arange(s["Lk"], device=device) * s["frames"] // s["Lk"]
        count = s["frames"] - s["window"] + 1
        q_time = torch.arange(s["Lq"], device=device) * count // s["Lq"] + s["window"] - 1
        x = {**super().make(s, dtype, device, rng), "q_time": q_time, "k_time": k_time}
        x["mask"] = (k_time <= q_time[:, None]) & (k_time > q_time[:, None] - s["window"])
        x["block_mask"] = _window_mask(q_time, k_time, s)
        # Queries of a frame and the keys that they see, as slices.
        x["slices"] = []
        for frame in range(s["window"] - 1, s["frames"]):
            rows = [(q_time == frame).nonzero(), ((k_time <= frame) & (k_time > frame - s["window"])).nonzero()]
            x["slices"].append([slice(r[0].item(), r[-1].item() + 1) for r in rows])
        return x

    def share(self, s):
        return s["window"] / s["frames"]

    def call(self, x, s, backend):
        window = (s["window"] - 1, 0)
        return vk.cross_attention(
            x["q"], x["k"], x["v"], q_time=x["q_time"], k_time=x["k_time"], window=window, backend=backend
        )

    @baseline("SDPA, boolean mask")
    def sdpa(self, x, s):
        return F.scaled_dot_product_attention(*_heads_first(x), attn_mask=x["mask"]).transpose(1, 2)

    def by_frame(self, x, attention):
        """Without a mask: only where queries and keys lie in the order of time."""
        queries = x["q"].split([rows.stop - rows.start for rows, _ in x["slices"]], dim=1)
        parts = [
            attention(part, x["k"][:, seen], x["v"][:, seen])
            for part, (_, seen) in zip(queries, x["slices"], strict=True)
        ]
        return torch.cat(parts, dim=1)

    @baseline("SDPA of each frame")
    def frames(self, x, s):
        def sdpa(*qkv):
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in qkv)).transpose(1, 2)

        return self.by_frame(x, sdpa)

    @baseline("fa3-fwd of each frame", devices=("cuda",), needs="fa3_fwd_interface")
    def fa3_frames(self, x, s):
        return self.by_frame(x, lambda *qkv: _flash("fa3_fwd_interface", *qkv))

    @baseline("FlashAttention-4 of each frame", devices=("cuda",), needs="flash_attn.cute")
    def fa4_frames(self, x, s):
        return self.by_frame(x, lambda *qkv: _flash("flash_attn.cute", *qkv))

    @baseline("FlexAttention, BlockMask", on_request=("cpu", "cuda"))
    def flex(self, x, s):
        return _flex(x, block_mask=x["block_mask"])


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
        # Rows of keys that each block of queries sees; all shapes have B = 1.
        keys = index.long()[0, 0].unsqueeze(2) * s["block"][1] + torch.arange(s["block"][1], device=device)
        x["rows"] = [rows[rows < s["Lk"]] for rows in keys.flatten(1)]
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

    @baseline("SDPA of gathered keys")
    def gathered(self, x, s):
        q, k, v = _heads_first(x)
        parts = [
            F.scaled_dot_product_attention(part, k.index_select(2, rows), v.index_select(2, rows))
            for part, rows in zip(q.split(s["block"][0], dim=2), x["rows"], strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    @baseline("FlexAttention, BlockMask", on_request=("cpu", "cuda"))
    def flex(self, x, s):
        return _flex(x, block_mask=x["block_mask"])


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
        order.clone(),  # the generated C++ does not compile with one tensor in two places
        count,
        order,
        BLOCK_SIZE=s["block"],
        mask_mod=visible,
        seq_lengths=(s["Lq"], s["Lk"]),
    )


def _window_mask(q_time, k_time, s):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(b, h, i, j):
        return (k_time[j] <= q_time[i]) & (k_time[j] > q_time[i] - s["window"])

    return create_block_mask(visible, None, None, s["Lq"], s["Lk"], device=q_time.device)


@benchmark("merge_attention_states")
class MergeAttentionStates(Benchmark):
    """Merges two sources of keys: the memory and the current clip."""

    differentiable = ("out0", "out1", "lse0", "lse1")

    def make(self, s, dtype, device, rng):
        outs = {f"out{i}": randn(rng, dtype, s["B"], s["L"], s["H"], s["D"]) for i in range(2)}
        return outs | {f"lse{i}": randn(rng, torch.float32, s["B"], s["H"], s["L"]) for i in range(2)}

    def call(self, x, s, backend):
        return vk.merge_attention_states([x["out0"], x["out1"]], [x["lse0"], x["lse1"]], backend=backend)

    def work(self, s, itemsize):
        # Two sources read, one written; a multiplication and an addition for every value read.
        rows = s["B"] * s["L"] * s["H"]
        return Work(3 * rows * (s["D"] * itemsize + 4), 4 * rows * s["D"])

    def work_backward(self, s, itemsize):
        # Reads the sources and the gradient, writes two gradients; two products for each source.
        rows = s["B"] * s["L"] * s["H"]
        return Work(rows * (5 * s["D"] * itemsize + 4 * 4), 8 * rows * s["D"])

    @baseline("logsumexp form", compiled=True)
    def logsumexp(self, x, s):
        lses = [x["lse0"], x["lse1"]]
        lse = torch.stack(lses).logsumexp(0)
        weights = [(part - lse).exp().transpose(1, 2).unsqueeze(3) for part in lses]
        return (weights[0] * x["out0"] + weights[1] * x["out1"]).to(x["out0"].dtype), lse

    @baseline("sigmoid and lerp", compiled=True)
    def lerp(self, x, s):
        """Of two sources one weight is enough."""
        weight = torch.sigmoid(x["lse1"] - x["lse0"]).transpose(1, 2).unsqueeze(3)
        out = torch.lerp(x["out0"], x["out1"], weight.to(x["out0"].dtype))
        return out, torch.logaddexp(x["lse0"], x["lse1"])
