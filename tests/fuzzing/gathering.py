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


def _block_of_rows(sizes: Tensor) -> Tensor:
    return torch.arange(len(sizes)).repeat_interleave(sizes.long())


class TopkBlocks(Case):
    function = staticmethod(vk.topk_blocks)

    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Rows of each block of queries and of keys."""
        sizes = self.args.get("block_sizes")
        if sizes is None:
            lengths = zip((self.args["q"].shape[1], self.args["k"].shape[1]), self.args["block_size"], strict=True)
            return tuple((n - block * torch.arange(-(-n // block))).clamp(max=block) for n, block in lengths)
        return (sizes, sizes) if isinstance(sizes, Tensor) else sizes

    def _means(self, p: Precision, x: Tensor, sizes: Tensor, mask: Tensor | None = None) -> tuple[Num, Tensor]:
        """(B, H, blocks, D), and (B, blocks) whether there is anything to average."""
        batch, length, heads, _ = x.shape
        mask = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.expand(batch, -1)
        x = x.masked_fill(~mask.view(batch, length, 1, 1), 0)
        index = torch.where(mask, _block_of_rows(sizes), -1)
        rows = p.num(x.transpose(1, 2)).map(lambda t: t.flatten(0, 1))
        total = sum_rows(rows, index.repeat_interleave(heads, 0), len(sizes)).map(
            lambda t: t.unflatten(0, (batch, heads))
        )
        count = torch.zeros(batch, len(sizes) + 1).scatter_add_(1, index % (len(sizes) + 1), torch.ones(index.shape))
        count = count[:, :-1].double()
        return total / p.num(count.clamp(min=1).view(batch, 1, -1, 1)), count > 0

    def _priority(self, blocks_q: int, present: Tensor, sizes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, nq, nk) of blocks that stand first, the higher the earlier, else 0; and which may be chosen at all."""
        blocks = torch.arange(present.shape[1])
        may, priority = present.unsqueeze(1).expand(-1, blocks_q, -1), torch.zeros(blocks_q, len(blocks)).long()
        always = self.args.get("always")
        if always is not None:
            if not (isinstance(always, Tensor) and always.dtype == torch.bool):
                always = torch.isin(blocks, torch.as_tensor(always, dtype=torch.int64))
            priority = torch.where(always, len(blocks) - blocks, priority)
        if self.args.get("causal"):
            last = sizes[0].long().cumsum(0) - 1 + self.args["k"].shape[1] - self.args["q"].shape[1]
            own = (sizes[1].long().cumsum(0) <= last.unsqueeze(1)).sum(1, keepdim=True).clamp(max=len(blocks) - 1)
            may = may & (blocks <= own)
            priority = torch.where(blocks == own, len(blocks) + 1, priority)
        return torch.where(may, priority, 0), may

    def check(self, results):
        q, k, topk, index = self.args["q"], self.args["k"], self.args["topk"], results["out"]
        sizes = self._sizes()
        batch = q.shape[0] if k.shape[0] == 1 else k.shape[0]
        shape = (batch, q.shape[2], len(sizes[0]), topk)
        must(index.dtype == torch.int32 and index.shape == shape, f"index is {index.dtype}{list(index.shape)}")
        if index.numel() == 0:
            return
        mask = self.args.get("key_mask")
        q, k = (x.expand(batch, -1, -1, -1) for x in (q, k))
        p = Precision(torch.promote_types(q.dtype, k.dtype))
        (queries, _), (keys, present) = self._means(p, q, sizes[0]), self._means(p, k, sizes[1], mask)
        score = queries.matmul(keys.map(lambda t: t.mT), rounded=0)
        priority, may = self._priority(shape[2], present, sizes)
        priority, may = (t.unsqueeze(1).expand(score.x.shape) for t in (priority, may))
        index = index.long()
        place = torch.arange(topk)
        first = (priority > 0).sum(3, keepdim=True).clamp(max=topk)
        filled = may.sum(3, keepdim=True).clamp(max=topk)
        must(
            bool(((index == -1) == (place >= filled)).all()), "-1 stands elsewhere than where there are no more blocks"
        )
        must(bool((index < may.shape[3]).all()), "a block out of range")
        unique = torch.where(index < 0, -1 - place, index).sort(3).values.diff(dim=3)
        must(bool((unique > 0).all()), "a block twice")
        wanted = priority.sort(dim=3, descending=True, stable=True).indices[..., :topk]
        must(bool(((index == wanted) | (place >= first)).all()), "not the blocks first that are always there")
        at = index.clamp(min=0)
        must(bool((may.gather(3, at) | (index < 0)).all()), "a block that may not be chosen")
        x = score.x.masked_fill(score.x.isnan(), -torch.inf)
        e = score.e.masked_fill(~x.isfinite(), 0)
        chosen = (place >= first) & (place < filled)
        low, high = (x - e).gather(3, at), (x + e).gather(3, at)
        in_order = (high[..., :-1] >= low[..., 1:]) | ~(chosen[..., :-1] & chosen[..., 1:])
        must(bool(in_order.all()), "not the best first")
        others = (x - e).masked_fill(~may | (priority > 0), -torch.inf).scatter(3, at, -torch.inf).amax(3, keepdim=True)
        must(bool(((high >= others) | ~chosen).all()), "a better block was left out")
        small_integers = all(bool((t.double() == t.double().round()).all() and (t.abs() < 32).all()) for t in (q, k))
        whole = all(bool(((s & (s - 1)) == 0).all()) for s in sizes) and mask is None
        if small_integers and whole:  # every sum is exact, and equal scores tie
            rest = x.masked_fill(~may | (priority > 0), -torch.inf).argsort(dim=3, descending=True, stable=True)
            rest = rest.gather(3, (place - first).clamp(min=0))
            must(bool(((rest == index) | ~chosen).all()), "equal scores are not by ascending block")


