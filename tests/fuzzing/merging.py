"""Cases of match_tokens, match_into, match_neighbors, merge_tokens and unmerge_tokens."""

from __future__ import annotations

from collections.abc import Callable

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
        """(B, N) which tokens may merge, and (B, N, N) which destinations each of them sees."""
        raise NotImplementedError

    def metric(self) -> Tensor:
        """(B, N, C) of all tokens of the plan."""
        return self.args["metric"]

    def most(self) -> int:
        """How many tokens may merge in every batch element."""
        sources, _ = self.pairs()
        return int(sources.sum(1).amin()) if len(sources) else 0

    def rows(self, low: Tensor, high: Tensor) -> tuple[int, int]:
        """The fewest and most tokens that may have merged."""
        if self.args.get("num_merge") is None:
            return (int(self.args["ratio"] * self.most()),) * 2
        return (self.args["num_merge"],) * 2

    def check(self, results):
        metric = self.metric()
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
        must(bool(sources[merged].all()), "a token that is no source was merged")
        none = -torch.inf
        fewest, most = self.rows((best - e).masked_fill(~sources, none), (best + e).masked_fill(~sources, none))
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
        like = (seen.unsqueeze(2) == seen.unsqueeze(1)).all(3) & sources.unsqueeze(2) & sources.unsqueeze(1)
        rows_same = (metric.unsqueeze(2) == metric.unsqueeze(1)).all(3)
        passed = rows_same & like & lower & merged.unsqueeze(2) & alone.unsqueeze(1)
        must(not passed.any(), "of equal sources not the first was merged")


class MatchTokens(Match):
    function = staticmethod(vk.match_tokens)

    def pairs(self):
        a, (batch, tokens) = self.args, self.args["metric"].shape[:2]
        grid, near = a.get("grid"), torch.ones(tokens, tokens, dtype=torch.bool)
        if grid is None:
            to = a.get("destinations", torch.arange(tokens).unsqueeze(0) % 2 == 1)
        else:
            where, step = _positions(grid), torch.tensor(a.get("stride", (2, 2, 2)))
            cell = where // step
            to = (where % step == 0).all(1)
            if a.get("border") == "none":
                to &= ((cell + 1) * step <= torch.tensor(grid)).all(1)
            if "window" in a:
                near = ((cell.unsqueeze(1) - cell).abs() <= torch.tensor(a["window"])).all(2)
            to = to.unsqueeze(0)
        alone = a.get("protect", torch.zeros(1, tokens, dtype=torch.bool))
        to, alone = to.expand(batch, -1), alone.expand(batch, -1)
        sources = ~to & ~alone
        seen = sources.unsqueeze(2) & (to & ~alone).unsqueeze(1) & near
        return seen.any(2), seen


class MatchInto(Match):
    function = staticmethod(vk.match_into)

    def metric(self):
        metric, memory = self.args["metric"], self.args["memory_metric"]
        return torch.cat([memory.expand(metric.shape[0], -1, -1), metric], dim=1)

    def pairs(self):
        rows, tokens = self.args["memory_metric"].shape[1], self.args["metric"].shape[1]
        into = torch.arange(rows + tokens) < rows
        seen = (~into.unsqueeze(1) & into).expand(self.args["metric"].shape[0], -1, -1)
        return seen.any(2), seen


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
        if draw.chance(0.3):
            a["border"] = "none"
        tokens = grid[0] * grid[1] * grid[2]
    else:
        tokens = draw.size(140)
    metric = _metric(draw, tokens)
    if "grid" not in a and draw.chance(0.4):
        marked = draw.between(0, tokens)
        a["destinations"] = _marks(
            draw, metric, lambda rows: draw.values(rows, tokens, dtype=torch.float32).argsort(dim=1) < marked
        )
    if draw.chance(0.4):
        share = draw.pick(0.05, 0.4, 0.9)
        a["protect"] = _marks(draw, metric, lambda rows: draw.mask(rows, tokens, share=share))
    return _choose(draw, MatchTokens({"metric": metric} | a))


def _marks(draw: Draw, metric: Tensor, make: Callable[[int], Tensor]) -> Tensor:
    """A mask (B|1, N) of any layout."""
    mask = make(1 if draw.chance(0.4) else metric.shape[0])
    return draw.layout(mask.to(torch.int8)).view(torch.bool)


def _choose(draw: Draw, case: Match) -> Match:
    """The case with how many tokens merge, or the part of those that may."""
    most = case.most()
    if draw.chance(0.3):
        case.args["ratio"] = draw.pick(0.0, 0.3, 0.5, 0.71, 1.0)
    else:
        case.args["num_merge"] = draw.pick(most, draw.between(0, most), draw.between(0, most))
    return case


@generator
def match_into(draw: Draw) -> Case:
    metric = _metric(draw, draw.size(90))
    batch, _, channels = metric.shape
    memory = draw.tensor(1 if draw.chance(0.3) else batch, draw.size(90), channels, dtype=metric.dtype)
    return _choose(draw, MatchInto({"metric": metric, "memory_metric": memory}))


class MatchNeighbors(Match):
    function = staticmethod(vk.match_neighbors)

    def pairs(self):
        where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in self.args["grid"]), indexing="ij"), -1).view(
            -1, 3
        )
        odd = where.sum(1) % 2 == 1
        seen = ((where.unsqueeze(1) - where).abs().sum(2) == 1) & odd.unsqueeze(1)
        batch = self.args["metric"].shape[0]
        return odd.expand(batch, -1), seen.expand(batch, -1, -1)

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


def _whole(plan: vk.MergePlan, batch: int) -> vk.MergePlan:
    """One plan for a batch as that of every element."""
    return vk.MergePlan(*(field.expand(batch, -1) for field in plan))


