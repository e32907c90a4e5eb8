"""Merging against the published algorithms, written out: ToMe (arXiv 2210.09461) and ToMe for diffusion (2303.17604).

Both return the unmerged sources, best similarity last, and then the destinations; rows of a plan are in order of the
tokens. Rows are compared after that permutation. The definitions do not coincide in three places, which are left out:

- ToMe merges at most N // 2 tokens. Of an odd number of tokens the last is a source here as there, so that a plan can
  merge one more.
- In its second round ToMe splits the rows in the order that its first round left them in. A plan splits them in order
  of the tokens, unless they are brought into that order first; both are compared.
- ToMe for diffusion has no destinations in the partial cells at the far border; a plan has.

Similarities that nearly tie would depend on rounding: every case is asserted to have none.
"""

from math import prod
from typing import NamedTuple

import pytest
import torch
from bank_helpers import backend_for, cpu_backends
from torch import Tensor

import vidmem_kernels as vk

MERGING = pytest.mark.parametrize(
    "backend", cpu_backends("match_tokens", "match_neighbors", "merge_tokens", "unmerge_tokens")
)


def take(x, index):
    """Rows (B, K) of x (B, N, C)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


class Matching(NamedTuple):
    """Soft matching of tokens split into sources and destinations.

    `source` (S,) and `destination` (D,) are positions; `unmerged` (B, S - r) and `merged` (B, r) number the sources,
    `into` (B, r) the destination of each merged one.
    """

    source: Tensor
    destination: Tensor
    unmerged: Tensor
    merged: Tensor
    into: Tensor

    def merge(self, x, mode):
        sources, destinations = x[:, self.source], x[:, self.destination]
        gone = take(sources, self.merged)
        index = self.into.unsqueeze(2).expand_as(gone)
        return torch.cat(
            [take(sources, self.unmerged), destinations.scatter_reduce(1, index, gone, reduce=mode)], dim=1
        )

    def weighted_merge(self, x, size):
        """merge_wavg: sums of tokens times size, divided by sums of sizes."""
        total = self.merge(size.unsqueeze(2), "sum")
        return self.merge(x * size.unsqueeze(2), "sum") / total, total.squeeze(2)

    def unmerge(self, y, tokens):
        count = self.unmerged.shape[1]
        kept, destinations = y[:, :count], y[:, count:]
        out = y.new_full((y.shape[0], tokens, y.shape[2]), float("nan"))
        out[:, self.destination] = destinations
        lane = torch.arange(len(y)).unsqueeze(1)
        out[lane, self.source[self.unmerged]] = kept
        out[lane, self.source[self.merged]] = take(destinations, self.into)
        return out

    def positions(self):
        """(B, M) the token that each row of `merge` was at."""
        return torch.cat([self.source[self.unmerged], self.destination.expand(len(self.unmerged), -1)], dim=1)


def soft_match(metric, source, destination, r):
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, source] @ unit[:, destination].transpose(-1, -2)
    node_max, node_idx = scores.max(dim=-1)
    edges = node_max.argsort(dim=-1, descending=True)
    merged = edges[:, :r]
    best = scores.topk(min(2, len(destination)), dim=-1).values
    assert (best.diff(dim=-1) < -1e-6).all(), "two destinations nearly tie"
    assert (node_max.sort(dim=1).values.diff(dim=1) > 1e-6).all(), "two sources nearly tie"
    return Matching(source, destination, edges[:, r:], merged, node_idx.gather(1, merged))


def tome(metric, r):
    position = torch.arange(metric.shape[1])
    return soft_match(metric, position[::2], position[1::2], r)


def tome_on_a_grid(metric, grid, cell, r):
    """The split of ToMe for diffusion, with the first token of each cell where it draws one, and frames as 3D cells."""
    counts = [n // c for n, c in zip(grid, cell, strict=True)]
    marks = torch.zeros(*counts, prod(cell), dtype=torch.int64)
    marks[..., 0] = -1
    marks = marks.view(*counts, *cell).permute(0, 3, 1, 4, 2, 5).reshape(-1)
    ordered = marks.argsort(stable=True)
    destinations = prod(counts)
    return soft_match(metric, ordered[destinations:], ordered[:destinations], r)


def check_plan(plan, matching, tokens):
    """Asserts that the same tokens merge into the same; returns the row (B, M) of each row of the published order."""
    positions = matching.positions()
    rows = plan.assignment.long().gather(1, positions)
    assert torch.equal(rows.sort(dim=1).values, torch.arange(plan.kept.shape[1]).expand(len(rows), -1))
    assert torch.equal(plan.kept.long().gather(1, rows), positions)
    gone = matching.source[matching.merged]
    joined = plan.kept.long().gather(1, plan.assignment.long().gather(1, gone))
    assert torch.equal(joined, matching.destination[matching.into])
    return rows


def check(metric, x, size, plan, matching, backend):
    """Asserts that tokens merge and come back alike; returns our merged tokens, sizes and the row permutation."""
    tokens = metric.shape[1]
    rows = check_plan(plan, matching, tokens)
    merged = vk.merge_tokens(x, plan, size, backend=backend_for("merge_tokens", backend))
    means, sizes = matching.weighted_merge(x, torch.ones(x.shape[:2]) if size is None else size)
    torch.testing.assert_close(take(merged.tokens, rows), means)
    torch.testing.assert_close(merged.size.gather(1, rows), sizes)
    if size is None:
        torch.testing.assert_close(take(merged.tokens, rows), matching.merge(x, "mean"))
    back = vk.unmerge_tokens(merged.tokens, plan, backend=backend_for("unmerge_tokens", backend))
    torch.testing.assert_close(back, matching.unmerge(means, tokens))
    return merged, rows


@MERGING
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(
    ("tokens", "r"), [(2, 1), (3, 1), (10, 0), (64, 20), (64, 32), (65, 1), (65, 32), (197, 16), (197, 98)]
)
def test_tome(backend, tokens, r, sized):
    metric, x = torch.randn(3, tokens, 16), torch.randn(3, tokens, 7)
    size = torch.randint(1, 9, (3, tokens)).float() if sized else None
    plan = vk.match_tokens(metric, r, backend=backend_for("match_tokens", backend))
    check(metric, x, size, plan, tome(metric, r), backend)


def test_the_odd_last_token_is_a_source():
    metric = torch.randn(1, 9, 4)
    matching = tome(metric, 4)
    assert matching.source.tolist() == [0, 2, 4, 6, 8] and matching.destination.tolist() == [1, 3, 5, 7]
    assert vk.match_tokens(metric, 5).kept.tolist() == [[1, 3, 5, 7]]  # one more than ToMe would merge


@MERGING
@pytest.mark.parametrize("order", ["of the tokens", "of ToMe"])
@pytest.mark.parametrize("tokens", [64, 99])
def test_weighted_means_over_rounds(backend, tokens, order):
    """Three rounds that carry sizes and merge the metric like the tokens."""
    metric, x = torch.randn(2, tokens, 16), torch.randn(2, tokens, 5)
    ours = theirs = torch.cat([metric, x], dim=2)
    our_size = their_size = torch.ones(2, tokens)
    for r in (20, 13, 7):
        plan = vk.match_tokens(ours[..., :16], r, backend=backend_for("match_tokens", backend))
        matching = tome(theirs[..., :16].contiguous(), r)
        rows = check_plan(plan, matching, ours.shape[1])
        ours, our_size = vk.merge_tokens(ours, plan, our_size, backend=backend_for("merge_tokens", backend))
        theirs, their_size = matching.weighted_merge(theirs, their_size)
        if order == "of ToMe":
            ours, our_size = take(ours, rows), our_size.gather(1, rows)
        else:
            back = rows.argsort(dim=1)
            theirs, their_size = take(theirs, back), their_size.gather(1, back)
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(our_size, their_size)
    assert our_size.shape == (2, tokens - 40) and (our_size.sum(dim=1) == tokens).all() and our_size.max() > 2
    mean = (ours * our_size.unsqueeze(2)).sum(dim=1) / tokens
    torch.testing.assert_close(mean, torch.cat([metric, x], dim=2).mean(dim=1), rtol=1e-5, atol=1e-6)


@MERGING
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize(
    ("grid", "cell"),
    [
        ((1, 8, 12), (1, 2, 2)),
        ((1, 9, 8), (1, 3, 2)),
        ((1, 6, 6), (1, 1, 3)),
        ((4, 6, 8), (2, 2, 2)),
        ((3, 4, 6), (1, 2, 2)),
        ((6, 2, 5), (3, 1, 5)),
    ],
)
def test_tome_for_diffusion(backend, grid, cell, sized):
    tokens = prod(grid)
    metric, x = torch.randn(2, tokens, 16), torch.randn(2, tokens, 7)
    size = torch.randint(1, 9, (2, tokens)).float() if sized else None
    sources = tokens - tokens // prod(cell)
    for r in (1, sources // 2, sources):
        plan = vk.match_tokens(metric, r, grid=grid, stride=cell, backend=backend_for("match_tokens", backend))
        matching = tome_on_a_grid(metric, grid, cell, r)
        assert len(matching.source) == sources
        check(metric, x, size, plan, matching, backend)