def _sizes_of(draw: Draw, length: int, most: int) -> Tensor:
    """Lengths of blocks of at most so many rows, some of none, that make up `length` rows."""
    sizes = []
    while sum(sizes) < length:
        sizes.append(min(draw.between(0, most), length - sum(sizes)))
    return draw.layout(torch.tensor(sizes, dtype=draw.pick(torch.int32, torch.int64)))


@generator
def topk_blocks(draw: Draw) -> Case:
    dtype, batch, heads, size = draw.dtype(), draw.batch(), draw.between(1, 3), draw.size(140)
    kind = "integers" if draw.chance(0.3) else None
    causal = draw.chance(0.2)
    lengths = draw.size(), draw.size()
    lengths = sorted(lengths) if causal else lengths
    of_q, of_k = draw.pick((batch, batch), (batch, batch), (1, batch), (batch, 1))
    q = draw.tensor(of_q, lengths[0], heads, size, dtype=dtype, kind=kind)
    k = draw.tensor(of_k, lengths[1], heads, size, dtype=draw.pick(dtype, dtype, draw.dtype()), kind=kind)
    block = tuple(draw.pick(1, 1, 2, 3, 5, 16, 17, 32) for _ in range(2))
    blocks_q, blocks = (-(-n // size) for n, size in zip(lengths, block, strict=True))
    if k.numel() and draw.chance(0.1):
        k = draw.layout(k.masked_fill(draw.mask(*k.shape[:3], 1, share=0.1), torch.nan))
    a = {"q": q, "k": k, "block_size": block}
    if draw.chance(0.3):
        sizes = a["block_sizes"] = tuple(_sizes_of(draw, n, most) for n, most in zip(lengths, block, strict=True))
        blocks_q, blocks = map(len, sizes)
    a["topk"] = draw.pick(min(1, blocks), draw.between(0, blocks))
    if draw.chance(0.3):
        a["key_mask"] = draw.mask(draw.pick(1, batch), lengths[1], share=draw.pick(0.1, 0.7))
    if draw.chance(0.3):
        if draw.chance(0.5):
            a["always"] = draw.random.sample(range(blocks), draw.between(0, a["topk"]))
        else:
            a["always"] = draw.mask(blocks_q, blocks, share=0.2)
    if causal:
        a["causal"] = True
    return TopkBlocks(a)
