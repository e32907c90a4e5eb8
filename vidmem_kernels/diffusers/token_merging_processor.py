"""The attention processor that merges keys, values and queries of the video tokens before the rotary embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cross_attn.api import cross_attention
from ..sparse_gather.api import gather_tokens
from ..token_merge.api import MergePlan, merge_tokens, unmerge_tokens
from .families import Family, Grid
from .token_layout import TokenLayout
from .token_merging_plans import MergingState, PlanKey
from .wrapping_processor import WrappingProcessor

_APPLY = "apply_token_merging"


class MergingProcessor(WrappingProcessor):
    """Replaces the processor of a self-attention; calls the original if nothing merges.

    It is a module rather than a plain object because torch.compile treats numbers on modules as constants: each ratio
    has one graph, with dynamic sizes.

    Args:
        inner: the original processor.
        family: family of the model.
        state: state that all attentions of the model share.
        block: number of the block.
        group: number of the group of blocks that share a plan.
    """

    def __init__(self, inner: object, family: Family, state: MergingState, block: int, group: int):
        super().__init__(inner)
        self.family, self.state, self.block, self.group = family, state, block, group
        self.set_step(0)

    def set_step(self, step: int) -> None:
        """Sets the ratios of the step as (numerator, denominator), so that the sizes of tensors stay integers."""
        kv_ratio, q_ratio = self.state.config.ratios(self.block, step)
        self.kv_ratio, self.q_ratio = kv_ratio.as_integer_ratio(), q_ratio.as_integer_ratio()

    # Not `forward`, because attentions read the accepted arguments from the signature of __call__.
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> object:
        """Takes `hidden_states` (B, L, C) as `inner` does; the rotary embedding is accepted under either name."""
        rotary = rotary_emb if image_rotary_emb is None else image_rotary_emb
        record = None if rotary is None else next(iter(rotary[2:]), None)
        if self.state.enabled and (self.kv_ratio[0] or self.q_ratio[0]):
            if record is None:
                raise RuntimeError(
                    f"{_APPLY}: the rotary embedding of block {self.block} must come from a forward pass of the model, "
                    f"which adds the grid of the tokens, got {'none' if rotary is None else 'one without a grid'}"
                )
            layout = self._layout(hidden_states.shape[1], record.grid)
            if layout.grid[0]:
                return self._merged(attn, hidden_states, encoder_hidden_states, attention_mask, rotary, layout)
        if image_rotary_emb is None:
            rotary = rotary and rotary[:2]
            return self.inner(attn, hidden_states, encoder_hidden_states, attention_mask, rotary)
        return self.inner(
            attn, hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask,
            image_rotary_emb=rotary[:2],
        )  # fmt: skip

    def _layout(self, length: int, grid: Grid) -> TokenLayout:
        frames, height, width = grid
        if frames * height * width > length:
            raise ValueError(
                f"{_APPLY}: the video's grid must hold at most the {length} tokens of block {self.block}, got {grid}"
            )
        video_last = self.family.extra_tokens == "before"
        return TokenLayout.of(length, grid, video_last, self.state.config.protect_frames)

    def _merged(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        attention_mask: Tensor | None,
        rotary: tuple,
        layout: TokenLayout,
    ) -> object:
        if getattr(self.inner, "_parallel_config", None) is not None:
            raise NotImplementedError(f"{_APPLY}: the model must not be context-parallel, got a parallel config")
        config, record = self.state.config, rotary[2]
        angles = _angles(*rotary[:2])
        query, key, value, text = self.family.project(attn, hidden_states, encoder_hidden_states)

        def metric() -> Tensor:
            return layout.free(key).mean(dim=2) if config.metric == "key" else layout.free(hidden_states)

        def plan_of(ratio: tuple[int, int]) -> MergePlan:
            count = _num_merge(layout.grid, config.stride, ratio)
            which = PlanKey(self.group, *ratio)
            return self.state.plan(record, which, metric, hidden_states, layout.grid, count)

        kv_plan = plan_of(self.kv_ratio) if self.kv_ratio[0] else None
        q_plan = kv_plan
        if self.q_ratio != self.kv_ratio:
            q_plan = plan_of(self.q_ratio) if self.q_ratio[0] else None
        texts = 0 if text is None else text[1].shape[1]
        bias = None if attention_mask is None else _key_bias(attention_mask, key.shape[0], key.shape[1] + texts)
        queries, keys, values = query, key, value
        query_angles = key_angles = angles
        if kv_plan is not None:
            keys, size = _merged_tokens(key, kv_plan, layout)
            values, _ = _merged_tokens(value, kv_plan, layout)
            key_angles = _merged_angles(angles, kv_plan, layout)
            if bias is not None:  # a merged key is visible where the kept token is
                video, rest = bias[:, : key.shape[1], None], bias[:, key.shape[1] :]
                kept = gather_tokens(layout.free(video), kv_plan.kept)
                bias = torch.cat([layout.fixed(video)[..., 0], kept[..., 0], rest], dim=1)
            if config.size_bias:
                log_size = torch.nn.functional.pad(size.log(), (keys.shape[1] - size.shape[1], texts))
                bias = log_size if bias is None else bias + log_size
        if q_plan is not None:
            queries, _ = _merged_tokens(query, q_plan, layout)
            query_angles = _merged_angles(angles, q_plan, layout)
        queries, keys = _rotated(queries, query_angles), _rotated(keys, key_angles)
        if not torch.compiler.is_compiling():
            lengths = key.shape[1] + texts, queries.shape[1] + texts, keys.shape[1] + texts
            self.state.lengths[self.block] = lengths
        if text is not None:
            queries, keys, values = (
                torch.cat([x, y], dim=1) for x, y in zip((queries, keys, values), text, strict=True)
            )
        out = cross_attention(queries, keys, values, key_bias=bias).flatten(2).type_as(query)
        if q_plan is not None:
            video = queries.shape[1] - texts
            out = torch.cat([_unmerged_tokens(out[:, :video], q_plan, layout), out[:, video:]], dim=1)
        out = self.family.output(attn, out, encoder_hidden_states)
        # A memory attention added earlier adds to this output too.
        add_to = getattr(self.inner, "add_to", None)
        return out if add_to is None else add_to(out, hidden_states, encoder_hidden_states, rotary[:2])


def _num_merge(grid: Grid, stride: Grid, ratio: tuple[int, int]) -> int:
    """The number of tokens of the grid to merge away: the ratio's share, but no destination of `match_tokens`."""
    tokens, destinations = 1, 1
    for size, step in zip(grid, stride, strict=True):
        tokens, destinations = tokens * size, destinations * ((size + step - 1) // step)
    return torch.sym_min(tokens * ratio[0] // ratio[1], tokens - destinations)


def _angles(cos: Tensor, sin: Tensor) -> Tensor:
    """(B or 1, L, D): the cosines and then the sines, one per pair of channels.

    HunyuanVideo has (L, D), Wan (B or 1, L, 1, D), both with every angle twice, once for each channel of the pair.
    """
    both = torch.cat([cos[..., 0::2], sin[..., 0::2]], dim=-1)
    return both[None] if both.dim() == 2 else both.squeeze(2)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """(B, L, H, D) rotated by angles (B or 1, L, D)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles[:, :, None].chunk(2, dim=-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _key_bias(mask: Tensor, batch: int, keys: int) -> Tensor:
    """Converts the mask (B or 1, 1, 1, keys) of an attention, bool or added to the scores, to (B, keys) float32."""
    if tuple(mask.shape[1:]) != (1, 1, keys):
        raise ValueError(
            f"{_APPLY}: the attention mask must have shape (B or 1, 1, 1, {keys}), got {tuple(mask.shape)}"
        )
    mask = mask[:, 0, 0].expand(batch, -1)
    return (
        torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask
    )


# Merged tokens are placed after those that may not merge.


def _merged_tokens(x: Tensor, plan: MergePlan, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """(B, L, H, D) with the free tokens merged and placed after the others, and their (B, M) sizes."""
    merged, size = merge_tokens(layout.free(x).flatten(2), plan)
    return torch.cat([layout.fixed(x), merged.unflatten(2, x.shape[2:])], dim=1), size


def _merged_angles(angles: Tensor, plan: MergePlan, layout: TokenLayout) -> Tensor:
    """The mean rotation of the tokens of each row, which gave the smallest error of the variants tried.

    For equal tokens, merging after the rotation gives exactly this; for different tokens, merging before it errs less.
    """
    batch = plan.kept.shape[0]
    merged, _ = merge_tokens(layout.free(angles).expand(batch, -1, -1), plan)
    return torch.cat([layout.fixed(angles).expand(batch, -1, -1), merged], dim=1)


def _unmerged_tokens(x: Tensor, plan: MergePlan, layout: TokenLayout) -> Tensor:
    """Gives every token of (B, L, C) the row that it was merged into."""
    fixed = x.shape[1] - plan.kept.shape[1]
    return layout.joined(unmerge_tokens(x[:, fixed:], plan), x[:, :fixed])
