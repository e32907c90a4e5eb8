"""Cases of match_tokens, match_neighbors, merge_tokens and unmerge_tokens."""

from __future__ import annotations

import torch
from torch import Tensor

import vidmem_kernels as vk

from .bounds import Num, Precision, exact
from .case import Case, generator, must, zeros_if_none
from .draw import Draw
from .gathering import sum_rows

NO_SIMILARITY = -2.0

# --- plans ---


def check_plan(plan: dict[str, Tensor], batch: int, tokens: int) -> None:
    """A plan is a partition of the tokens, told twice, with rows in order of the tokens that they stand for."""
    assignment, kept, order, offsets = (plan[name].long() for name in ("assignment", "kept", "order", "offsets"))
    must(all(t.dtype == torch.int32 for t in plan.values()), "the plan is not int32")
    rows = kept.shape[1]
    shapes = [tuple(t.shape) for t in (assignment, kept, order, offsets)]
    must(shapes == [(batch, tokens), (batch, rows), (batch, tokens), (batch, rows + 1)], f"plan shapes {shapes}")
    if batch == 0:
        return
    for name, index, high in (("assignment", assignment, rows), ("kept", kept, tokens), ("order", order, tokens)):
        must(bool(((index >= 0) & (index < high)).all()), f"plan.{name} is out of range")
    must(bool((kept.diff(dim=1) > 0).all()), "plan.kept is not ascending")
    must(
        torch.equal(assignment.gather(1, kept), torch.arange(rows).expand(batch, rows)), "a row is not its kept token's"
    )
    must(torch.equal(order, assignment.argsort(dim=1, stable=True)), "plan.order is not the tokens by row")
    counts = torch.zeros(batch, rows, dtype=torch.int64).scatter_add_(1, assignment, torch.ones_like(assignment))
    must(bool((offsets[:, 0] == 0).all()) and torch.equal(offsets.diff(dim=1), counts), "plan.offsets do not fit")


