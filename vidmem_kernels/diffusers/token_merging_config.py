"""What a user chooses of token merging in a model, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from .._checks import check_int, is_number

Ratio = float | Mapping[int, float] | Callable[[int, int], float]

_NAME = "TokenMergingConfig"
_METRICS = ("hidden", "key")
_SHARES = (None, "batch")


@dataclass(frozen=True)
class TokenMergingConfig:
    """How many tokens `apply_token_merging` merges in a model's self-attention, which, and how often they are matched.

    A ratio is a share of the video's tokens that are not protected, at most 1 - 1 / (t * h * w) of `stride`: .5 halves
    them. Where the grid's border cuts cells there may be fewer sources than that; then all of them merge. It is a
    number, `{block: ratio}` (other blocks do not merge), or `fn(block, step)`.

    Attributes:
        kv_ratio: share of the keys and values that are merged away, before the rotary embedding; a merged key is
            turned by the mean rotation of its tokens.
        q_ratio: share of the queries; each gets the output of the query that it was merged into. Costs more
            accuracy than keys and values do.
        metric: what tokens are compared by: "hidden", the input of the attention, or "key", its keys, averaged over
            heads.
        stride, window: (t, h, w), see `vidmem_kernels.match_tokens`; window None compares all tokens, in quadratic
            time.
        size_bias: adds the logarithm of a merged key's size to its scores: proportional attention, as if its tokens
            were all there.
        protect_frames: numbers of latent frames, negative ones from the end, whose tokens are neither merged nor
            merged into. Frames that a video does not have are passed over. The others count as consecutive.
        blocks: numbers of the blocks that merge; None for all.
        steps: numbers of the denoising steps that merge; None for all. See `TokenMerging.step`.
        share_plan: None, every sample of a batch has its own plan, as if it were alone; "batch", all samples of a call
            and all calls of a step (both halves of classifier-free guidance) have one, that of the first call.
        reuse_steps: for so many steps a plan is used, starting at step 0.
        reuse_blocks: for so many consecutive blocks, of those that merge, a plan is used.

    Raises:
        ValueError, TypeError: values that do not fit.

    Source:
        Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461; of keys and values alone in video models,
        and reuse of plans: Sun et al., "AsymRnR", arXiv 2412.11706.
    """

    kv_ratio: Ratio = 0.5
    q_ratio: Ratio = 0.0
    metric: str = "hidden"
    stride: Sequence[int] = (1, 2, 2)
    window: Sequence[int] | None = (0, 1, 1)
    size_bias: bool = True
    protect_frames: Sequence[int] = (0,)
    blocks: Collection[int] | None = None
    steps: Collection[int] | None = None
    share_plan: str | None = None
    reuse_steps: int = 1
    reuse_blocks: int = 1

    def __post_init__(self) -> None:
        for name, low in (("stride", 1), ("window", 0)):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            _check_ints(name, value, low)
            if len(value) != 3:
                raise ValueError(f"{_NAME}: {name} must be three ints (t, h, w), got {value!r}")
            object.__setattr__(self, name, tuple(value))  # copied: a list could be changed behind our back
        for name in ("protect_frames", "blocks", "steps"):
            value = getattr(self, name)
            if value is not None:
                _check_ints(name, value, 0 if name == "steps" else None)
                # A range is kept: it may hold more steps than one would list.
                object.__setattr__(self, name, value if isinstance(value, range) else tuple(value))
        if self.protect_frames is None:
            raise TypeError(f"{_NAME}: protect_frames must be ints, got None")
        for name, choices in (("metric", _METRICS), ("share_plan", _SHARES), ("size_bias", (True, False))):
            value = getattr(self, name)
            if value not in choices or (name == "size_bias" and not isinstance(value, bool)):
                raise ValueError(f"{_NAME}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        check_int(_NAME, "reuse_steps", self.reuse_steps, 1)
        check_int(_NAME, "reuse_blocks", self.reuse_blocks, 1)
        for name in ("kv_ratio", "q_ratio"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                _check_ints(f"the blocks of {name}", list(value), None)
                for block, ratio in value.items():
                    self._check_ratio(f"{name}[{block}]", ratio)
            elif not callable(value):
                self._check_ratio(name, value)

    def _check_ratio(self, name: str, ratio: object) -> Fraction:
        most = 1 - Fraction(1, math.prod(self.stride))
        if not is_number(ratio):
            raise TypeError(f"{_NAME}: {name} must be a number, a dict or a function, got {type(ratio).__name__}")
        if not 0 <= ratio <= most:
            bounds = f"[0, {float(most):g}], what stride {self.stride} leaves"
            raise ValueError(f"{_NAME}: {name} must be in {bounds}, got {ratio}")
        return Fraction(str(float(ratio)))  # as written: .3 is 3/10, so that 10 tokens give 3

    def check_blocks(self, number: int) -> None:
        """Raises where `blocks`, or the keys of a ratio, name a block that a model of so many blocks does not have."""
        for name, blocks in (("blocks", self.blocks), ("kv_ratio", self.kv_ratio), ("q_ratio", self.q_ratio)):
            for block in blocks if isinstance(blocks, Collection) else ():
                what = "blocks must hold numbers" if name == "blocks" else f"{name} must have keys"
                if not 0 <= block < number:
                    raise ValueError(f"{_NAME}: {what} in [0, {number - 1}], got {block}")

    def ratios(self, block: int, step: int) -> tuple[Fraction, Fraction]:
        """(of keys and values, of queries) in that block at that step."""
        if not self.merges(block) or (self.steps is not None and step not in self.steps):
            return Fraction(0), Fraction(0)
        found = []
        for name in ("kv_ratio", "q_ratio"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = value.get(block, 0)
            elif callable(value):
                value = value(block, step)
            found.append(self._check_ratio(f"{name} of block {block} at step {step}", value))
        return found[0], found[1]

    def merges(self, block: int) -> bool:
        """Whether the block ever merges, as far as the numbers given tell."""
        if self.blocks is not None and block not in self.blocks:
            return False
        ratios = self.kv_ratio, self.q_ratio
        return any(callable(r) or (r.get(block, 0) if isinstance(r, Mapping) else r) for r in ratios)

    @property
    def counts_steps(self) -> bool:
        """Whether what a call does depends on its step."""
        ratios = self.kv_ratio, self.q_ratio
        return self.steps is not None or self.reuse_steps > 1 or any(callable(ratio) for ratio in ratios)

    @property
    def keeps_plans(self) -> bool:
        """Whether a call may use the plan of an earlier one."""
        return self.reuse_steps > 1 or self.share_plan == "batch"


def _check_ints(name: str, values: object, low: int | None) -> None:
    if not isinstance(values, Collection) or isinstance(values, str | Mapping):
        raise TypeError(f"{_NAME}: {name} must be ints, got {values!r}")
    for value in values if not isinstance(values, range) else values[:1]:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{_NAME}: {name} must be ints, got {values!r}")
        if low is not None and value < low:
            raise ValueError(f"{_NAME}: {name} must be at least {low}, got {values!r}")
