"""The performance goals on an H200 in bfloat16: the rows that gpu_suite.sh measures before all others.

A row names an entry of shapes.py and a pass. `floor_ms` is computed from the required work at 4.3 TB/s and 790 TFLOP/s;
a run compares with the floor at the rates that it measures itself. N = 32,760 is a clip at 480 x 832.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Row = dict[str, Any]


class Target(NamedTuple):
    """A goal for one op, shape and pass.

    Attributes:
        title: the row in words.
        op: benchmark.
        shape: name of its shape.
        which: pass.
        floor_ms: minimum milliseconds at the rates above; None if only host memory limits it.
        of_floor: fraction of the floor's speed that ours should reach.
        max_ms: milliseconds that ours may take.
        faster: name, or part of the name, of alternatives -> how many times as fast as the best of them ours should be;
            "" is all of them.
    """

    title: str
    op: str
    shape: str
    which: str
    floor_ms: float | None
    of_floor: float | None = None
    max_ms: float | None = None
    faster: dict[str, float] = {}

    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, self.which

    def unmet(self, ours: Row, others: list[Row]) -> list[str]:
        """The goals that a measured row misses, in words; `others` are the rows of its alternatives that were timed."""
        found = []
        if self.of_floor is not None and ours["floor_fraction"] < self.of_floor:
            found.append(f"{ours['floor_fraction']:.0%} of the floor, not {self.of_floor:.0%}")
        if self.max_ms is not None and ours["median_ms"] > self.max_ms:
            found.append(f"{ours['median_ms']:.3g} ms, not {self.max_ms:.3g}")
        for name, ratio in self.faster.items():
            against = [row for row in others if name in row["contender"]]
            best = min(against, key=lambda row: row["over_ours"], default=None)
            if best is None:
                found.append(f"not compared with {name or 'anything'}")
            elif best["over_ours"] < ratio:
                found.append(f"{best['over_ours']:.2f}x {best['contender']}, not {ratio:g}x")
        return found


FLEX = "FlexAttention"
PLAIN = {"": 0.99}  # dispatch may add 1 %
FRAMES = {"each frame": 1.2, FLEX: 1}

TARGETS = (
    Target("match, half and half, C = 128", "match_tokens", "clip480p", "fwd", 0.087, None, 0.2, {"ToMe": 3}),
    Target("match in a window, 561,600 tokens", "match_tokens_window", "history60s", "fwd", 0.034, None, 1.0),
    Target("merge half", "merge_tokens", "clip480p", "fwd", 0.070, 0.75, None, {"scatter_reduce": 3}),
    Target("unmerge half", "unmerge_tokens", "clip480p", "fwd", 0.070, 0.75),
    Target("gather", "gather_tokens", "history20s", "fwd", 0.094, 0.85),
    Target("gather int8", "gather_tokens_int8", "history20s", "fwd", 0.070, 0.8, None, {"multiply": 2.5}),
    Target("gather fp8", "gather_tokens_fp8", "history20s", "fwd", 0.070, 0.8, None, {"multiply": 2.5}),
    Target("gather from the host, 5,120 rows", "gather_tokens_pinned", "history20s", "fwd", None, 0.8),
    Target("top-k blocks of 561,600", "topk_blocks", "clip480p-history60s", "fwd", 0.425, None, None, {"pooled": 3}),
    Target("linear", "linear_attention", "clip480p", "fwd", 0.094, 0.65, None, {"compiled": 3}),
    Target("linear", "linear_attention", "clip480p", "bwd", 0.165, None, 0.5),
    Target("linear, causal", "linear_attention_causal", "clip480p", "fwd", 0.094, None, 0.2, {"fla fused": 1.3}),
    Target("linear, causal", "linear_attention_causal", "clip480p", "bwd", 0.165, None, 1.0),
    Target("attention", "cross_attention", "clip480p-memory5k", "fwd", 2.6, None, None, PLAIN),
    Target("attention", "cross_attention", "clip480p-memory5k", "bwd", 6.6, None, None, PLAIN),
    Target("attention with a bias", "cross_attention_bias", "clip480p-memory5k", "fwd", 2.6, 0.72),
    Target("attention with a bias", "cross_attention_bias", "clip480p-memory5k", "bwd", 6.6, 0.45, None, {FLEX: 1}),
    Target("attention in a window", "cross_attention_window", "clip480p", "fwd", 2.1, None, None, {"each frame": 1.3}),
    Target("attention in a window", "cross_attention_window", "clip480p", "bwd", 5.3, None, None, FRAMES),
    Target("attention to blocks", "cross_attention_blocks", "clip480p", "fwd", 1.06, 0.5, None, {FLEX: 1.2}),
    Target("attention to blocks", "cross_attention_blocks", "clip480p", "bwd", 2.6, None, None, {FLEX: 1}),
)
BY_KEY = {target.key(): target for target in TARGETS}