class Match(Case):
    """A match is judged by the similarities that it chose, in float64: where two are equal within rounding, either."""

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(N,) which tokens are sources, and (N, N) which destinations each of them sees."""
        raise NotImplementedError

    def rows(self, low: Tensor, high: Tensor) -> tuple[int, int]:
        """The fewest and most tokens that may have merged."""
        return (self.args["num_merge"],) * 2

    def check(self, results):
        metric = self.args["metric"]
        batch, tokens, channels = metric.shape
        check_plan(results, batch, tokens)
        if batch == 0 or tokens == 0:
            return
        x = metric.double()
        peak = x.abs().amax(2, keepdim=True)
        x = x / peak.masked_fill(peak == 0, 1)
        norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
        x = x / norm.masked_fill(norm == 0, 1)
        # Two vectors divided by their peak and their norm (a sum of squares and a root), and their product.
        slack = Precision(metric.dtype).unit * (2 * channels + 12)
        sources, seen = self.pairs()
        score = (x @ x.mT).nan_to_num(nan=NO_SIMILARITY)
        score = score.masked_fill(~seen, -torch.inf)
        best = score.amax(2)
        sure = best == NO_SIMILARITY  # exactly so, whatever the rounding
        e = slack * (~sure)
        assignment, kept = results["assignment"].long(), results["kept"].long()
        alone = torch.zeros(batch, tokens, dtype=torch.bool).scatter_(1, kept, True)
        merged = ~alone
        must(bool(sources[None].expand(batch, -1)[merged].all()), "a token that is no source was merged")
        fewest, most = self.rows((best - e)[:, sources], (best + e)[:, sources])
        count = tokens - kept.shape[1]
        must(fewest <= count <= most, f"{count} tokens merged, not {fewest} to {most}")
        if count == 0:
            return
        into = kept.gather(1, assignment)
        chosen = score.gather(2, into.unsqueeze(2)).squeeze(2)
        must(bool((chosen > -torch.inf)[merged].all()), "a token was merged into one that it does not see")
        must(bool((chosen + 2 * e >= best)[merged].all()), "a token was merged into one less similar")
        weakest = (best + e).masked_fill(~merged, torch.inf).amin(1)
        spared = (best - e).masked_fill(merged | ~sources, -torch.inf).amax(1)
        must(bool((weakest >= spared).all()), "a more similar pair was not merged")
        # Of equal vectors, whose similarities are equal to the bit, the lower position wins.
        same = (metric.unsqueeze(2) == metric.unsqueeze(1)).all(3) | sure.unsqueeze(2)
        lower = torch.ones(tokens, tokens, dtype=torch.bool).tril(-1)  # [i, j]: j < i
        twins = same.gather(1, into.unsqueeze(2).expand(-1, -1, tokens)) | sure.unsqueeze(2)
        before = torch.arange(tokens) < into.unsqueeze(2)
        must(not (twins & before & seen & merged.unsqueeze(2)).any(), "of equal destinations not the first was taken")
        like = (seen.unsqueeze(1) == seen.unsqueeze(0)).all(2) & sources.unsqueeze(1) & sources
        rows_same = (metric.unsqueeze(2) == metric.unsqueeze(1)).all(3)
        passed = rows_same & like & lower & merged.unsqueeze(2) & alone.unsqueeze(1)
        must(not passed.any(), "of equal sources not the first was merged")


class MatchTokens(Match):
    function = staticmethod(vk.match_tokens)

    def pairs(self):
        grid, tokens = self.args.get("grid"), self.args["metric"].shape[1]
        if grid is None:
            even = torch.arange(tokens) % 2 == 0
            return even if tokens > 1 else torch.zeros_like(even), even.unsqueeze(1) & ~even
        stride = self.args.get("stride", (2, 2, 2))
        where = _positions(grid)
        step = torch.tensor(stride)
        first = (where % step == 0).all(1)
        seen = ~first.unsqueeze(1) & first
        if "window" in self.args:
            cell = where // step
            away = (cell.unsqueeze(1) - cell).abs()
            seen &= (away <= torch.tensor(self.args["window"])).all(2)
        return ~first, seen


def _positions(grid: tuple[int, int, int]) -> Tensor:
    """(N, 3) where each token is."""
    return torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).view(-1, 3)


def _grid(draw: Draw) -> tuple[int, int, int]:
    axes = [draw.between(1, 7) for _ in range(3)]
    if draw.chance(0.3):
        axes = [1, 1, draw.size(150)]
    if draw.chance(0.03):
        axes[0] = 0
    draw.random.shuffle(axes)
    return tuple(axes)


def _metric(draw: Draw, tokens: int) -> Tensor:
    batch, channels = draw.batch(), max(1, draw.size(140, empty=0))
    metric = draw.tensor(batch, tokens, channels, dtype=draw.dtype())
    if draw.chance(0.15):
        spoilt = metric.masked_fill(draw.mask(batch, tokens, 1, share=0.2), draw.pick(torch.nan, torch.inf))
        metric = draw.layout(spoilt)
    return metric


@generator
def match_tokens(draw: Draw) -> Case:
    a = {}
    if draw.chance(0.5):
        grid = _grid(draw)
        a["grid"] = grid
        a["stride"] = tuple(draw.between(1, 3) for _ in range(3))
        if draw.chance(0.6):
            a["window"] = tuple(draw.between(0, 2) for _ in range(3))
        tokens = grid[0] * grid[1] * grid[2]
    else:
        tokens = draw.size(140)
    case = MatchTokens({"metric": _metric(draw, tokens), "num_merge": 0} | a)
    most = int(case.pairs()[0].sum())
    case.args["num_merge"] = draw.pick(most, draw.between(0, most), draw.between(0, most))
    return case


class MatchNeighbors(Match):
    function = staticmethod(vk.match_neighbors)

    def pairs(self):
        where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in self.args["grid"]), indexing="ij"), -1).view(
            -1, 3
        )
        odd = where.sum(1) % 2 == 1
        return odd, ((where.unsqueeze(1) - where).abs().sum(2) == 1) & odd.unsqueeze(1)

    def rows(self, low, high):
        limit = self.args["num_merge"]
        limit = self.args["metric"].shape[1] // 2 if limit is None else limit
        if "threshold" not in self.args:
            return limit, limit
        fewest, most = (int((t >= self.args["threshold"]).sum(1).amin()) for t in (low, high))
        return min(limit, fewest), min(limit, most)


@generator
def match_neighbors(draw: Draw) -> Case:
    grid = _grid(draw)
    tokens = grid[0] * grid[1] * grid[2]
    a = {"metric": _metric(draw, tokens), "num_merge": draw.between(0, tokens // 2), "grid": grid}
    if draw.chance(0.5):
        a["threshold"] = draw.pick(-1.0, 0.0, 0.1, -0.2, 0.5, 1.0)
        if draw.chance(0.3):
            a["num_merge"] = None
    return MatchNeighbors(a)


# --- merging by a plan ---


def _plan(draw: Draw, batch: int, tokens: int) -> vk.MergePlan:
    """Of any assignment, with rows that have no token, or of a match."""
    if tokens and draw.chance(0.5):
        metric = draw.values(batch, tokens, 3, dtype=torch.float32, kind="normal")
        plan = vk.match_tokens(metric, draw.between(0, (tokens + 1) // 2 if tokens > 1 else 0), backend="reference")
    else:
        rows = max(1, draw.size(tokens + 3))
        plan = vk.MergePlan.from_assignment(draw.integers(0, rows, batch, tokens), rows)
    wide = draw.pick(torch.int32, torch.int64)
    return vk.MergePlan(*(draw.layout(t.to(wide)) for t in plan))


class Merge(Case):
    function = staticmethod(vk.merge_tokens)

    def _shares(self) -> tuple[Num, Num, Num]:
        """(B, N, 1) a token's share of its group, its size; (B, M, 1) the sizes of the groups."""
        x, plan, size = self.args["x"], self.args["plan"], self.args.get("size")
        p = Precision(x.dtype)
        p.factor = p.factor_vanishing = 0.0
        size = p.num(torch.ones(x.shape[:2]) if size is None else size).map(lambda t: t.unsqueeze(2))
        total = sum_rows(size, plan.assignment, plan.kept.shape[1])
        own = self._of_group(total)
        some = own.x > 0
        return (size / own.where(some, 1.0)).where(some), own, total

    def _of_group(self, rows: Num) -> Num:
        at = self.args["plan"].assignment.long().unsqueeze(2)
        return rows.map(lambda t: t.gather(1, at.expand(-1, -1, t.shape[2])))

    def outputs(self, results):
        x, plan = self.args["x"], self.args["plan"]
        self.shares = share, _, total = self._shares()
        if "size" in self.args:  # a token of size 0 adds nothing, whatever it holds
            x = x.masked_fill((self.args["size"] == 0).unsqueeze(2), 0)
        tokens = sum_rows(share * share.precision.num(x), plan.assignment, plan.kept.shape[1]).to(x.dtype)
        alone = plan.offsets.diff(dim=1) == 1
        counted = (alone & (total.x.squeeze(2) > 0)).unsqueeze(2)
        tokens.e = torch.where(counted, 0.0, tokens.e)  # a token alone comes out unchanged
        return {"tokens": tokens, "size": total.map(lambda t: t.squeeze(2)).to(results["size"].dtype)}

    def gradients(self, cotangents, results):
        x, plan = self.args["x"], self.args["plan"]
        share, own, _ = self.shares
        p = share.precision
        by_row = p.num(zeros_if_none(cotangents, "tokens", results["tokens"]))
        grad = self._of_group(by_row)
        found = {"x": (grad * share).to(x.dtype)}
        if "size" in self.args:
            along = (grad * p.num(x)).sum(2, keepdim=True)
            some = own.x > 0
            own = own.where(some, 1.0)
            along = along.where(some)
            mean = sum_rows(along * (share / own), plan.assignment, plan.kept.shape[1])
            by_total = p.num(zeros_if_none(cotangents, "size", results["size"]).unsqueeze(2)) - mean
            found["size"] = (
                (along / own + self._of_group(by_total)).map(lambda t: t.squeeze(2)).to(self.args["size"].dtype)
            )
        return found


