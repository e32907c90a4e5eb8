"""Memory tokens in the sequence of tiny diffusers models: as if the video were longer; beside caches and adapters."""

import copy
import gc
import pickle
from contextlib import nullcontext

import pytest
import torch
from diffusers_caches import CACHES, cache, denoise, first_step
from diffusers_checks import FAMILIES, compiled, out_of, said, same_compiled, skeleton
from diffusers_helpers import HEAD_SIZE, HEADS, MODELS, draw_grid, inputs_of, tiny_framepack, tiny_hunyuan, tiny_wan
from torch import nn

from vidmem_kernels.diffusers import MemoryPrefix, add_memory_attention, attention_backend, patch_tokens

every_layout = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
WIDTH = HEADS * HEAD_SIZE


def memory_of(length=6, batch=1, dtype=torch.float32):
    """Tokens, and positions before the video."""
    return torch.randn(batch, length, WIDTH).to(dtype), torch.randint(-5, 5, (length, 3))


def split(model, longer, frames, after):
    """The inputs of a video without its first (`after`: last) frames, and the start in time and latents of those."""
    latents = longer["hidden_states"]
    length = latents.shape[2] - frames
    rest = slice(None, length) if after else slice(frames, None)
    cut = latents[:, :, length:] if after else latents[:, :, :frames]
    shorter = longer | {"hidden_states": latents[:, :, rest]}
    start = length if after else -frames
    if "indices_latents" in longer:
        shorter["indices_latents"] = longer["indices_latents"][rest]
        start = int(longer["indices_latents"][length if after else 0])
    if longer["timestep"].dim() == 2:
        tokens = longer["timestep"].unflatten(1, (latents.shape[2], -1))
        shorter["timestep"] = tokens[:, rest].flatten(1)
    return shorter, cut, start, rest


