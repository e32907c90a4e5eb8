"""Makes the merge plan of each attention, once for as many blocks, calls and steps as the configuration says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..token_merge.api import MergePlan, match_tokens
from .families import Grid
from .token_merging_config import TokenMergingConfig


class ForwardRecord:
    """The grid of one forward pass of the model, and the plans made in it.

    It is passed to every block with the rotary embedding (see families.py). Gradient checkpointing keeps it for the
    recomputation, which therefore uses the plans of its own forward pass, even if others ran in between.

    Attributes:
        grid: (T, H, W).
        call: number of the call within its step, from 0, if that decides which plans it uses.
        plans: by group of blocks that share a plan, and ratio.
    """

    def __init__(self, grid: Grid, call: int):
        self.grid, self.call = grid, call
        self.plans: dict[PlanKey, MergePlan] = {}


class PlanKey(NamedTuple):
    """Attentions with the same key use the same plan: the number of the group of blocks, and the ratio."""

    group: int
    numerator: int
    denominator: int


class MergingState:
    """State that all attentions of a model share: configuration, denoising step, kept plans, statistics.

    It is stored on the attention processors, so that a copy of the model has its own.
    """

    def __init__(self, config: TokenMergingConfig):
        self.config = config
        self.enabled = True
        self.on_step: list[Callable[[int], None]] = []
        self.reset()

    def reset(self) -> None:
        """Resets to the state before the first forward pass."""
        self.step_is_set = False  # set by the user; until then forward passes are counted
        self._latest: tuple[Tensor | None, int, float] | None = None  # of the latest forward pass: see begin_forward
        self.forwards = self.plans_made = 0
        self.grid: Grid | None = None
        self.lengths: dict[int, tuple[int, int, int]] = {}  # by block: tokens, queries, keys
        self._kept: dict[tuple[int, PlanKey], tuple[Grid, MergePlan]] = {}
        self._go_to(0)

    def __getstate__(self) -> dict[str, Any]:
        """Drops what only a later forward pass would use."""
        return self.__dict__ | {"_kept": {}, "_latest": None}

    def set_step(self, step: int) -> None:
        """Sets the step; steps are no longer counted."""
        span = self.config.reuse_steps
        if not self.step_is_set or step <= self.step or step // span != self.step // span:
            self._kept.clear()
        self.step_is_set = True
        self._go_to(step)

    def _go_to(self, step: int) -> None:
        if step % self.config.reuse_steps == 0:
            self._kept.clear()
        self.step, self._calls = step, 0
        for listener in self.on_step:
            listener(step)

    def begin_forward(self, timestep: Tensor | None) -> None:
        """Counts the steps by the timesteps of forward passes.

        Forward passes with the same, unmodified timestep tensor are the calls of one step: pipelines do so for the two
        halves of classifier-free guidance. If the step matters, a timestep above the previous one starts a new video.
        """
        if torch.compiler.is_compiling():
            if self.config.counts_steps and not self.step_is_set:
                raise RuntimeError(
                    "apply_token_merging: the step must be set by `handle.step = i` before each compiled call, "
                    "got none; only uncompiled calls are counted"
                )
            return
        self.forwards += 1
        if self.step_is_set:
            return
        version = 0 if timestep is None or timestep.is_inference() else timestep._version
        before = self._latest
        if before is not None and timestep is not None and before[0] is timestep and before[1] == version:
            return
        time = 0.0
        if self.config.counts_steps and timestep is not None:
            time = float(timestep.max())  # waits for the device
        self._latest = timestep, version, time
        if before is not None:
            self._go_to(0 if time > before[2] else self.step + 1)

    def record(self, grid: Grid) -> ForwardRecord:
        """The record of a forward pass that begins."""
        if not torch.compiler.is_compiling():
            self.grid = tuple(grid)
        if self.config.reuse_steps == 1 or self.config.share_plan == "batch":
            return ForwardRecord(grid, 0)
        self._calls += 1
        return ForwardRecord(grid, self._calls - 1)

    def plan(
        self,
        record: ForwardRecord,
        key: PlanKey,
        metric: Callable[[], Tensor],
        hidden_states: Tensor,
        grid: Grid,
        num_merge: int,
    ) -> MergePlan:
        """Returns the plan that an attention merges its tokens by, making it if necessary.

        Args:
            record: record of the forward pass.
            key: key of the attention.
            metric: function that returns the (B, N, C) features that tokens are compared by; called only to make a
                plan.
            hidden_states: input of the attention, for its batch and device.
            grid: grid of the N tokens, without the protected frames.
            num_merge: number of tokens to merge away.

        Returns:
            The `MergePlan`.
        """
        config, compiling = self.config, torch.compiler.is_compiling()
        shared = config.share_plan == "batch"
        keeps = config.keeps_plans and (self.step_is_set or not compiling)
        plan = record.plans.get(key)
        if plan is None and keeps:
            grid_before, plan = self._kept.get((record.call, key), (None, None))
            plan = plan if grid_before == record.grid else None
        batch, device = hidden_states.shape[0], hidden_states.device
        if plan is None or plan.kept.shape[0] != (1 if shared else batch) or plan.kept.device != device:
            compared = metric()
            if shared:  # with concatenated channels, the cosine is the mean of the samples' cosines, weighted by length
                compared = compared.transpose(0, 1).flatten(1)[None]
            plan = match_tokens(compared.detach(), num_merge, grid=grid, stride=config.stride, window=config.window)
            if not compiling:
                self.plans_made += 1
            if keeps:
                self._kept[record.call, key] = record.grid, plan
        # Compiled with checkpointing, a block must not leave tensors behind, except plans that other blocks need.
        if not compiling or config.reuse_blocks > 1:
            record.plans[key] = plan
        return MergePlan(*(x.expand(batch, -1) for x in plan)) if shared else plan
