"""Cases of gather_tokens, scatter_add_tokens, quantize_rows, select_tokens and topk_blocks."""

from __future__ import annotations

import torch
from torch import Tensor

import vidmem_kernels as vk

from .bounds import Num, Precision, exact
from .case import Case, generator, must
from .draw import FLOATS, Draw


def sum_rows(values: Num, index: Tensor, rows: int) -> Num:
    """(B, rows, C): the values (B, K, C) of equal index, added; -1 adds nothing."""
    batch, count, channels = values.x.shape
    where = torch.where(index < 0, rows, index).long()

    def add(t: Tensor) -> Tensor:
        out = t.new_zeros(batch, rows + 1, channels)
        return out.scatter_add_(1, where.unsqueeze(2).expand(batch, count, channels), t)[:, :rows]

    counts = torch.zeros(batch, rows + 1, dtype=torch.int64).scatter_add_(1, where, torch.ones_like(where))
    return values.linear(add, int(counts.max()) if counts.numel() else 1)


def _taken(bank: Tensor, index: Tensor) -> Tensor:
    """float64 rows of a bank (B|1, M, C), zeros for -1."""
    rows = bank.detach().to(torch.float64)
    rows = torch.cat([rows.new_zeros(rows.shape[0], 1, rows.shape[2]), rows], 1).expand(index.shape[0], -1, -1)
    return rows.gather(1, (index.long() + 1).unsqueeze(2).expand(*index.shape, bank.shape[2]))


# --- gather_tokens ---


class Gather(Case):
    function = staticmethod(vk.gather_tokens)

    def outputs(self, results):
        bank, index, scale = self.args["bank"], self.args["index"], self.args.get("scale")
        out_dtype = results["out"].dtype
        wanted = self.args.get("out_dtype") or (bank.dtype if scale is None else torch.float32)
        must(out_dtype == wanted, f"out has dtype {out_dtype}, not {wanted}")
        rows = _taken(bank, index)
        if scale is None:
            wider = torch.promote_types(bank.dtype, out_dtype) == out_dtype
            return {"out": exact(rows) if wider else Precision(bank.dtype).num(rows).to(out_dtype)}
        p = Precision(torch.float32)
        factor = p.num(_taken(scale.unsqueeze(2), index))
        return {"out": (p.num(rows) * factor).to(out_dtype)}

    def gradients(self, cotangents, results):
        bank, index = self.args["bank"], self.args["index"]
        grad = cotangents["out"]
        rows = bank.shape[1]
        if "scale" in self.args:
            p = Precision(torch.float32)
            values = (p.num(grad) * p.num(_taken(bank, index))).sum(2, keepdim=True)
        else:
            values = Precision(torch.promote_types(grad.dtype, bank.dtype)).num(grad)
        if bank.shape[0] == 1:  # read by the whole batch
            values = values.map(lambda t: t.reshape(1, index.numel(), t.shape[2]))
            index = index.reshape(1, index.numel())
        total = sum_rows(values, index, rows)
        if "scale" in self.args:
            return {"scale": total.map(lambda t: t.squeeze(2)).to(torch.float32)}
        return {"bank": total.to(bank.dtype)}


@generator
def gather_tokens(draw: Draw) -> Case:
    batch, rows, count, channels = draw.batch(), draw.size(), draw.size(), draw.size(140)
    bank_batch = 1 if draw.chance(0.3) else batch
    index = draw.integers(-1 if draw.chance(0.7) or not rows else 0, rows, batch, count)
    a = {"index": index}
    wanted = {}
    if draw.chance(0.4):
        dtype = draw.pick(torch.int8, torch.float8_e4m3fn)
        values = draw.values(bank_batch, rows, channels, dtype=torch.float32, kind="normal") * 30
        a["bank"] = draw.layout(values.clamp(-127, 127).to(dtype))
        a["scale"] = wanted["scale"] = draw.positive(bank_batch, rows, dtype=torch.float32)
    else:
        a["bank"] = wanted["bank"] = draw.tensor(bank_batch, rows, channels, dtype=draw.dtype())
    if draw.chance(0.3):
        a["out_dtype"] = draw.pick(*FLOATS)
        if a["bank"].dtype == torch.float64 or a["out_dtype"] == torch.float16:  # large ones would overflow
            a["out_dtype"] = torch.float64
    if "bank" in wanted and draw.chance(0.15):
        # What is not read may hold anything; what is read and not finite is copied as it is.
        spoilt = a["bank"].masked_fill(draw.mask(bank_batch, rows, 1, share=0.3), draw.pick(torch.nan, torch.inf))
        a["bank"], wanted = draw.layout(spoilt), {}
    return Gather(a, wanted)


# --- scatter_add_tokens ---