def relative(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


@every_layout
@pytest.mark.parametrize("seed", range(3))
def test_own_tokens_of_a_longer_video_give_the_longer_video(make, seed):
    model = make()
    after = seed % 2 == 1 or make in (MODELS["hunyuan"], MODELS["hunyuan-i2v"])  # their text stands at no position
    frames, height, width = draw_grid(seed)
    kept = 1 + seed % 2
    longer = inputs_of(model, (frames + kept, height, width), batch=2)
    if longer["timestep"].dim() == 2:
        shorter, *_ = split(model, longer, kept, after)
        noisiest = shorter["timestep"].amax(1, keepdim=True)
        memory = noisiest.expand(-1, kept * height * width)
        longer["timestep"] = torch.cat([shorter["timestep"], memory] if after else [memory, shorter["timestep"]], 1)
    expected = out_of(model, longer)
    shorter, latents, start, rest = split(model, longer, kept, after)
    without = out_of(model, shorter)
    p = MemoryPrefix(model, time="step")
    assert torch.equal(out_of(model, shorter), without)
    p.set(*patch_tokens(model, latents, start))
    assert relative(out_of(model, shorter), expected[:, :, rest]) < 1e-6
    assert relative(without, expected[:, :, rest]) > 1e-3
    p.clear()
    assert torch.equal(out_of(model, shorter), without)
    p.set(*memory_of()).remove()
    assert torch.equal(out_of(model, shorter), without)


@pytest.mark.parametrize("name", ["wan", "wan-ti2v", "wan-i2v"])
def test_clean_memory_has_time_zero(name):
    model = MODELS[name]()
    frames, height, width = draw_grid(5)
    longer = inputs_of(model, (frames + 1, height, width), batch=2)
    if longer["timestep"].dim() == 1:
        shorter, latents, start, rest = split(model, longer, 1, after=False)
        longer["timestep"] = longer["timestep"][:, None].repeat(1, (frames + 1) * height * width)
    else:
        shorter, latents, start, rest = split(model, longer, 1, after=False)
    longer["timestep"][:, : height * width] = 0
    before = out_of(model, shorter)
    with MemoryPrefix(model, time="zero") as p:
        assert torch.equal(out_of(model, shorter), before)
        p.set(*patch_tokens(model, latents, start))
        assert relative(out_of(model, shorter), out_of_without(model, p, longer)[:, :, rest]) < 1e-6
        # A time that is given by position.
        args = [shorter.pop("hidden_states"), shorter.pop("timestep")]
        p.set(*patch_tokens(model, latents, start))
        with torch.no_grad():
            assert relative(model(*args, **shorter)[0], out_of_without(model, p, longer)[:, :, rest]) < 1e-6


def out_of_without(model, p, inputs):
    slot = p._prefix("test").slot
    held, slot.held = slot.held, None
    out = out_of(model, inputs)
    slot.held = held
    return out


@every_layout
def test_one_memory_serves_a_batch_and_each_its_own(make):
    model = make()
    inputs = inputs_of(model, draw_grid(2), batch=1)
    single = [name for name in inputs if name.startswith("indices")]
    both = {n: torch.cat([x, x]) if isinstance(x, torch.Tensor) and n not in single else x for n, x in inputs.items()}
    p = MemoryPrefix(model)
    tokens, positions = memory_of(batch=2)
    p.set(tokens[:1], positions)
    one = out_of(model, inputs)
    torch.testing.assert_close(out_of(model, both), torch.cat([one, one]), rtol=1e-5, atol=1e-5)
    p.set(tokens, positions)
    whole = out_of(model, both)
    assert not torch.allclose(whole[0], whole[1], atol=1e-4)
    for i in range(2):
        p.set(tokens[i : i + 1], positions)
        torch.testing.assert_close(whole[i : i + 1], out_of(model, inputs), rtol=1e-5, atol=1e-5)
    said_batch = "tokens must have batch 1 or that of the video, got 2 and 1"
    p.set(tokens, positions)
    said(ValueError, lambda: out_of(model, inputs), f"MemoryPrefix: {said_batch}")
    out_of(model, both)  # an exception leaves nothing behind


def test_positions_of_every_sample():
    model = tiny_wan()
    inputs = inputs_of(model, (2, 3, 4), batch=2)
    tokens = torch.randn(2, 6, WIDTH)
    positions = torch.randn(2, 6, 3) * 5  # between the patches, too
    p = MemoryPrefix(model).set(tokens, positions)
    whole = out_of(model, inputs)
    for i in range(2):
        p.set(tokens[i : i + 1], positions[i])
        single = {n: x[i : i + 1] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        torch.testing.assert_close(whole[i : i + 1], out_of(model, single), rtol=1e-5, atol=1e-5)
    p.set(tokens[:1].expand(2, -1, -1), positions[:1])
    torch.testing.assert_close(out_of(model, inputs)[:1], whole[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["wan", "wan-ti2v", "wan-i2v", "hunyuan", "hunyuan-i2v"])
@pytest.mark.parametrize("backend", ["native", "vidmem"])
def test_a_token_of_size_n_counts_as_n(name, backend):
    model = MODELS[name]()
    inputs = inputs_of(model, draw_grid(6), batch=2)
    tokens, positions = memory_of(4, batch=2)
    size = torch.tensor([1, 3, 1, 2])
    p = MemoryPrefix(model).set(tokens.repeat_interleave(size, 1), positions.repeat_interleave(size, 0))
    expected = out_of(model, inputs)
    p.set(tokens, positions)
    assert not torch.allclose(out_of(model, inputs), expected, atol=1e-4)
    p.set(tokens, positions, size[None].float())
    with attention_backend(model) if backend == "vidmem" else nullcontext():
        assert relative(out_of(model, inputs), expected) < 2e-6
    by_sample = torch.stack([size, torch.ones(4)]).float()
    p.set(tokens, positions, by_sample)
    torch.testing.assert_close(out_of(model, inputs)[:1], expected[:1], rtol=1e-4, atol=1e-5)


@every_family
def test_an_empty_memory_is_none(make):
    model = make()
    inputs = inputs_of(model, (2, 3, 4), batch=2)
    before = out_of(model, inputs)
    with MemoryPrefix(model) as p:
        p.set(*memory_of(0))
        torch.testing.assert_close(out_of(model, inputs), before, rtol=1e-6, atol=1e-6)


@every_family
def test_half_precision_and_autocast(make):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 3, 4))
    p = MemoryPrefix(model).set(*memory_of())
    expected = out_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(out_of(model, inputs).float(), expected) < 0.05
    model.to(torch.bfloat16)
    half = {n: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in inputs.items()}
    said(ValueError, lambda: out_of(model, half), "tokens must have the dtype of the model's tokens")
    tokens, positions = memory_of(dtype=torch.bfloat16)
    p.set(tokens, positions)
    assert out_of(model, half).isfinite().all()


@every_family
@pytest.mark.parametrize("name", CACHES)
def test_beside_caches_in_either_order(make, name):
    model = make()
    with cache(model, name):
        alone = denoise(model)
    memory = memory_of()
    with cache(model, name):
        with MemoryPrefix(model) as p:
            assert torch.equal(denoise(model), alone)
            p.set(*memory)
            inside = denoise(model)
        assert torch.equal(denoise(model), alone)
    p = MemoryPrefix(model).set(*memory)
    computed = denoise(model)
    with cache(model, name):
        assert torch.equal(denoise(model), inside)
        # Of another length, without a reset of the user's.
        inputs = inputs_of(model, (2, 3, 3))
        inputs["hidden_states"] = inputs["hidden_states"] * 0.95
        for length in (3, 9):
            p.set(*memory_of(length))
            first_step(model, inputs)
        p.clear()
        assert torch.equal(first_step(model, inputs), alone[0])
        p.remove()
        assert torch.equal(denoise(model), alone)
    assert not torch.equal(inside, computed) and not torch.equal(inside, alone)


@pytest.mark.parametrize(
    ("make", "time"), [(tiny_wan, "step"), (tiny_wan, "zero"), (tiny_hunyuan, "step"), (tiny_framepack, "step")]
)
def test_gradients_reach_the_memory_with_checkpointing_too(make, time):
    model = make().train()
    a, b = inputs_of(model, (2, 3, 5)), inputs_of(model, (2, 5, 3), seed=1)
    (tokens, positions), other = memory_of(), memory_of()
    tokens.requires_grad_()
    p = MemoryPrefix(model, time)

    size = None if make is tiny_framepack else torch.rand(1, 6) + 0.5

    def gradients():
        p.set(tokens, positions, size)
        loss = model(**a)[0].square().sum()
        p.set(*other)  # before the backward
        loss = loss + model(**b)[0].square().sum()
        p.clear()
        return torch.autograd.grad(loss, [tokens, *model.proj_out.parameters()])

    expected = gradients()
    assert expected[0].abs().sum() > 0
    model.enable_gradient_checkpointing()
    for mine, theirs in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@every_family
def test_copies_have_a_memory_of_their_own(make):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 3, 4))
    before = out_of(model, inputs)
    tokens, positions = memory_of()
    MemoryPrefix(model).set(nn.Linear(WIDTH, WIDTH)(tokens), positions)  # of a graph, which cannot be copied
    after = out_of(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out_of(copied, inputs), after)
        MemoryPrefix.of(copied).clear()
        assert torch.equal(out_of(copied, inputs), before)
        assert torch.equal(out_of(model, inputs), after)
        MemoryPrefix.of(copied).remove()
        said(ValueError, lambda copied=copied: MemoryPrefix.of(copied), "MemoryPrefix.of: model must have a memory")


