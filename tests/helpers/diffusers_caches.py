"""Puts diffusers' caches on a model for the tests of adapters, and runs denoising steps that fill and use them."""

from contextlib import contextmanager

import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers_helpers import inputs_of

_step = [0]


def _time():
    return 999 - 100 * _step[0]


_BUT_THE_FIRST = (-1, 950)  # times of steps that may be skipped; FasterCache has nothing to skip the first with

# Each so that some of four steps are computed and some are not.
CACHES = {
    "first_block": lambda: FirstBlockCacheConfig(threshold=0.3),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=_BUT_THE_FIRST, cross_attention_timestep_skip_range=_BUT_THE_FIRST,
        current_timestep_callback=_time,
    ),
    "faster": lambda: FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=_BUT_THE_FIRST,
        attention_weight_callback=lambda _: 0.3, is_guidance_distilled=True, current_timestep_callback=_time,
    ),
    "taylor": lambda: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[r".*blocks\.\d+\.attn[12]?"],
    ),
}  # fmt: skip


@contextmanager
def cache(model, name):
    model.enable_cache(CACHES[name]())
    try:
        yield
    finally:
        model.disable_cache()


def first_step(model, inputs):
    """The output of a first step, without a reset of the caches."""
    _step[0] = 0
    with torch.no_grad(), model.cache_context("cond"):
        return model(**inputs)[0]


def denoise(model, grid=(2, 3, 3), batch=1, steps=4):
    """Outputs of some steps that differ a little, from empty caches on; (steps, B, C, F, height, width)."""
    model._reset_stateful_cache()
    inputs = inputs_of(model, grid, batch)
    outs = []
    for step in range(steps):
        _step[0] = step
        inputs["hidden_states"] = inputs["hidden_states"] * 0.95
        with torch.no_grad(), model.cache_context("cond"):
            outs.append(model(**inputs)[0])
    return torch.stack(outs)
