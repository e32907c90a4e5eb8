"""Models that merge tokens, compiled: as in eager mode, by one graph for all sizes."""

import pytest
import torch
from diffusers_helpers import MODELS, inputs_of, tiny_wan

from vidmem_kernels.diffusers import apply_token_merging

SHAPES = [((3, 5, 4), 2), ((5, 7, 3), 2), ((4, 3, 6), 3)]  # grids of tokens and batches
ALL = {"kv_ratio": 0.5, "q_ratio": 0.25, "metric": "key", "reuse_blocks": 2, "protect_frames": (0, -1)}


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compared(model, compiled, shapes=SHAPES, tolerance=0.0):
    for i, (grid, batch) in enumerate(shapes):
        inputs = inputs_of(model, grid, batch, seed=i)
        with torch.no_grad(), torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            out = compiled(**inputs)[0]
        with torch.no_grad():
            expected = model(**inputs)[0]
        assert (out - expected).abs().max() <= tolerance


@pytest.mark.sample(1)
@pytest.mark.parametrize("options", [{"kv_ratio": 0.5}, ALL, {"share_plan": "batch"}], ids=["keys", "all", "batch"])
@pytest.mark.parametrize("name", ["wan", "wan-ti2v", "hunyuan"])
def test_one_graph_for_all_sizes_is_eager_mode_to_the_bit(name, options):
    model = MODELS[name](layers=1)
    apply_token_merging(model, **options)
    compared(model, torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True))


@pytest.mark.long
def test_blocks_compiled_alone():
    """By one graph for all blocks, of which the first of a pair makes the plan."""
    model = tiny_wan(layers=4)
    inputs = [inputs_of(model, grid, batch) for grid, batch in SHAPES]
    apply_token_merging(model, reuse_blocks=2)
    with torch.no_grad():
        expected = [model(**each)[0] for each in inputs]
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True, dynamic=True)
        assert all(torch.equal(model(**each)[0], out) for each, out in zip(inputs, expected, strict=True))


@pytest.mark.long
def test_framepack():
    """Which reads back the lengths of its texts, and so is never one graph."""
    model = MODELS["framepack"](layers=1)
    apply_token_merging(model)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    compared(model, compiled, SHAPES[:1])


@pytest.mark.long
@pytest.mark.parametrize("name", ["wan", "hunyuan"])
def test_inductor(name):
    model = MODELS[name](layers=1)
    apply_token_merging(model)
    compared(model, torch.compile(model, fullgraph=True, dynamic=True), tolerance=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing):
    model = tiny_wan(layers=2)
    apply_token_merging(model, q_ratio=0.25)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(**inputs_of(model, (3, 5, 4), 2))[0].square().sum().backward()
        grads.append([w.grad for w in model.parameters() if w.grad is not None])
    for expected, grad in zip(*grads, strict=True):
        assert torch.allclose(grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.long
def test_steps_that_are_told():
    """Every ratio has a graph; a plan that was kept is read, not made."""
    model = tiny_wan(layers=1)
    handle = apply_token_merging(model, kv_ratio=lambda block, step: 0.5 if step < 2 else 0.0, reuse_steps=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    outs = []
    for call in (model, compiled):
        handle.reset()
        for step in (0, 1, 2):
            handle.step = step
            with torch.no_grad():
                outs.append(call(**inputs_of(model, (3, 5, 4), 2, seed=step))[0])
    assert all(torch.equal(a, b) for a, b in zip(outs[:3], outs[3:], strict=True))


def test_steps_that_are_not_told():
    model = tiny_wan(layers=1)
    apply_token_merging(model, reuse_steps=2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="the step must be set by `handle.step = i` before each compiled call"):
        compiled(**inputs_of(model, (3, 5, 4)))
