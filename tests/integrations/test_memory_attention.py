"""Memory attention in tiny diffusers models: closed, trained, saved, removed; beside caches, LoRA, checkpointing."""

import copy
import gc
import json
import pickle
import random

import pytest
import safetensors.torch
import torch
from diffusers import FasterCacheConfig
from diffusers_caches import CACHES, cache, denoise
from diffusers_checks import FAMILIES, compiled, out_of, said, same_compiled, skeleton
from diffusers_helpers import MODELS, draw_grid, inputs_of, tiny_hunyuan, tiny_wan
from torch import nn

from vidmem_kernels import MemoryFileError, rotary
from vidmem_kernels.diffusers import MemoryAttention, add_memory_attention, load_memory_adapter

every_layout = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
DIM = 10


def memory_of(length=7, batch=1, dtype=torch.float32):
    return torch.randn(batch, length, DIM).to(dtype)


def opened(model, **options):
    """Memory attention that reads, with random weights."""
    torch.manual_seed(3)
    m = add_memory_attention(model, memory_dim=DIM, **options)
    for parameter in m.parameters():
        nn.init.normal_(parameter, 0.0, 0.3)
    return m


@every_layout
def test_closed_opened_cleared_removed(make):
    model = make()
    inputs = inputs_of(model, draw_grid(1), batch=2)
    before = out_of(model, inputs)
    m = add_memory_attention(model, memory_dim=DIM)
    assert torch.equal(out_of(model, inputs), before)  # nothing is set
    m.set(memory_of(batch=2), key_bias=torch.randn(2, 7))
    assert torch.equal(out_of(model, inputs), before)  # the gate is closed
    m.remove()
    m = opened(model)
    m.set(memory_of())
    assert not torch.allclose(out_of(model, inputs), before, atol=1e-3)
    m.clear()
    assert torch.equal(out_of(model, inputs), before)
    m.set(memory_of(0))  # an empty memory adds nothing
    assert torch.equal(out_of(model, inputs), before)
    m.set(memory_of()).remove()
    assert torch.equal(out_of(model, inputs), before)


def test_what_is_read_is_what_the_module_reads():
    model = tiny_wan(layers=2)
    inputs = inputs_of(model, (2, 3, 5), batch=2)
    m = opened(model, blocks=[1])
    memory, bias = memory_of(batch=2), torch.randn(2, 7)
    m.set(memory, bias)
    seen, attn = {}, model.blocks[1].attn2
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], args=args, out=out))
    out_of(model, inputs)
    processor = attn.processor
    with torch.no_grad():
        expected = processor.inner(attn, *seen["args"]) + processor.reader.read(seen["x"], memory, key_bias=bias)
    assert torch.equal(seen["out"], expected)
    assert m.blocks == ["blocks.1"] and m.memory_dim == DIM


