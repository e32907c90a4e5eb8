"""The configuration of token merging, and its checks."""

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
    """Configures which tokens `apply_token_merging` merges in the self-attention of a model, and how many.

    A ratio is the share of unprotected video tokens that are merged away, at most 1 - 1 / (t * h * w) of `stride`; .5
    halves their number. If the border of the grid cuts cells off, fewer tokens may be able to merge; then all of these
    merge. A ratio is a number, `{block: ratio}` (other blocks do not merge), or `fn(block, step)`.

    Attributes:
        kv_ratio: share of the keys and values that are merged away, before the rotary embedding; a merged key gets the
            mean rotation of its tokens.
        q_ratio: share of the queries that are merged away; each gets the output of the query that it was merged into.
            It costs more accuracy than `kv_ratio`.
        metric: features that tokens are compared by: "hidden", the input of the attention, or "key", its keys averaged
            over heads.
        stride: (t, h, w), see `vidmem_kernels.match_tokens`.
        window: (t, h, w), see `vidmem_kernels.match_tokens`; None compares all tokens, in quadratic time.
        size_bias: whether to add the log of a merged key's size to its scores (proportional attention), so that it
            counts as all of its tokens.
        protect_frames: numbers of latent frames, negative ones from the end, whose tokens are neither merged nor merged
            into. Frames that a video does not have are ignored. The other frames count as consecutive.
        blocks: numbers of the blocks that merge; None for all.
        steps: numbers of the denoising steps that merge; None for all. See `TokenMerging.step`.
        share_plan: None: each sample of a batch has its own plan. "batch": all samples of a call, and all calls of a
            step (both halves of classifier-free guidance), use the plan of the first call.
        reuse_steps: number of steps for which a plan is used, starting at step 0.
        reuse_blocks: number of consecutive merging blocks for which a plan is used.

    Raises:
        ValueError, TypeError: a value is invalid.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461; merging only keys and values in video
    models, and reuse of plans: Sun et al., "AsymRnR", arXiv 2412.11706.
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
            object.__setattr__(self, name, tuple(value))  # copied, because the argument may be changed later
        for name in ("protect_frames", "blocks", "steps"):
            value = getattr(self, name)
            if value is not None:
                _check_ints(name, value, 0 if name == "steps" else None)
                # A range is kept as it is, because it may be too long for a list.
                object.__setattr__(self, name, value if isinstance(value, range) else tuple(value))
        if self.protect_frames is None:
            raise TypeError(f"{_NAME}: protect_frames must be ints, got None")
        for name, choices in (("metric", _METRICS), ("share_plan", _SHARES)):
            if getattr(self, name) not in choices:
                named = ", ".join(map(repr, choices))
                raise ValueError(f"{_NAME}: {name} must be one of {named}, got {getattr(self, name)!r}")
        if not isinstance(self.size_bias, bool):
            raise TypeError(f"{_NAME}: size_bias must be a bool, got {type(self.size_bias).__name__}")
        check_int(_NAME, "reuse_steps", self.reuse_steps, 1)
        check_int(_NAME, "reuse_blocks", self.reuse_blocks, 1)
        for name in ("kv_ratio", "q_ratio"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                _check_ints(f"the blocks of {name}", list(value), None)
                for block, ratio in value.items():
                    self._check_ratio(f"{name}[{block}]", ratio)
                object.__setattr__(self, name, dict(value))
            elif not callable(value):
                self._check_ratio(name, value)

    def _check_ratio(self, name: str, ratio: object) -> Fraction:
        most = 1 - Fraction(1, math.prod(self.stride))
        if not is_number(ratio):
            raise TypeError(f"{_NAME}: {name} must be a number, a dict or a function, got {type(ratio).__name__}")
        if not 0 <= ratio <= most:
            bounds = f"[0, {float(most):g}], what stride {self.stride} leaves"
            raise ValueError(f"{_NAME}: {name} must be in {bounds}, got {ratio}")
        return Fraction(str(float(ratio))).limit_denominator(10**6)  # the decimal as written: .3 of 10 tokens is 3

    def check_blocks(self, number: int) -> None:
        """Raises if `blocks`, or the keys of a ratio, name a block that a model with `number` blocks does not have.

        Args:
            number: blocks of the model.
        """
        for name, blocks in (("blocks", self.blocks), ("kv_ratio", self.kv_ratio), ("q_ratio", self.q_ratio)):
            for block in blocks if isinstance(blocks, Collection) else ():
                what = name if name == "blocks" else f"the keys of {name}"
                if not 0 <= block < number:
                    raise ValueError(f"{_NAME}: {what} must be in [0, {number - 1}], got {block}")

    def ratios(self, block: int, step: int) -> tuple[Fraction, Fraction]:
        """Returns the ratios of a block at a step.

        Args:
            block: number of the block.
            step: number of the denoising step.

        Returns:
            (ratio of keys and values, ratio of queries).
        """
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
        """Returns whether a block may ever merge, judging by the ratios that are numbers.

        Args:
            block: number of the block.

        Returns:
            True if it may.
        """
        if self.blocks is not None and block not in self.blocks:
            return False
        ratios = self.kv_ratio, self.q_ratio
        return any(callable(r) or (r.get(block, 0) if isinstance(r, Mapping) else r) for r in ratios)

    @property
    def counts_steps(self) -> bool:
        """Whether the result of a call depends on its step."""
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