@generator
def merge_tokens(draw: Draw) -> Case:
    dtype, batch, tokens = draw.dtype(), draw.batch(), draw.size()
    x = draw.tensor(batch, tokens, draw.size(140), dtype=dtype)
    a = {"x": x, "plan": _plan(draw, batch, tokens)}
    wanted = {"x": x}
    if draw.chance(0.6):
        a["size"] = wanted["size"] = draw.positive(batch, tokens, dtype=torch.promote_types(dtype, torch.float32))
        if draw.chance(0.2):
            a["size"] = wanted["size"] = draw.layout(a["size"].masked_fill(draw.mask(batch, tokens, share=0.5), 0))
    if draw.chance(0.1):  # touches nothing but its own group
        a["x"] = draw.layout(x.masked_fill(draw.mask(batch, tokens, 1, share=0.1), draw.pick(torch.nan, torch.inf)))
        wanted = {}
    return Merge(a, wanted)


class Unmerge(Case):
    function = staticmethod(vk.unmerge_tokens)

    def outputs(self, results):
        y, plan = self.args["y"], self.args["plan"]
        at = plan.assignment.long().unsqueeze(2)
        return {"out": exact(y.detach().gather(1, at.expand(-1, -1, y.shape[2])))}

    def gradients(self, cotangents, results):
        grad = cotangents["out"]
        values = Precision(grad.dtype).num(grad)
        return {"y": sum_rows(values, self.args["plan"].assignment, self.args["y"].shape[1]).to(grad.dtype)}


@generator
def unmerge_tokens(draw: Draw) -> Case:
    batch, tokens = draw.batch(), draw.size()
    plan = _plan(draw, batch, tokens)
    y = draw.tensor(batch, plan.kept.shape[1], draw.size(140), dtype=draw.dtype())
    return Unmerge({"y": y, "plan": plan}, {"y": y})