@every_layout
def test_with_positions_it_is_the_model_s_own_rotary_embedding(make, tmp_path):
    """Memory at the positions of the tokens of the video: moved as one, the reading does not change."""
    model = make()
    grid = draw_grid(4)
    inputs = inputs_of(model, grid, batch=2)
    before = out_of(model, inputs)
    start = int(inputs.get("indices_latents", torch.tensor([0]))[0])
    m = opened(model, rope=True, blocks=[0])
    positions = torch.tensor([[start, 0, 0], [start + 1, 2, 1], [start - 3, 0, 4]])
    memory, bias = memory_of(3, batch=2), torch.randn(2, 3)
    m.set(memory, bias, positions)
    attn = model.blocks[0].attn2 if hasattr(model, "blocks") else model.transformer_blocks[0].attn
    seen = {}
    attn.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(args=args, kw=kwargs, out=out), with_kwargs=True
    )
    after = out_of(model, inputs)
    x = seen["kw"]["hidden_states"] if seen["kw"] else seen["args"][0]
    times = torch.arange(start, start + grid[0])
    video = torch.cartesian_prod(times, torch.arange(grid[1]), torch.arange(grid[2]))
    if "indices_latents_clean" in inputs:  # FramePack's tokens begin with the history: compare the video's alone
        x = x[:, -len(video) :]
    rope = model.rope
    axes, theta = ((rope.t_dim, rope.h_dim, rope.w_dim), 1e4) if hasattr(rope, "t_dim") else (rope.rope_dim, rope.theta)
    turned = {"q_rotary": rotary(video, axes, theta), "k_rotary": rotary(positions, axes, theta)}
    with torch.no_grad():
        expected = attn.processor.reader.read(x, memory, key_bias=bias, **turned)
        plain = attn.processor.inner(attn, *seen["args"], **seen["kw"])
    got = (seen["out"][0] - plain[0])[:, -len(video) :] if isinstance(plain, tuple) else seen["out"] - plain
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)

    m.set(memory, bias, positions[[2, 1, 0]])
    assert not torch.allclose(out_of(model, inputs), after, atol=1e-4)
    m.save(tmp_path / "memory.safetensors")
    m.remove()
    assert torch.equal(out_of(model, inputs), before)
    assert not any(module._forward_pre_hooks for module in model.modules())
    with load_memory_adapter(model, tmp_path / "memory.safetensors") as loaded:
        loaded.encoder = lambda frames: (memory, bias.exp(), frames)
        loaded.remember(positions.expand(2, -1, -1))
        torch.testing.assert_close(out_of(model, inputs), after, rtol=1e-5, atol=1e-5)
        said(ValueError, lambda: loaded.set(memory), "positions must be given if rope is True, got None")
        said(
            ValueError, lambda: loaded.set(memory, None, positions[1:]), "positions must have shape (3, 3) or (2 or 1,"
        )
    m = opened(model)
    said(ValueError, lambda: m.set(memory, None, positions), "positions must be None if rope is False, got some")


@every_family
def test_one_memory_serves_a_batch_and_guidance_in_two_calls(make):
    model = make()
    inputs = inputs_of(model, draw_grid(2), batch=1)
    both = {
        name: torch.cat([x, x]) if isinstance(x, torch.Tensor) and not name.startswith("indices") else x
        for name, x in inputs.items()
    }
    m = opened(model).set(memory_of())
    one = out_of(model, inputs)
    torch.testing.assert_close(out_of(model, both), torch.cat([one, one]), rtol=1e-5, atol=1e-5)
    memory = memory_of(batch=2)
    m.set(memory)
    whole = out_of(model, both)
    for i in range(2):
        m.set(memory[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], out_of(model, inputs), rtol=1e-5, atol=1e-5)


@every_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_to_the_bit(make, dtype, tmp_path):
    model = make().to(dtype)
    inputs = {k: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for k, x in inputs_of(model, draw_grid(3)).items()}  # fmt: skip
    before, memory = out_of(model, inputs), memory_of(dtype=dtype)
    with opened(model, blocks=[0, 2]).set(memory) as m:
        after = out_of(model, inputs)
        m.save(tmp_path / "memory.safetensors")
        m.save(tmp_path / "memory.safetensors")  # replaces
    assert torch.equal(out_of(model, inputs), before)
    loaded = load_memory_adapter(model, tmp_path / "memory.safetensors").set(memory)
    assert len(loaded.blocks) == 2 and torch.equal(out_of(model, inputs), after)
    assert [p.name for p in tmp_path.iterdir()] == ["memory.safetensors"]


