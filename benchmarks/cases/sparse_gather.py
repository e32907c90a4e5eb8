"""Gathering, scattering, quantising and selecting tokens of a memory."""

from __future__ import annotations

import torch

import vidmem_kernels as vk

from ..registry import Benchmark, Work, baseline, benchmark, randint, randn


@benchmark("gather_tokens")
class GatherTokens(Benchmark):
    differentiable = ("bank",)

    def make(self, s, dtype, device, rng):
        index = randint(rng, s["M"], 1, s["K"])
        return {"bank": randn(rng, dtype, 1, s["M"], s["C"]), "index": index, "index64": index.long()}

    def call(self, x, s, backend):
        return vk.gather_tokens(x["bank"], x["index"], backend=backend)

    def work(self, s, itemsize):
        return Work(2 * s["K"] * s["C"] * itemsize + 4 * s["K"])

    def work_backward(self, s, itemsize):
        return Work((s["K"] + s["M"]) * s["C"] * itemsize + 4 * s["K"])

    @baseline("index_select")
    def index_select(self, x, s):
        return x["bank"][0].index_select(0, x["index64"][0]).unsqueeze(0)

    @baseline("gather, expanded index")
    def gather(self, x, s):
        return x["bank"].gather(1, x["index64"].unsqueeze(2).expand(-1, -1, s["C"]))


@benchmark("gather_tokens_pinned", covers="gather_tokens")
class GatherTokensPinned(Benchmark):
    """A bank in host memory, pinned for a GPU; on the CPU the same as any other."""

    def make(self, s, dtype, device, rng):
        index = randint(rng, s["M"], 1, s["K"])
        bank = randn(rng, dtype, 1, s["M"], s["C"]).cpu()
        bank = bank.pin_memory() if index.is_cuda else bank
        return {"bank": bank, "index": index, "index64": index.long(), "on_host": index.long().cpu()}

    def call(self, x, s, backend):
        bank = x["bank"].to(x["index"].device) if backend == "reference" else x["bank"]
        return vk.gather_tokens(bank, x["index"], backend=backend)

    def work(self, s, itemsize):
        size = s["K"] * s["C"] * itemsize
        return Work(2 * size, host_bytes=size)

    @baseline("index_select on the host, copy")
    def index_select(self, x, s):
        """Not pinned: torch would pin a new result by every call, which takes longer than to copy without."""
        return x["bank"][0].index_select(0, x["on_host"][0]).to(x["index"].device).unsqueeze(0)

    @baseline("index_select into pinned memory, copy", devices=("cuda",))
    def staged(self, x, s):
        if "staging" not in x:
            x["staging"] = x["bank"].new_empty(s["K"], s["C"], pin_memory=True)
        staging = torch.index_select(x["bank"][0], 0, x["on_host"][0], out=x["staging"])
        return staging.to(x["index"].device, non_blocking=True).unsqueeze(0)


@benchmark("gather_tokens_int8", covers="gather_tokens")
class GatherTokensInt8(Benchmark):
    stored = torch.int8

    def make(self, s, dtype, device, rng):
        rows, scale = vk.quantize_rows(randn(rng, dtype, 1, s["M"], s["C"]), self.stored, backend="reference")
        index = randint(rng, s["M"], 1, s["K"])
        return {"rows": rows, "scale": scale, "index": index, "index64": index.long(), "dtype": dtype}

    def call(self, x, s, backend):
        return vk.gather_tokens(x["rows"], x["index"], scale=x["scale"], out_dtype=x["dtype"], backend=backend)

    def exact(self, x, s):
        return (x["rows"].double() * x["scale"].double().unsqueeze(2))[:, x["index64"][0]]

    def work(self, s, itemsize):
        return Work(s["K"] * s["C"] * (1 + itemsize) + 8 * s["K"])

    @baseline("index_select, multiply", compiled=True)
    def index_select(self, x, s):
        index = x["index64"][0]
        rows = (
            x["rows"][0].view(torch.int8).index_select(0, index).view(self.stored).float()
        )  # index_select does not support fp8 on CPUs
        return (rows * x["scale"][0].index_select(0, index).unsqueeze(1)).to(x["dtype"]).unsqueeze(0)


@benchmark("gather_tokens_fp8", covers="gather_tokens")
class GatherTokensFp8(GatherTokensInt8):
    stored = torch.float8_e4m3fn


