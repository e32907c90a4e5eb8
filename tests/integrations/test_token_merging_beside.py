"""Token merging beside what else diffusers and PEFT put into a model, in either order."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading, apply_layer_skip
from diffusers_helpers import MODELS, inputs_of, tiny_framepack, tiny_hunyuan, tiny_wan
from peft import LoraConfig

from vidmem_kernels.diffusers import apply_token_merging

MAKERS = [tiny_wan, tiny_hunyuan, tiny_framepack]
GRID = (3, 4, 5)
ATTENTIONS = (r"^blocks\.\d+\.attn1$", r"transformer_blocks\.\d+\.attn$")


class Clock:
    """The time of the step, as caches ask a pipeline for it."""

    now = 0

    def __call__(self):
        return self.now


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def denoised(model, clock):
    """Outputs of some steps of what changes little from one to the next."""
    model._reset_stateful_cache()
    outs = []
    for step in range(5):
        clock.now = 700 - 100 * step
        inputs = inputs_of(model, GRID, 2)
        inputs["hidden_states"] *= 1 - 0.05 * step
        inputs["timestep"] = torch.full_like(inputs["timestep"], clock.now)
        with model.cache_context("cond"):
            outs.append(run(model, inputs))
    return torch.stack(outs)


def cache_config(name, clock, distilled):
    times = {"current_timestep_callback": clock, "spatial_attention_block_skip_range": 2}
    if name == "first-block":
        return FirstBlockCacheConfig(threshold=0.3)
    if name == "pyramid":
        return PyramidAttentionBroadcastConfig(spatial_attention_timestep_skip_range=(100, 800), **times)
    if name == "taylor":
        return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=ATTENTIONS)
    return FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 650), unconditional_batch_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=2, attention_weight_callback=lambda _: 0.5, tensor_format="BCFHW",
        is_guidance_distilled=distilled, **times,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["first-block", "faster", "pyramid", "taylor"])
@pytest.mark.parametrize("make", MAKERS)
def test_caches_before_and_after(make, cache):
    clock, distilled = Clock(), make is not tiny_wan
    first, second = make(layers=2), make(layers=2)
    plain = denoised(first, clock)
    first.enable_cache(cache_config(cache, clock, distilled))
    cached = denoised(first, clock)
    handle = apply_token_merging(first)
    both = denoised(first, clock)

    other = apply_token_merging(second)
    merged = denoised(second, clock)
    second.enable_cache(cache_config(cache, clock, distilled))
    assert torch.equal(denoised(second, clock), both)
    assert not torch.equal(both, cached) and not torch.equal(both, merged)

    handle.enabled = False
    assert torch.equal(denoised(first, clock), cached)
    handle.remove()  # before the cache, which was there first
    assert torch.equal(denoised(first, clock), cached)
    other.remove()
    second.disable_cache()
    assert torch.equal(denoised(second, clock), plain)


def with_lora(model):
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)


@pytest.mark.parametrize("make", MAKERS)
def test_lora_before_and_after(make):
    before, after = make(layers=1), make(layers=1)
    inputs = inputs_of(before, GRID)
    handle = apply_token_merging(after)
    without = run(after, inputs)
    with_lora(before)
    plain = run(before, inputs)
    apply_token_merging(before)
    with_lora(after)
    merged = run(before, inputs)
    assert torch.equal(run(after, inputs), merged) and not torch.equal(merged, without)
    after(**inputs)[0].square().sum().backward()
    assert all(w.grad is not None for name, w in after.named_parameters() if "lora" in name and "attn" in name)
    handle.remove()
    assert torch.equal(run(after, inputs), plain)


def test_fused_projections():
    model = tiny_wan(layers=2)
    inputs = inputs_of(model, GRID)
    handle = apply_token_merging(model, q_ratio=0.25)
    merged = run(model, inputs)
    model.fuse_qkv_projections()
    assert model.blocks[0].attn1.fused_projections
    assert (run(model, inputs) - merged).abs().max() < 1e-5
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), merged)
    handle.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(MODELS))
def test_half_precision(name, dtype):
    model = MODELS[name](layers=1)
    inputs = inputs_of(model, GRID, 2)
    plain = run(model, inputs)
    apply_token_merging(model, q_ratio=0.25)
    merged = run(model, inputs)
    with torch.autocast("cpu", dtype):
        autocast = run(model, inputs)
    model.to(dtype)
    floats = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    half = run(model, floats)
    assert half.dtype == dtype
    for out in (autocast, half):
        assert (out.float() - merged).norm() < 0.05 * plain.norm()


@pytest.mark.parametrize("first", ["merging", "offload"])
@pytest.mark.parametrize("make", MAKERS)
def test_group_offload(make, first):
    model, reference = make(layers=1), make(layers=1)
    inputs = inputs_of(model, GRID)
    apply_token_merging(reference)
    if first == "merging":
        handle = apply_token_merging(model)
    apply_group_offloading(model, onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)
    if first == "offload":
        handle = apply_token_merging(model)
    assert torch.equal(run(model, inputs), run(reference, inputs))
    handle.remove()
    assert run(model, inputs).isfinite().all()


@pytest.mark.parametrize("make", MAKERS)
def test_layer_skip_finds_the_processor(make):
    model = make(layers=2)
    inputs = inputs_of(model, GRID)
    apply_token_merging(model)
    merged = run(model, inputs)
    name = "blocks" if make is tiny_wan else "transformer_blocks"
    config = LayerSkipConfig(indices=[1], fqn=name, skip_attention=True, skip_ff=False, skip_attention_scores=False)
    apply_layer_skip(model, config)
    assert run(model, inputs).shape == merged.shape and not torch.equal(run(model, inputs), merged)


def test_what_diffusers_sets_on_processors():
    model = tiny_wan(layers=1)
    attn = model.blocks[0].attn1
    former = attn.processor
    with apply_token_merging(model):
        attn.set_attention_backend("_native_math")
        assert former._attention_backend == "_native_math"
        attn.processor._parallel_config = object()
        with pytest.raises(NotImplementedError, match="apply_token_merging: the model must not be context-parallel"):
            run(model, inputs_of(model, GRID))
        attn.processor._parallel_config = None
    assert attn.processor is former