@every_family
def test_trains_alone(make):
    model = make().requires_grad_(False)
    inputs = inputs_of(model, (2, 3, 4))
    m = add_memory_attention(model, memory_dim=DIM)
    assert all(p.requires_grad for p in m.parameters())
    assert {id(p) for p in m.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    memory = memory_of().requires_grad_()
    m.set(memory)
    target = out_of(model, inputs) + 0.1
    optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.mse_loss(model(**inputs)[0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for name, p in m.named_parameters() if "k.bias" not in name
    )
    assert memory.grad.abs().sum() > 0


def gradients(m, model, memory, calls, between=lambda: None):
    leaves = [*m.parameters(), memory]
    loss = sum(out.square().sum() for out in calls())
    between()
    return torch.autograd.grad(loss, leaves)


@every_family
@pytest.mark.parametrize("rope", [False, True])
def test_checkpointing_changes_no_gradient_even_when_the_memory_changes_before_the_backward(make, rope):
    model = make().train()
    a, b = inputs_of(model, (2, 3, 5)), inputs_of(model, (2, 5, 3), seed=1)
    first, second = memory_of(), memory_of()
    first.requires_grad_()
    m = opened(model, rope=rope)
    positions = {"positions": torch.randint(-3, 3, (7, 3))} if rope else {}

    def calls():
        m.set(first, **positions)
        yield model(**a)[0]
        m.set(second, **positions)
        yield model(**b)[0]

    expected = gradients(m, model, first, calls)
    model.enable_gradient_checkpointing()
    for mine, theirs in zip(gradients(m, model, first, calls, m.clear), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@every_family
@pytest.mark.parametrize("name", CACHES)
def test_beside_caches_in_either_order(make, name):
    model = make()
    with cache(model, name):
        alone = denoise(model)
    memory = memory_of()
    with cache(model, name):
        with add_memory_attention(model, memory_dim=DIM).set(memory):
            assert torch.equal(denoise(model), alone)
        with opened(model).set(memory):
            inside = denoise(model)
        assert torch.equal(denoise(model), alone)
    m = opened(model).set(memory)
    computed = denoise(model)
    with cache(model, name):
        outside = denoise(model)
        m.remove()
        assert torch.equal(denoise(model), alone)
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, computed) and not torch.equal(inside, alone)


def test_beside_a_cache_that_runs_half_of_the_batch():
    """FasterCache leaves the unconditional half of [unconditional, conditional] out in some steps."""
    model = tiny_wan()
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, unconditional_batch_skip_range=2, attention_weight_callback=lambda _: 0.3,
        unconditional_batch_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500,
    )  # fmt: skip
    memory = memory_of()
    outs = []
    for first in ("cache", "memory"):
        m = opened(model).set(memory) if first == "memory" else None
        model.enable_cache(config)
        m = m or opened(model).set(memory)
        outs.append(denoise(model, batch=2))
        m.set(memory_of(batch=2))
        said(ValueError, lambda: denoise(model, batch=2), "memory must have batch 1 or that of x, 1, got 2")
        model.disable_cache()
        m.remove()
    assert torch.equal(*outs)


def test_a_new_memory_empties_the_caches():
    model = tiny_wan()
    inputs = inputs_of(model, (2, 3, 3))
    first, second = memory_of(), memory_of()
    # Only the last block reads, so the first changes nothing that the cache looks at.
    with opened(model, blocks=[2]).set(second) as m, cache(model, "first_block"):
        expected = denoise(model, steps=1)[0]
        m.set(first)
        denoise(model, steps=1)
        inputs["hidden_states"] = inputs["hidden_states"] * 0.95
        m.set(second)
        with model.cache_context("cond"):
            assert torch.equal(out_of(model, inputs), expected)


@every_family
def test_copies_have_a_memory_of_their_own(make):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 3, 4))
    before = out_of(model, inputs)
    m = opened(model)
    m.set(nn.Linear(DIM, DIM)(memory_of()))  # of a graph, which cannot be copied
    after = out_of(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(out_of(copied, inputs), after)
        MemoryAttention(copied).clear()
        assert torch.equal(out_of(copied, inputs), before)
        assert torch.equal(out_of(model, inputs), after)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.testing.assert_close(out_of(averaged.module, inputs), after)


@every_family
def test_many_cycles_leave_nothing(make, tmp_path):
    model = make(layers=1)
    inputs = inputs_of(model, (2, 3, 3))
    before, is_as = out_of(model, inputs), skeleton(model)
    for cycle in range(200):
        m = add_memory_attention(model, memory_dim=DIM)
        m.set(memory_of())
        if cycle % 50 == 0:
            out_of(model, inputs)
        if cycle == 20:
            gc.collect()
            count = len(gc.get_objects())
        m.remove()
    del m
    gc.collect()
    assert len(gc.get_objects()) < count + 1000
    assert skeleton(model) == is_as
    assert torch.equal(out_of(model, inputs), before)


@every_family
@pytest.mark.parametrize("first", ["lora", "memory"])
def test_beside_lora(make, first):
    from peft import LoraConfig

    model = make()
    inputs = inputs_of(model, (2, 3, 4))
    before = out_of(model, inputs)
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    if first == "lora":
        model.add_adapter(config)
        m = opened(model)
    else:
        m = opened(model)
        model.add_adapter(config)
        assert not any(p.requires_grad for p in m.parameters())  # PEFT's doing
        m.requires_grad_()
    adapted = out_of(model, inputs)
    assert not torch.equal(adapted, before)
    m.set(memory_of())
    assert not torch.allclose(out_of(model, inputs), adapted, atol=1e-4)
    model(**inputs)[0].square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) > len([*m.parameters()]) and all(p.grad is not None for p in trained)
    m.remove()
    assert torch.equal(out_of(model, inputs), adapted)
    model.delete_adapters("default")
    assert torch.equal(out_of(model, inputs), before)


