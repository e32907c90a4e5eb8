"""Cases of cross_attention, merge_attention_states and linear_attention."""

from __future__ import annotations

import inspect
import math

import torch
from torch import Tensor

import vidmem_kernels as vk

from .bounds import EXP, Num, Precision, log_sum_exp, unit_of
from .case import Case, generator, zeros_if_none
from .draw import Draw

AREA = 60_000  # elements of a matrix of scores


def _heads(p: Precision, x: Tensor) -> Num:
    return p.num(x.transpose(1, 2))


def _back(n: Num, dtype: torch.dtype) -> Num:
    return n.map(lambda t: t.transpose(1, 2)).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _lengths(draw: Draw, batch: int, heads: int) -> tuple[int, int]:
    """Of queries and keys, so that the scores do not grow out of hand."""
    area = AREA * 8 if draw.large else AREA
    queries = draw.size()
    return queries, min(draw.size(empty=0.02), max(1, area // max(1, batch * heads * queries)))


# --- cross_attention ---


def _spread(x: Tensor, batch: int, heads: int, axis: int = 1) -> Tensor:
    """What serves a batch or a group of heads, once for each of them; `axis` is that of the heads."""
    x = x.expand(batch, *x.shape[1:])
    return x if x.shape[axis] in (1, heads) else x.repeat_interleave(heads // x.shape[axis], axis)


def _gathered(grad: Num, like: Tensor, heads: int) -> Num:
    """The gradient (B, heads, Lk, C) of what was spread: sums of gradients that are stored in the tensor's dtype."""
    shared = heads > like.shape[2], grad.x.shape[0] != like.shape[0]
    if any(shared):
        grad = grad.to(like.dtype)
    if shared[0]:
        group = heads // like.shape[2]
        grad = grad.map(lambda t: t.unflatten(1, (like.shape[2], group))).sum(2)
        grad.e = grad.e + group * unit_of(like.dtype) * grad.m  # added one by one where a call was made for each
    return grad.sum(0, keepdim=True) if shared[1] else grad


class CrossAttention(Case):
    function = staticmethod(vk.cross_attention)

    def named(self, result):
        return dict(zip(("out", "lse"), result if isinstance(result, tuple) else (result,), strict=False))

    def visible(self) -> Tensor:
        """(B, H, Lq, Lk), by a loop over what the docstring says rather than as the reference does it."""
        a = self.args
        batch, queries, heads, _ = a["q"].shape
        keys = a["k"].shape[1]
        causal = torch.ones(1, dtype=torch.bool)
        seen = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
        if "window" in a:
            left, right = a["window"]
            wide = torch.float32 if a["q_time"].dtype == a["k_time"].dtype == torch.float32 else torch.float64
            at = a["q_time"].to(wide).expand(batch, queries)[:, None, :, None]
            when = a["k_time"].to(wide).expand(batch, keys)[:, None, None, :]
            causal = when <= at + right
            seen &= (at - left <= when) & causal
        if "block_index" in a:
            rows, columns = a["block_size"]
            listed = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
            index = _spread(a["block_index"], batch, heads).expand(-1, heads, -1, -1)
            for i in range(index.shape[2]):
                for t in range(index.shape[3]):
                    block = (torch.arange(keys) // columns).expand(batch, heads, 1, keys)
                    hit = block == index[:, :, i, t, None, None]
                    listed[:, :, i * rows : (i + 1) * rows] |= hit
            seen &= listed
        sink = torch.arange(keys) < a.get("num_sinks", 0)
        return seen | (sink & causal if a.get("causal_sinks") else sink)

    def _rows(self, p: Precision, name: str) -> Num:
        """k or v, dequantised, for every head of queries."""
        a = self.args
        batch, _, heads, _ = a["q"].shape
        rows = _heads(p, a[name])
        if f"{name}_scale" in a:
            rows = rows * p.num(a[f"{name}_scale"][:, None, :, None])
        return rows.map(lambda t: _spread(t, batch, heads))

    def _forward(self) -> tuple[Num, Num, Num, Num, Tensor]:
        """weights, lse, out and v as (B, H, L, D), and what is seen."""
        a = self.args
        p = Precision(a["q"].dtype)
        q, k, v = _heads(p, a["q"]), self._rows(p, "k"), self._rows(p, "v")
        batch, heads = q.x.shape[:2]
        more = int("k_scale" in a)  # rows of 8 bits may be dequantised to the dtype of q
        seen = self.visible()
        scale = a.get("scale")
        scores = q.matmul(k.map(lambda t: t.mT), rounded=1 + more) * (q.x.shape[-1] ** -0.5 if scale is None else scale)
        if "key_bias" in a:
            bias = a["key_bias"]
            bias = _spread(bias if bias.dim() == 3 else bias.unsqueeze(1), batch, heads).unsqueeze(2)
            seen = seen & (bias > -torch.inf)
            scores = scores + p.num(bias.masked_fill(bias == -torch.inf, 0))
        if "key_mask" in a:
            seen = seen & a["key_mask"][:, None, None]
        scores = scores.where(seen, -torch.inf)
        largest = scores.x.amax(-1, keepdim=True).nan_to_num(neginf=0) if scores.x.shape[-1] else 0.0
        argument = EXP * p.unit * (scores.m + abs(largest))
        scores.e = torch.where(seen, scores.e + argument, 0.0)
        lse = log_sum_exp(scores)
        some = lse.x > -torch.inf
        weight = (scores - lse.where(some).map(lambda t: t.unsqueeze(-1))).exp().where(seen)
        # A weight of float16 that is less than it can hold, however small the sum of the weights.
        out = weight.matmul(v, rounded=1 + more)
        # Whatever the scores are, the weights add up to one.
        seen_v = (seen.unsqueeze(-1) * v.m.unsqueeze(2)).amax(3) if v.x.shape[2] else out.m
        out.e = torch.minimum(out.e.nan_to_num(nan=torch.inf), 2.1 * seen_v)
        if a.get("causal_sinks"):  # two calls, whose results are weighted by their lses
            parts = 4 * lse.e.where(some, 0) + 4 * EXP * p.unit * (1 + lse.m)
            out.e = 2 * out.e + parts.unsqueeze(-1) * out.m
            lse.e = torch.where(some, 2 * lse.e + parts, 0.0)
        return weight, lse, out, v, seen

    def outputs(self, results):
        self.forward = self._forward()
        _, lse, out, _, _ = self.forward
        found = {"out": _back(out, self.args.get("out_dtype", self.args["q"].dtype))}
        if self.args["return_lse"]:
            found["lse"] = lse.to(_wide(self.args["q"].dtype))
        return found

    def gradients(self, cotangents, results):
        a = self.args
        dtype = a["q"].dtype
        weight, lse, out, v, seen = self.forward
        p = weight.precision
        q, k = _heads(p, a["q"]), self._rows(p, "k")
        heads, more = q.x.shape[1], int("k_scale" in a)
        grad = _heads(p, zeros_if_none(cotangents, "out", results["out"]))
        if a.get("out_dtype", dtype) != dtype:
            grad.e = p.factor * grad.m + p.factor_vanishing
        shared = (grad * out.to(dtype)).sum(-1, keepdim=True)
        if "lse" in cotangents:
            shared = shared - p.num(cotangents["lse"].unsqueeze(-1))
        by_score = weight * (grad.matmul(v.map(lambda t: t.mT), rounded=more) - shared)
        scale = a.get("scale")
        scale = q.x.shape[-1] ** -0.5 if scale is None else scale
        turned = by_score.map(lambda t: t.mT)
        by_key = turned.matmul(q, rounded=2) * scale
        by_value = weight.map(lambda t: t.mT).matmul(grad, rounded=1)
        found = {"q": _back(by_score.matmul(k, rounded=2 + more) * scale, dtype)}
        for name, by_row in (("k", by_key), ("v", by_value)):
            if more:
                found[f"{name}_scale"] = self._by_scale(name, by_row.to(dtype))
            else:
                found[name] = _back(_gathered(by_row, a[name], heads), dtype)
        if "key_bias" in a:
            bias, of_bias = a["key_bias"], by_score.sum(2).map(lambda t: t.unsqueeze(-1))
            three = bias if bias.dim() == 3 else bias.unsqueeze(1)
            of_bias = _gathered(of_bias, three.transpose(1, 2), heads).map(lambda t: t.squeeze(-1))
            found["key_bias"] = (of_bias if bias.dim() == 3 else of_bias.map(lambda t: t.squeeze(1))).to(bias.dtype)
        return found

    def _by_scale(self, name: str, by_row: Num) -> Num:
        """The gradient of a scale from that of its rows (B, H, Lk, C)."""
        rows, scale = self.args[name], self.args[f"{name}_scale"]
        batch, heads, keys, _ = by_row.x.shape
        p = by_row.precision
        found = by_row * p.num(_spread(rows.to(torch.float32).transpose(1, 2), batch, heads))
        found = found.sum(3).sum(1)
        return (found.sum(0, keepdim=True) if scale.shape[0] != batch else found).to(scale.dtype)

    def twin(self):
        a = self.args
        if a.get("causal_sinks") and "block_index" in a:
            return None  # sinks that nobody sees are hidden as by a bias, which is another promise
        unseen = ~self.visible().any(2).transpose(1, 2).unsqueeze(-1)  # (B, Lk, H, 1)
        unseen = unseen.unflatten(2, (a["k"].shape[2], -1)).all(3) if unseen.numel() else unseen[:, :, :0]
        if a["k"].shape[0] < unseen.shape[0]:
            unseen = unseen.all(0, keepdim=True)
        if not unseen.any():
            return None
        other = (500.0, math.nan, math.inf)[a["q"].shape[1] % 3]
        if "k_scale" in a:
            unseen = unseen.all(2).squeeze(2)
            if a["k_scale"].shape[0] < unseen.shape[0]:
                unseen = unseen.all(0, keepdim=True)
            return {id(a[n]): a[n].masked_fill(unseen, other) for n in ("k_scale", "v_scale")}
        return {id(a[name]): a[name].masked_fill(unseen, other) for name in ("k", "v")}


@generator
def cross_attention(draw: Draw) -> Case:
    dtype, batch = draw.dtype(), draw.batch()
    key_heads, group = (draw.between(1, 3), 1) if draw.chance(0.7) else (draw.between(1, 2), draw.between(2, 3))
    heads = key_heads * group
    queries, keys = _lengths(draw, batch, heads)
    size, wide = draw.size(140, empty=0.01), draw.size(140, empty=0.01)
    if draw.chance(0.5):
        wide = size
    kind = "normal" if draw.chance(0.6) else None
    served = 1 if draw.chance(0.15) else batch
    a = {
        "q": draw.tensor(batch, queries, heads, size, dtype=dtype, kind=kind),
        "k": draw.tensor(served, keys, key_heads, size, dtype=dtype, kind=kind),
        "v": draw.tensor(served, keys, key_heads, wide, dtype=dtype),
        "return_lse": draw.chance(0.5),
    }
    if dtype != torch.float64 and draw.chance(0.2):
        _quantize(draw, a, batch)
    names = ("q", "k_scale", "v_scale") if "k_scale" in a else ("q", "k", "v")
    wanted = {name: a[name] for name in names}
    if draw.chance(0.4):
        shape = [(draw.pick(1, batch), keys), (draw.pick(1, batch), draw.pick(key_heads, heads), keys)]
        shape = draw.pick(*shape)
        bias = draw.values(*shape, dtype=draw.pick(dtype, torch.float32, torch.float64), kind="normal")
        bias = bias.masked_fill(draw.mask(*shape, share=draw.pick(0.0, 0.2, 0.7)), -torch.inf)
        a["key_bias"] = wanted["key_bias"] = draw.layout(bias)
    if draw.chance(0.15):
        a["key_mask"] = draw.mask(draw.pick(1, batch), keys, share=draw.pick(0.0, 0.3, 0.9))
    if draw.chance(0.35):
        _add_window(draw, a, batch, queries, keys)
    if draw.chance(0.35):
        _add_blocks(draw, a, batch, queries, keys, (1, key_heads, heads))
    if draw.chance(0.3):
        a["num_sinks"] = draw.between(0, min(keys, draw.pick(1, 3, keys)))
    if "window" in a and draw.chance(0.3):
        a["causal_sinks"] = True
        wanted = {}  # gradients through two calls: see tests/kernels/cross_attn/test_attention_options.py
    if size == 0 or draw.chance(0.3):
        a["scale"] = draw.pick(1.0, 0.25, 0.0, -0.3)
    if dtype != torch.float64 and draw.chance(0.2):
        a["out_dtype"] = torch.float32
    return CrossAttention(a, wanted)


def _quantize(draw: Draw, a: dict, batch: int) -> None:
    """Rows of 8 bits in drawn layouts, and any scales that keep them about as large."""
    kind = draw.pick(torch.int8, torch.float8_e4m3fn)
    for name in ("k", "v"):
        codes = torch.randint(-127, 128, a[name].shape, generator=draw.generator)
        a[name] = draw.layout(codes.to(torch.int8) if kind == torch.int8 else codes.to(torch.float32).to(kind))
        served = draw.pick(1, batch)
        a[f"{name}_scale"] = draw.layout(draw.positive(served, codes.shape[1], dtype=torch.float32) / 256)


def _add_window(draw: Draw, a: dict, batch: int, queries: int, keys: int) -> None:
    """Times that are multiples of a quarter, so that a comparison at the border of a window is exact; some are NaN."""
    late = 2**40 if draw.chance(0.1) else 0  # what float32 cannot tell apart
    for name, length in (("q_time", queries), ("k_time", keys)):
        shape = (batch, length) if draw.chance(0.5) else (length,)
        ticks = torch.randint(0, max(2, keys // draw.pick(1, 4)), shape, generator=draw.generator)
        if draw.chance(0.5):
            ticks = ticks.sort(-1).values
        dtype = draw.pick(torch.int64, torch.float64, *(() if late else (torch.int32, torch.float32)))
        ticks = ticks.to(dtype) / 4 if dtype.is_floating_point else ticks
        if dtype.is_floating_point and draw.chance(0.1):
            ticks = ticks.masked_fill(draw.mask(*shape, share=0.1), torch.nan)
        a[name] = draw.layout((ticks + late).to(dtype))
    a["window"] = tuple(draw.pick(0, 1, 2.25, draw.between(0, max(1, keys // 2)), math.inf) for _ in range(2))


def _add_blocks(draw: Draw, a: dict, batch: int, queries: int, keys: int, heads: tuple[int, ...]) -> None:
    size = tuple(draw.pick(1, 3, 16, 17, 32, 64, 128) for _ in range(2))
    rows, columns = -(-queries // size[0]), -(-keys // size[1])
    topk = draw.between(0, min(4, columns + 1))
    a["block_size"] = size
    a["block_index"] = draw.integers(-1, columns, draw.pick(1, batch), draw.pick(*heads), rows, topk)


# --- merge_attention_states ---


class MergeStates(Case):
    function = staticmethod(vk.merge_attention_states)

    def named(self, result):
        return dict(zip(("out", "lse"), result, strict=True))

    def _forward(self):
        outs, lses = self.args["outs"], self.args["lses"]
        p = Precision(outs[0].dtype)
        p.factor = p.factor_vanishing = 0.0  # no product of two tensors of the half dtype
        logs = p.num(torch.stack(list(lses), -1))
        seen = logs.x > -torch.inf
        logs = logs.where(seen).where(seen, -torch.inf)
        largest = logs.x.amax(-1, keepdim=True).nan_to_num(neginf=0)
        logs.e = torch.where(seen, EXP * p.unit * (logs.m + largest.abs()), 0.0)
        lse = log_sum_exp(logs)
        weight = (logs - lse.where(lse.x > -torch.inf).map(lambda t: t.unsqueeze(-1))).exp().where(seen)
        stacked = p.num(torch.stack(list(outs), -1).permute(0, 2, 1, 4, 3))  # (B, H, L, n, D)
        out = (weight.map(lambda t: t.unsqueeze(-1)) * stacked).sum(3)
        return weight, lse, stacked, out

    def outputs(self, results):
        self.forward = self._forward()
        _, lse, _, out = self.forward
        return {"out": _back(out, self.args["outs"][0].dtype), "lse": lse.to(self.args["lses"][0].dtype)}

    def gradients(self, cotangents, results):
        weight, _, stacked, _ = self.forward
        p = weight.precision
        grad = _heads(p, zeros_if_none(cotangents, "out", results["out"])).map(lambda t: t.unsqueeze(3))
        along = (grad * stacked).sum(-1)  # (B, H, L, n)
        shared = (weight * along).sum(-1, keepdim=True)
        if "lse" in cotangents:
            shared = shared - p.num(cotangents["lse"].unsqueeze(-1))
        by_lse = weight * (along - shared)
        by_out = weight.map(lambda t: t.unsqueeze(-1)) * grad
        found = {}
        for i, (out, lse) in enumerate(zip(self.args["outs"], self.args["lses"], strict=True)):
            found[f"outs[{i}]"] = _back(by_out.map(lambda t, i=i: t[..., i, :]), out.dtype)
            found[f"lses[{i}]"] = by_lse.map(lambda t, i=i: t[..., i]).to(lse.dtype)
        return found


@generator
def merge_attention_states(draw: Draw) -> Case:
    dtype, batch, heads, length = draw.dtype(), draw.batch(), draw.between(1, 3), draw.size()
    size, parts = draw.size(140), draw.between(1, 4)
    outs = [draw.tensor(batch, length, heads, size, dtype=dtype) for _ in range(parts)]
    lses, share = [], draw.pick(0.0, 0.3, 0.8)
    for _ in range(parts):
        lse = draw.values(batch, heads, length, dtype=_wide(dtype), kind="normal") * draw.pick(1, 20)
        lses.append(draw.layout(lse.masked_fill(draw.mask(*lse.shape, share=share), -torch.inf)))
    named = {f"outs[{i}]": t for i, t in enumerate(outs)} | {f"lses[{i}]": t for i, t in enumerate(lses)}
    return MergeStates({"outs": outs, "lses": lses}, named)


# --- linear_attention ---


def _feature(x: Num, name: str) -> tuple[Num, Num]:
    """phi and its derivative, on numbers that are exact."""
    p = x.precision
    if name == "identity":
        return x, p.num(torch.ones_like(x.x))
    if name == "relu":
        return x.where(x.x > 0), p.num((x.x > 0).to(torch.float64))
    low = p.num(x.x.clamp(max=0)).exp()
    high = x + p.num(torch.ones_like(x.x))
    positive = x.x > 0
    pairs = zip((high.x, high.m, high.e), (low.x, low.m, low.e), strict=True)
    return Num(p, *(torch.where(positive, h, s) for h, s in pairs)), low


class LinearAttention(Case):
    function = staticmethod(vk.linear_attention)

    def named(self, result):
        if isinstance(result, Tensor):
            return {"out": result}
        return {"out": result[0], "S": result[1].S, "z": result[1].z}

    def _forward(self):
        """As one matrix of weights, whatever the order in which kernels add: see `bounds.Num.m`."""
        a = self.args
        p = Precision(a["q"].dtype)
        q, self.slope_q = _feature(_heads(p, a["q"]), a["feature_map"])
        k, self.slope_k = _feature(_heads(p, a["k"]), a["feature_map"])
        if a.get("scale") is not None:
            q, self.slope_q = q * a["scale"], self.slope_q * a["scale"]
        v = _heads(p, a["v"])
        ones = v.x.new_ones(*v.x.shape[:-1], 1)
        v = Num(p, *(torch.cat([t, one], -1) for t, one in ((v.x, ones), (v.m, ones), (v.e, 0 * ones))))
        block = torch.arange(q.x.shape[2]) // a["block_size"]
        seen = (block.unsqueeze(1) >= block) | (not a["causal"])
        weight = q.matmul(k.map(lambda t: t.mT), rounded=2).where(seen)
        total = weight.matmul(v, rounded=2)
        state = k.map(lambda t: t.mT).matmul(v, rounded=2)
        before = None
        if a.get("state") is not None:
            S, z = a["state"]
            before = p.num(torch.cat([S, z.unsqueeze(-1)], -1))
            total = total + q.matmul(before, rounded=2)
            state = state + before
        return q, k, v, weight, total, state, before, seen

    def outputs(self, results):
        a = self.args
        self.forward = self._forward()
        *_, total, state, _, _ = self.forward
        out = total.map(lambda t: t[..., :-1])
        if a["normalize"]:
            out = out / self._denominator(total)
        found = {"out": _back(out, a["v"].dtype)}
        if a["return_state"]:
            wide = _wide(a["q"].dtype)
            found["S"], found["z"] = (state.map(part).to(wide) for part in (_all_but_last, _last))
        return found

    @staticmethod
    def _denominator(total: Num) -> Num:
        return total.map(lambda t: t[..., -1:]) + total.precision.num(torch.tensor(1e-10, dtype=torch.float64))

    def gradients(self, cotangents, results):
        a = self.args
        q, k, v, weight, total, state, before, seen = self.forward
        p = q.precision
        grad = _heads(p, zeros_if_none(cotangents, "out", results["out"]))
        last = p.num(grad.x.new_zeros(*grad.x.shape[:-1], 1))
        if a["normalize"]:
            one = p.num(torch.ones_like(last.x))
            inverse = one / self._denominator(total)
            numerator = total.map(lambda t: t[..., :-1])
            numerator.e = numerator.e + p.factor * numerator.m  # may come from the result, which was rounded
            last = -((grad * numerator).sum(-1, keepdim=True) * inverse * inverse)
            grad = grad * inverse
        by_total = Num(p, *(torch.cat(pair, -1) for pair in zip(_parts(grad), _parts(last), strict=True)))
        by_weight = by_total.matmul(v.map(lambda t: t.mT), rounded=2).where(seen)
        by_q = by_weight.matmul(k, rounded=2)
        by_k = by_weight.map(lambda t: t.mT).matmul(q, rounded=2)
        by_v = weight.map(lambda t: t.mT).matmul(by_total, rounded=2)
        by_before = q.map(lambda t: t.mT).matmul(by_total, rounded=2)
        if before is not None:
            by_q = by_q + by_total.matmul(before.map(lambda t: t.mT), rounded=2)
        if "S" in cotangents or "z" in cotangents:
            S = zeros_if_none(cotangents, "S", state.x[..., :-1])
            z = zeros_if_none(cotangents, "z", state.x[..., -1])
            by_state = p.num(torch.cat([S.double(), z.double().unsqueeze(-1)], -1))
            by_k = by_k + v.matmul(by_state.map(lambda t: t.mT), rounded=2)
            by_v = by_v + k.matmul(by_state, rounded=2)
            by_before = by_before + by_state
        dtype = a["q"].dtype
        found = {
            "q": _back(by_q * self.slope_q, dtype),
            "k": _back(by_k * self.slope_k, dtype),
            "v": _back(by_v.map(_all_but_last), dtype),
        }
        if before is not None:
            found["S"], found["z"] = (by_before.map(part).to(_wide(dtype)) for part in (_all_but_last, _last))
        return found


def _all_but_last(t: Tensor) -> Tensor:
    return t[..., :-1]


def _last(t: Tensor) -> Tensor:
    return t[..., -1]


def _parts(n: Num) -> tuple[Tensor, Tensor, Tensor]:
    return n.x, n.m, n.e


HAS_SCALE = "scale" in inspect.signature(vk.linear_attention).parameters


@generator
def linear_attention(draw: Draw) -> Case:
    dtype, batch, heads = draw.dtype(), draw.batch(), draw.between(1, 3)
    length = draw.size()
    while batch * heads * length**2 > AREA * (8 if draw.large else 1):
        length //= 2
    size, wide = draw.size(140, empty=0.01), draw.size(140, empty=0.01)
    if draw.chance(0.5):
        wide = size
    kind = draw.pick("normal", None)
    causal = draw.chance(0.6)
    a = {
        "q": draw.tensor(batch, length, heads, size, dtype=dtype, kind=kind),
        "k": draw.tensor(batch, length, heads, size, dtype=dtype, kind=kind),
        "v": draw.tensor(batch, length, heads, wide, dtype=dtype),
        "feature_map": draw.pick("relu", "elu1", "identity"),
        "causal": causal,
        "block_size": draw.pick(1, 2, 7, 16, 31, 64, 128, 130, max(1, length)),
        "normalize": draw.chance(0.6),
        "return_state": draw.chance(0.5),
    }
    wanted = {name: a[name] for name in "qkv"}
    if draw.chance(0.5):
        kind = "normal"
        S = draw.tensor(batch, heads, size, wide, dtype=_wide(dtype), kind=kind)
        z = draw.positive(batch, heads, size, dtype=_wide(dtype))
        a["state"] = vk.LinearAttentionState(S, z)
        wanted |= {"S": S, "z": z}
    if HAS_SCALE and draw.chance(0.4):
        a["scale"] = draw.pick(1.0, 0.125, 3.0, 0.0, -0.5)
    return LinearAttention(a, wanted)