def _axes_of(like: Tensor, tokens: Num) -> Num:
    """(B, N, C) with the further axes of another tensor."""
    return tokens.map(lambda t: t.reshape(*t.shape[:2], *like.shape[2:]))


class Merge(Case):
    function = staticmethod(vk.merge_tokens)

    @property
    def plan(self) -> vk.MergePlan:
        return _whole(self.args["plan"], self.args["x"].shape[0])

    def _shares(self) -> tuple[Num, Num, Num]:
        """(B, N, 1) a token's share of its group, its size; (B, M, 1) the sizes of the groups."""
        x, plan, size = self.args["x"], self.plan, self.args.get("size")
        p = Precision(x.dtype)
        p.factor = p.factor_vanishing = 0.0
        size = torch.ones(x.shape[:2]) if size is None else size.expand(x.shape[0], -1)
        size = p.num(size).map(lambda t: t.unsqueeze(2))
        total = sum_rows(size, plan.assignment, plan.kept.shape[1])
        own = self._of_group(total)
        some = own.x > 0
        return (size / own.where(some, 1.0)).where(some), own, total

    def _of_group(self, rows: Num) -> Num:
        at = self.plan.assignment.long().unsqueeze(2)
        return rows.map(lambda t: t.gather(1, at.expand(-1, -1, t.shape[2])))

    def outputs(self, results):
        given, plan = self.args["x"], self.plan
        x = given.flatten(2)
        self.shares = share, _, total = self._shares()
        if "size" in self.args:  # a token of size 0 adds nothing, whatever it holds
            x = x.masked_fill((self.args["size"].expand(x.shape[0], -1) == 0).unsqueeze(2), 0)
        tokens = sum_rows(share * share.precision.num(x), plan.assignment, plan.kept.shape[1]).to(x.dtype)
        alone = plan.offsets.diff(dim=1) == 1
        counted = (alone & (total.x.squeeze(2) > 0)).unsqueeze(2)
        tokens.e = torch.where(counted, 0.0, tokens.e)  # a token alone comes out unchanged
        tokens = _axes_of(given, tokens)
        return {"tokens": tokens, "size": total.map(lambda t: t.squeeze(2)).to(results["size"].dtype)}

    def gradients(self, cotangents, results):
        given, plan = self.args["x"], self.plan
        x = given.flatten(2)
        share, own, _ = self.shares
        p = share.precision
        by_row = p.num(zeros_if_none(cotangents, "tokens", results["tokens"]).flatten(2))
        grad = self._of_group(by_row)
        found = {"x": _axes_of(given, (grad * share).to(x.dtype))}
        if "size" in self.args:
            along = (grad * p.num(x)).sum(2, keepdim=True)
            some = own.x > 0
            own = own.where(some, 1.0)
            along = along.where(some)
            mean = sum_rows(along * (share / own), plan.assignment, plan.kept.shape[1])
            by_total = p.num(zeros_if_none(cotangents, "size", results["size"]).unsqueeze(2)) - mean
            size = (along / own + self._of_group(by_total)).map(lambda t: t.squeeze(2))
            if self.args["size"].shape[0] != x.shape[0]:
                size = size.sum(0, keepdim=True)
            found["size"] = size.to(self.args["size"].dtype)
        return found


def _channels(draw: Draw) -> tuple[int, ...]:
    """Of tokens: one axis, or heads before it."""
    return (draw.between(0, 4), draw.size(40)) if draw.chance(0.2) else (draw.size(140),)


@generator
def merge_tokens(draw: Draw) -> Case:
    dtype, batch, tokens = draw.dtype(), draw.batch(), draw.size()
    x = draw.tensor(batch, tokens, *_channels(draw), dtype=dtype)
    a = {"x": x, "plan": _plan(draw, 1 if draw.chance(0.3) else batch, tokens)}
    wanted = {"x": x}
    if draw.chance(0.6):
        sizes = 1 if draw.chance(0.3) else batch
        a["size"] = wanted["size"] = draw.positive(sizes, tokens, dtype=torch.promote_types(dtype, torch.float32))
        if draw.chance(0.2):
            a["size"] = wanted["size"] = draw.layout(a["size"].masked_fill(draw.mask(sizes, tokens, share=0.5), 0))
    if draw.chance(0.1):  # touches nothing but its own group
        spoilt = draw.mask(batch, tokens, *(1 for _ in x.shape[2:]), share=0.1)
        a["x"] = draw.layout(x.masked_fill(spoilt, draw.pick(torch.nan, torch.inf)))
        wanted = {}
    return Merge(a, wanted)


class Unmerge(Case):
    function = staticmethod(vk.unmerge_tokens)

    def outputs(self, results):
        y = self.args["y"]
        at = _whole(self.args["plan"], y.shape[0]).assignment.long().unsqueeze(2)
        flat = y.detach().flatten(2)
        return {"out": _axes_of(y, exact(flat.gather(1, at.expand(-1, -1, flat.shape[2]))))}

    def gradients(self, cotangents, results):
        grad, y = cotangents["out"], self.args["y"]
        values = Precision(grad.dtype).num(grad.flatten(2))
        summed = sum_rows(values, _whole(self.args["plan"], y.shape[0]).assignment, y.shape[1])
        return {"y": _axes_of(y, summed.to(grad.dtype))}


@generator
def unmerge_tokens(draw: Draw) -> Case:
    batch, tokens = draw.batch(), draw.size()
    plan = _plan(draw, 1 if draw.chance(0.3) else batch, tokens)
    y = draw.tensor(batch, plan.kept.shape[1], *_channels(draw), dtype=draw.dtype())
    return Unmerge({"y": y, "plan": plan}, {"y": y})