def test_an_encoder_remembers():
    model = tiny_wan(layers=1)
    encoder = nn.Linear(5, DIM)
    with pytest.raises(ValueError, match="MemoryAttention.remember: encoder must be given"):
        opened(model).remember(torch.randn(1, 3, 5))
    MemoryAttention(model).remove()
    m = opened(model, encoder=encoder)
    inputs, frames, size = inputs_of(model, (2, 3, 3)), torch.randn(1, 6, 5), torch.tensor([[1.0, 2, 1, 3, 1, 1]])
    m.remember(frames)
    model(**inputs)[0].sum().backward()
    assert encoder.weight.grad.abs().sum() > 0
    m.encoder = lambda frames: (encoder(frames), size)
    m.remember(frames)
    sized = out_of(model, inputs)
    m.set(encoder(frames).repeat_interleave(size[0].long(), 1))  # a token of size n counts as n
    torch.testing.assert_close(sized, out_of(model, inputs), rtol=1e-5, atol=1e-6)


@every_family
@pytest.mark.parametrize("first", ["memory", "casting"])
def test_weights_in_eight_bits_and_offloaded_by_groups(make, first):
    model = make(layers=1).to(torch.bfloat16)
    inputs = {n: x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
              for n, x in inputs_of(model, (2, 3, 3)).items()}  # fmt: skip

    def cast():
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)

    if first == "casting":
        cast()
    m = opened(model)
    if first == "memory":
        cast()
    device = torch.device("cpu")
    model.enable_group_offload(onload_device=device, offload_device=device, offload_type="leaf_level")
    before = out_of(model, inputs)
    m.set(memory_of(dtype=torch.bfloat16))
    after = out_of(model, inputs)
    assert after.isfinite().all() and not torch.equal(after, before)
    m.remove()
    assert torch.equal(out_of(model, inputs), before)