class Scatter(Case):
    function = staticmethod(vk.scatter_add_tokens)

    def outputs(self, results):
        src = self.args["src"]
        values = Precision(src.dtype).num(src)
        return {"out": sum_rows(values, self.args["index"], self.args["num_rows"]).to(src.dtype)}

    def gradients(self, cotangents, results):
        return {"src": exact(_taken(cotangents["out"], self.args["index"]))}


@generator
def scatter_add_tokens(draw: Draw) -> Case:
    batch, count, rows = draw.batch(), draw.size(), draw.size()
    src = draw.tensor(batch, count, draw.size(140), dtype=draw.dtype())
    high = rows if draw.chance(0.7) else min(rows, 2)  # many of one row
    index = draw.integers(-1 if draw.chance(0.5) or not rows else 0, high, batch, count)
    if rows == 0:
        index = torch.full_like(index, -1)
    return Scatter({"src": src, "index": index, "num_rows": rows}, {"src": src})


# --- quantize_rows ---


class Quantize(Case):
    function = staticmethod(vk.quantize_rows)

    def check(self, results):
        x, rows, scale = self.args["x"].double(), results["rows"], results["scale"].detach().double()
        must(rows.dtype == self.args["dtype"], f"rows have dtype {rows.dtype}")
        finite = x.isfinite().all(-1)
        must(bool(scale[~finite].isnan().all()), "the scale of a row that is not finite is not NaN")
        held = rows.to(torch.float64)
        must(bool((held[~finite | (scale == 0)] == 0).all()), "a row without a scale is not 0")
        back, x, scale = (t[finite] for t in (held * scale.unsqueeze(-1), x, scale.unsqueeze(-1)))
        half = scale / 2 if rows.dtype == torch.int8 else torch.maximum(x.abs() / 16, scale / 1024)
        off = ((back - x).abs() - half - 2.0**-22 * x.abs()).nan_to_num(nan=torch.inf)
        must(bool((off <= 0).all()), f"rows * scale is off x by {off.max() if off.numel() else 0:.3g} too much")

    def outputs(self, results):
        x = self.args["x"]
        p = Precision(x.dtype)
        most = 127.0 if self.args["dtype"] == torch.int8 else 448.0
        largest = x.double().abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1], dtype=torch.float64)
        largest = largest.masked_fill(largest.isinf(), torch.nan)
        scale = p.num(largest) * (1 / most)
        return {"scale": scale.where(largest != 0)}

    def gradients(self, cotangents, results):
        x = self.args["x"]
        most = 127.0 if self.args["dtype"] == torch.int8 else 448.0
        grad = torch.zeros(x.shape, dtype=torch.float64)
        if x.shape[-1]:
            first = (x.abs() == x.abs().amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
            sign = x.gather(-1, first).sign().double()
            grad.scatter_(-1, first, cotangents["scale"].double().unsqueeze(-1) * sign)
        p = Precision(x.dtype)
        return {"x": (p.num(grad) * (1 / most)).where(grad != 0).to(x.dtype)}


@generator
def quantize_rows(draw: Draw) -> Case:
    lead = draw.pick((), (draw.batch(),), (2, draw.batch()))
    x = draw.tensor(*lead, draw.size(), draw.size(140), dtype=draw.dtype())
    wanted = {"x": x}
    if draw.chance(0.15):
        x = draw.layout(x.masked_fill(draw.mask(*x.shape, share=0.05), draw.pick(torch.nan, torch.inf, -torch.inf)))
        wanted = {}
    return Quantize({"x": x, "dtype": draw.pick(torch.int8, torch.float8_e4m3fn)}, wanted)


# --- select_tokens ---


class Select(Case):
    function = staticmethod(vk.select_tokens)

    def check(self, results):
        x, keep, score, index = self.args["x"], self.args["keep"], self.args.get("score"), results["index"]
        must(index.dtype == torch.int32 and index.shape == (x.shape[0], keep), f"index is {index.dtype}{index.shape}")
        ascending = bool((index.diff(dim=1) > 0).all()) and bool(((index >= 0) & (index < x.shape[1])).all())
        must(ascending, "index is not ascending or out of range")
        if keep == 0 or x.shape[0] == 0:
            return
        if score is not None:
            slack = torch.tensor(0.0)
            score = score.double()
        else:
            # Squares that vanish, and n + 2 roundings of sums, halved by the root; its own.
            unit = Precision(x.dtype).unit
            norm = torch.linalg.vector_norm(x.double(), dim=2)
            slack = norm * unit * (x.shape[2] / 2 + 3) + (x.shape[2] * Precision(x.dtype).vanishing) ** 0.5
            score = norm
        score = score.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        low, high = score - slack.nan_to_num(0, 0), score + slack.nan_to_num(0, 0)
        kept = torch.zeros(x.shape[:2], dtype=torch.bool).scatter_(1, index.long(), True)
        weakest = high.masked_fill(~kept, torch.inf).amin(1)
        left_out = low.masked_fill(kept, -torch.inf).amax(1)
        must(bool((weakest >= left_out).all()), "a stronger token was left out")
        if "score" in self.args:
            order = score.argsort(dim=1, descending=True, stable=True)[:, :keep].sort(1).values
            must(torch.equal(order, index.long()), "of equal scores the lower position must be kept")

    def outputs(self, results):
        return {"tokens": exact(_taken(self.args["x"], results["index"]))}

    def gradients(self, cotangents, results):
        grad = cotangents["tokens"]
        values = Precision(grad.dtype).num(grad)
        found = sum_rows(values, results["index"], self.args["x"].shape[1])
        return {"x": Num(found.precision, found.x, found.m, torch.zeros_like(found.e))}


@generator
def select_tokens(draw: Draw) -> Case:
    dtype, batch, tokens = draw.dtype(), draw.batch(), draw.size()
    x = draw.tensor(batch, tokens, draw.size(140), dtype=dtype)
    a = {"x": x, "keep": draw.pick(0, tokens, draw.between(0, tokens))}
    if draw.chance(0.5):
        score = draw.values(batch, tokens, dtype=draw.pick(*FLOATS))
        if draw.chance(0.3):
            score = score.masked_fill(draw.mask(*score.shape, share=0.2), draw.pick(torch.nan, torch.inf, -torch.inf))
        a["score"] = draw.layout(score)
    return Select(a, {"x": x})


# --- topk_blocks ---


class TopkBlocks(Case):
    function = staticmethod(vk.topk_blocks)

    def _means(self, p: Precision, x: Tensor, block: int) -> Num:
        """(B, H, blocks, D)"""
        rows = p.num(x.transpose(1, 2))
        index = (torch.arange(x.shape[1]) // block).expand(x.shape[0] * x.shape[2], -1)
        count = -(-x.shape[1] // block)
        total = sum_rows(rows.map(lambda t: t.flatten(0, 1)), index, count)
        sizes = (x.shape[1] - block * torch.arange(count)).clamp(max=block).double().unsqueeze(1)
        return (total / p.num(sizes)).map(lambda t: t.unflatten(0, (x.shape[0], x.shape[2])))

    def check(self, results):
        q, k, topk, index = self.args["q"], self.args["k"], self.args["topk"], results["out"]
        bq, bk = self.args["block_size"]
        shape = (q.shape[0], q.shape[2], -(-q.shape[1] // bq), topk)
        must(index.dtype == torch.int32 and index.shape == shape, f"index is {index.dtype}{list(index.shape)}")
        if index.numel() == 0:
            return
        p = Precision(torch.promote_types(q.dtype, k.dtype))
        score = self._means(p, q, bq).matmul(self._means(p, k, bk).map(lambda t: t.mT), rounded=0)
        blocks = score.x.shape[3]
        must(bool(((index >= 0) & (index < blocks)).all()), "a block out of range")
        index = index.long()
        must(bool((index.sort(3).values.diff(dim=3) > 0).all()), "a block twice")
        x = score.x.masked_fill(score.x.isnan(), -torch.inf)
        e = score.e.masked_fill(~x.isfinite(), 0)
        low, high = (x - e).gather(3, index), (x + e).gather(3, index)
        must(bool((high[..., :-1] >= low[..., 1:]).all()), "not the best first")
        others = (x - e).scatter(3, index, -torch.inf).amax(3)
        must(bool((high[..., -1] >= others).all()), "a better block was left out")
        small_integers = all(bool((t.double() == t.double().round()).all() and (t.abs() < 32).all()) for t in (q, k))
        whole = all(b in (1, 2, 4, 16, 32) and t.shape[1] % b == 0 for b, t in ((bq, q), (bk, k)))
        if small_integers and whole:  # every sum is exact, and equal scores tie
            order = x.argsort(dim=3, descending=True, stable=True)[..., :topk]
            must(torch.equal(order, index), "equal scores are not by ascending block")


@generator
def topk_blocks(draw: Draw) -> Case:
    dtype, batch, heads, size = draw.dtype(), draw.batch(), draw.between(1, 3), draw.size(140)
    kind = "integers" if draw.chance(0.3) else None
    q = draw.tensor(batch, draw.size(), heads, size, dtype=dtype, kind=kind)
    k = draw.tensor(batch, draw.size(), heads, size, dtype=draw.pick(dtype, dtype, draw.dtype()), kind=kind)
    block = tuple(draw.pick(1, 1, 2, 3, 5, 16, 17, 32) for _ in range(2))
    blocks = -(-k.shape[1] // block[1])
    if k.numel() and draw.chance(0.1):
        k = draw.layout(k.masked_fill(draw.mask(*k.shape[:3], 1, share=0.1), torch.nan))
    return TopkBlocks({"q": q, "k": k, "block_size": block, "topk": draw.pick(min(1, blocks), draw.between(0, blocks))})