@every_family
def test_many_cycles_leave_nothing(make):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 3, 3))
    before, is_as = out_of(model, inputs), skeleton(model)
    for cycle in range(200):
        with MemoryPrefix(model) as p:
            p.set(*memory_of())
            if cycle % 50 == 0:
                out_of(model, inputs)
        if cycle == 20:
            gc.collect()
            count = len(gc.get_objects())
    del p
    gc.collect()
    assert len(gc.get_objects()) < count + 1000
    assert skeleton(model) == is_as
    assert torch.equal(out_of(model, inputs), before)


@every_family
@pytest.mark.parametrize("first", ["lora", "memory"])
def test_beside_lora(make, first):
    from peft import LoraConfig

    model, memory = make(), memory_of()
    inputs = inputs_of(model, (2, 3, 4))
    before = out_of(model, inputs)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    torch.manual_seed(5)
    if first == "lora":
        model.add_adapter(config)
    p = MemoryPrefix(model)
    if first == "memory":
        model.add_adapter(config)
    adapted = out_of(model, inputs)
    p.set(*memory)
    both = out_of(model, inputs)
    assert not torch.allclose(both, adapted, atol=1e-4)
    p.remove()
    assert torch.equal(out_of(model, inputs), adapted)
    model.delete_adapters("default")
    assert torch.equal(out_of(model, inputs), before)