def test_autocast_and_half():
    model = tiny_wan(layers=1)
    inputs = inputs_of(model, (2, 3, 3))
    m = opened(model).set(memory_of())
    expected = out_of(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(out_of(model, inputs).float(), expected, rtol=0.1, atol=0.1)
    m.set(memory_of(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="MemoryCrossAttention: x and memory must have the same dtype"):
        out_of(model, inputs)


def test_wrong_use():
    model = tiny_wan(layers=2)
    said(TypeError, lambda: add_memory_attention(nn.Linear(3, 3)), "model must be one of")
    said(ValueError, lambda: MemoryAttention(model), "MemoryAttention: model must have memory attention")
    for blocks, error, message in [
        ([2], ValueError, "add_memory_attention: blocks must be in [0, 1], got 2"),
        ([], ValueError, "add_memory_attention: blocks must name at least one block"),
        (["a"], TypeError, "add_memory_attention: blocks must be an int, got str"),
        (3, TypeError, "add_memory_attention: blocks must be numbers of blocks, got 3"),
    ]:
        said(error, lambda blocks=blocks: add_memory_attention(model, blocks), message)
    said(ValueError, lambda: add_memory_attention(model, memory_dim=0), "memory_dim must be at least 1, got 0")
    said(TypeError, lambda: add_memory_attention(model, rope=1), "rope must be a bool, got int")
    said(TypeError, lambda: add_memory_attention(model, encoder=3), "encoder must be callable, got int")
    is_as = skeleton(model)
    m = add_memory_attention(model, memory_dim=DIM)
    said(ValueError, lambda: add_memory_attention(model), "model must not have memory attention already, got")
    for memory, bias, error, message in [
        (torch.randn(1, 7, 9), None, ValueError, f"memory must have shape (B, M, {DIM}), got (1, 7, 9)"),
        (torch.randn(7, DIM), None, ValueError, "memory must have shape (B, M, memory_dim), got (7, 10)"),
        (None, None, TypeError, "memory must be a tensor, got NoneType"),
        (torch.zeros(1, 7, DIM).long(), None, TypeError, "memory must be float32"),
        (memory_of(), torch.zeros(1, 6), ValueError, "key_bias must have shape (1 or 1, 7)"),
        (memory_of(batch=2), torch.zeros(3, 7), ValueError, "key_bias must have shape (2 or 1, 7)"),
    ]:
        said(error, lambda memory=memory, bias=bias: m.set(memory, bias), f"MemoryAttention.set: {message}")
    m.set(memory_of(batch=3))
    said(ValueError, lambda: model(**inputs_of(model, (2, 3, 3), batch=2)),
         "MemoryCrossAttention: memory must have batch 1 or that of x, 2, got 3")  # fmt: skip
    m.remove()
    assert skeleton(model) == is_as
    for call in (m.remove, m.clear, lambda: m.set(memory_of()), lambda: m.save("x"), lambda: [*m.parameters()]):
        said(ValueError, call, "model must have memory attention, got one without")
    with add_memory_attention(model) as m:
        m.remove()


def test_files_that_do_not_fit(tmp_path):
    model, path = tiny_wan(layers=3), tmp_path / "memory.safetensors"
    with opened(model, blocks=[0, 2]) as m:
        m.save(path)
        said(ValueError, lambda: load_memory_adapter(model, path), "model must not have memory attention already")
        said(OSError, lambda: m.save(tmp_path / "no" / "x"), "No such folder")
    is_as = skeleton(model)
    said(ValueError, lambda: load_memory_adapter(tiny_hunyuan(), path), "model must be of family wan")
    said(ValueError, lambda: load_memory_adapter(tiny_wan(layers=2), path), "one without blocks.2")
    wide = type(model)(num_attention_heads=3, attention_head_dim=12, ffn_dim=8, num_layers=3, text_dim=8, freq_dim=8)
    said(ValueError, lambda: load_memory_adapter(wide, path), "model must have width 24, as in")
    said(FileNotFoundError, lambda: load_memory_adapter(model, tmp_path / "none"), "No such file")

    whole, damaged = path.read_bytes(), tmp_path / "damaged"
    draw = random.Random(0)
    cut = [whole[: draw.randrange(len(whole))] for _ in range(6)]
    flipped = []
    for _ in range(12):
        at = draw.randrange(len(whole))
        flipped.append(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
    for content in [b"", *cut, *flipped]:
        damaged.write_bytes(content)
        with pytest.raises((MemoryFileError, ValueError)) as raised:
            load_memory_adapter(model, damaged)
        assert str(raised.value).startswith(f"load_memory_adapter: {damaged}"), raised.value
    safetensors.torch.save_file({"x": torch.zeros(2)}, damaged)
    said(MemoryFileError, lambda: load_memory_adapter(model, damaged), "is not a memory adapter")
    text = json.dumps({"version": 2, "checksum": "", "config": {}})
    safetensors.torch.save_file({"x": torch.zeros(2)}, damaged, {"vidmem.memory_attention": text})
    said(MemoryFileError, lambda: load_memory_adapter(model, damaged), "is of version 2")
    assert skeleton(model) == is_as


@pytest.mark.long
@every_family
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(make, backend):
    model = make(layers=1)
    fast = compiled(model, backend)
    inputs = inputs_of(model, (2, 3, 7), batch=2)
    same_compiled(fast, model, inputs, backend)
    m = opened(model, rope=True)  # after the first compilation
    for length in (7, 5, 9):
        m.set(memory_of(length), positions=torch.randint(-4, 4, (length, 3)))
        same_compiled(fast, model, inputs, backend)
    m.remove()
    same_compiled(fast, model, inputs, backend)