@benchmark("scatter_add_tokens")
class ScatterAddTokens(Benchmark):
    differentiable = ("src",)

    def make(self, s, dtype, device, rng):
        index = randint(rng, s["M"], 1, s["K"])
        return {"src": randn(rng, dtype, 1, s["K"], s["C"]), "index": index, "index64": index.long()}

    def call(self, x, s, backend):
        return vk.scatter_add_tokens(x["src"], x["index"], s["M"], backend=backend)

    def work(self, s, itemsize):
        return Work((s["K"] + s["M"]) * s["C"] * itemsize + 4 * s["K"])

    def work_backward(self, s, itemsize):
        return Work((s["K"] + min(s["K"], s["M"])) * s["C"] * itemsize + 4 * s["K"])

    @baseline("index_add_")
    def index_add(self, x, s):
        return x["src"].new_zeros(s["M"], s["C"]).index_add_(0, x["index64"][0], x["src"][0]).unsqueeze(0)

    @baseline("index_put_, accumulate")
    def index_put(self, x, s):
        zeros = x["src"].new_zeros(s["M"], s["C"])
        return zeros.index_put_((x["index64"][0],), x["src"][0], accumulate=True).unsqueeze(0)

    @baseline("scatter_add_, expanded index")
    def scatter_add(self, x, s):
        index = x["index64"].unsqueeze(2).expand(-1, -1, s["C"])
        return x["src"].new_zeros(1, s["M"], s["C"]).scatter_add_(1, index, x["src"])


@benchmark("quantize_rows")
class QuantizeRows(Benchmark):
    tolerance = 1 / 126  # torch's division sometimes rounds a tie the other way: one step of 127

    def make(self, s, dtype, device, rng):
        return {"x": randn(rng, dtype, s["M"], s["C"])}

    def call(self, x, s, backend):
        return vk.quantize_rows(x["x"], backend=backend)

    def comparable(self, results, x, s):
        rows, scale = results
        return rows.to(scale.dtype) * scale.unsqueeze(1), scale

    def work(self, s, itemsize):
        return Work(s["M"] * s["C"] * (itemsize + 1) + 4 * s["M"])

    @baseline("amax, divide, round", compiled=True)
    def composition(self, x, s):
        scale = x["x"].abs().amax(dim=1).float() / 127
        return (x["x"] / scale.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8), scale


@benchmark("select_tokens")
class SelectTokens(Benchmark):
    differentiable = ("x",)

    def make(self, s, dtype, device, rng):
        return {"x": randn(rng, dtype, 1, s["N"], s["C"]), "score": randn(rng, torch.float32, 1, s["N"])}

    def call(self, x, s, backend):
        return vk.select_tokens(x["x"], s["keep"], score=x["score"], backend=backend)

    def comparable(self, results, x, s):
        return results[0]

    def work(self, s, itemsize):
        return Work(2 * s["keep"] * s["C"] * itemsize + 4 * (s["N"] + s["keep"]))

    def work_backward(self, s, itemsize):
        return Work((s["keep"] + s["N"]) * s["C"] * itemsize)

    @baseline("topk, sort, index_select")
    def composition(self, x, s):
        index = x["score"][0].topk(s["keep"], sorted=False).indices.sort().values
        return x["x"][0].index_select(0, index).unsqueeze(0), index


def _means(x, block):
    """(B, H, ceil(L / block), D) float32 means of blocks of (B, L, H, D)."""
    whole = x.shape[1] // block * block
    means = x[:, :whole].unflatten(1, (-1, block)).mean(2, dtype=torch.float32)
    if whole < x.shape[1]:
        means = torch.cat([means, x[:, whole:].mean(1, keepdim=True, dtype=torch.float32)], dim=1)
    return means.transpose(1, 2)


@benchmark("topk_blocks")
class TopkBlocks(Benchmark):
    selects = True

    def make(self, s, dtype, device, rng):
        q = randn(rng, dtype, s["B"], s["Lq"], s["H"], s["D"])
        return {"q": q, "k": randn(rng, dtype, s["B"], s["Lk"], s["H"], s["D"])}

    def call(self, x, s, backend):
        return vk.topk_blocks(x["q"], x["k"], block_size=s["block"], topk=s["topk"], backend=backend)

    def comparable(self, results, x, s):
        queries, keys = (_means(x[n], b).double() for n, b in zip("qk", s["block"], strict=True))
        chosen = results.long()
        assert (chosen.sort(dim=3).values.diff(dim=3) > 0).all(), "a block was chosen twice"
        scores = queries @ keys.mT
        return scores.gather(3, chosen) / scores.abs().amax()

    def work(self, s, itemsize):
        blocks = [-(-s[n] // b) for n, b in zip(("Lq", "Lk"), s["block"], strict=True)]
        rows = s["B"] * s["H"] * s["D"]
        return Work((s["Lq"] + s["Lk"]) * rows * itemsize, (s["Lq"] + s["Lk"] + 2 * blocks[0] * blocks[1]) * rows)

    @baseline("pooled matmul, topk", compiled=True)
    def composition(self, x, s):
        queries, keys = (_means(x[n], b) for n, b in zip("qk", s["block"], strict=True))
        return (queries @ keys.mT).topk(s["topk"], dim=3).indices.int()

    @baseline("pooled matmul, topk, 1,024 blocks of queries at a time")
    def chunked(self, x, s):
        queries, keys = (_means(x[n], b) for n, b in zip("qk", s["block"], strict=True))
        parts = [(part @ keys.mT).topk(s["topk"], dim=3).indices for part in queries.split(1024, dim=2)]
        return torch.cat(parts, dim=2).int()