@every_family
def test_beside_memory_attention(make):
    model = make()
    inputs, memory = inputs_of(model, (2, 3, 4)), memory_of()
    p = MemoryPrefix(model).set(*memory)
    with_prefix = out_of(model, inputs)
    m = add_memory_attention(model).set(torch.randn(1, 4, WIDTH))
    assert torch.equal(out_of(model, inputs), with_prefix)
    nn.init.normal_(next(x for name, x in m.named_parameters() if name.endswith("gate")))
    both = out_of(model, inputs)
    p.remove()
    MemoryPrefix(model).set(*memory)
    assert torch.equal(out_of(model, inputs), both)
    m.remove()
    assert torch.equal(out_of(model, inputs), with_prefix)


def test_wrong_use():
    model = tiny_wan(layers=1)
    said(TypeError, lambda: MemoryPrefix(nn.Linear(3, 3)), "model must be one of")
    said(ValueError, lambda: MemoryPrefix(model, "now"), "MemoryPrefix: time must be one of step, zero, got 'now'")
    said(ValueError, lambda: MemoryPrefix(tiny_hunyuan(layers=1), "zero"), "time must be step in hunyuan-video")
    said(ValueError, lambda: MemoryPrefix(tiny_framepack(layers=1), "zero"), "time must be step in framepack")
    bare = tiny_framepack(layers=1)
    bare.clean_x_embedder = None
    said(ValueError, lambda: MemoryPrefix(bare), "model must have a clean_x_embedder")
    said(ValueError, lambda: MemoryPrefix.of(model), "MemoryPrefix.of: model must have a memory prefix")
    p = MemoryPrefix(model)
    said(ValueError, lambda: MemoryPrefix(model), "model must not have a memory prefix already, got one that has")
    tokens, positions = memory_of()
    for args, error, message in [
        ((tokens[..., 1:], positions), ValueError, f"tokens must have shape (B, M, {WIDTH}), got (1, 6, {WIDTH - 1})"),
        ((tokens[0], positions), ValueError, "tokens must have shape (B, M, C)"),
        ((tokens.long(), positions), TypeError, "tokens must be float32"),
        ((tokens, positions[1:]), ValueError, "positions must have shape (6, 3) or (1 or 1, 6, 3), got (5, 3)"),
        ((tokens, positions[:, :2]), ValueError, "positions must have shape (6, 3)"),
        ((tokens, positions.expand(3, -1, -1)), ValueError, "positions must have shape (6, 3)"),
        ((tokens, None), TypeError, "positions must be a tensor"),
        ((tokens, positions, torch.ones(1, 5)), ValueError, "size must have shape (1 or 1, 6), got (1, 5)"),
        ((tokens, positions, torch.ones(6)), ValueError, "size must have shape (B, M)"),
        ((tokens, positions, 2), TypeError, "size must be a tensor, got int"),
    ]:
        said(error, lambda args=args: p.set(*args), f"MemoryPrefix.set: {message}")
    hunyuan = MemoryPrefix(tiny_hunyuan(layers=1))
    said(ValueError, lambda: hunyuan.set(tokens, positions[None]), "positions must have shape (6, 3), got (1, 6, 3)")
    framepack = MemoryPrefix(tiny_framepack(layers=1))
    said(ValueError, lambda: framepack.set(tokens, positions, torch.ones(1, 6)), "size must be None in FramePack")
    p.remove()
    for call in (p.remove, p.clear, lambda: p.set(tokens, positions)):
        said(ValueError, call, "model must have a memory prefix, got one without, or from which it was removed")
    said(ValueError, lambda: patch_tokens(model, tokens), "patch_tokens: latents must have shape")
    with MemoryPrefix(model) as p:
        p.remove()


@pytest.mark.long
@every_family
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(make, backend):
    model = make(layers=1)
    fast = compiled(model, backend)
    inputs = inputs_of(model, (2, 3, 7), batch=2)
    same_compiled(fast, model, inputs, backend)
    p = MemoryPrefix(model, "zero" if make is tiny_wan else "step")  # after the first compilation
    for length in (7, 5, 9):
        p.set(*memory_of(length))
        same_compiled(fast, model, inputs, backend)
    p.remove()
    same_compiled(fast, model, inputs, backend)
