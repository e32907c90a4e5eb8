"""Matching, merging and unmerging of tokens."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F

import vidmem_kernels as vk

from ..registry import Benchmark, Unsupported, Work, baseline, benchmark, randn
from ..shapes import CPU, GPU, MEMORY_20S, N240, N480, SMOKE, Shape

STRIDE, WINDOW = (2, 2, 2), (1, 1, 1)
SCORE_BYTES = 2**33  # limit for baselines that hold all scores


def _cells(grid):
    return [-(-n // s) for n, s in zip(grid, STRIDE, strict=True)]


class Match(Benchmark):
    """Compares plans by the sorted similarities of the merged pairs, as near ties may be decided either way."""

    selects = True

    def make(self, s, dtype, device, rng):
        return {"metric": randn(rng, dtype, 1, s["N"], s["C"])}

    def is_source(self, s, device):
        """(N,) bool"""
        raise NotImplementedError

    def num_merge(self, s):
        return s["N"] // 4

    def tokens(self, s):
        """The number of tokens that the plan covers."""
        return s["N"]

    def comparable(self, results, x, s):
        # A baseline returns the positions of (merged sources, their destinations); a plan has the same for every token.
        if isinstance(results, vk.MergePlan):
            target = results.kept.long().gather(1, results.assignment.long())[0]
        else:
            source, destination = results
            target = torch.arange(self.tokens(s), device=source.device)
            target[source[0]] = destination[0]
        source = (target != torch.arange(self.tokens(s), device=target.device)).nonzero()[:, 0]
        destination = target[source]
        assert len(source) == self.num_merge(s), f"{len(source)} tokens merge, not {self.num_merge(s)}"
        is_source = self.is_source(s, source.device)
        assert is_source[source].all() and not is_source[destination].any(), "a pair is no source and destination"
        self.check_pairs(source, destination, s)
        unit = F.normalize(self.metric(x)[0].double(), dim=1)
        return (unit[source] * unit[destination]).sum(1).sort().values

    def metric(self, x):
        """(1, N, C) of the tokens that the plan covers."""
        return x["metric"]

    def check_pairs(self, source, destination, s):
        """Asserts that sources may merge with these destinations."""

    def bytes(self, s, itemsize):
        tokens, rows = self.tokens(s), self.tokens(s) - self.num_merge(s)
        return tokens * s["C"] * itemsize + 4 * (2 * tokens + 2 * rows)


@benchmark("match_tokens")
class MatchTokens(Match):
    def call(self, x, s, backend):
        return vk.match_tokens(x["metric"], self.num_merge(s), backend=backend)

    def is_source(self, s, device):
        return torch.arange(s["N"], device=device) % 2 == 0

    def work(self, s, itemsize):
        return Work(self.bytes(s, itemsize), 2 * (s["N"] / 2) ** 2 * s["C"])

    @baseline("ToMe composition", compiled=True)
    def tome(self, x, s):
        metric = x["metric"]
        if (s["N"] / 2) ** 2 * metric.itemsize > SCORE_BYTES:
            raise Unsupported(f"its scores take {(s['N'] / 2) ** 2 * metric.itemsize / 2**30:.0f} GiB")
        metric = metric / metric.norm(dim=-1, keepdim=True)
        a, b = metric[:, ::2], metric[:, 1::2]
        score, destination = (a @ b.transpose(1, 2)).max(dim=-1)
        source = score.argsort(dim=-1, descending=True)[:, : self.num_merge(s)]
        return 2 * source, 2 * destination.gather(1, source) + 1

    @baseline("ToMe composition, 1,024 sources at a time")
    def chunked(self, x, s):
        unit = F.normalize(x["metric"], dim=-1)
        b = unit[:, 1::2].transpose(1, 2)
        best = [(a @ b).max(dim=-1) for a in unit[:, ::2].split(1024, dim=1)]
        score, destination = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
        source = score.topk(self.num_merge(s), dim=1, sorted=False).indices
        return 2 * source, 2 * destination.gather(1, source) + 1


@benchmark("match_tokens_window", covers="match_tokens")
class MatchTokensWindow(Match):
    def call(self, x, s, backend):
        return vk.match_tokens(
            x["metric"], self.num_merge(s), grid=s["grid"], stride=STRIDE, window=WINDOW, backend=backend
        )

    def is_source(self, s, device):
        mask = torch.ones(s["grid"], dtype=torch.bool, device=device)
        mask[:: STRIDE[0], :: STRIDE[1], :: STRIDE[2]] = False
        return mask.flatten()

    def check_pairs(self, source, destination, s):
        _, height, width = s["grid"]
        cells = [
            torch.stack([p // (height * width) // 2, p // width % height // 2, p % width // 2])
            for p in (source, destination)
        ]
        assert ((cells[0] - cells[1]).abs() <= 1).all(), "a destination is outside the window"

    def work(self, s, itemsize):
        seen = prod(2 * w + 1 for w in WINDOW)
        return Work(self.bytes(s, itemsize), 2 * (s["N"] - prod(_cells(s["grid"]))) * seen * s["C"])

    @baseline("27 neighbour cells, bmm", compiled=True)
    def neighbour_cells(self, x, s):
        """Cells as a batch: the 8 tokens of each against the destinations of the 27 cells around it."""
        grid, cells = s["grid"], _cells(s["grid"])
        device, dtype = x["metric"].device, x["metric"].dtype
        unit = F.normalize(x["metric"], dim=-1).view(*grid, s["C"])
        spare = [c * n - g for c, n, g in zip(cells, STRIDE, grid, strict=True)]
        padded = F.pad(unit, (0, 0, 0, spare[2], 0, spare[1], 0, spare[0]))
        blocks = padded.view(cells[0], 2, cells[1], 2, cells[2], 2, s["C"]).permute(0, 2, 4, 1, 3, 5, 6)
        around = F.pad(blocks[:, :, :, 0, 0, 0], (0, 0, 1, 1, 1, 1, 1, 1))
        around = around.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1)
        scores = blocks.reshape(-1, 8, s["C"]) @ around.reshape(-1, s["C"], 27)
        inside = F.pad(torch.ones(cells, device=device, dtype=dtype), (1, 1, 1, 1, 1, 1))
        inside = inside.unfold(0, 3, 1).unfold(1, 3, 1).unfold(2, 3, 1).reshape(-1, 1, 27)
        best, neighbour = scores.masked_fill(inside == 0, -2).max(dim=2)
        position = torch.arange(prod(grid), device=device).view(grid)
        numbers = F.pad(position, (0, spare[2], 0, spare[1], 0, spare[0]), value=-1)
        numbers = numbers.view(cells[0], 2, cells[1], 2, cells[2], 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 8)
        best = best.masked_fill(numbers < 0, -3)
        best[:, 0] = -3  # the destinations themselves
        merged = best.flatten().topk(self.num_merge(s), sorted=False).indices
        cell, neighbour = merged // 8, neighbour.flatten()[merged]
        t, h, w = cell // (cells[1] * cells[2]), cell // cells[2] % cells[1], cell % cells[2]
        t, h, w = t + neighbour // 9 - 1, h + neighbour // 3 % 3 - 1, w + neighbour % 3 - 1
        destination = (2 * t * grid[1] + 2 * h) * grid[2] + 2 * w
        return numbers.flatten()[merged].unsqueeze(0), destination.unsqueeze(0)


_INTO = {
    "smoke": Shape({"N": 60, "M": 43, "C": 24}, SMOKE),
    "clip240p-memory": Shape({"N": N240, "M": N240 // 2, "C": 128}, "a clip into a memory of half its size", CPU),
    "clip480p-memory": Shape({"N": N480, "M": MEMORY_20S, "C": 128}, "a 480 x 832 clip into 20 s of memory", GPU),
}


@benchmark("match_into", shapes=_INTO)
class MatchInto(Match):
    def make(self, s, dtype, device, rng):
        return {"metric": randn(rng, dtype, 1, s["N"], s["C"]), "memory": randn(rng, dtype, 1, s["M"], s["C"])}

    def call(self, x, s, backend):
        return vk.match_into(x["metric"], x["memory"], self.num_merge(s), backend=backend)

    def num_merge(self, s):
        return s["N"] // 2

    def tokens(self, s):
        return s["M"] + s["N"]

    def metric(self, x):
        return torch.cat([x["memory"], x["metric"]], dim=1)

    def is_source(self, s, device):
        return torch.arange(self.tokens(s), device=device) >= s["M"]

    def work(self, s, itemsize):
        return Work(self.bytes(s, itemsize), 2 * s["N"] * s["M"] * s["C"])

    @baseline("product and maximum, 1,024 tokens at a time", compiled=True)
    def chunked(self, x, s):
        memory = F.normalize(x["memory"], dim=-1).transpose(1, 2)
        best = [(a @ memory).max(dim=-1) for a in F.normalize(x["metric"], dim=-1).split(1024, dim=1)]
        score, destination = (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
        source = score.topk(self.num_merge(s), dim=1, sorted=False).indices
        return s["M"] + source, destination.gather(1, source)


@benchmark("match_neighbors")
class MatchNeighbors(Match):
    def call(self, x, s, backend):
        return vk.match_neighbors(x["metric"], self.num_merge(s), grid=s["grid"], backend=backend)

    def is_source(self, s, device):
        t, h, w = (torch.arange(n, device=device) for n in s["grid"])
        return ((t[:, None, None] + h[:, None] + w) % 2 == 1).flatten()

    def check_pairs(self, source, destination, s):
        _, height, width = s["grid"]
        steps = [(p // (height * width), p // width % height, p % width) for p in (source, destination)]
        apart = sum((a - b).abs() for a, b in zip(*steps, strict=True))
        assert (apart == 1).all(), "a destination is no neighbour"

    def work(self, s, itemsize):
        return Work(self.bytes(s, itemsize), 6 * s["N"] * s["C"])

    @baseline("shifted products", compiled=True)
    def shifted(self, x, s):
        grid, device = s["grid"], x["metric"].device
        unit = F.normalize(x["metric"], dim=-1)[0].view(*grid, s["C"])
        position = torch.arange(prod(grid), device=device).view(grid)
        scores, there = [], []
        for axis, size in enumerate(grid):
            along = (unit.narrow(axis, 0, size - 1) * unit.narrow(axis, 1, size - 1)).sum(-1)
            ends = along.new_full([1 if a == axis else n for a, n in enumerate(grid)], -2)
            scores += [torch.cat([ends, along], axis), torch.cat([along, ends], axis)]
            there += [position.roll(1, axis), position.roll(-1, axis)]
        best, which = torch.stack(scores).max(0)
        best = best.masked_fill(~self.is_source(s, device).view(grid), -3)
        source = best.flatten().topk(self.num_merge(s), sorted=False).indices
        destination = torch.stack(there).gather(0, which[None])[0].flatten()[source]
        return source.unsqueeze(0), destination.unsqueeze(0)


def _plan(rng, s):
    """A plan that merges half of the tokens, by random similarities."""
    metric = randn(rng, torch.float32, 1, s["N"], 8)
    plan = vk.match_tokens(metric, s["N"] // 2, backend="reference")
    index = plan.assignment.long()
    return {"plan": plan, "index": index, "expanded": index.unsqueeze(2).expand(-1, -1, s["C"])}


@benchmark("merge_tokens")
class MergeTokens(Benchmark):
    differentiable = ("x",)

    def make(self, s, dtype, device, rng):
        size = torch.randint(1, 5, (1, s["N"]), generator=rng, device=device).float()
        return {"x": randn(rng, dtype, 1, s["N"], s["C"]), "size": size, **_plan(rng, s)}

    def call(self, x, s, backend):
        return tuple(vk.merge_tokens(x["x"], x["plan"], x["size"], backend=backend))

    def work(self, s, itemsize):
        rows = s["N"] - s["N"] // 2
        return Work((s["N"] + rows) * (s["C"] * itemsize + 8))

    work_backward = work

    def total(self, x, s):
        return x["size"].new_zeros(1, s["N"] - s["N"] // 2).scatter_add_(1, x["index"], x["size"])

    @baseline("ToMe, scatter_reduce")
    def tome(self, x, s):
        weighted = x["x"] * x["size"].unsqueeze(2).to(x["x"].dtype)
        sums = weighted.new_zeros(1, s["N"] - s["N"] // 2, s["C"])
        sums = sums.scatter_reduce(1, x["expanded"], weighted, reduce="sum")
        total = self.total(x, s)
        return sums / total.unsqueeze(2).to(sums.dtype), total

    @baseline("index_add")
    def index_add(self, x, s):
        weighted = x["x"][0] * x["size"][0].unsqueeze(1).to(x["x"].dtype)
        sums = weighted.new_zeros(s["N"] - s["N"] // 2, s["C"]).index_add(0, x["index"][0], weighted)
        total = self.total(x, s)
        return (sums / total[0].unsqueeze(1).to(sums.dtype)).unsqueeze(0), total


@benchmark("unmerge_tokens")
class UnmergeTokens(Benchmark):
    differentiable = ("y",)

    def make(self, s, dtype, device, rng):
        return {"y": randn(rng, dtype, 1, s["N"] - s["N"] // 2, s["C"]), **_plan(rng, s)}

    def call(self, x, s, backend):
        return vk.unmerge_tokens(x["y"], x["plan"], backend=backend)

    def work(self, s, itemsize):
        rows = s["N"] - s["N"] // 2
        return Work((s["N"] + rows) * s["C"] * itemsize + 4 * s["N"])

    work_backward = work

    @baseline("gather, expanded index")
    def gather(self, x, s):
        return x["y"].gather(1, x["expanded"])

    @baseline("index_select")
    def index_select(self, x, s):
        return x["y"][0].index_select(0, x["index"][0]).unsqueeze(0)
